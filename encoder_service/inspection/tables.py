"""Code health as tables and sentences on a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from hashlens.bits import BitMeaning
from hashlens.cli.text import printable
from hashlens.codehealth import CodeHealth, summary, verdict

MAX_SHOWN_BITS = 128
"""Bits that get a line each; of longer codes the others are in the JSON."""

_MAX_CLASSES = 4
"""Class names in one cell."""


def print_facts(console: Console, facts: Mapping[str, Any]) -> None:
    """Print names and values, nested ones with a dot."""
    table = Table("what", "value")
    for name, value in _flat(facts):
        table.add_row(printable(name), printable(_text(value)))
    console.print(table)


def print_health(console: Console, health: CodeHealth) -> None:
    """Print what was found, then what it means."""
    table = Table("code health", "value")
    for name, value in summary(health).items():
        table.add_row(name, f"{value:,.0f}" if value.is_integer() else f"{value:.4g}")
    console.print(table)
    table = Table("within bits", "rows: median", "mean", "95th percentile", title="pool sizes")
    for threshold in _telling_thresholds(health):
        table.add_row(
            str(threshold),
            *(
                f"{sizes[threshold]:,.0f}"
                for sizes in (health.pool_median, health.pool_mean, health.pool_p95)
            ),
        )
    console.print(table)
    found = verdict(health)
    console.print(f"These codes are {found.level}.", style="bold")
    for sentence in found.sentences:
        console.print(f"* {sentence}")
    for advice in found.advice:
        console.print(f"To do: {advice}")


def print_bits(
    console: Console,
    meanings: Sequence[BitMeaning],
    classes: Sequence[str],
    health: CodeHealth | None,
) -> None:
    """Print a line for each bit: how often it fires, how sure it is, what it says."""
    table = Table("bit", "fire rate", "mean margin", "set for", "clear for", title="bits")
    for meaning in meanings[:MAX_SHOWN_BITS]:
        bit = meaning.bit
        margins = None if health is None else health.margins
        table.add_row(
            str(bit),
            "" if health is None else f"{health.fire_rates[bit]:.3f}",
            "" if margins is None else f"{margins.mean_by_bit[bit]:.3f}",
            _names(meaning.fires_for, classes),
            _names(meaning.silent_for, classes),
        )
    console.print(table)
    if len(meanings) > MAX_SHOWN_BITS:
        console.print(f"The other {len(meanings) - MAX_SHOWN_BITS} bits are in the JSON: --json.")


def _telling_thresholds(health: CodeHealth) -> list[int]:
    """Choose up to the threshold that gathers what is wanted, in a dozen steps at most."""
    last = min(health.threshold_bits + 1, health.n_bits)
    return sorted({*range(0, last + 1, -(-(last + 1) // 12)), health.threshold_bits})


def _names(positions: Sequence[int], classes: Sequence[str]) -> str:
    names = [printable(classes[position]) for position in positions[:_MAX_CLASSES]]
    more = len(positions) - len(names)
    return ", ".join(names) + (f" and {more} more" if more else "")


def _flat(facts: Mapping[str, Any]) -> Iterable[tuple[str, Any]]:
    for name, value in facts.items():
        if isinstance(value, Mapping):
            yield from ((f"{name}.{key}", part) for key, part in value.items())
        else:
            yield name, value


def _text(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return f"{value:.6g}" if isinstance(value, float) else str(value)
