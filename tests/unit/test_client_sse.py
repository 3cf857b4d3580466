"""The decoder of server-sent events: bytes in, events out, wherever they are cut."""

from __future__ import annotations

import itertools
from collections.abc import Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.client.sse import ServerEvent, SSEDecoder


def decode(*chunks: bytes) -> list[ServerEvent]:
    decoder = SSEDecoder()
    return [event for chunk in chunks for event in decoder.feed(chunk)]


def cut(data: bytes, places: Iterable[int]) -> list[bytes]:
    edges = [0, *sorted(place % (len(data) + 1) for place in places), len(data)]
    return [data[a:b] for a, b in itertools.pairwise(edges)]


cuts = st.lists(st.integers(0, 10_000), max_size=20)
line_end = st.sampled_from(["\n", "\r\n", "\r"])
#: A value has no line ends, and no leading space (one is eaten); U+2028, U+0085, VT and FF are not line ends here.
value = st.text(st.characters(exclude_characters="\r\n\0", exclude_categories=("Cs",)), max_size=12) | st.sampled_from(
    ["a\u2028b", "a\x85b", "\x0b\x0c", "é🙂", ":", ": x", ""]
)


@st.composite
def streams(draw: st.DrawFn) -> tuple[bytes, list[ServerEvent]]:
    """A well-formed stream, every line ended in its own way, and the events that it means."""
    text = draw(st.sampled_from(["", "\ufeff"]))
    expected = []
    id = ""
    for _ in range(draw(st.integers(0, 5))):
        name, data, lines = "", [], []
        for field in draw(st.lists(st.sampled_from(["data", "event", "id", "retry", "comment", "other"]), max_size=6)):
            content = draw(value)
            if field == "comment":
                lines.append(f":{content}")
                continue
            lines.append(f"{field}: {content}")
            if field == "data":
                data.append(content)
            elif field == "event":
                name = content
            elif field == "id":
                id = content
        ended = [line + draw(line_end) for line in [*lines, ""]]
        # A CR followed by a line that is only an LF would be one CRLF.
        for i in range(len(ended) - 1):
            if ended[i].endswith("\r") and ended[i + 1] == "\n":
                ended[i] = ended[i][:-1] + "\n"
        if text.endswith("\r") and ended[0] == "\n":
            ended[0] = "\r"
        text += "".join(ended)
        if data:
            expected.append(ServerEvent(name or "message", "\n".join(data), id))
    return text.encode(), expected


@given(streams(), cuts)
def test_a_stream_means_the_same_wherever_it_is_cut(stream: tuple[bytes, list[ServerEvent]], places: list[int]) -> None:
    data, expected = stream
    assert decode(*cut(data, places)) == expected
    assert decode(*(bytes([byte]) for byte in data)) == expected


@given(
    st.binary(max_size=200) | st.lists(st.sampled_from([b"\r", b"\n", b"data:", b"id:", b"x", b"\xff"])).map(b"".join),
    cuts,
)
def test_any_bytes_mean_the_same_wherever_they_are_cut(data: bytes, places: list[int]) -> None:
    assert decode(*cut(data, places)) == decode(data)


@given(streams(), st.integers(0, 10_000))
def test_a_torn_stream_gives_a_prefix_of_its_events(stream: tuple[bytes, list[ServerEvent]], place: int) -> None:
    data, expected = stream
    torn = decode(data[: place % (len(data) + 1)])
    assert torn == expected[: len(torn)]


def test_a_block_is_dispatched_by_its_blank_line_only() -> None:
    assert decode(b"id: 1\nevent: token\ndata: a\n") == []
    assert decode(b"id: 1\nevent: token\ndata: a\n", b"\n") == [ServerEvent("token", "a", "1")]


def test_the_blank_line_of_a_cr_stream_needs_no_further_byte() -> None:
    assert decode(b"data: a\r\r") == [ServerEvent("message", "a", "")]


def test_a_crlf_is_one_line_end_even_when_it_is_cut() -> None:
    assert decode(b"data: a\r", b"\ndata: b\r", b"", b"\n\r", b"\n") == [ServerEvent("message", "a\nb", "")]


def test_data_lines_are_joined_and_the_name_does_not_stick() -> None:
    events = decode(b"event: x\ndata: a\ndata:\ndata:b\n\ndata: c\n\n")
    assert events == [ServerEvent("x", "a\n\nb", ""), ServerEvent("message", "c", "")]


def test_the_id_sticks_until_the_next_one_and_a_block_without_data_is_no_event() -> None:
    assert decode(b"id: 7\n\ndata: a\n\nid\ndata: b\n\n") == [
        ServerEvent("message", "a", "7"),
        ServerEvent("message", "b", ""),
    ]


def test_an_id_with_a_nul_is_ignored() -> None:
    assert decode(b"id: 1\ndata: a\n\nid: 2\x003\ndata: b\n\n")[1].id == "1"


def test_heartbeats_are_counted_and_disturb_nothing() -> None:
    decoder = SSEDecoder()
    assert decoder.feed(b": ping\nid: 1\nevent: token\n: ping\ndata: a\n\n: ping\n") == [ServerEvent("token", "a", "1")]
    assert decoder.comments == 3


@pytest.mark.parametrize(
    ("line", "retry"), [(b"retry: 1500", 1500), (b"retry: 1.5", None), (b"retry: -1", None), (b"retry", None)]
)
def test_retry_counts_at_once_and_only_as_digits(line: bytes, retry: int | None) -> None:
    decoder = SSEDecoder()
    decoder.feed(line + b"\n")  # a draining server says goodbye like this, without a blank line
    assert decoder.retry == retry


def test_broken_utf_8_is_replaced_and_unknown_fields_are_ignored() -> None:
    assert decode(b"data: a\xffb\nfoo: bar\nfoo\n\n") == [ServerEvent("message", "a\ufffdb", "")]
