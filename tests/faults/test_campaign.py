"""The short form of ``make faults``: each kind of crash once."""

from __future__ import annotations

import pytest

from tests.faults.campaign import Campaign, crashes
from tests.support.redis_server import server_binaries

SEED = 7
KINDS = len({crash.kind for crash in crashes(1000, SEED)})


@pytest.mark.slow
def test_every_kind_of_crash_loses_nothing() -> None:
    with Campaign(server_binaries()[0], SEED) as campaign:
        came = [campaign.round(crash) for crash in crashes(KINDS, SEED)]
    # Which places a writer comes by in a second is the scheduler's affair; most, in any case.
    assert sum(came) > KINDS // 2
