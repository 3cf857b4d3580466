"""An OpenAI-compatible server whose model is perfect: it does what it is asked, and nothing else.

It answers as vLLM does (``/version``, ``/tokenize``, token ids, constraints), so that the upstream engine can use
everything it has. The model is a handful of rules over the conversation: it calls the tool that is asked for with
arguments that obey its schema, fills a schema with what the text names, reports what a tool answered, and says what it
is told to say. What a client misses from it, the protocol between has lost.

``python -m tests.clients.scripted PORT`` serves it alone.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import itertools
import json
import math
import re
import struct
import sys
import threading
import time
import zlib
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

CHAT, EMBED = "scripted", "scripted-embed"
CONTEXT = 65_536
DIMENSIONS = 64
#: Seconds from one token to the next, so that each comes by itself.
PACE = 0.03
#: So deep in a schema only what has to be is filled in.
DEEP = 4

# ------------------------------------------------------------------------------------------ tokens

_PIECE = re.compile(r" ?\w+|\s|[^\w\s]")


class Vocabulary:
    """Words and signs as tokens; an id is given with a token's first use."""

    def __init__(self) -> None:
        self._ids: dict[str, int] = {}
        self._pieces: list[str] = []

    def encode(self, text: str) -> list[int]:
        return [self._id(piece) for piece in _PIECE.findall(text)]

    def pieces(self, ids: list[int]) -> list[str]:
        """Raises `Refused` for an id that is none."""
        if bad := [each for each in ids if not 0 <= each < len(self._pieces)]:
            raise Refused(f"Token id {bad[0]} is out of vocabulary")
        return [self._pieces[each] for each in ids]

    def _id(self, piece: str) -> int:
        if piece not in self._ids:
            self._ids[piece] = len(self._pieces)
            self._pieces.append(piece)
        return self._ids[piece]


VOCABULARY = Vocabulary()


class Refused(Exception):
    """A request that gets a 400 (or *status*), in vLLM's shape."""

    def __init__(self, message: str, status: int = 400, kind: str = "BadRequestError") -> None:
        super().__init__(message)
        self.status, self.kind = status, kind

    @property
    def body(self) -> dict[str, Any]:
        return {"error": {"message": str(self), "type": self.kind, "param": None, "code": self.status}}


# ------------------------------------------------------------------------------------------ what a text names

_NAME = r"[A-Z][\w'’]*(?:(?:, | )[A-Z][\w'’]*)*"
_NO_NAME = re.compile(
    "A|An|And|Answer|Are|Calculate|Call|Can|Create|Do|Extract|For|Generate|Give|Have|Hello|Hi|How|I|Is|It|Make|My|"
    "Please|Say|Should|Tell|The|Then|This|Use|What|When|Where|Which|Who|Write|You|Your"
)


class Named:
    """Values for a schema, taken from *text* in its order: what is quoted, names, numbers."""

    def __init__(self, text: str) -> None:
        self.text = text
        self._quoted = re.findall(r"[\"“]([^\"”]+)[\"”]|(?<!\w)'([^']+)'(?!\w)|`([^`]+)`", text)
        self._strings = [next(filter(None, groups)) for groups in self._quoted] or self.places() or self._names()
        self._numbers = re.findall(r"(?<![\w.])-?\d+(?:\.\d+)?", text)

    def places(self) -> list[str]:
        found = re.findall(rf"\b(?:in|of|for|at|to|named|called) ({_NAME})", self.text)
        return [part for each in found for part in re.split(r" and ", each)]

    def _names(self) -> list[str]:
        return [each for each in re.findall(_NAME, self.text) if not _NO_NAME.fullmatch(each)]

    def string(self) -> str:
        return self._strings.pop(0) if self._strings else self.text.strip()[:60] or "nothing"

    def number(self) -> float:
        return float(self._numbers.pop(0)) if self._numbers else 1.0


def instance(schema: Any, named: Named, root: Any = None, depth: int = 0) -> Any:
    """A value that obeys *schema* (JSON Schema), with what the text names."""
    if not isinstance(schema, dict):
        return named.string()
    root = schema if root is None else root
    if "$ref" in schema:
        target = root
        for key in filter(None, schema["$ref"].lstrip("#").split("/")):
            target = target[key]
        return instance(target, named, root, depth)
    if "const" in schema:
        return schema["const"]
    if "enum" in schema:
        return chosen([each for each in schema["enum"] if each is not None], named.text)
    if every := schema.get("allOf"):
        merged: dict[str, Any] = {key: value for key, value in schema.items() if key != "allOf"}
        for each in every:
            merged |= each
        return instance(merged, named, root, depth)
    if options := schema.get("anyOf") or schema.get("oneOf"):
        return instance(next((each for each in options if each.get("type") != "null"), options[0]), named, root, depth)
    kind = schema.get("type", "object" if "properties" in schema else "string")
    match kind[0] if isinstance(kind, list) else kind:
        case "object":
            properties = schema.get("properties", {})
            # What need not be is left out, unless nothing has to be.
            wanted = schema.get("required") or [name for name in properties if depth < DEEP]
            return {name: instance(properties.get(name, {}), named, root, depth + 1) for name in wanted}
        case "array":
            items = schema.get("prefixItems") or [schema.get("items", {})] * max(1, schema.get("minItems", 1))
            return [instance(each, named, root, depth + 1) for each in items]
        case "integer":
            return int(within(named.number(), schema))
        case "number":
            return within(named.number(), schema)
        case "boolean":
            return True
        case "null":
            return None
    if pattern := schema.get("pattern"):
        return matching(pattern)
    formats = {"date": "2026-01-31", "date-time": "2026-01-31T12:00:00Z", "time": "12:00:00Z"}
    return formats.get(schema.get("format", "")) or named.string()[: schema.get("maxLength")]


def within(number: float, schema: dict[str, Any]) -> float:
    return min(max(number, schema.get("minimum", number)), schema.get("maximum", number))


def chosen(options: list[Any], text: str) -> Any:
    """The option that *text* speaks of; else the first."""
    return next((each for each in options if str(each).lower() in text.lower()), options[0])


def matching(pattern: str) -> str:
    """A text that the regular expression *pattern* matches: of every choice the first, of every repetition the least
    (but one). Raises `Refused`."""
    try:
        return "".join(_least(re._parser.parse(pattern)))  # type: ignore[attr-defined]
    except re.error as error:
        raise Refused(f"Invalid regex: {error}") from None


def _least(parsed: Any) -> Iterator[str]:
    for kind, value in parsed:
        match str(kind):
            case "LITERAL":
                yield chr(value)
            case "ANY":
                yield "a"
            case "NOT_LITERAL":
                yield "b" if value == ord("a") else "a"
            case "IN":
                yield _member(*value[0])
            case "MAX_REPEAT" | "MIN_REPEAT":
                yield "".join(_least(value[2])) * max(value[0], min(1, value[1]))
            case "SUBPATTERN":
                yield from _least(value[-1])
            case "BRANCH":
                yield from _least(value[1][0])


def _member(kind: Any, value: Any) -> str:
    match str(kind):
        case "RANGE":
            return chr(value[0])
        case "LITERAL":
            return chr(value)
    return {"CATEGORY_DIGIT": "1", "CATEGORY_SPACE": " "}.get(str(value), "a")


# ------------------------------------------------------------------------------------------ the perfect model


@dataclass
class Call:
    """Of a function, with its arguments as JSON."""

    name: str
    arguments: str
    id: int = field(default_factory=itertools.count(1).__next__, init=False)


@dataclass
class Said:
    """A reply before it is cut into tokens."""

    text: str = ""
    calls: list[Call] = field(default_factory=list)
    thought: str = ""


CAPITALS = {"France": "Paris", "Italy": "Rome", "Japan": "Tokyo", "Spain": "Madrid", "Austria": "Vienna"}


def known(text: str) -> str | None:
    """The answer to the last question in *text*, where it is one of those that the model knows."""
    answers = [(match.end(), CAPITALS[match[1]]) for match in re.finditer(rf"capital of ({'|'.join(CAPITALS)})", text)]
    answers += [(match.end(), str(int(match[1]) + int(match[2]))) for match in re.finditer(r"(\d+) ?\+ ?(\d+)", text)]
    return max(answers)[1] if answers else None


def content_of(message: dict[str, Any]) -> str:
    content = message.get("content") or ""
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)


def talk(body: dict[str, Any]) -> Said:
    """The reply to a chat: what the request says it has to be, else what its last turn asks for. A first sentence
    'Think "…".' says what is thought before."""
    messages = body["messages"]
    last = max((at for at, each in enumerate(messages) if each["role"] == "user"), default=-1)
    asked = content_of(messages[last]) if last >= 0 else ""
    asked = re.sub(r"<system-reminder>.*?</system-reminder>", "", asked, flags=re.DOTALL)  # agents put them around it
    since = [each for each in messages[last + 1 :] if each["role"] in ("assistant", "tool")]
    thought = ""
    if thinks := re.match(r"Think [\"'](.+?)[\"']\. ", asked):
        thought, asked = thinks[1], asked[thinks.end() :]
    if (tool := tool_for(body, asked, since)) is not None:
        return Said(calls=calls_of(tool, asked, body.get("parallel_tool_calls") is not False), thought=thought)
    if (text := constrained(body, Named(asked))) is not None:
        return Said(text, thought=thought)
    if results := [content_of(each) for each in since if each["role"] == "tool"]:
        return Said(f"The tool says: {' and '.join(results)}", thought=thought)
    text = edit(asked, messages) or quoted(asked) or told(asked) or known(asked)
    return Said(text or f"You asked me this. {asked[:200]} I have answered.", thought=thought)


def tool_for(body: dict[str, Any], asked: str, since: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The tool that is called, if one is: one that has to be, or that the question speaks of and has not answered."""
    tools = [tool["function"] for tool in body.get("tools") or ()]
    choice = body.get("tool_choice", "auto")
    if isinstance(choice, dict):
        return next(tool for tool in tools if tool["name"] == choice["function"]["name"])
    if choice == "required":
        called = [call["function"]["name"] for each in since for call in each.get("tool_calls") or ()]
        tools = [tool for tool in tools if tool["name"] not in called] or tools
    elif choice == "none" or since or told(asked) or quoted(asked):
        return None
    tool = max(tools, key=lambda each: relevance(each, asked), default=None)
    return tool if tool and (choice == "required" or relevance(tool, asked)) else None


def relevance(tool: dict[str, Any], asked: str) -> int:
    """How many words *tool* and the question share; its name counts double, and where it is named whole, before all."""
    words = set(re.findall(r"[a-z]{4,}", asked.lower().replace("_", " "))) - {"what", "with", "this", "that", "tool"}
    name = set(re.findall(r"[a-z]{4,}", tool["name"].lower().replace("_", " ")))
    about = set(re.findall(r"[a-z]{4,}", (tool.get("description") or "").lower()))
    named = re.search(rf"\b{re.escape(tool['name'])}\b", asked) is not None
    return 100 * named + 2 * len(words & name) + len(words & about)


def calls_of(tool: dict[str, Any], asked: str, several: bool) -> list[Call]:
    """One call, or one for each place that is asked about where the tool takes one."""
    schema = tool.get("parameters") or {}
    one_text = [each.get("type") for each in schema.get("properties", {}).values()] == ["string"]
    places = re.findall(rf"\bin ({_NAME})", asked) if several and one_text else []
    texts = [f"in {place}" for place in places] if len(places) > 1 else [asked]
    values = [instance(schema, Named(text)) if schema.get("properties") else {} for text in texts]
    return [Call(tool["name"], json.dumps(value, ensure_ascii=False)) for value in values]


def told(asked: str) -> str | None:
    """What it is told to say, word for word."""
    found = re.search(
        r"\b(?:say|reply|answer|respond)\b[^\"“‘'`\n]{0,40}[\"“‘'`](.+?)[\"”’'`]", asked, re.IGNORECASE | re.DOTALL
    )
    return found[1] if found else None


def quoted(asked: str) -> str | None:
    """What the documents say that came with the question, where some did."""
    found = re.findall(r"<source [^>]*>([^<]+)</source>", asked)
    return f"The documents say: {' '.join(each.strip() for each in found)}" if found else None


def edit(asked: str, messages: list[dict[str, Any]]) -> str | None:
    """The change of a file that an editor asks for: 'replace `a` with `b` in `file`', as aider wants it."""
    wanted = re.search(r"replace `(.+?)` with `(.+?)` in `(.+?)`", asked)
    if wanted is None or not any("<<<<<<< SEARCH" in content_of(each) for each in messages):
        return None
    old, new, name = wanted.groups()
    return f"{name}\n```python\n<<<<<<< SEARCH\n{old}\n=======\n{new}\n>>>>>>> REPLACE\n```\n"


def constrained(body: dict[str, Any], named: Named) -> str | None:
    """The reply where the request says which texts it may be: OpenAI's response_format, vLLM's fields."""
    wanted = body.get("response_format") or {}
    limits = dict(body.get("structured_outputs") or {})
    limits |= {
        name: body[f"guided_{name}"] for name in ("json", "regex", "choice", "grammar") if f"guided_{name}" in body
    }
    if wanted.get("type") == "json_schema":
        limits["json"] = wanted["json_schema"]["schema"]
    elif wanted.get("type") == "json_object":
        # Without a schema it is described in words, mostly as one.
        keys = [each for each in re.findall(r"['\"`](\w+)['\"`]", named.text) if "key" in named.text] or ["answer"]
        limits["json"] = described(body) or {"type": "object", "properties": {key: {"type": "string"} for key in keys}}
    if (schema := limits.get("json")) is not None:
        schema = json.loads(schema) if isinstance(schema, str) else schema
        return json.dumps(instance(schema, named), ensure_ascii=False)
    if "choice" in limits:
        return str(chosen(limits["choice"], named.text))
    if "regex" in limits:
        return matching(limits["regex"])
    if "grammar" in limits:
        return str(chosen(re.findall(r'"([^"]+)"', limits["grammar"]), named.text))
    if re.search("json", json.dumps(body.get("messages")), re.IGNORECASE) and (schema := described(body)):
        return json.dumps(instance(schema, named), ensure_ascii=False)
    return None


def described(body: dict[str, Any]) -> Any:
    """A JSON Schema that a message holds."""
    text = "\n".join(content_of(each) for each in body.get("messages", ()))
    decoder = json.JSONDecoder()
    for at in (match.start() for match in re.finditer(r"\{", text)):
        with contextlib.suppress(ValueError):
            found, _ = decoder.raw_decode(text, at)
            if isinstance(found, dict) and "properties" in found:
                return found
    return None


# ------------------------------------------------------------------------------------------ tokens of a reply


@dataclass(eq=False)
class Token:
    """One of a reply: its delta, what it stands for, and how likely it was."""

    id: int
    text: str
    delta: dict[str, Any]

    def chat_logprob(self, top: int) -> dict[str, Any]:
        own = {"token": self.text, "logprob": -0.01, "bytes": list(self.text.encode())}
        others = [{"token": f"{self.text}~{i}", "logprob": -5.0 - i, "bytes": None} for i in range(1, top)]
        return {**own, "top_logprobs": [own, *others] if top else []}


def cut(said: Said, limit: int | None, stop: list[str]) -> tuple[list[Token], str, str | None]:
    """The reply's tokens, why it ended, and the stop string that ended it."""
    text, hit = said.text, None
    if found := [(at, each) for each in stop if (at := text.find(each)) >= 0]:
        at, hit = min(found)
        text = text[:at]
    tokens = [Token(each, piece, {"reasoning": piece}) for each, piece in _tokens(said.thought)]
    tokens += [Token(each, piece, {"content": piece}) for each, piece in _tokens(text)]
    for index, call in enumerate(said.calls):
        head = {"index": index, "id": f"call_{call.id}", "type": "function"}
        tokens += [
            Token(each, piece, {"tool_calls": [{**(head if not at else {"index": index}), "function": {
                **({"name": call.name} if not at else {}), "arguments": piece}}]})
            for at, (each, piece) in enumerate(_tokens(call.arguments))
        ]  # fmt: skip
    if limit is not None and len(tokens) > limit:
        return tokens[:limit], "length", None
    return tokens, "tool_calls" if said.calls else "stop", hit


def _tokens(text: str) -> list[tuple[int, str]]:
    ids = VOCABULARY.encode(text)
    return list(zip(ids, VOCABULARY.pieces(ids), strict=True))


# ------------------------------------------------------------------------------------------ routes


async def chat(request: Request) -> Response:
    body = await read(request, CHAT)
    prompt = VOCABULARY.encode(json.dumps([body["messages"], body.get("tools")], ensure_ascii=False))
    limit = fits(prompt, body.get("max_completion_tokens") or body.get("max_tokens"))
    tokens, reason, hit = cut(talk(body), limit, stops(body))
    top = body.get("top_logprobs") or 0 if body.get("logprobs") else None

    def choice(some: list[Token], finish: str | None, delta: dict[str, Any]) -> dict[str, Any]:
        logprobs = None if top is None or not some else {"content": [each.chat_logprob(top) for each in some]}
        ids = {"token_ids": [each.id for each in some]} if body.get("return_token_ids") else {}
        return {
            "index": 0,
            "logprobs": logprobs,
            "finish_reason": finish,
            "stop_reason": finish and hit,
            **delta,
            **ids,
        }

    if not body.get("stream"):
        message = {"role": "assistant", "content": "".join(each.delta.get("content", "") for each in tokens) or None}
        if thought := "".join(each.delta.get("reasoning", "") for each in tokens):
            message["reasoning"] = thought
        if calls := joined(tokens):
            message["tool_calls"] = calls
        return JSONResponse(envelope("chat.completion", [choice(tokens, reason, {"message": message})], prompt, tokens))
    chunks = [choice([], None, {"delta": {"role": "assistant", "content": ""}})]
    chunks += [choice([each], None, {"delta": each.delta}) for each in tokens]
    chunks.append(choice([], reason, {"delta": {}}))
    return stream("chat.completion.chunk", chunks, body, prompt, tokens)


def joined(tokens: list[Token]) -> list[dict[str, Any]]:
    calls: list[dict[str, Any]] = []
    for part in (part for each in tokens for part in each.delta.get("tool_calls", ())):
        if "id" in part:
            calls.append({"id": part["id"], "type": "function", "function": dict(part["function"])})
        else:
            calls[-1]["function"]["arguments"] += part["function"]["arguments"]
    return calls


async def complete(request: Request) -> Response:
    body = await read(request, CHAT)
    echo, wanted = body.get("echo"), body.get("logprobs") is not None
    prompts, replies, choices = [], [], []
    for index, ids in enumerate(prompts_of(body["prompt"])):
        prompt = [Token(each, piece, {}) for each, piece in zip(ids, VOCABULARY.pieces(ids), strict=True)]
        text = "".join(each.text for each in prompt)
        limit = fits(ids, 16 if body.get("max_tokens") is None else body["max_tokens"])
        answer = constrained(body, Named(text)) or f" {known(text) or 'and so it went on, word by word, to its end.'}\n"
        tokens, reason, hit = cut(Said(answer), limit, stops(body))
        parts = ([prompt] if echo else []) + ([[each] for each in tokens] if body.get("stream") else [tokens])
        for part in [*parts, []]:
            end = {"finish_reason": reason, "stop_reason": hit} if not part else {"finish_reason": None}
            choice = {"index": index, "text": "".join(each.text for each in part), "logprobs": None, **end}
            if wanted and part:
                choice["logprobs"] = completion_logprobs(part, prompt if part is prompt else [])
            if body.get("return_token_ids"):
                choice["token_ids"] = [] if part is prompt else [each.id for each in part]
            choices.append(choice)
        if body.get("prompt_logprobs") is not None:
            choices[-1]["prompt_logprobs"] = prompt_logprobs(prompt)
        prompts += ids
        replies += tokens
    if not body.get("stream"):
        return JSONResponse(envelope("text_completion", [*map(folded, grouped(choices))], prompts, replies))
    return stream("text_completion", choices, body, prompts, replies)


def prompts_of(prompt: Any) -> list[list[int]]:
    """The token ids of each: a text, token ids, or several of one of them."""
    several = prompt if isinstance(prompt, list) and not isinstance(prompt[0], int) else [prompt]
    return [VOCABULARY.encode(each) if isinstance(each, str) else each for each in several]


def grouped(choices: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    return [list(parts) for _, parts in itertools.groupby(choices, key=lambda each: each["index"])]


def folded(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """A choice's parts, as they would be streamed, in one."""
    whole = dict(parts[-1], text="".join(each["text"] for each in parts))
    if told := [each["logprobs"] for each in parts if each["logprobs"]]:
        whole["logprobs"] = {name: [value for each in told for value in each[name]] for name in told[0]}
    if "token_ids" in whole:
        whole["token_ids"] = [id for each in parts for id in each["token_ids"]]
    return whole


def completion_logprobs(tokens: list[Token], prompt: list[Token]) -> dict[str, Any]:
    """Of *tokens*, which are the *prompt* or, where that is empty, some of the reply."""
    found: dict[str, Any] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
    for at, token in enumerate(tokens):
        likely, best = likelihood(prompt, at) if prompt else (-0.01, token.text)
        first = bool(prompt) and at == 0  # of which nothing can be said
        found["tokens"].append(token.text)
        found["token_logprobs"].append(None if first else likely)
        found["top_logprobs"].append(
            None if first else {best: likely if best == token.text else -0.01, token.text: likely}
        )
        found["text_offset"].append(0)
    return found


def likelihood(prompt: list[Token], at: int) -> tuple[float, str]:
    """How likely token *at* of a prompt is to a model that knows the answers, and which is the likeliest there."""
    text = "".join(each.text for each in prompt[:at])
    question, answer_word, begun = text.rpartition("Answer:")
    if answer_word and (answer := known(question)) is not None and f" {answer}".startswith(begun):
        rest = f" {answer}"[len(begun) :]
        best = _PIECE.match(rest)
        if best is not None:
            return (-0.01 if best[0] == prompt[at].text else -10.0), best[0]
    return -1.0, prompt[at].text


def prompt_logprobs(prompt: list[Token]) -> list[Any]:
    """As vLLM tells them: by token id."""
    found: list[Any] = [None]
    for at in range(1, len(prompt)):
        likely, best = likelihood(prompt, at)
        entries = [(VOCABULARY.encode(best)[0], -0.01, 1, best)] if best != prompt[at].text else []
        entries.append((prompt[at].id, likely, 2 if entries else 1, prompt[at].text))
        found.append({str(id): {"logprob": p, "rank": rank, "decoded_token": text} for id, p, rank, text in entries})
    return found


async def embed(request: Request) -> Response:
    body = await read(request, EMBED)
    inputs = body["input"]
    if isinstance(inputs, str) or (inputs and isinstance(inputs[0], int)):
        inputs = [inputs]
    texts = ["".join(VOCABULARY.pieces(each)) if isinstance(each, list) else each for each in inputs]
    tokens = [fits_all(VOCABULARY.encode(text)) for text in texts]
    size = body.get("dimensions") or DIMENSIONS
    vectors = [vector(text, size) for text in texts]
    if body.get("encoding_format") == "base64":
        told: list[Any] = [base64.b64encode(struct.pack(f"<{size}f", *each)).decode() for each in vectors]
    else:
        told = vectors
    data = [{"object": "embedding", "index": at, "embedding": each} for at, each in enumerate(told)]
    count = sum(tokens)
    usage = {"prompt_tokens": count, "total_tokens": count}
    return JSONResponse({"object": "list", "model": EMBED, "data": data, "usage": usage})


def vector(text: str, size: int) -> list[float]:
    """Texts that share words are near each other."""
    counts = [0.0] * size
    for word in re.findall(r"\w+", text.lower()) or [""]:
        counts[zlib.crc32(word.encode()) % size] += 1
    length = math.hypot(*counts)
    return [each / length for each in counts]


async def tokenize(request: Request) -> Response:
    body = await read(request, CHAT)
    text = body["prompt"] if "prompt" in body else json.dumps(body["messages"], ensure_ascii=False)
    ids = VOCABULARY.encode(text)
    names = VOCABULARY.pieces(ids) if body.get("return_token_strs") else None
    return JSONResponse({"count": len(ids), "max_model_len": CONTEXT, "tokens": ids, "token_strs": names})


async def detokenize(request: Request) -> Response:
    body = await read(request, CHAT)
    return JSONResponse({"prompt": "".join(VOCABULARY.pieces(body["tokens"]))})


async def models(request: Request) -> Response:
    card = {"object": "model", "created": 0, "owned_by": "vllm", "max_model_len": CONTEXT}
    return JSONResponse({"object": "list", "data": [{"id": name, **card} for name in (CHAT, EMBED)]})


async def version(request: Request) -> Response:
    return JSONResponse({"version": "0.0.0 (scripted)"})


async def read(request: Request, model: str) -> dict[str, Any]:
    body: dict[str, Any] = await request.json()
    if body.get("model", model) != model:
        raise Refused(f"The model `{body['model']}` does not do this.", 404, "NotFoundError")
    return body


def stops(body: dict[str, Any]) -> list[str]:
    stop = body.get("stop") or []
    return [stop] if isinstance(stop, str) else stop


def fits(prompt: list[int], limit: int | None) -> int:
    """How many tokens the reply may have. Raises `Refused`, in vLLM's words."""
    if len(prompt) + (limit or 1) > CONTEXT:
        raise Refused(
            f"This model's maximum context length is {CONTEXT} tokens. However, you requested {limit or 1} output "
            f"tokens and your prompt contains {len(prompt)} input tokens. Please reduce the length of the input prompt."
        )
    return CONTEXT - len(prompt) if limit is None else limit


def fits_all(ids: list[int]) -> int:
    fits(ids, 1)
    return len(ids)


def usage_of(prompt: list[int], tokens: list[Token]) -> dict[str, int]:
    return {
        "prompt_tokens": len(prompt),
        "completion_tokens": len(tokens),
        "total_tokens": len(prompt) + len(tokens),
    }


def envelope(kind: str, choices: list[Any], prompt: list[int], tokens: list[Token] | None) -> dict[str, Any]:
    head = {"id": "chatcmpl-scripted", "object": kind, "created": int(time.time()), "model": CHAT, "choices": choices}
    return head if tokens is None else {**head, "usage": usage_of(prompt, tokens)}


def stream(
    kind: str, choices: list[dict[str, Any]], body: dict[str, Any], prompt: list[int], tokens: list[Token]
) -> Response:
    async def events() -> AsyncIterator[str]:
        for each in choices:
            yield f"data: {json.dumps(envelope(kind, [each], prompt, None))}\n\n"
            await asyncio.sleep(PACE)
        if (body.get("stream_options") or {}).get("include_usage"):
            yield f"data: {json.dumps(envelope(kind, [], prompt, tokens))}\n\n"
        yield "data: [DONE]\n\n"

    return StreamingResponse(events(), media_type="text/event-stream")


async def refuse(request: Request, error: Exception) -> Response:
    assert isinstance(error, Refused)
    return JSONResponse(error.body, error.status)


app = Starlette(
    routes=[
        Route("/v1/models", models),
        Route("/v1/chat/completions", chat, methods=["POST"]),
        Route("/v1/completions", complete, methods=["POST"]),
        Route("/v1/embeddings", embed, methods=["POST"]),
        Route("/tokenize", tokenize, methods=["POST"]),
        Route("/detokenize", detokenize, methods=["POST"]),
        Route("/version", version),
    ],
    exception_handlers={Refused: refuse},
)


@contextlib.contextmanager
def scripted(port: int) -> Iterator[str]:
    """The server on *port*, in a thread; its address."""
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=port, log_level="warning"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        while not server.started and thread.is_alive():
            time.sleep(0.01)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join(10)


if __name__ == "__main__":
    uvicorn.run(app, host="127.0.0.1", port=int(sys.argv[1]), log_level="warning")
