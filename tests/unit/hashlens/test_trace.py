"""Trace headers, as https://www.w3.org/TR/trace-context/ has them, and what is passed on."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hashlens.client.wire import ClientConfig, Wire
from hashlens.rpc import call, trace
from hashlens.rpc.call import Call
from hashlens.rpc.trace import TraceContext

TRACE, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


@pytest.mark.parametrize(
    ("header", "flags"),
    [
        (f"00-{TRACE}-{SPAN}-01", 1),
        (f"00-{TRACE}-{SPAN}-00", 0),
        (f"00-{TRACE}-{SPAN}-03", 3),
        (f"00-{TRACE}-{SPAN}-fd", 1),  # Flags without a meaning are not passed on.
        (f"cc-{TRACE}-{SPAN}-01", 1),  # A later version may say more behind.
        (f"cc-{TRACE}-{SPAN}-01-what-the-future-holds", 1),
    ],
)
def test_a_valid_parent_is_read(header: str, flags: int) -> None:
    assert trace.read([header]) == TraceContext(TRACE, SPAN, flags)


@pytest.mark.parametrize(
    "headers",
    [
        [],
        [""],
        [f"00-{TRACE}-{SPAN}-01", f"00-{TRACE}-{SPAN}-01"],
        [f"00-{TRACE.upper()}-{SPAN}-01"],
        [f"ff-{TRACE}-{SPAN}-01"],
        [f"00-{'0' * 32}-{SPAN}-01"],
        [f"00-{TRACE}-{'0' * 16}-01"],
        [f"00-{TRACE[1:]}-{SPAN}-01"],
        [f"00-{TRACE}-{SPAN}-1"],
        [f"00-{TRACE}-{SPAN}-01-more"],
        [f"cc-{TRACE}-{SPAN}-01.more"],
        [f" 00-{TRACE}-{SPAN}-01"],
        [f"00-{TRACE}-{SPAN}-01\n"],
        [f"0-{TRACE}-{SPAN}-01"],
        [f"00-{TRACE[:-1]}g-{SPAN}-01"],
        [f"\u0660\u0660-{TRACE}-{SPAN}-01"],
    ],
)
def test_a_malformed_parent_is_none(headers: list[str]) -> None:
    assert trace.read(headers, ["a=b"]) is None


@pytest.mark.parametrize(
    ("headers", "state"),
    [
        ([], ""),
        (["rojo=00f067aa0ba902b7"], "rojo=00f067aa0ba902b7"),
        (["a=1, b=2 ,c=3"], "a=1,b=2,c=3"),
        (["a=1", "b=2"], "a=1,b=2"),
        (["a=1,,b=2,"], "a=1,b=2"),
        (["tenant@system=x y"], "tenant@system=x y"),
        (["0a=1"], "0a=1"),
        (["a=1,a=2"], ""),
        (["A=1"], ""),
        (["a"], ""),
        (["a="], ""),
        (["a=b=c"], ""),
        (["a=ü"], ""),
        (["a@1b=1"], ""),
        ([f"{'a' * 257}=1"], ""),
        ([f"a={'x' * 257}"], ""),
        ([",".join(f"k{i}=1" for i in range(33))], ""),
        ([",".join(f"k{i}=1" for i in range(32))], ",".join(f"k{i}=1" for i in range(32))),
        ([f"a={'x' * 256},b={'y' * 200},c={'z' * 200}"], f"a={'x' * 256},b={'y' * 200}"),
    ],
)
def test_states_are_passed_on_or_dropped(headers: list[str], state: str) -> None:
    found = trace.read([f"00-{TRACE}-{SPAN}-01"], headers)
    assert found is not None
    assert found.state == state


@given(st.lists(st.text(max_size=80), max_size=3), st.lists(st.text(max_size=80), max_size=3))
def test_whatever_is_sent_what_is_passed_on_is_valid(parents: list[str], states: list[str]) -> None:
    found = trace.read(parents, states)
    if found is not None:
        headers = dict(found.headers())
        assert trace.read([headers["traceparent"]], [headers.get("tracestate", "")]) == found


def test_a_new_trace_is_valid_and_new() -> None:
    made = {trace.new_trace() for _ in range(1000)}
    assert len({one.trace_id for one in made}) == 1000
    for one in made:
        assert trace.read([dict(one.headers())["traceparent"]]) == one
        assert not one.is_sampled


@pytest.mark.parametrize(
    ("given_id", "is_kept"),
    [
        ("a", True),
        ("Root=1-67891233-abcdef012345678912345678", True),
        ("5e6f/7:8.9_0", True),
        ("x" * 64, True),
        ("x" * 65, False),
        ("", False),
        (None, False),
        ("two words", False),
        ("line\nbreak", False),
        ("-rf", False),
        ("ümlaut", False),
        ('quo"te', False),
    ],
)
def test_a_request_id_is_kept_if_it_is_harmless(given_id: str | None, is_kept: bool) -> None:
    found = call.request_id_of(given_id)
    assert (found == given_id) is is_kept
    assert call.request_id_of(found) == found
    if not is_kept:
        assert call.request_id_of(given_id) != found


def test_a_client_carries_the_trace_it_is_in() -> None:
    wire = Wire(ClientConfig())
    assert wire.metadata() == ()
    place = TraceContext(TRACE, SPAN, 1, "a=b")
    with call.joined(place):
        assert wire.metadata() == (("traceparent", f"00-{TRACE}-{SPAN}-01"), ("tracestate", "a=b"))
    assert wire.metadata() == ()


async def _in_a_call() -> tuple[tuple[str, str], ...]:
    call.enter(Call("S/M", "the-id", TraceContext(TRACE, SPAN)))
    return Wire(ClientConfig()).metadata()


def test_a_client_inside_a_call_passes_its_name_on_and_only_there() -> None:
    import asyncio

    assert asyncio.run(_in_a_call()) == (
        ("x-request-id", "the-id"),
        ("traceparent", f"00-{TRACE}-{SPAN}-00"),
    )
    assert Wire(ClientConfig()).metadata() == ()


def test_a_client_takes_the_span_of_a_program_that_uses_opentelemetry() -> None:
    otel = pytest.importorskip("opentelemetry.trace")
    place = otel.SpanContext(int(TRACE, 16), int(SPAN, 16), False, otel.TraceFlags(1))
    with otel.use_span(otel.NonRecordingSpan(place)):
        assert Wire(ClientConfig()).metadata() == (("traceparent", f"00-{TRACE}-{SPAN}-01"),)
    assert Wire(ClientConfig()).metadata() == ()
