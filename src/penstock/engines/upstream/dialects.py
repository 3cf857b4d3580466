"""What the servers have in common, and what each of them calls its own: requests, refusals, what a probe tells."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import msgspec

from penstock.core.bounds import check_form
from penstock.core.errors import (
    ContextLengthExceeded,
    InvalidRequest,
    ModelNotFound,
    PenstockError,
    RequestTooLarge,
    Unsupported,
)
from penstock.core.foreign import Malformed, Mismatch, decode, whole
from penstock.core.job import Message, Request, ResponseFormat, Task, Tool
from penstock.engines.upstream.reply import UpstreamReply
from penstock.engines.upstream.stream import as_count


@dataclass(frozen=True)
class ServerDialect:
    """A kind of server. ``begun_chat``: it continues a final assistant message. ``scores``: it tells how likely the
    tokens of a prompt are. ``unsupported``: request fields that it does not know."""

    name: str
    tells_ids: bool = False
    begun_chat: bool = False
    scores: bool = False
    unsupported: tuple[str, ...] = ()


DIALECTS = {
    "openai": ServerDialect(
        "openai",
        unsupported=(
            "bad_words",
            "ignore_eos",
            "input_type",
            "min_p",
            "min_tokens",
            "repetition_penalty",
            "stop_token_ids",
            "top_k",
        ),
    ),
    "vllm": ServerDialect("vllm", tells_ids=True, begun_chat=True, scores=True, unsupported=("input_type",)),
    "llama": ServerDialect(
        "llama", begun_chat=True, unsupported=("bad_words", "input_type", "min_tokens", "stop_token_ids")
    ),
    "penstock": ServerDialect("penstock", tells_ids=True, begun_chat=True, scores=True),
}
OWNERS = {"penstock": "penstock", "vllm": "vllm", "llamacpp": "llama"}


# ------------------------------------------------------------------------------------------ what a probe tells


class _Meta(msgspec.Struct):
    n_ctx: int | None = None
    n_ctx_train: int | None = None
    n_vocab: int | None = None


class ModelCard(msgspec.Struct):
    """An entry of ``GET /v1/models``, with what vLLM, llama.cpp and Penstock add."""

    id: str
    owned_by: str = ""
    max_model_len: int | None = None
    context_length: int | None = None
    meta: _Meta | None = None
    precision: str = ""
    chat: bool = True
    unsupported: tuple[str, ...] = ()
    tasks: tuple[Task, ...] = ()
    """Empty: it does not say. (A Penstock does, of a model that was loaded once.)"""
    dimensions: int = 0

    @property
    def vocab_size(self) -> int:
        """0: not told."""
        return (self.meta is not None and self.meta.n_vocab) or 0

    @property
    def context(self) -> int:
        """In tokens; 0: not told."""
        found = self.max_model_len or self.context_length
        if not found and self.meta is not None:
            found = self.meta.n_ctx or self.meta.n_ctx_train
        return found or 0


class _ModelList(msgspec.Struct):
    data: list[ModelCard] = []


def read_models(body: bytes) -> list[ModelCard]:
    """Raises `Malformed` for what is no list of models. Of a card, what is not as it has to be counts as not told."""
    try:
        return decode(body, _ModelList).data
    except Mismatch:
        cards = decode(body, dict[str, Any]).get("data")
    if not isinstance(cards, list):
        raise Malformed("without a list of models")
    return [_card(card) for card in cards if isinstance(card, dict) and isinstance(card.get("id"), str)]


def _card(given: dict[str, Any]) -> ModelCard:
    known: dict[str, Any] = {}
    for field in msgspec.structs.fields(ModelCard):
        value = given.get(field.name)
        with contextlib.suppress(msgspec.ValidationError):
            known[field.name] = msgspec.convert(as_count(value) or value, field.type)
    return ModelCard(**{name: value for name, value in known.items() if value is not None})


# ------------------------------------------------------------------------------------------ requests


#: How a call treats what is logged of its reply: there is nothing, or nobody has seen it (anew); it is part of the
#: prompt, as token ids or as text; or the reply is asked for again, and new is what comes behind it (again).
Resume = Literal["anew", "ids", "text", "again"]


def endpoint(sent: dict[str, Any]) -> str:
    """The route that a body is for."""
    return "/chat/completions" if "messages" in sent else "/completions"


def body(
    dialect: ServerDialect,
    model: str,
    context: int,
    request: Request,
    choice: int,
    reply: UpstreamReply,
    resume: Resume,
) -> dict[str, Any]:
    """The request's JSON for one choice."""
    sampling = request.sampling
    logged = 0 if resume == "again" else len(reply.ids)
    sent: dict[str, Any] = {
        "model": model,
        "max_tokens": sampling.max_tokens - logged,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    text = reply.text if resume == "text" else ""
    if resume == "ids":
        prompt = request.prompt_ids if request.prompt_ids is not None else reply.prompt_ids
        sent["prompt"] = [*(prompt or ()), *reply.ids]
    elif request.messages is not None:
        sent |= chat(dialect, request, text) | _tools(dialect, request)
    elif request.prompt is not None:
        sent["prompt"] = request.prompt + text
    else:
        # Ids and a text in one prompt: only llama.cpp takes that.
        sent["prompt"] = [*(request.prompt_ids or ()), *([text] if text else ())]
    if dialect.tells_ids:
        sent["return_token_ids"] = True
    if dialect.name == "llama":
        sent["timings_per_token"] = True
    sent |= _format(dialect, request)
    sent |= _sampling(dialect, request, context, in_chat="messages" in sent)
    if (least := sampling.min_tokens - logged) > 0:
        sent["min_tokens"] = least
    if sampling.seed is not None:
        sent["seed"] = _seed(sampling.seed, choice, logged)
        if dialect.name == "llama":
            sent["seed"] %= 2**32 - 1  # it has 32 bits; all ones mean "at random"
    return sent


def chat(dialect: ServerDialect, request: Request, text: str = "") -> dict[str, Any]:
    """The messages, what the template is told beside them, and that the last one is the reply's beginning, where it is
    (*text* goes on with it)."""
    messages = [_message(dialect, message) for message in request.messages or ()]
    sent: dict[str, Any] = {"messages": messages}
    if request.continue_final:
        messages[-1]["content"] = (messages[-1]["content"] or "") + text
    elif text:
        messages.append({"role": "assistant", "content": text})
    if text or request.continue_final:
        sent |= {"add_generation_prompt": False, "continue_final_message": True}
    return sent | _template(dialect, request)


def _template(dialect: ServerDialect, request: Request) -> dict[str, Any]:
    """How much to think, and what else the template is told."""
    told, effort = dict(request.chat_template_kwargs), request.reasoning_effort
    sent: dict[str, Any] = {}
    if effort is not None and dialect.name in ("vllm", "llama"):
        # These leave it to the template: most know only whether to think, and the servers' fields not all the words.
        thinks = effort not in ("none", "minimal")
        told = {"enable_thinking": thinks} | ({"reasoning_effort": effort} if thinks else {}) | told
    elif effort is not None:
        sent["reasoning_effort"] = effort
    return sent | ({"chat_template_kwargs": told} if told else {})


def _format(dialect: ServerDialect, request: Request) -> dict[str, Any]:
    if (wanted := request.response_format) is None:
        return {}
    if wanted.json_schema is None:
        return _text_format(dialect, wanted)
    if dialect.name == "llama" and request.messages is None:
        return {"json_schema": wanted.json_schema}
    if wanted.type == "json_object":
        return {"response_format": {"type": "json_object"}}
    schema = {"name": "reply", "strict": True, "schema": wanted.schema}
    return {"response_format": {"type": "json_schema", "json_schema": schema}}


def _text_format(dialect: ServerDialect, wanted: ResponseFormat) -> dict[str, Any]:
    """A form that is not JSON. llama.cpp takes its own kind of grammar; OpenAI's API has nothing like it.

    An empty one is refused: to a server it would mean that anything will do.
    """
    check_form(wanted, "response_format")
    value: Any = {"regex": wanted.pattern, "choice": list(wanted.choices), "grammar": wanted.grammar}[wanted.type]
    if dialect.tells_ids:  # vLLM, and Penstock
        return {"structured_outputs": {wanted.type: value}}
    if dialect.name == "llama" and wanted.type == "choice":
        return {"grammar": "root ::= " + " | ".join(json.dumps(each, ensure_ascii=False) for each in value)}
    if dialect.name == "llama" and wanted.type == "grammar" and "::=" in value:
        return {"grammar": value}
    raise Unsupported(f"The upstream server cannot hold a reply to this {wanted.type}.", param="response_format")


def _tools(dialect: ServerDialect, request: Request) -> dict[str, Any]:
    if not request.tools:
        return {}
    tools, choice = request.tools, request.tool_choice
    sent: dict[str, Any] = {"tool_choice": choice}
    if request.tool_name is not None:
        if dialect.name == "llama":  # it cannot be told a name; so it has no other to choose
            tools = tuple(tool for tool in tools if tool.name == request.tool_name)
        else:
            sent["tool_choice"] = {"type": "function", "function": {"name": request.tool_name}}
    sent["tools"] = tool_views(tools)
    if not request.parallel_tool_calls:
        sent["parallel_tool_calls"] = False
    return sent


def tool_views(tools: Sequence[Tool]) -> list[dict[str, Any]]:
    """*tools* as OpenAI's API has them."""
    return [
        {
            "type": "function",
            "function": {"name": tool.name, "description": tool.description, "parameters": tool.parameters},
        }
        for tool in tools
    ]


def _message(dialect: ServerDialect, message: Message) -> dict[str, Any]:
    # Servers that render with the model's own template would lose a role that it does not know.
    system = message.role == "developer" and dialect.name in ("vllm", "llama")
    sent: dict[str, Any] = {"role": "system" if system else message.role, "content": message.content}
    if message.name is not None:
        sent["name"] = message.name
    if message.reasoning and dialect.name != "openai":  # OpenAI's API has no such field
        sent |= {"reasoning": message.reasoning, "reasoning_content": message.reasoning}
    if message.tool_calls:
        sent["content"] = message.content or None
        sent["tool_calls"] = [
            {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            for call in message.tool_calls
        ]
    if message.tool_call_id is not None:
        sent["tool_call_id"] = message.tool_call_id
    return sent


_NEUTRAL = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}


def _sampling(dialect: ServerDialect, request: Request, context: int, *, in_chat: bool) -> dict[str, Any]:
    """The sampling fields that ask for something; the others are the server's and its model's to choose."""
    sampling = request.sampling
    sent = {name: value for name in _NEUTRAL if (value := getattr(sampling, name)) != _NEUTRAL[name]}
    if dialect.name == "llama":
        if "repetition_penalty" in sent:
            sent["repeat_penalty"] = sent.pop("repetition_penalty")
        if "repeat_penalty" in sent or sampling.presence_penalty or sampling.frequency_penalty:
            sent["repeat_last_n"] = context  # penalties count the whole text, not its last 64 tokens
    for name in ("presence_penalty", "frequency_penalty"):
        if value := getattr(sampling, name):
            sent[name] = value
    if sampling.ignore_eos and request.response_format is None and request.tool_choice != "required":
        sent["ignore_eos"] = True  # what must be JSON ends where the JSON ends
    if sampling.stop:
        sent["stop"] = list(sampling.stop)
    for name in ("stop_token_ids", "bad_words"):
        if values := getattr(sampling, name):
            sent[name] = list(values)
    if sampling.logit_bias:
        sent["logit_bias"] = {str(token): value for token, value in sampling.logit_bias.items()}
    if sampling.logprobs is not None:
        if in_chat:
            sent |= {"logprobs": True, "top_logprobs": sampling.logprobs}
        else:
            sent["logprobs"] = sampling.logprobs
    return sent


def _seed(seed: int, choice: int, logged: int) -> int:
    """Random numbers of its own for every choice and every place of resumption: servers begin anew with a request, and
    would otherwise repeat those that the reply began with."""
    if choice == 0 and logged == 0:
        return seed
    digest = hashlib.blake2b(f"{seed} {choice} {logged}".encode(), digest_size=8).digest()
    return int.from_bytes(digest) >> 1


# ------------------------------------------------------------------------------------------ refusals

_CONTEXT = re.compile(
    # The last two are of an input to embed, at text-embeddings-inference and at llama.cpp.
    r"context (length|size|window)|maximum.{0,20}tokens|n_ctx|must have less than \d+ tokens|too large to process",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class UpstreamError:
    """An error as a server reports it, in any of the shapes that are about."""

    message: str
    kind: str = ""
    """Its ``code`` and ``type``, whatever is text of them."""
    status: int = 0
    param: str | None = None

    @classmethod
    def read(cls, value: Any) -> UpstreamError:
        """From the JSON of an error's body, or what is under ``error`` in an event."""
        if isinstance(value, dict) and isinstance(value.get("error"), dict | str):
            value = value["error"]
        if not isinstance(value, dict):
            return cls(_said(value)[:500])
        code, kind, param = value.get("code"), value.get("type"), value.get("param")
        message = value.get("message") or value.get("detail") or "no reason given"
        return cls(
            _said(message)[:2000],
            " ".join(each for each in (code, kind) if isinstance(each, str)),
            code if isinstance(code, int) else 0,
            whole(param) if isinstance(param, str) else None,
        )

    @property
    def about_context(self) -> bool:
        return any(each in self.kind for each in ("context_length_exceeded", "exceed_context_size")) or bool(
            _CONTEXT.search(self.message)
        )

    @property
    def about_batch(self) -> bool:
        """Is an input to embed more than llama.cpp computes at once? It says so with a 500, as if it were broken."""
        return "too large to process" in self.message

    @property
    def about_model(self) -> bool:
        """Is it the model that the server does not have?"""
        return "model_not_found" in self.kind or (self.status == 404 and "model" in self.message.lower())

    @property
    def about_route(self) -> bool:
        """Is it the route, or what it is for?"""
        return self.status in (405, 501) or (self.status == 404 and not self.about_model)

    @property
    def about_limit(self) -> bool:
        """Is ``max_tokens`` more than it can give (perhaps because the prompt leaves no room)?"""
        return self.about_context or self.param == "max_tokens"

    def refusal(self, model: str) -> PenstockError:
        """For the client whose request it refuses."""
        if self.about_context:
            # What the server's own words lack of those that clients look for (see `ContextLengthExceeded.of`).
            known = "Input tokens exceed the configured limit: this model's maximum context length is less."
            return ContextLengthExceeded(f"{self.message} ({known})", param=self.param)
        if "unsupported" in self.kind:
            return Unsupported(self.message, param=self.param)
        if self.about_model:
            return ModelNotFound(
                f"The upstream server does not have the model {model!r}: {self.message}", param="model"
            )
        if self.status == 413:
            return RequestTooLarge(f"It is more than the upstream server takes: {self.message}", param=self.param)
        return InvalidRequest(self.message, param=self.param)


def _said(value: Any) -> str:
    try:
        return whole(str(value))
    except RecursionError:
        return "an error that is nested too deeply"


def describe(names: Sequence[str]) -> str:
    """A few names for a message."""
    return ", ".join(names[:8]) + (", …" if len(names) > 8 else "")
