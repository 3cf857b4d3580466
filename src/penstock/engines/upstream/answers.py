"""Calls with one answer, which is no stream: vectors of inputs, tokens of a prompt, and how likely they are."""

from __future__ import annotations

import base64
from typing import Any, TypeVar

import msgspec

from penstock.core.events import Logprob, TopLogprob
from penstock.core.foreign import Malformed, decode, whole
from penstock.core.job import Request
from penstock.core.tasks import Tokenized, vector_text
from penstock.engines.upstream.dialects import ServerDialect, chat, tool_views
from penstock.engines.upstream.stream import NEVER, UNKNOWN_ID, StreamError, as_count, read_logprobs, read_usage

T = TypeVar("T")


def read(answer: bytes, kind: type[T]) -> T:
    """*answer* as a *kind*. Raises `StreamError` for what is none."""
    try:
        return decode(answer, kind)
    except Malformed as error:
        raise StreamError(f"an answer that cannot be read ({error})") from error


# ------------------------------------------------------------------------------------------ vectors


def embedding_body(model: str, request: Request, indexes: list[int], *, floats: bool) -> dict[str, Any]:
    """The request's JSON for the inputs at *indexes*.

    Vectors are asked for in base64: it is a quarter of the bytes, and what the log has (`penstock.core.tasks`), so that
    no number of them is ever parsed. *floats*: the server refuses that, and has its own form.
    """
    inputs = request.inputs or ()
    sent: dict[str, Any] = {"model": model, "input": [inputs[index] for index in indexes]}
    if not floats:
        sent["encoding_format"] = "base64"
    if request.dimensions is not None:
        sent["dimensions"] = request.dimensions
    if request.input_type is not None:
        sent["input_type"] = request.input_type
    return sent


class _Vector(msgspec.Struct, gc=False):
    embedding: str | list[float]
    index: Any = None


class _Vectors(msgspec.Struct):
    data: list[_Vector]
    usage: Any = None


def read_vectors(answer: bytes, count: int) -> tuple[list[str], int, int | None]:
    """*count* vectors as texts of the log, in the order of their inputs; how many dimensions they have; and the tokens
    of the inputs, where they are told. Raises `StreamError`."""
    found = read(answer, _Vectors)
    by_index: dict[int, str | list[float]] = {}
    for place, each in enumerate(found.data):
        by_index[place if each.index is None else as_count(each.index) or 0] = each.embedding
    if len(found.data) != count or sorted(by_index) != list(range(count)):
        raise StreamError(f"{len(found.data)} vectors for {count} inputs, or some without their index")
    texts, sizes = [], set()
    for _, vector in sorted(by_index.items()):
        text = vector if isinstance(vector, str) else vector_text(vector)
        texts.append(text)
        sizes.add(_bytes_of(text))
    size = sizes.pop()
    if sizes or not size or size % 4:
        raise StreamError("vectors of different sizes, or that are no float32 in base64")
    usage = read_usage(found.usage)
    return texts, size // 4, usage.prompt_tokens if usage is not None else None


def _bytes_of(text: str) -> int:
    try:
        return len(base64.b64decode(text, validate=True))
    except ValueError as error:  # also of what is no ASCII
        raise StreamError(f"a vector that is no base64 ({error})") from error


# ------------------------------------------------------------------------------------------ tokens


class TokenizeAnswer(msgspec.Struct):
    """What vLLM, SGLang and Penstock answer to ``/tokenize``."""

    count: int
    tokens: list[int] = []
    token_strs: list[str] | None = None


class DetokenizeAnswer(msgspec.Struct):
    """To ``/detokenize``; ``text`` is SGLang's name for it."""

    prompt: str | None = None
    text: str | None = None


class TemplateAnswer(msgspec.Struct):
    """What llama.cpp answers to ``/apply-template``."""

    prompt: str


class _Piece(msgspec.Struct, gc=False):
    id: int
    piece: str | list[int]
    """Its bytes where they are no text by themselves."""


class _Pieces(msgspec.Struct):
    tokens: list[_Piece]


def tokenize_body(dialect: ServerDialect, model: str, request: Request) -> dict[str, Any]:
    """The JSON for ``/tokenize`` as vLLM has it."""
    sent: dict[str, Any] = {"model": model, "return_token_strs": True}
    if request.messages is None:
        return sent | {"prompt": request.prompt, "add_special_tokens": request.add_special_tokens}
    if request.callable_tools:
        sent["tools"] = tool_views(request.callable_tools)
    return sent | chat(dialect, request)


def detokenize_body(dialect: ServerDialect, model: str, ids: list[int]) -> dict[str, Any]:
    """The JSON for ``/detokenize``."""
    sent: dict[str, Any] = {"model": model, "tokens": ids}
    if dialect.name == "openai":
        sent["skip_special_tokens"] = False  # SGLang would leave them out
    return sent


def template_body(dialect: ServerDialect, model: str, request: Request) -> dict[str, Any]:
    """The JSON for llama.cpp's ``/apply-template``."""
    tools = {"tools": tool_views(request.callable_tools)} if request.callable_tools else {}
    return {"model": model, **chat(dialect, request), **tools}


def pieces_body(model: str, request: Request, prompt: str | None) -> dict[str, Any]:
    """The JSON for ``/tokenize`` as llama.cpp has it, which takes ids as well. *prompt*: the messages', written out."""
    content = prompt if request.messages is not None else request.prompt
    return {
        "model": model,
        "content": list(request.prompt_ids or ()) if content is None else content,
        "add_special": content is not None and request.add_special_tokens,
        "parse_special": True,  # as in the prompt of a completion
        "with_pieces": True,
    }


def read_pieces(answer: bytes) -> Tokenized:
    """Raises `StreamError`."""
    pieces = read(answer, _Pieces).tokens
    names = [
        each.piece if isinstance(each.piece, str) else "".join(f"<0x{byte:02X}>" for byte in each.piece)
        for each in pieces
    ]
    try:
        whole = b"".join(each.piece.encode() if isinstance(each.piece, str) else bytes(each.piece) for each in pieces)
    except ValueError as error:
        raise StreamError(f"a token's bytes that are none ({error})") from error
    return Tokenized([each.id for each in pieces], names, whole.decode("utf-8", "replace"))


# ------------------------------------------------------------------------------------------ how likely a prompt is


def score_body(dialect: ServerDialect, model: str, request: Request) -> dict[str, Any]:
    """The JSON for ``/completions`` that asks for no more than the prompt's log-probabilities, as far as can be."""
    prompt = list(request.prompt_ids or ()) if request.prompt is None else request.prompt
    sent: dict[str, Any] = {"model": model, "prompt": prompt, "return_token_ids": True}
    count = request.sampling.logprobs or 0
    if dialect.name == "penstock":
        return sent | {"max_tokens": 0, "echo": True, "logprobs": count}
    return sent | {"max_tokens": 1, "temperature": 0, "prompt_logprobs": count}


class _Likely(msgspec.Struct, gc=False):
    logprob: float | None = None
    decoded_token: str | None = None


class Scored(msgspec.Struct):
    """What a server tells of a prompt."""

    prompt_logprobs: list[dict[str, _Likely] | None] | None = None
    """vLLM's: by token id."""
    prompt_token_ids: list[int] | None = None
    token_ids: list[int] | None = None
    logprobs: msgspec.Raw = msgspec.Raw(b"null")
    """Of an echoed prompt."""

    @property
    def ids(self) -> list[int] | None:
        """The prompt's tokens, where they are told."""
        return self.prompt_token_ids or (self.token_ids if self.prompt_logprobs is None else None)

    def entries(self, ids: list[int], count: int) -> tuple[list[str | None], list[Logprob | None]]:
        """Of each of the prompt's tokens *ids* the text where it is told, and the log-probability, which the first one
        has not; with alternatives if *count* is not 0. Raises `StreamError`."""
        texts: list[str | None] = [None]
        entries: list[Logprob | None] = [None]
        if self.prompt_logprobs is not None:
            for id, likely in zip(ids[1:], self.prompt_logprobs[1:], strict=False):
                texts.append((entry := _by_id(likely or {}, id)).text)
                entries.append(entry if count else Logprob(entry.logprob, (), entry.text))
            scored = len(self.prompt_logprobs)
        else:
            try:
                tokens = read_logprobs(self.logprobs)
            except Malformed as error:
                raise StreamError(f"log-probabilities that cannot be read ({error})") from error
            for token in tokens[1:]:
                top = tuple(TopLogprob(UNKNOWN_ID, each.token, _sure(each.logprob)) for each in token.top_logprobs)
                texts.append(token.token)
                entries.append(Logprob(_sure(token.logprob), top if count else (), token.token))
            texts[0] = tokens[0].token if tokens else None
            scored = len(tokens)
        if not ids or scored != len(ids):
            raise StreamError(f"log-probabilities of {scored} tokens for a prompt of {len(ids)}")
        return texts, entries


class _Scores(msgspec.Struct):
    choices: list[Scored]


def read_scores(answer: bytes) -> Scored:
    """Raises `StreamError`."""
    choices = read(answer, _Scores).choices
    if len(choices) != 1:
        raise StreamError(f"{len(choices)} choices for one prompt")
    return choices[0]


def _by_id(likely: dict[str, _Likely], id: int) -> Logprob:
    if (chosen := likely.get(str(id))) is None:
        raise StreamError("no log-probability of a token of the prompt")
    top = [
        TopLogprob(int(other), whole(each.decoded_token or ""), _sure(each.logprob))
        for other, each in likely.items()
        if other.isdecimal()
    ]
    top.sort(key=lambda each: (-each.logprob, each.id))
    return Logprob(_sure(chosen.logprob), tuple(top), whole(chosen.decoded_token or ""))


def _sure(logprob: float | None) -> float:
    return NEVER if logprob is None else logprob
