"""The parsers and figures that every measurement rests on."""

from __future__ import annotations

import math
import subprocess
from pathlib import Path

import pytest
from benchmarks import canned
from benchmarks.client import ChunkedDecoder, EventSplitter, Exchange, ProtocolError
from benchmarks.dialects import DIALECTS, Chat, Completions, Dialect, Generate, parse_events
from benchmarks.processes import find_redis
from benchmarks.report import plot_bars
from benchmarks.scenarios.fairness import TENANTS, WEIGHTS, Fairness, half_bound, largest_difference
from benchmarks.stats import Spread, Times, percentile
from benchmarks.workload import Workload

PAYLOADS = [b"data: one\n\n", b"data: t\r\n\n\n", b"x" * 300]
WIRE = b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in PAYLOADS) + b"0\r\n\r\n"


def test_chunks_decode_whatever_the_reads() -> None:
    for cut in range(len(WIRE) + 1):
        decoder = ChunkedDecoder()
        got = decoder.feed(WIRE[:cut]) + decoder.feed(WIRE[cut:])
        assert (got, decoder.done) == (b"".join(PAYLOADS), True)
    decoder = ChunkedDecoder()
    assert b"".join(decoder.feed(WIRE[at : at + 1]) for at in range(len(WIRE))) == b"".join(PAYLOADS)
    assert decoder.done


def test_chunk_extensions_and_trailers_are_skipped() -> None:
    decoder = ChunkedDecoder()
    assert decoder.feed(b"3;a=b\r\nabc\r\n0\r\nX-Trailer: 1\r\n\r\n") == b"abc"
    assert decoder.done


def test_a_bad_chunk_size_is_refused() -> None:
    with pytest.raises(ProtocolError, match="bad chunk size"):
        ChunkedDecoder().feed(b"hello\r\n")


@pytest.mark.parametrize("separator", [b"\n\n", b"\r\n\r\n"])
def test_events_are_cut_at_block_ends_only(separator: bytes) -> None:
    stream = separator.join([b"data: a", b"id: 2\ndata: b", b"data: c"]) + separator
    for cut in range(len(stream) + 1):
        splitter = EventSplitter()
        pieces = [splitter.feed(stream[:cut]), splitter.feed(stream[cut:])]
        assert b"".join(pieces) == stream
        assert all(not piece or piece.endswith(separator) for piece in pieces)


@pytest.mark.parametrize("name", DIALECTS)
def test_a_good_reply_is_counted_and_verified(name: str) -> None:
    decoder, dialect = ChunkedDecoder(), DIALECTS[name]()
    blocks = [decoder.feed(chunk) for chunk in canned.reply(name, 5)]
    exchange = Exchange(b"", 5, events=_count(dialect, b"".join(blocks)), blocks=blocks)
    assert (dialect.finish(exchange), exchange.events, exchange.tokens) == ("", 5, 5)
    assert dialect.verify(exchange) == ""


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        (b"id: 3\n", b"id: 4\n", "position 4 where 3 is due"),
        (b'"token_id": 1234, "attempt": 1}\n\nid: 2', b'"token_id": 1234, "attempt": 2}\n\nid: 2', "attempt went back"),
        (b'"completion_tokens": 5', b'"completion_tokens": 6', "usage says 6 for 5"),
        (b"event: done", b"event: token", "does not end with done"),
    ],
)
def test_verify_sees_a_broken_log(old: bytes, new: bytes, problem: str) -> None:
    decoder, dialect = ChunkedDecoder(), Generate()
    stream = b"".join(decoder.feed(chunk) for chunk in canned.reply("generate", 5))
    assert old in stream
    exchange = Exchange(b"", 5, events=5, tokens=5, blocks=[stream.replace(old, new, 1)])
    assert problem in dialect.verify(exchange)


def test_errors_and_cut_streams_are_seen() -> None:
    assert Generate().finish(Exchange(b"", 1, blocks=[b'event: error\ndata: {"x":1}\n\n'])) == "error event"
    assert Completions().finish(Exchange(b"", 1, blocks=[b'data: {"error":{"code":"x"}}\n\n'])) == "error event"
    chunk = b'data: {"choices":[{"text":"a","finish_reason":null}]}\n\n'
    assert Completions().finish(Exchange(b"", 1, blocks=[chunk])) == "truncated stream"


def test_a_marker_inside_a_text_is_not_counted() -> None:
    tricky = rb'data: {"choices":[{"delta":{"content":"say \"content\":\"x\""}}]}' + b"\n\n"
    role = b'data: {"choices":[{"delta":{"role":"assistant","content":""}}]}\n\n'
    assert _count(Chat(), role + tricky) == 1


def test_percentiles_are_nearest_rank_and_know_zeros() -> None:
    assert [percentile(list(range(1, 101)), p) for p in (50, 95, 99, 100)] == [50, 95, 99, 100]
    assert percentile([7.0], 50, leading_zeros=3) == 0.0
    assert percentile([7.0], 99, leading_zeros=3) == 7.0
    assert math.isnan(percentile([], 50))
    assert Times.of([0.001, 0.003], zeros=2) == Times(0.0, 3.0, 3.0, 1.0)
    assert Spread.of([3, 1, 2, math.nan]) == Spread(2, 1, 3)


def test_workloads_are_reproducible_and_within_bounds() -> None:
    prompts = Workload(vocab=50).prompt_list(20)
    assert prompts == Workload(vocab=50).prompt_list(20)
    assert all(16 <= len(prompt) <= 32 and all(10 <= int(token) < 50 for token in prompt) for prompt in prompts)


def test_prompts_may_begin_alike() -> None:
    first, *others = Workload(vocab=50, shared_prefix=9).prompt_list(5)
    assert all(prompt[:9] == first[:9] and prompt[9:] != first[9:] for prompt in others)
    assert {16 <= len(prompt) - 9 <= 32 for prompt in [first, *others]} == {True}
    first, *others = Workload(prompts="text", shared_prefix=9).prompt_list(5)
    assert isinstance(first, str)
    assert {str(prompt).split("\n\n")[0].count(" ") for prompt in [first, *others]} == {8}


def test_sse_is_parsed_as_browsers_do() -> None:
    stream = b": ping\nid: 1\nevent: token\ndata: a\ndata: b\n\nid: 2\n\ndata:c\n\n"
    assert parse_events(stream) == [
        {"event": "token", "id": "1", "data": "a\nb"},
        {"event": "message", "id": "", "data": "c"},
    ]


def test_the_largest_difference_is_over_all_spans() -> None:
    """It opens by 3 after the first sample, and closes by 5 after that: 5 in the span between the two."""
    assert largest_difference([0, 4, 4, 4], [0, 1, 1, 6]) == 5
    assert largest_difference([7, 8], [0, 1]) == 0


def test_a_queue_in_order_of_arrival_is_beyond_the_bound() -> None:
    half = half_bound(TENANTS, slots=32)
    idle = {tenant.name: [0.0, 0.0] for tenant in TENANTS[1:]}
    run = Fairness(WEIGHTS["equal"], 1.0, {TENANTS[0].name: [0.0, 2 * half + 1]} | idle, [])
    assert not run.holds
    assert Fairness(WEIGHTS["equal"], 1.0, {TENANTS[0].name: [0.0, 2 * half]} | idle, [(0.1, 0)]).holds
    assert not Fairness(WEIGHTS["equal"], 1.0, {TENANTS[0].name: [0.0, 1.0]} | idle, [(0.1, 1)]).holds


def test_a_server_is_found_where_none_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert find_redis("redis") is None
    found = find_redis()
    assert found is not None
    assert "Valkey" in subprocess.run([found, "--version"], capture_output=True, text=True, check=True).stdout


def _count(dialect: Dialect, stream: bytes) -> int:
    token, empty = dialect.learn(stream) or (b"\0", b"")
    return stream.count(token) - (stream.count(empty) if empty else 0)


def test_bars_of_nothing_are_drawn(tmp_path: Path) -> None:
    """All tokens of a stream in one read: nothing lies between them, and zeros have no logarithm."""
    drawn = plot_bars(tmp_path / "bars", "x", ["c=1"], {"inter-token p50 ms": {"penstock": [(0.0, 0.0, 0.0)]}})
    assert drawn is None or drawn.stat().st_size > 0
