"""What ghz reported, to keep: the JSON without secrets and single calls, and a page to look at.

Writes ``OUT.json`` and ``OUT.html``. ghz itself writes one format for each run, and the bearer
token into it. Python's own library only.
"""

from __future__ import annotations

import argparse
import html
import json
import sys
from collections import defaultdict
from datetime import datetime
from pathlib import Path
from typing import Any

import check

WIDTH, HEIGHT = 720, 160
OK_COLOUR = "#3a7"
OTHER_COLOURS = ("#d70", "#c33", "#86b", "#555")

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 760px; margin: 2em auto; color: #222; }
table { border-collapse: collapse; } td, th { padding: 2px 14px 2px 0; text-align: right; }
td:first-child, th:first-child { text-align: left; }
.kept { color: #275; } .missed { color: #b00; font-weight: bold; } small { color: #666; }
"""


def seconds_of(details: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Sum up single calls by the second in which they ended."""
    if not details:
        return []
    ends = [datetime.fromisoformat(call["timestamp"]).timestamp() for call in details]
    first = min(ends)
    statuses: dict[int, dict[str, int]] = defaultdict(lambda: defaultdict(int))
    latencies: dict[int, list[int]] = defaultdict(list)
    for call, end in zip(details, ends, strict=True):
        second = int(end - first)
        statuses[second][call["status"]] += 1
        if call["status"] == "OK":
            latencies[second].append(call["latency"])
    return [
        {
            "second": second,
            "statuses": dict(statuses[second]),
            "slowest_ok_ms": round(max(latencies[second], default=0) / 1e6, 3),
        }
        for second in range(max(statuses) + 1)
    ]


def kept_part(report: dict[str, Any]) -> dict[str, Any]:
    """Return a report without what others should not read, and with seconds instead of calls."""
    kept = {key: value for key, value in report.items() if key != "details"}
    secret = ("metadata", "data")
    kept["options"] = {key: v for key, v in report["options"].items() if key not in secret}
    kept["seconds"] = seconds_of(report.get("details") or [])
    return kept


def chart(seconds: list[dict[str, Any]]) -> str:
    """Draw how many calls ended in each second, by status."""
    if not seconds:
        return ""
    names = sorted({status for second in seconds for status in second["statuses"]})
    others = [name for name in names if name != "OK"]
    colours = {"OK": OK_COLOUR}
    for i, name in enumerate(others):
        colours[name] = OTHER_COLOURS[min(i, len(OTHER_COLOURS) - 1)]
    most = max(sum(second["statuses"].values()) for second in seconds) or 1
    step = WIDTH / len(seconds)
    bars = []
    for i, second in enumerate(seconds):
        top = float(HEIGHT)
        for name in ("OK", *others):
            n = second["statuses"].get(name, 0)
            height = HEIGHT * n / most
            top -= height
            bars.append(
                f'<rect x="{i * step:.2f}" y="{top:.2f}" width="{max(step - 0.5, 0.5):.2f}" '
                f'height="{height:.2f}" fill="{colours[name]}"><title>second {i}: {n} '
                f"{html.escape(name)}</title></rect>"
            )
    legend = " ".join(
        f'<span style="color:{colours[name]}">&#9632;</span> {html.escape(name or "no status")}'
        for name in ("OK", *others)
    )
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}">{"".join(bars)}'
        f"</svg><p>{legend} <small>calls that ended in each second; the highest bar is {most}"
        "</small></p>"
    )


def table(head: tuple[str, str], rows: list[tuple[str, str]]) -> str:
    """Return a table of two columns."""
    lines = "".join(f"<tr><td>{html.escape(a)}</td><td>{html.escape(b)}</td></tr>" for a, b in rows)
    return f"<table><tr><th>{head[0]}</th><th>{head[1]}</th></tr>{lines}</table>"


def page(report: dict[str, Any], verdicts: list[check.Verdict]) -> str:
    """Return the page."""
    tags = report.get("tags") or {}
    title = f"{tags.get('scenario', '')} {tags.get('shape', '')}".strip()
    total_s = report["total"] / 1e9
    statuses = report["statusCodeDistribution"]
    numbers = [
        ("loop", str(tags.get("loop", ""))),
        ("calls", str(report["count"])),
        ("seconds", f"{total_s:.2f}"),
        ("OK calls a second", f"{statuses.get('OK', 0) / total_s:.1f}"),
    ]
    latencies = [
        (f"p{entry['percentage']}", f"{entry['latency'] / 1e6:.2f}")
        for entry in report["latencyDistribution"] or []
    ]
    lines = "".join(
        f'<li class="{"kept" if verdict.is_kept else "missed"}">{html.escape(str(verdict))}</li>'
        for verdict in verdicts
    )
    counts = [(status or "no status", str(n)) for status, n in sorted(statuses.items())]
    errors = sorted(report["errorDistribution"].items(), key=lambda entry: -entry[1])[:10]
    return "".join(
        [
            '<!doctype html><html lang="en"><meta charset="utf-8">',
            f"<title>{html.escape(title)}</title><style>{STYLE}</style><h1>{html.escape(title)}</h1>",
            f"<p>{html.escape(str(report.get('name', '')))} <small>{html.escape(report['date'])}",
            f"</small></p><ul>{lines}</ul>",
            table(("run", ""), numbers),
            f"<h2>Latency of OK calls, ms</h2>{table(('percentile', 'ms'), latencies)}",
            f"<h2>Over time</h2>{chart(report['seconds'])}",
            f"<h2>Statuses</h2>{table(('status', 'calls'), counts)}",
            f"<h2>Errors</h2>{table(('message', 'calls'), [(k, str(n)) for k, n in errors])}"
            if errors
            else "",
            "</html>\n",
        ]
    )


def main() -> int:
    """Write both."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("report", type=Path, help="as ghz wrote it, JSON")
    parser.add_argument("scenario")
    parser.add_argument("shape")
    parser.add_argument("out", help="path of what is written, without .json and .html")
    parser.add_argument("--thresholds", type=Path, default=check.HERE / "thresholds.json")
    asked = parser.parse_args()
    report = kept_part(json.loads(asked.report.read_text()))
    Path(f"{asked.out}.json").write_text(json.dumps(report, indent=1) + "\n")
    try:
        thresholds = check.thresholds_of(asked.thresholds, asked.scenario, asked.shape)
        found = check.verdicts(report, thresholds)
    except check.ThresholdsError:
        # check.py says so, and fails.
        found = []
    Path(f"{asked.out}.html").write_text(page(report, found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
