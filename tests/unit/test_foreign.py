"""Everything that reads what others wrote, against bytes of every kind: only the declared error leaves, and what is
made of them is text that can be sent on."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from penstock.api.jobs import JobView
from penstock.client.core import _decoded
from penstock.client.errors import ProtocolError, failure_of
from penstock.client.resume import ResumePoint
from penstock.client.sse import ServerEvent
from penstock.core.calls import read_calls
from penstock.core.errors import ErrorInfo, InvalidRequest, PenstockError
from penstock.core.events import Phase, Prefix
from penstock.core.foreign import Malformed, Mismatch, decode, loads, whole
from penstock.core.job import Message, Request, Sampling, Tool
from penstock.engines.frames import Outputs, encode
from penstock.engines.text.formats.table import TOOLS as FORMATS
from penstock.engines.text.formats.table import Formats
from penstock.engines.upstream import answers
from penstock.engines.upstream.dialects import UpstreamError, read_models
from penstock.engines.upstream.reply import UpstreamReply
from penstock.engines.upstream.stream import Lines, StreamError
from penstock.gateway import feed, http
from penstock.gateway.batches.input import check_input

DEEP = 20_000

#: Numbers, constants and texts that are no JSON, or more than a reader may expect.
ODD = st.sampled_from(
    [
        b"NaN",
        b"-Infinity",
        b"1e999",
        b"9" * 30,
        b"9" * 5000,
        b"-0.0",
        b"null",
        b"true",
        b'"\\ud83d"',
        b'"\\ude00"',
        b'"\\u0000"',
        b'"\xe2\x80"',
        b'"\xed\xa0\xbd"',
        b"\xff",
        b"[" * DEEP,
        b'{"a":' * DEEP + b"1" + b"}" * DEEP,
        b"[[]]",
        b'["x", 1]',
        b'{"type": "text"}',
        b"",
    ]
)
TOP = {"token": "a", "logprob": -0.5, "bytes": [97], "top_logprobs": [{"token": "a", "logprob": -0.5}]}
#: What the readers are made for.
PROPER: list[dict[str, Any]] = [
    {
        "choices": [
            {
                "delta": {"content": "a", "tool_calls": [{"index": 0, "id": "i", "function": {"name": "t"}}]},
                "logprobs": {"content": [TOP]},
                "finish_reason": "tool_calls",
                "token_ids": [7],
            }
        ],
        "usage": {"prompt_tokens": 1, "completion_tokens": 2},
        "timings": {"predicted_n": 1, "prompt_n": 2, "cache_n": 0},
    },
    {
        "choices": [
            {"text": "a", "logprobs": {"tokens": ["a"], "token_logprobs": [-1.0], "top_logprobs": [{"a": -1.0}]}}
        ]
    },
    {"choices": [{"message": {"content": [{"type": "text", "text": "a"}]}, "finish_reason": "stop"}]},
    {"error": {"message": "m", "type": "t", "code": 500, "param": "p"}},
    {"data": [{"index": 0, "embedding": [1.0, 2.0]}], "usage": {"prompt_tokens": 3}},
    {"data": [{"id": "m", "owned_by": "vllm", "max_model_len": 100, "meta": {"n_ctx": 5}, "tasks": ["generate"]}]},
    {"count": 1, "tokens": [1], "token_strs": ["a"], "prompt": "p"},
    {"tokens": [{"id": 1, "piece": [226, 128]}]},
    {"custom_id": "1", "method": "POST", "url": "/v1/chat/completions", "body": {"model": "m", "messages": []}},
    {"token": "a", "token_id": 1, "attempt": 1, "index": 0, "id": "job_1", "status": "completed"},
    {"name": "t", "arguments": {"a": 1}},
]


@st.composite
def mangled(draw: st.DrawFn) -> bytes:
    """A proper message with something odd in the place of one of its values, or cut off."""
    raw = json.dumps(draw(st.sampled_from(PROPER))).encode()
    places = [i for i, byte in enumerate(raw) if byte in b':[,"']
    at = draw(st.sampled_from(places)) + 1
    end = draw(st.sampled_from([i for i, byte in enumerate(raw) if byte in b',}]"' and i >= at] or [len(raw)]))
    return raw[:at] + draw(ODD) + (raw[end:] if draw(st.booleans()) else b"")


FOREIGN = st.one_of(
    st.binary(max_size=200), ODD, mangled(), st.sampled_from(PROPER).map(lambda v: json.dumps(v).encode())
)
EXAMPLES = [
    b"[" * DEEP,
    b"\x91" * DEEP,
    b'"\xff"',
    b'{"choices":[{"text":"\\ud83d"}]}',
    b'{"choices":[{"delta":{"content":"\xff"}}]}',
]

TOOLS = (Tool("t"), Tool("u"))
ASKED = Request(model="m", messages=(Message("user", "?"),), sampling=Sampling(max_tokens=10, logprobs=2), tools=TOOLS)


def events(raw: bytes) -> None:
    """A stream's, on their way into the log."""
    for request in (ASKED, msgspec.structs.replace(ASKED, sampling=Sampling(max_tokens=10))):
        reply = UpstreamReply(1, None, Prefix(), request)
        output, _, _ = reply.take([*Lines().feed(b"data: " + raw.replace(b"\n", b" ") + b"\n"), raw])
        encode(Outputs([output, reply.end()]))
        assert len(output.ids) == len(output.texts) == len(output.logprobs or output.ids)


def response(raw: bytes) -> httpx.Response:
    return httpx.Response(500, content=raw, request=httpx.Request("GET", "http://x"))


#: Every reader, and what it may raise.
READERS: dict[str, tuple[Callable[[bytes], Any], type[Exception] | tuple[type[Exception], ...]]] = {
    "anything": (lambda raw: decode(raw, object), Malformed),
    "forgiving": (loads, Malformed),
    "text": (lambda raw: decode(raw.decode("utf-8", "surrogateescape"), object), Malformed),
    "stream": (events, ()),
    "vectors": (lambda raw: answers.read_vectors(raw, 1), StreamError),
    "tokens": (lambda raw: answers.read(raw, answers.TokenizeAnswer), StreamError),
    "pieces": (answers.read_pieces, StreamError),
    "template": (lambda raw: answers.read(raw, answers.TemplateAnswer), StreamError),
    "models": (read_models, Malformed),
    "refusal": (lambda raw: UpstreamError.read(loads(raw)).refusal("m").message.encode(), Malformed),
    "calls": (lambda raw: called(raw.decode("utf-8", "replace")), ()),
    "client": (lambda raw: _decoded(raw, JobView, response(raw)), PenstockError),
    "client's refusal": (lambda raw: failure_of(response(raw), raw), ()),
    "client's events": (
        lambda raw: ResumePoint(0).take(ServerEvent("token", raw.decode("utf-8", "replace"), "1")),
        ProtocolError,
    ),
    "body": (lambda raw: http.decode(raw, dict[str, Any]), InvalidRequest),
    "place": (lambda raw: feed.Cursor.parse(base64.urlsafe_b64encode(raw).decode()), InvalidRequest),
}


def called(text: str) -> None:
    for name, (tools, _) in FORMATS.items():
        for form in (text, "".join(tools.begins[:1]) + text):
            reader = Formats(name, "think").reader(ASKED)
            assert reader is not None
            found = [*reader.push(form), *reader.finish()]
            for call in read_calls("".join(part for phase, part in found if phase is Phase.TOOL)):
                (call.name + call.arguments).encode()
            "".join(part for _, part in found).encode()


@pytest.mark.parametrize("reader", READERS)
@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(FOREIGN)
@example(EXAMPLES[0])
@example(EXAMPLES[1])
@example(EXAMPLES[2])
@example(EXAMPLES[3])
@example(EXAMPLES[4])
def test_only_the_declared_error_leaves(reader: str, raw: bytes) -> None:
    read, declared = READERS[reader]
    try:
        read(raw)
    except declared as error:
        str(error).encode()


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(st.lists(FOREIGN, max_size=4))
@example(EXAMPLES)
def test_a_batchs_lines_are_refused_one_by_one(tmp_path: Path, lines: list[bytes]) -> None:
    path = tmp_path / "input.jsonl"
    path.write_bytes(b"\n".join(line.replace(b"\n", b" ") for line in lines))
    msgspec.json.encode(check_input(path, "/v1/chat/completions", 100_000))


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (b"[" * DEEP, "nested too deeply"),
        (b'"\xff"', "not valid UTF-8"),
        ("\ud83d", "not valid"),
        (b'"\\ud83d"', "not valid JSON"),
        (b"9" * 5000, "out of range"),
        (b"{", "not valid JSON"),
    ],
)
def test_what_is_said(raw: bytes | str, words: str) -> None:
    with pytest.raises(Malformed, match=words):
        decode(raw, object)


def test_another_value_is_told_with_its_place() -> None:
    with pytest.raises(Mismatch, match=r"Expected `str`, got `int` - at `\$.message`"):
        decode(b'{"message": 1}', ErrorInfo)


def test_halves_of_characters() -> None:
    assert whole(loads(b'"a\\ud83d\\ude00 \\ud83d \\ude00"')) == "a\U0001f600 \ufffd \ufffd"
    assert loads(b"[NaN, -Infinity, 1]") == [None, None, 1]
