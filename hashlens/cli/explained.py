"""Explanations in words, for the terminal, for JSON and for pages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from hashlens import codes
from hashlens.cli.text import printable
from hashlens.types import ExplainedBit, Explanation, Hit, Prediction, ReplyExplanation

N_UNSURE = 6
"""So many of the query's least sure bits are shown."""

_NAMED = 3
"""Classes named for one bit; a longer list says less."""


class Words:
    """Puts the explanation of one answer into words.

    Parameters
    ----------
    explanation
        Of the answer.
    """

    def __init__(self, explanation: ReplyExplanation) -> None:
        self._explanation = explanation
        self._bits = {bit.bit: bit for bit in explanation.bits}
        packed = np.frombuffer(explanation.code, dtype=np.uint8)
        self._is_set: list[bool] = codes.unpack(packed, 8 * packed.size).tolist()

    @property
    def detail(self) -> str:
        """Why the bits have no meaning here; empty if they have."""
        return printable(self._explanation.detail)

    @property
    def query(self) -> str:
        """What the query looks like to the model: ``Sneaker 98%``; empty if that is not known."""
        return self.seen_as(self._explanation.prediction)

    def seen_as(self, prediction: Prediction | None) -> str:
        """Return a prediction as ``Sneaker 98%``; empty without one."""
        if prediction is None:
            return ""
        # Not 100%: a softmax is never sure.
        percent = min(round(100 * prediction.probability), 99)
        return f"{self._name(prediction.class_index)} {percent}%"

    def hit(self, hit: Hit) -> str:
        """Return what the hit's code looks like to the model; empty if that is not known."""
        return "" if hit.explanation is None else self.seen_as(hit.explanation.prediction)

    def unsure(self) -> list[tuple[int, float]]:
        """Return the query's least sure bits with their margins, the least sure first."""
        return sorted(enumerate(self._explanation.certainty), key=lambda bit: bit[1])[:N_UNSURE]

    def bit(self, bit: int, margin: float | None) -> str:
        """Say of one bit what it means and how sure the query was of it."""
        state = "set" if self._has(bit) else "clear"
        parts = [f"{state} in the query"]
        meaning = self._bits.get(bit)
        if meaning is not None:
            parts += self._sides(meaning)
        if margin is not None:
            parts.append(f"query margin {margin:.2f}")
        return f"bit {bit}: {'; '.join(parts)}"

    def separation(self, explanation: Explanation) -> str:
        """Say what most separates a hit from the query: the differing bit that it was surest of.

        Empty where nothing differs, or nothing is known of the bits.
        """
        surest = differing(explanation)[:1]
        if not surest or surest[0][1] is None or surest[0][0] not in self._bits:
            return ""
        bit, _ = surest[0]
        meaning = self._bits[bit]
        asked, found = meaning.fires_for, meaning.silent_for
        if not self._has(bit):
            asked, found = found, asked
        return f"in bit {bit} the query is {self._like(asked)}, the hit {self._like(found)}"

    def lines(self, explanation: Explanation) -> str:
        """Say of each differing bit what it means, on a line each, the surest first."""
        return "\n".join(self.bit(bit, margin) for bit, margin in differing(explanation))

    def as_dict(self) -> dict[str, Any]:
        """Return what is known of the query as ``--json`` prints it."""
        explanation = self._explanation
        return {
            "predicted": self.predicted(explanation.prediction),
            "certainty": list(explanation.certainty),
            "bits": [
                {
                    "bit": bit.bit,
                    "fires_for": [self._name(c) for c in bit.fires_for],
                    "silent_for": [self._name(c) for c in bit.silent_for],
                }
                for bit in explanation.bits
            ],
            "detail": explanation.detail,
        }

    def hit_as_dict(self, explanation: Explanation) -> dict[str, Any]:
        """Return a hit's explanation as ``--json`` prints it."""
        return {
            "predicted": self.predicted(explanation.prediction),
            "differing_bits": list(explanation.differing_bits),
            "certainty": list(explanation.certainty),
        }

    def predicted(self, prediction: Prediction | None) -> dict[str, Any] | None:
        """Return a prediction as ``--json`` prints it."""
        if prediction is None:
            return None
        return {
            "class": self._name(prediction.class_index),
            "probability": prediction.probability,
        }

    def _has(self, bit: int) -> bool:
        return bit < len(self._is_set) and self._is_set[bit]

    def _name(self, class_index: int) -> str:
        classes = self._explanation.classes
        return printable(classes[class_index]) if class_index < len(classes) else str(class_index)

    def _names(self, classes: Sequence[int]) -> str:
        named = ", ".join(self._name(c) for c in classes[:_NAMED])
        return f"{named}, ..." if len(classes) > _NAMED else named

    def _like(self, classes: Sequence[int]) -> str:
        return f"like {self._names(classes)}" if classes else "like no class"

    def _sides(self, meaning: ExplainedBit) -> list[str]:
        sides = []
        if meaning.fires_for:
            sides.append(f"fires for {self._names(meaning.fires_for)}")
        if meaning.silent_for:
            sides.append(f"silent for {self._names(meaning.silent_for)}")
        return sides or ["the same for all classes"]


def differing(explanation: Explanation) -> list[tuple[int, float | None]]:
    """Return a hit's differing bits with the query's margins, those it was surest of first."""
    bits, certainty = explanation.differing_bits, explanation.certainty
    if len(certainty) != len(bits):
        return [(bit, None) for bit in bits]
    return [(bits[i], certainty[i]) for i in sorted(range(len(bits)), key=lambda i: -certainty[i])]
