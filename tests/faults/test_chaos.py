"""The short form of `tests.faults.chaos`: two rounds that are chosen, not drawn."""

from __future__ import annotations

import pytest

from tests.faults.chaos import Chaos
from tests.support.redis_server import server_binaries

SEED = 1


@pytest.mark.slow
def test_replicas_agree_after_everything_at_once() -> None:
    with Chaos(server_binaries()[0], SEED, n_replicas=2) as chaos:
        chaos.round(["compact", "verify", "redis"], "delete")
        chaos.round(["backup", "pause", "kill"], "")
