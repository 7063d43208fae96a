"""What mixed precision may round, and what not."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.support.training import make_trainer, small_recipe


@pytest.mark.parametrize("loss", ["orthohash", "csq", "ssdh", "softmax"])
def test_only_the_network_runs_in_mixed_precision_not_the_loss(loss: str) -> None:
    trainer = make_trainer(small_recipe(loss=loss, amp="bf16", steps=1))
    seen: list[tuple[tuple[Any, ...], torch.Tensor]] = []
    trainer._loss.register_forward_hook(
        lambda module, given, result: seen.append((given, result.detach()))
    )
    list(trainer.fit())
    ((output, labels), found) = seen[0]
    assert output.logits.dtype == torch.bfloat16
    with torch.no_grad():
        assert float(found) == float(trainer._loss(output, labels))
