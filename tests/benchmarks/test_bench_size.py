"""`hashlens bench size` on a table that is large enough for its formulas to be compared."""

from __future__ import annotations

import json
from pathlib import Path

from click.testing import CliRunner

from hashlens.cli.main import main
from search_service.bench.size import SizeConfig, formulas


def test_what_a_row_takes_is_what_the_formulas_say(tmp_path: Path) -> None:
    path = tmp_path / "found.json"
    flags = ["--rows", "6000", "--dim", "64", "--payload-bytes", "40"]
    done = CliRunner().invoke(
        main, ["bench", "size", *flags, "--checkpoint-interval-s", "3", "--json", str(path)]
    )
    assert done.exit_code == 0, done.output
    found = {line["what"]: line for line in json.loads(path.read_text())["lines"]}
    formula = 8 + 48 + 12 + 40 + 128
    assert found["files of a replica"]["formula"] == formula
    # Room is allocated ahead.
    assert found["files of a replica"]["measured"] > formula
    items = found["Redis, items"]
    assert items["formula"] == 12 + 8 + 13 + 12 + 50 + 5
    # Of few rows much is what Redis remembers of the calls that brought them.
    assert 0.9 < items["measured"] / items["formula"] < 2
    assert found["write calls of Redis, each a sync"]["measured"] >= 6000 / 256


def test_codes_without_payloads() -> None:
    config = SizeConfig(dim=0, payload_bytes=0, bits=100)
    assert formulas(config) == {"files": 16 + 48 + 12, "redis": 12 + 13 + 13, "log": 52}
