"""Every query of the dashboard and of the alert rules asks for what both services expose."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from hashlens import Client, Item
from hashlens.errors import InvalidInputError
from hashlens.rpc import status
from tests.support.observed import Observed, value
from tests.support.promql import parse
from tests.support.services import wait_until

FOLDER = Path(__file__).parents[2] / "deploy" / "grafana"
OPERATIONS = Path(__file__).parents[2] / "docs" / "operations.md"

_OF_PROMETHEUS = {"job", "instance"}
"""Labels that Prometheus adds."""


class Exposed:
    """Metrics with the labels and values that they came with."""

    def __init__(self, observed: Observed) -> None:
        self.labels: dict[str, set[str]] = {}
        self.values: dict[str, set[str]] = {
            # These come with what happens.
            "code": {code.name for code in grpc.StatusCode},
            "reason": set(status._REASONS.values()),
            "outcome": {"ok", *status._REASONS.values()},
        }
        for process in (observed.encoder, observed.search):
            for name, labels in process.scrape():
                self.labels.setdefault(name, set()).update(key for key, _ in labels)
                for key, found in labels:
                    self.values.setdefault(key, set()).add(found)

    def check(self, query: str) -> set[str]:
        """Compare a query; return the metrics that it asks for."""
        asked = parse(query)
        grouped = set(_OF_PROMETHEUS)
        for name, matchers in asked.metrics:
            assert name in self.labels, f"{name} is not exposed: {query}"
            grouped |= self.labels[name]
            for label, operator, wanted in matchers:
                assert label in self.labels[name] | _OF_PROMETHEUS, f"{name}: no {label}: {query}"
                if label in _OF_PROMETHEUS:
                    continue
                parts = wanted.split("|") if operator in ("=~", "!~") else [re.escape(wanted)]
                for part in parts:
                    assert any(re.fullmatch(part, found) for found in self.values[label]), (
                        f"{name}: {label} is never {part}: {query}"
                    )
        assert asked.labels <= grouped, f"{asked.labels - grouped} of no metric here: {query}"
        return {name for name, _ in asked.metrics}


@pytest.fixture(scope="module")
def exposed(observed: Observed, images: list[bytes]) -> Exposed:
    with Client(observed.search.target, observed.encoder.target) as client:
        client.create_collection("watched")
        client.upsert("watched", [Item(f"{i}", image=images[i]) for i in range(10)])
        client.search("watched", image=images[0], k=3)
        for target in (client.encode, lambda image: client.search("watched", image=image)):
            with pytest.raises(InvalidInputError):
                target(b"no image")
    # What fails is counted when the caller knows already.
    for process, method in (
        (observed.encoder, "EncoderService/Encode"),
        (observed.search, "SearchService/Search"),
    ):
        labels = {"method": method, "reason": "invalid_input"}
        wait_until(
            lambda process=process, labels=labels: value(
                process.scrape(), "hashlens_rpc_refusals_total", **labels
            ),
            within_s=60,
            what=f"{method} was counted",
        )
    return Exposed(observed)


def dashboard() -> Iterator[tuple[dict[str, object], str, str]]:
    """Yield each panel with each of its queries and that one's legend."""
    board = json.loads((FOLDER / "hashlens.json").read_text())
    for panel in board["panels"]:
        for target in panel.get("targets", ()):
            yield panel, target["expr"], target["legendFormat"]


def rules() -> list[dict[str, str]]:
    """Read the alert rules: the few forms of YAML that the file uses."""
    found: list[dict[str, str]] = []
    lines = (FOLDER / "alerts.yaml").read_text().splitlines()
    for i, line in enumerate(lines):
        if match := re.fullmatch(r"      - alert: (\w+)", line):
            found.append({"alert": match[1]})
        elif match := re.fullmatch(r"        expr: >-", line):
            folded = []
            for more in lines[i + 1 :]:
                if not more.startswith("          "):
                    break
                folded.append(more.strip())
            found[-1]["expr"] = " ".join(folded)
        elif match := re.fullmatch(r" {8,10}(expr|for|labels|summary|description): (.+)", line):
            found[-1][match[1]] = match[2].strip('"')
    return found


def test_every_query_of_the_dashboard_asks_for_what_there_is(exposed: Exposed) -> None:
    asked: set[str] = set()
    panels = list(dashboard())
    assert len(panels) > 50
    for panel, query, legend in panels:
        asked |= exposed.check(query)
        grouped = parse(query).labels
        for label in re.findall(r"{{\s*(\w+)\s*}}", legend):
            assert label in grouped, f"{panel['title']}: {label} is aggregated away"
    # The other way round: what nobody sees might as well not be there.
    ours = {name for name in exposed.labels if name.startswith("hashlens_")}
    base = {re.sub("_(bucket|sum|count)$", "", name) for name in asked}
    assert {re.sub("_(bucket|sum|count)$", "", name) for name in ours} - base == set()


def test_variables_ask_for_what_there_is(exposed: Exposed) -> None:
    board = json.loads((FOLDER / "hashlens.json").read_text())
    names = set()
    for variable in board["templating"]["list"]:
        names.add(variable["name"])
        if variable["type"] == "query":
            metric, label = re.fullmatch(
                r"label_values\((\w+(?:{.*})?), (\w+)\)", variable["query"]["query"]
            ).groups()  # type: ignore[union-attr]
            exposed.check(metric)
            assert label in _OF_PROMETHEUS
    used = set(re.findall(r"\$\{?(\w+)", (FOLDER / "hashlens.json").read_text()))
    assert used <= names | {"__rate_interval", "__all"}


def test_panels_have_their_place() -> None:
    board = json.loads((FOLDER / "hashlens.json").read_text())
    taken: set[tuple[int, int]] = set()
    for panel in board["panels"]:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken, panel["title"]
        assert place["x"] + place["w"] <= 24
        taken |= cells
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])


def test_every_alert_asks_for_what_there_is(exposed: Exposed) -> None:
    found = rules()
    assert len(found) == (FOLDER / "alerts.yaml").read_text().count("- alert:") > 15
    assert len({rule["alert"] for rule in found}) == len(found)
    for rule in found:
        metrics = exposed.check(rule["expr"])
        assert re.fullmatch(r"\{severity: (page|warn)\}", rule["labels"]), rule
        asked = parse(rule["expr"])
        labels = asked.labels or _OF_PROMETHEUS.union(*(exposed.labels[m] for m in metrics))
        for text in (rule["summary"], rule.get("description", "")):
            for label in re.findall(r"\$labels\.(\w+)", text):
                assert label in labels, f"{rule['alert']}: {label}"


def test_a_metric_that_is_not_there_is_found_out(exposed: Exposed) -> None:
    for query in (
        "sum(rate(hashlens_rpc_calls[5m]))",
        'hashlens_rpc_in_flight{collection="a"}',
        'hashlens_search_stage_seconds_count{stage="lunch"}',
        "sum by (colour) (hashlens_rpc_in_flight)",
        "sum((hashlens_rpc_in_flight)",
        "average(hashlens_rpc_in_flight)",
    ):
        with pytest.raises(AssertionError):
            exposed.check(query)


def test_every_metric_is_described(exposed: Exposed) -> None:
    text = OPERATIONS.read_text()
    for name in exposed.labels:
        base = re.sub("_(bucket|sum|count)$", "", name)
        if base.startswith("hashlens_"):
            assert f"`{base}`" in text, base
