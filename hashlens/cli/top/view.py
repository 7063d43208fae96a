"""What `hashlens top` shows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from hashlens.cli.text import printable

_MAX_COLLECTIONS = 12
"""More would push everything else off the screen; the largest are shown."""


def view(services: Mapping[str, Mapping[str, Any]]) -> RenderableType:
    """Return a picture of both services.

    Parameters
    ----------
    services
        By name, what `Watch.describe` says.
    """
    parts: list[RenderableType] = []
    for name, found in services.items():
        parts.append(_headline(name, found))
        if found["up"]:
            parts.append(_work(name, found))
            if found["methods"]:
                parts.append(_indented(_methods(found["methods"])))
            stages = {k: v for k, v in found["stages"].items() if v["p50_ms"] is not None}
            if stages:
                parts.append(_indented(_stages(stages)))
            if found.get("collections"):
                parts.append(_indented(_collections(found["collections"])))
        parts.append(Text())
    return Group(*parts)


def _headline(name: str, found: Mapping[str, Any]) -> Text:
    line = Text.assemble((f"{name:<8}", "bold"), f"{printable(found['address'])}  ")
    if not found["up"]:
        return line.append("away  ", "bold red").append(printable(found["detail"]), "dim")
    process = found["process"]
    line.append("up", "green")
    line.append(
        f"  {_bytes(process['rss_bytes'])} RSS, {_number(process['cpus'], 2)} CPUs, "
        f"{_number(process['threads'])} threads, {_number(process['open_fds'])} descriptors"
    )
    if process["warnings"]:
        line.append(f", {_number(process['warnings'])} warnings", "yellow")
    return line


def _work(name: str, found: Mapping[str, Any]) -> Text:
    queue = found["queue"]
    if name == "encoder":
        model = found["model"]
        text = (
            f"  {_number(found['images_per_s'], 1)} images/s, "
            f"batches of {_number(found['batch_mean'], 1)}; "
            f"{_number(queue['admitted'])} of {_number(queue['limit'])} in the works, "
            f"{_number(queue['waiting'])} wait for the model; "
            f"{model.get('backbone')}, {model.get('bits')} bits, {model.get('device')}"
        )
        return Text(printable(text))
    redis = found["redis"]
    line = Text(
        f"  {_number(found['queries_per_s'], 1)} queries/s, "
        f"{_number(found['batch_mean'], 1)} a pass, pools of {_number(found['pool_p50_rows'])}; "
        f"{_number(queue['waiting'])} of {_number(queue['limit'])} wait; Redis "
    )
    if not redis["connected"]:
        return line.append("away", "bold red")
    line.append(*(("writable", "green") if redis["writable"] else ("refuses writes", "bold red")))
    return line.append(f", {redis['last_call_ms']:.2f} ms a call")


def _methods(methods: Mapping[str, Mapping[str, Any]]) -> Table:
    table = _table("method", "calls/s", "errors/s", "in flight", "p50 ms", "p99 ms", "calls")
    for method, row in methods.items():
        table.add_row(
            printable(method),
            _number(row["calls_per_s"], 1),
            Text(_number(row["errors_per_s"], 1), "red" if row["errors_per_s"] else ""),
            _number(row["in_flight"]),
            _number(row["p50_ms"], 2),
            _number(row["p99_ms"], 2),
            _number(row["calls"]),
        )
    return table


def _stages(stages: Mapping[str, Mapping[str, Any]]) -> Table:
    table = _table("stage", *stages)
    for key in ("p50_ms", "p99_ms"):
        table.add_row(key.replace("_", " "), *(_number(row[key], 2) for row in stages.values()))
    return table


def _collections(collections: Mapping[str, Mapping[str, Any]]) -> Table:
    table = _table("collection", "items", "dead", "version", "lag", "log", "writes")
    largest = sorted(collections.items(), key=lambda item: (-(item[1]["items"] or 0), item[0]))
    for name, row in largest[:_MAX_COLLECTIONS]:
        writable = row["writable"] == 1
        table.add_row(
            printable(name),
            _number(row["items"]),
            _number(row["dead_rows"]),
            _number(row["version"]),
            Text(_number(row["lag"]), "yellow" if row["lag"] else ""),
            _number(row["log_entries"]),
            Text(*(("yes", "green") if writable else ("no", "bold red"))),
        )
    if len(largest) > _MAX_COLLECTIONS:
        table.add_row(f"and {len(largest) - _MAX_COLLECTIONS} smaller ones", *[""] * 6)
    return table


def _indented(table: Table) -> Padding:
    return Padding(table, (0, 0, 0, 2))


def _table(first: str, *others: str) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column(first, no_wrap=True)
    for name in others:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _number(value: float | None, digits: int = 0) -> str:
    return "-" if value is None else f"{value:,.{digits}f}"


def _bytes(value: float | None) -> str:
    return "-" if value is None else f"{value / 2**20:,.0f} MiB"
