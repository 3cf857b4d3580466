"""`traceparent` by the rules and cases of the W3C recommendation (https://www.w3.org/TR/trace-context/)."""

from __future__ import annotations

import pytest

from penstock.core.trace import TraceContext

TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
SPAN = "00f067aa0ba902b7"
HEADER = f"00-{TRACE}-{SPAN}-01"


def test_the_header_of_the_standard() -> None:
    context = TraceContext.parse(HEADER)
    assert context == TraceContext(TRACE, SPAN, 1)
    assert context.sampled
    assert str(context) == HEADER


@pytest.mark.parametrize(
    ("flags", "kept"),
    [("00", "00"), ("01", "01"), ("02", "02"), ("03", "03"), ("ff", "03"), ("08", "00")],
)
def test_flags_that_nobody_knows_yet_are_not_passed_on(flags: str, kept: str) -> None:
    context = TraceContext.parse(f"00-{TRACE}-{SPAN}-{flags}")
    assert str(context) == f"00-{TRACE}-{SPAN}-{kept}"
    assert context is not None
    assert context.sampled is (kept in ("01", "03"))


@pytest.mark.parametrize(
    "header",
    [
        f" {HEADER}",
        f"{HEADER} ",
        f"\t{HEADER}\t",
        f"cc-{TRACE}-{SPAN}-01",
        f"01-{TRACE}-{SPAN}-01-what-the-future-says",
    ],
    ids=["space before", "space behind", "tabs", "later version", "later version says more"],
)
def test_what_has_to_be_taken(header: str) -> None:
    assert TraceContext.parse(header) == TraceContext(TRACE, SPAN, 1)


@pytest.mark.parametrize(
    "header",
    [
        None,
        "",
        "00",
        f"00-{TRACE}-{SPAN}",
        f"00-{TRACE}-{SPAN}-",
        f"00-{TRACE}-{SPAN}-1",
        f"00-{TRACE}-{SPAN}-001",
        f"00-{TRACE}-{SPAN}-0x",
        f"00-{TRACE}-{SPAN}-01.",
        f"00-{TRACE}-{SPAN}-01-what-the-future-says",
        f"00-{TRACE}-{SPAN}-01-",
        f"cc-{TRACE}-{SPAN}-01.what",
        f"cc-{TRACE}-{SPAN}-01what",
        f"ff-{TRACE}-{SPAN}-01",
        f"0-{TRACE}-{SPAN}-01",
        f"000-{TRACE}-{SPAN}-01",
        f".0-{TRACE}-{SPAN}-01",
        f"00-{TRACE.upper()}-{SPAN}-01",
        f"00-{TRACE}-{SPAN.upper()}-01",
        f"0A-{TRACE}-{SPAN}-01",
        f"00-{TRACE[:-1]}-{SPAN}-01",
        f"00-{TRACE}0-{SPAN}-01",
        f"00-{TRACE[:-1]}.-{SPAN}-01",
        f"00-{TRACE}-{SPAN[:-1]}-01",
        f"00-{TRACE}-{SPAN}0-01",
        f"00-{'0' * 32}-{SPAN}-01",
        f"00-{TRACE}-{'0' * 16}-01",
        f"{HEADER},{HEADER}",
        f"{HEADER}\n",
        f"00_{TRACE}_{SPAN}_01",
    ],
)
def test_anything_else_is_ignored(header: str | None) -> None:
    assert TraceContext.parse(header) is None


@pytest.mark.parametrize("sampled", [True, False])
def test_a_new_trace_and_its_children(sampled: bool) -> None:
    root, other = TraceContext.new(sampled=sampled), TraceContext.new(sampled=sampled)
    child = root.child()
    assert TraceContext.parse(str(root)) == root
    assert TraceContext.parse(str(child)) == child
    assert child.trace_id == root.trace_id != other.trace_id
    assert child.span_id != root.span_id
    assert child.sampled is root.sampled is sampled
