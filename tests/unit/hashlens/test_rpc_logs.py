"""Lines of the log: one each, with the call they belong to, and not too many that are alike."""

from __future__ import annotations

import contextvars
import json
import logging
from collections.abc import Callable, Iterator

import pytest

from hashlens.rpc import call, logs
from hashlens.rpc.call import Call
from hashlens.rpc.trace import TraceContext

TRACE, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


@pytest.fixture
def set_up() -> Iterator[Callable[..., None]]:
    root = logging.getLogger()
    before = (root.handlers[:], root.level)
    root.handlers = []
    yield logs.set_up
    root.handlers, level = before
    root.setLevel(level)


def in_call(work: Callable[[], None]) -> None:
    def run() -> None:
        call.enter(Call("SearchService/Search", "the-id", TraceContext(TRACE, SPAN)))
        work()

    contextvars.copy_context().run(run)


def test_json_lines_name_their_call(
    set_up: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    set_up("json", "info")
    logger = logging.getLogger("a.b")

    def work() -> None:
        logger.info("two\nlines of %s", "ünicode", extra={"fields": {"code": "OK"}})
        try:
            raise ValueError("why")
        except ValueError:
            logger.exception("it failed")

    in_call(work)
    logger.info("outside")
    first, second, third = map(json.loads, capsys.readouterr().err.splitlines())
    assert first.pop("time").endswith("Z")
    assert first == {
        "level": "info",
        "logger": "a.b",
        "message": "two\nlines of ünicode",
        "request_id": "the-id",
        "trace_id": TRACE,
        "method": "SearchService/Search",
        "code": "OK",
    }
    assert "ValueError: why" in second["exception"]
    assert second["request_id"] == "the-id"
    assert not {"request_id", "trace_id", "method"} & set(third)


def test_nobody_makes_up_a_line_of_text(
    set_up: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    set_up("text", "info")
    in_call(lambda: logging.getLogger("a").info("%s", "x\n2026-01-01 INFO a: forged\x1b[31m\r"))
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith("a: x\\n2026-01-01 INFO a: forged\\x1b[31m\\r [the-id]")


def test_warnings_that_are_alike_are_bounded_and_counted(
    set_up: Callable[..., None],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now_s = 100.0
    monkeypatch.setattr(logs.time, "monotonic", lambda: now_s)
    set_up("text", "info", 3)
    logger = logging.getLogger("a")
    for i in range(50):
        logger.warning("%s: %s after %d ms", "Search", "OverloadedError", i)
        logger.info("%s is fine", "Search")
    logger.warning("%s: %s after %d ms", "Search", "DataLossError", 1)  # Another kind.
    lines = capsys.readouterr().err.splitlines()
    assert sum("OverloadedError" in line for line in lines) == 3
    assert sum("is fine" in line for line in lines) == 50
    assert sum("DataLossError" in line for line in lines) == 1
    now_s += 11
    logger.warning("%s: %s after %d ms", "Search", "OverloadedError", 7)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith("OverloadedError after 7 ms (and 47 more like this before it)")
    counted = {(s.name, s.labels.get("level")): s.value for m in logs.collect() for s in m.samples}
    assert counted["hashlens_log_lines_total", "warning"] == 5
    assert counted["hashlens_log_lines_total", "info"] == 50
    assert counted["hashlens_log_suppressed_total", None] == 47


def test_kinds_of_warnings_do_not_pile_up(set_up: Callable[..., None]) -> None:
    set_up("text", "info", 1)
    (handler,) = logging.getLogger().handlers
    burst = next(f for f in handler.filters if isinstance(f, logs._BurstFilter))
    logger = logging.getLogger("a")
    for i in range(3 * logs._MAX_KINDS):
        logger.warning("%s", f"stranger {i}")
    assert len(burst._kinds) == logs._MAX_KINDS


def test_no_limit_is_none(set_up: Callable[..., None], capsys: pytest.CaptureFixture[str]) -> None:
    set_up("text", "info", 0)
    for _ in range(100):
        logging.getLogger("a").warning("again")
    assert len(capsys.readouterr().err.splitlines()) == 100
