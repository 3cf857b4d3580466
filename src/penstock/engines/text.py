"""Everything between text and token ids, for any ``tokenizer.json``.

`TextModel` turns a request into prompt ids. `Reply` turns one choice's token ids back into text as they come: it
detokenizes incrementally, holds back what may become a stop string, and knows when the reply ends. Both are pure
functions of their input, so replaying a logged prefix through a new `Reply` rebuilds the state of the old one.
"""

from __future__ import annotations

import datetime
import json
import re
from codecs import utf_8_decode
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn, Protocol

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import numpy as np
import structlog
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

from penstock.core.errors import ContextLengthExceeded, InvalidRequest, ModelLoadError, Unsupported
from penstock.core.events import Logprob, TopLogprob
from penstock.core.foreign import whole
from penstock.core.job import Message, Request, Sampling, Tool
from penstock.core.tasks import Tokenized
from penstock.core.tools import finish_reason

log = structlog.get_logger("penstock.engine")

#: Context length when no file tells one.
DEFAULT_CONTEXT = 2048

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"

_ROLE = re.compile(r"[A-Za-z0-9_.-]{1,64}")

# Code points that Unicode guarantees will never be characters: marks that no real text contains.
_MARKS = tuple(chr(code) for code in range(0xFDD0, 0xFDF0))


# ------------------------------------------------------------------------------------------ detokenizer


def _byte_level_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-in for each byte, inverted: character → byte."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(rest)}


class Detokenizer(Protocol):
    """Token ids in, text out: joined, ``push``es and one final ``flush`` give what decoding all ids at once gives.

    Half a character is never given out; bytes that can no longer become one are U+FFFD.
    """

    def push(self, token: int) -> str: ...

    def flush(self) -> str: ...


class _ByteLevelDetokenizer:
    """Each token is a run of bytes; the text is their UTF-8 decoding."""

    __slots__ = ("_data", "_held", "_texts")

    def __init__(self, texts: list[str | None], data: list[bytes]) -> None:
        self._texts = texts  # by id: the text of tokens that are whole characters, else None
        self._data = data
        self._held = b""  # the beginning of a character

    def push(self, token: int) -> str:
        if not self._held and (text := self._texts[token]) is not None:
            return text
        data = self._held + self._data[token]
        text, used = utf_8_decode(data, "replace", False)
        self._held = data[used:]
        return text

    def flush(self) -> str:
        text = self._held.decode("utf-8", "replace")
        self._held = b""
        return text


class _ByteFallbackDetokenizer:
    """SentencePiece style: tokens are text, except byte tokens ``<0x00>`` … ``<0xFF>``.

    A run of byte tokens is decoded as a whole when it ends: if it is not UTF-8, every byte of it becomes U+FFFD. That
    is what the decoder of ``tokenizers`` does, so nothing of a run can be given out before its end is known.
    """

    __slots__ = ("_data", "_run", "_strip", "_texts")

    def __init__(self, texts: list[str | None], data: list[bytes], strip: int) -> None:
        self._texts = texts  # by id: None for byte tokens
        self._data = data
        self._run = b""
        self._strip = strip  # how many leading spaces the decoder still takes off

    def push(self, token: int) -> str:
        text = self._texts[token]
        if text is None:
            self._run += self._data[token]
            return ""
        if not text:  # a special token: no text, and it does not end a run
            return ""
        if self._run:
            text = self._end_run() + text
        return self._stripped(text) if self._strip else text

    def flush(self) -> str:
        return self._stripped(self._end_run())

    def _end_run(self) -> str:
        run, self._run = self._run, b""
        try:
            return run.decode()
        except UnicodeDecodeError:
            return REPLACEMENT * len(run)

    def _stripped(self, text: str) -> str:
        for _ in range(self._strip):
            if not text:
                return ""
            if text[0] != " ":
                break
            self._strip -= 1
            text = text[1:]
        if text:
            self._strip = 0
        return text


class _WindowDetokenizer:
    """Any other decoder: decode a sliding window of ids with and without its newest ones, and give the difference.

    The window starts a few tokens back, at the start of the text last given out, because decoders may treat the first
    token of a text in a special way.
    """

    __slots__ = ("_decode", "_given", "_ids")

    def __init__(self, decode: Callable[[list[int]], str]) -> None:
        self._decode = decode
        self._ids: list[int] = []
        self._given = 0  # how many of the ids have had their text given out

    def push(self, token: int) -> str:
        self._ids.append(token)
        before, now = self._decode(self._ids[: self._given]), self._decode(self._ids)
        if len(now) <= len(before) or now.endswith(REPLACEMENT) or not now.startswith(before):
            return ""
        self._ids = self._ids[self._given :]
        self._given = len(self._ids)
        return now[len(before) :]

    def flush(self) -> str:
        before, now = self._decode(self._ids[: self._given]), self._decode(self._ids)
        self._given = len(self._ids)
        return now[len(before) :]


# ------------------------------------------------------------------------------------------ one choice's reply


class StopStrings:
    """Finds stop strings across token borders, holding back only what may still become one."""

    __slots__ = ("_firsts", "_held", "_longest", "_stops", "met")

    def __init__(self, stops: Sequence[str]) -> None:
        self.met: str | None = None
        """The one that was met."""
        self._stops = tuple(stops)
        self._longest = max(map(len, stops))
        self._firsts = frozenset(stop[0] for stop in stops)
        self._held = ""

    def push(self, text: str) -> tuple[str, bool]:
        """The text that can be given out now, and whether a stop string was met (the text ends before it).

        Of several stop strings the one that is complete first wins, whatever the tokens' borders are.
        """
        held = self._held + text
        first: tuple[int, int] | None = None
        for stop in self._stops:
            start = held.find(stop)
            if start >= 0 and (first is None or (start + len(stop), start) < first):
                first, self.met = (start + len(stop), start), stop
        if first is not None:
            self._held = ""
            return held[: first[1]], True
        for start in range(max(0, len(held) - self._longest + 1), len(held)):
            if held[start] in self._firsts and any(stop.startswith(held[start:]) for stop in self._stops):
                self._held = held[start:]
                return held[:start], False
        self._held = ""
        return held, False

    def flush(self) -> str:
        held, self._held = self._held, ""
        return held


class Follows(Protocol):
    """What is asked of `penstock.engines.guide.Guide`."""

    over: bool

    @property
    def error(self) -> str | None: ...

    def accept(self, token: int) -> None: ...

    def mask(self, logits: Any) -> None: ...


class Bans:
    """Tokens that a reply must not go on with: its ends before it has ``min_tokens``, and the last token of a text that
    it must not have. Never all that its guide leaves: the guide comes first."""

    def __init__(self, reply: Reply, least: int, ends: Iterable[int], spellings: Iterable[Sequence[int]]) -> None:
        """*spellings*: the forbidden texts in tokens."""
        self._reply = reply
        self._least = least
        self._ends = sorted(ends)
        self._spellings = [(list(spelling[:-1]), spelling[-1]) for spelling in spellings]

    def mask(self, logits: Any) -> None:
        if self._reply.guide is not None:
            self._reply.guide.mask(logits)
        ids = self._reply.ids
        banned = [last for before, last in self._spellings if not before or ids[-len(before) :] == before]
        if len(ids) < self._least:
            banned += self._ends
        values = logits[banned]
        logits[banned] = -np.inf
        if not np.isfinite(logits).any():
            logits[banned] = values


class Reply:
    """One choice of one request, as its tokens come.

    ``finish`` is None until the reply has ended. *limit* is the number of tokens it may have, counted from its start.
    Construct it with the logged *prefix* of an earlier attempt to continue that attempt's reply. A *request* with tools
    ends with ``tool_calls`` when the reply has calls. A *guide* is told of every token, and ends the reply once nothing
    more can follow. *bad_words* are the sampling's in tokens.
    """

    __slots__ = (
        "_detokenizer",
        "_ends",
        "_least",
        "_limit",
        "_request",
        "_stops",
        "_texts",
        "finish",
        "guide",
        "ids",
        "mask",
        "push_text",
    )

    def __init__(
        self,
        detokenizer: Detokenizer,
        sampling: Sampling,
        eos_ids: frozenset[int],
        limit: int,
        prefix: Iterable[int] = (),
        *,
        request: Request | None = None,
        guide: Follows | None = None,
        bad_words: Iterable[Sequence[int]] = (),
    ) -> None:
        self._detokenizer = detokenizer
        self.push_text = detokenizer.push
        self._request = request if request is not None and request.callable_tools else None
        self._texts: list[str] = []
        self.guide = guide
        ends: frozenset[int] = frozenset() if sampling.ignore_eos and guide is None else eos_ids
        self._ends = ends.union(sampling.stop_token_ids)
        self._least = sampling.min_tokens
        self._stops = StopStrings(sampling.stop) if sampling.stop else None
        self._limit = limit
        self.ids: list[int] = []
        self.finish: str | None = None
        """None, or a reason as `penstock.core.job.FinishReason` has them."""
        self.mask: Follows | Bans | None = guide
        """Takes out of one row of logits what must not come next; None where everything may."""
        if sampling.min_tokens or sampling.bad_words:
            self.mask = Bans(self, sampling.min_tokens, self._ends, bad_words)
        for token in prefix:
            if self.finish is None:
                self.push(token)

    @property
    def left(self) -> int:
        """How many tokens may still come."""
        return self._limit - len(self.ids)

    @property
    def stop(self) -> str | None:
        """The stop string that ended it, if one did."""
        return None if self._stops is None else self._stops.met

    def push(self, token: int) -> str:
        """The text that *token* completed (perhaps none); sets ``finish`` when the reply ends with it.

        The end token itself and the tokens of a stop string give no text of their own.
        """
        text = self._next(token)
        if self._request is not None:
            self._texts.append(text)
            if self.finish is not None:
                self.end(self.finish)
        return text

    def end(self, reason: str) -> None:
        """The engine ended it for a *reason* of its own."""
        self.finish = reason
        if self._request is not None:
            self.finish = finish_reason(self._request, reason, "".join(self._texts))

    def _next(self, token: int) -> str:
        ids = self.ids
        ids.append(token)
        if self.guide is not None:
            self.guide.accept(token)
        if token in self._ends:
            self.finish = "stop"
            return self._rest("")
        text = self.push_text(token)
        if self._stops is not None and len(ids) > self._least:
            text, stopped = self._stops.push(text)
            if stopped:
                self.finish = "stop"
                return text
        if self.guide is not None and self.guide.over:
            self.finish = "stop"
            return self._rest(text)
        if len(ids) >= self._limit:
            self.finish = "length"
            return self._rest(text)
        return text

    def _rest(self, text: str) -> str:
        """*text* and whatever is held back, once it is known that nothing follows."""
        last = self._detokenizer.flush()
        if self._stops is None:
            return text + last
        more, stopped = self._stops.push(last)
        if stopped:
            self.finish = "stop"
            return text + more
        return text + more + self._stops.flush()


# ------------------------------------------------------------------------------------------ chat templates


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes HTML; templates written for Hugging Face expect plain JSON.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _strftime_now(form: str) -> str:
    return datetime.datetime.now().strftime(form)


class _Generation(jinja2.ext.Extension):
    """``{% generation %} … {% endgeneration %}``: what the model wrote, for those who train it. Shown as it is."""

    tags: set[str] = {"generation"}  # noqa: RUF012 (Jinja's own type)

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        # With a scope of its own, as in Hugging Face's library: what is set inside is not seen behind it.
        return jinja2.nodes.CallBlock(self.call_method("_show"), [], [], body).set_lineno(line)

    def _show(self, caller: Callable[[], str]) -> str:
        return caller()


class ChatTemplate:
    """A model's own Jinja template, in a sandbox: operators choose models, but models come from the internet.

    Raises `ModelLoadError` for one that cannot be read.
    """

    def __init__(self, source: str, variables: Mapping[str, Any]) -> None:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
        )
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = _strftime_now
        self._variables = dict(variables)
        self.takes_tools = "tools" in source
        """Does it show tools and their calls? `with_tools_as_text` is for those that do not."""
        self.takes_developers = "developer" in source
        """Does it know that role? `with_developers_as_system` is for those that do not."""
        try:
            self._template = environment.from_string(source)
        except (jinja2.TemplateError, RecursionError) as error:
            raise ModelLoadError(f"The model's chat template cannot be read: {error}") from error

    def render(
        self, messages: Sequence[Mapping[str, Any]], *, reply: bool = True, tools: Sequence[Mapping[str, Any]] = ()
    ) -> str:
        """The prompt text, with (*reply*) the beginning of the reply's turn at its end.

        Raises `InvalidRequest` with the template's own words when it refuses the messages.
        """
        try:
            return self._template.render(
                **self._variables,
                messages=[dict(message) for message in messages],
                add_generation_prompt=reply,
                tools=[dict(tool) for tool in tools] or None,
            )
        except Exception as error:  # a template is somebody else's program: it may raise anything
            raise InvalidRequest(
                f"The model's chat template refuses these messages: {error}", param="messages"
            ) from error


# ------------------------------------------------------------------------------------------ tools in a conversation


def turns_of(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Messages as chat templates expect them: arguments of calls as objects, the tool's name with its answer."""
    turns: list[dict[str, Any]] = []
    names: dict[str, str] = {}
    for message in messages:
        turn: dict[str, Any] = {"role": message.role, "content": message.content}
        if message.tool_calls:
            names |= {call.id: call.name for call in message.tool_calls}
            turn["tool_calls"] = [
                {
                    "id": call.id,
                    "type": "function",
                    "function": {"name": call.name, "arguments": _arguments(call.arguments)},
                }
                for call in message.tool_calls
            ]
        if message.tool_call_id is not None:
            turn["tool_call_id"] = message.tool_call_id
            if message.tool_call_id in names:
                turn["name"] = names[message.tool_call_id]
        turns.append(turn)
    return turns


def _arguments(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def _tool_view(tool: Tool) -> dict[str, Any]:
    function = {"name": tool.name, "description": tool.description, "parameters": tool.parameters}
    return {"type": "function", "function": function}


_TOOLS = """You may call these functions, described in JSON:
%s
To call one, write {"name": <its name>, "arguments": <an object>} between <tool_call> and </tool_call>."""


def with_tools_as_text(turns: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The conversation for a template that knows nothing of tools: they become text, in the form of Hermes."""
    plain: list[dict[str, Any]] = []
    if tools:
        plain.append({"role": "system", "content": _TOOLS % "\n".join(map(_tojson, tools))})
    for turn in turns:
        role, content = turn["role"], turn["content"]
        for call in turn.get("tool_calls", ()):
            content += f"\n<tool_call>\n{_tojson(call['function'])}\n</tool_call>"
        if role == "tool":
            role, content = "user", f"<tool_response>\n{content}\n</tool_response>"
        if role == "system" and len(plain) == 1 and tools:  # many templates take one system message only
            plain[0]["content"] = f"{content}\n\n{plain[0]['content']}"
        else:
            plain.append({"role": role, "content": content.strip() if turn.get("tool_calls") else content})
    return plain


def with_developers_as_system(turns: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The conversation for a template that has no such role, and would leave out what a developer says."""
    plain: list[dict[str, Any]] = []
    for turn in turns:
        if turn["role"] != "developer":
            plain.append(dict(turn))
        elif plain and plain[-1]["role"] == "system":  # many templates take one system message only
            plain[-1]["content"] += f"\n\n{turn['content']}"
        else:
            plain.append({**turn, "role": "system"})
    return plain


def _texts(value: Any) -> Iterator[str]:
    """Every string of a value of JSON's kinds, names included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for part in value:
            yield from _texts(part)
    elif isinstance(value, dict):
        for name, part in value.items():
            yield name
            yield from _texts(part)


# ------------------------------------------------------------------------------------------ the model's text side


def read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise ModelLoadError(f"{path} cannot be read: {error}") from error
    return value if isinstance(value, dict) else {}


def _token_string(value: Any) -> str | None:
    """``"<s>"`` or ``{"content": "<s>", …}``, as tokenizer_config.json has both."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None


def _chat_template_source(folder: Path, config: Mapping[str, Any]) -> str | None:
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8", errors="replace")
    source = config.get("chat_template") or read_json(folder / "chat_template.json").get("chat_template")
    if isinstance(source, list):  # several named ones: [{"name": "default", "template": …}, …]
        named = {entry["name"]: entry["template"] for entry in source}
        return named.get("default") or next(iter(named.values()), None)
    return source


def _context_length(config: Mapping[str, Any], tokenizer_config: Mapping[str, Any]) -> int:
    """What the weights were trained for, or less where the tokenizer's files say so.

    ``model_max_length`` is 1e30 where its writer did not know.
    """
    text = config.get("text_config") or config
    known = [
        int(value)
        for value in (
            text.get("max_position_embeddings") or text.get("n_positions") or text.get("n_ctx"),
            tokenizer_config.get("model_max_length"),
        )
        if isinstance(value, int | float) and 0 < value < 1e9
    ]
    return min(known) if known else DEFAULT_CONTEXT


class TextModel:
    """A model's tokenizer, its special tokens and its chat template.

    ``context_length`` is in tokens; ``vocab_size`` is the number of ids that the model knows (rows of its embedding),
    which may be more than the tokenizer has names for.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        config: Mapping[str, Any] | None = None,
        generation_config: Mapping[str, Any] | None = None,
        tokenizer_config: Mapping[str, Any] | None = None,
        chat_template: str | None = None,
    ) -> None:
        config, generation_config, tokenizer_config = config or {}, generation_config or {}, tokenizer_config or {}
        # Files may ask for padding or truncation to a training length; a server wants the text as it is.
        tokenizer.no_padding()
        tokenizer.no_truncation()
        self.tokenizer = tokenizer
        text_config = config.get("text_config") or config
        self.vocab_size = int(text_config.get("vocab_size") or tokenizer.get_vocab_size())
        self.context_length = _context_length(config, tokenizer_config)

        added = tokenizer.get_added_tokens_decoder()
        self._special = frozenset(id for id, token in added.items() if token.special)
        self._names = {
            name: string
            for name in ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")
            if (string := _token_string(tokenizer_config.get(name))) is not None
        }
        bos = self._names.get("bos_token")
        self.bos_id = None if bos is None else tokenizer.token_to_id(bos)
        self._add_bos = tokenizer_config.get("add_bos_token")
        self.eos_ids = self._find_eos(generation_config, config)

        strings = sorted((token.content for id, token in added.items() if token.special), key=len, reverse=True)
        self._special_pattern = re.compile("|".join(map(re.escape, strings))) if strings else None
        self._chat: ChatTemplate | None = None
        self.no_chat = ""
        """Why it cannot chat, where its template cannot be read."""
        if chat_template is not None:
            try:
                self._chat = ChatTemplate(chat_template, self._names)
            except ModelLoadError as error:
                self.no_chat = error.message
                log.warning("no_chat", reason=error.message)

    @classmethod
    def load(cls, folder: Path, tokenizer: Tokenizer | None = None) -> TextModel:
        """Read a model folder. Raises `ModelLoadError` when there is no usable ``tokenizer.json`` and no *tokenizer* is
        given instead."""
        path = folder / "tokenizer.json"
        if tokenizer is None and not path.is_file():
            raise ModelLoadError(
                f"{folder} has no tokenizer.json. Put the model's tokenizer.json (and tokenizer_config.json) there; "
                "the model's page on the hub has them."
            )
        try:
            tokenizer = tokenizer or Tokenizer.from_file(str(path))
        except Exception as error:  # tokenizers raises bare Exception
            raise ModelLoadError(f"{path} is not a tokenizer that this version can read: {error}") from error
        tokenizer_config = read_json(folder / "tokenizer_config.json")
        return cls(
            tokenizer,
            config=read_json(folder / "config.json"),
            generation_config=read_json(folder / "generation_config.json"),
            tokenizer_config=tokenizer_config,
            chat_template=_chat_template_source(folder, tokenizer_config),
        )

    @property
    def has_chat_template(self) -> bool:
        return self._chat is not None

    def _find_eos(self, *configs: Mapping[str, Any]) -> frozenset[int]:
        ids: set[int] = set()
        for config in configs:
            value = config.get("eos_token_id")
            ids.update([value] if isinstance(value, int) else value or ())
        name = self._names.get("eos_token")
        if name is not None and (id := self.tokenizer.token_to_id(name)) is not None:
            ids.add(id)
        return frozenset(ids)

    # ---------------------------------------------------------------------------- text → ids

    def encode_request(self, request: Request) -> list[int]:
        """The prompt's token ids.

        Raises `ContextLengthExceeded` (before tokenizing, where the text cannot fit), `Unsupported` for messages
        without a chat template, `InvalidRequest` for ids beyond the vocabulary and for an empty prompt.
        """
        ids = self._ids(request)
        param = "messages" if request.messages is not None else "prompt"
        if not ids:
            raise InvalidRequest("The prompt is empty.", param=param)
        if len(ids) + (request.task == "generate") > self.context_length:
            raise ContextLengthExceeded.of(param, len(ids), self.context_length)
        return ids

    def _ids(self, request: Request) -> list[int]:
        if request.prompt_ids is not None:
            return self.known(request.prompt_ids, "tokens" if request.task == "tokenize" else "prompt")
        if request.prompt is not None:
            self.check_size(len(request.prompt), "prompt")
            if not request.add_special_tokens:
                return self._tokenize(request.prompt, special=False)
            return self.encode(request.prompt)
        try:
            return self.encode_chat(request.messages or (), request.callable_tools, begun=request.continue_final)
        except RecursionError as error:
            raise InvalidRequest("The arguments of a call are nested too deeply.", param="messages") from error

    def known(self, ids: Sequence[int], param: str) -> list[int]:
        """*ids* as a list. Raises `InvalidRequest` for one beyond the vocabulary."""
        if ids and (min(ids) < 0 or max(ids) >= self.vocab_size):
            raise InvalidRequest(f"Token ids must be in 0 … {self.vocab_size - 1}.", param=param)
        return list(ids)

    def tokenize(self, request: Request) -> Tokenized:
        """A request's prompt as tokens, which may be more than the context holds, or none.

        Raises what `encode_request` raises for everything else.
        """
        return self.named(self._ids(request))

    def named(self, ids: list[int]) -> Tokenized:
        """*ids* with what they stand for."""
        names = [self.tokenizer.id_to_token(id) or "" for id in ids]
        return Tokenized(ids, names, self.tokenizer.decode(ids, skip_special_tokens=False))

    def special_tail(self, ids: Sequence[int]) -> int:
        """How many special tokens *ids* end with."""
        return next((i for i, id in enumerate(reversed(ids)) if id not in self._special), len(ids))

    def check_ids(self, sampling: Sampling) -> None:
        """Raises `InvalidRequest` for a token beyond the vocabulary."""
        for param in ("logit_bias", "stop_token_ids"):
            for token in getattr(sampling, param):
                if not 0 <= token < self.vocab_size:
                    raise InvalidRequest(
                        f"{param} names token {token}; this model's ids are 0 … {self.vocab_size - 1}.", param=param
                    )

    def encode(self, text: str) -> list[int]:
        """A raw prompt, with the special tokens that the tokenizer puts around a text."""
        ids = self._tokenize(text, special=True)
        if self.bos_id is not None and self._add_bos is not None:
            # tokenizer_config.json overrules what tokenizer.json does.
            if self._add_bos and ids[:1] != [self.bos_id]:
                ids.insert(0, self.bos_id)
            elif not self._add_bos and ids[:1] == [self.bos_id]:
                del ids[0]
        return ids

    def encode_chat(self, messages: Sequence[Message], tools: Sequence[Tool] = (), *, begun: bool = False) -> list[int]:
        """Messages through the chat template. *begun*: the last one is the beginning of the reply, and stays open.

        A special token written out in a message is encoded as plain text, so that nobody can end a turn or forge a
        system prompt: a mark that is no character is put inside it before the template runs, and the rendered text
        is tokenized in pieces, cut at the marks. Text without special tokens is not touched.
        """
        if self._chat is None:
            raise Unsupported(
                f"{self.no_chat or 'This model has no chat template'}: give 'prompt' instead of 'messages'.",
                param="messages",
            )
        turns, shown = turns_of(messages), [_tool_view(tool) for tool in tools]
        if not self._chat.takes_developers:
            turns = with_developers_as_system(turns)
        if not self._chat.takes_tools:
            turns, shown = with_tools_as_text(turns, shown), []
        texts = [*_texts(turns), *_texts(shown)]
        self.check_size(sum(map(len, texts)), "messages")
        for message in messages:
            # Templates put roles between the halves of a special token: <|{{ role }}|>.
            if not _ROLE.fullmatch(message.role):
                raise InvalidRequest("A message's role is a word: system, user, assistant, tool.", param="messages")
        mark = next((mark for mark in _MARKS if all(mark not in text for text in texts)), None)
        if mark is None:
            raise InvalidRequest("The messages are full of code points that are not characters.", param="messages")
        turns, shown = self._defuse_all(turns, mark), self._defuse_all(shown, mark)
        if begun:
            turns[-1]["content"] += mark * 2  # the turn is cut off here
        rendered = self._chat.render(turns, reply=not begun, tools=shown)
        if begun:
            rendered, found, _ = rendered.rpartition(mark * 2)
            if not found:
                raise Unsupported(
                    "The model's chat template does not show the last message as it is: its reply cannot be begun.",
                    param="continue_final_message",
                )
        ids: list[int] = []
        for piece in rendered.split(mark):
            if piece:
                ids += self._tokenize(piece, special=False)
        return ids

    def _tokenize(self, text: str, *, special: bool) -> list[int]:
        ids: list[int] = self.tokenizer.encode(whole(text), add_special_tokens=special).ids
        return ids

    def _defuse(self, text: str, mark: str) -> str:
        if self._special_pattern is None:
            return text
        # A mark between any two characters, so that no shorter special token is left inside a longer one. A special
        # token of one character cannot be cut; no tokenizer in use has one.
        return self._special_pattern.sub(lambda match: mark.join(match.group()), text)

    def _defuse_all(self, value: Any, mark: str) -> Any:
        if isinstance(value, str):
            return self._defuse(value, mark)
        if isinstance(value, list):
            return [self._defuse_all(part, mark) for part in value]
        if isinstance(value, dict):
            return {self._defuse(name, mark): self._defuse_all(part, mark) for name, part in value.items()}
        return value

    def check_size(self, characters: int, param: str) -> None:
        """Refuse at once what cannot fit: a tokenizer may take very long over a text of megabytes."""
        most = self.context_length * self._longest_token
        if characters > most:
            tokens = -(-characters // self._longest_token)
            raise ContextLengthExceeded.of(param, tokens, self.context_length, characters=characters)

    @cached_property
    def _longest_token(self) -> int:
        """Characters of text that one token can stand for, at most."""
        longest = max(map(len, self.tokenizer.get_vocab()), default=1)
        # A normalizer may make the text shorter before it is cut into tokens (composition: at most 3 to 1).
        return longest * (1 if self.tokenizer.normalizer is None else 4)

    # ---------------------------------------------------------------------------- ids → text

    def detokenizer(self, *, continuing: bool = False) -> Detokenizer:
        """A fresh detokenizer. *continuing*: the text goes on from a raw prompt, so its first space is kept."""
        kind, texts, data, strip = self._tables
        if kind == "bytes":
            return _ByteLevelDetokenizer(texts, data)
        if kind == "fallback":
            return _ByteFallbackDetokenizer(texts, data, 0 if continuing else strip)
        return _WindowDetokenizer(self.tokenizer.decode)

    def reply(self, request: Request, limit: int, prefix: Iterable[int] = (), guide: Follows | None = None) -> Reply:
        """One choice of *request*, at most *limit* tokens, behind what an earlier attempt logged of it."""
        detokenizer = self.detokenizer(continuing=request.messages is None or request.continue_final)
        sampling = request.sampling
        return Reply(
            detokenizer,
            sampling,
            self.eos_ids,
            limit,
            prefix,
            request=request,
            guide=guide,
            bad_words=[spelling for word in sampling.bad_words for spelling in self.spellings(word)],
        )

    def spellings(self, text: str) -> list[list[int]]:
        """*text* in tokens, at a text's beginning and behind a space."""
        text = text.strip()
        return [ids for each in (text, f" {text}") if (ids := self._cut(each))]

    def _cut(self, text: str) -> list[int]:
        return self._tokenize(text, special=False)

    @property
    def has_token_bytes(self) -> bool:
        """Is a text its tokens' bytes, one after the other? (Not where a decoder looks at neighbours.)"""
        return self._tables[0] != "window"

    def token_bytes(self) -> list[bytes]:
        """By id, the bytes of text that a token stands for; empty for special tokens and ids without a name."""
        _, texts, data, _ = self._tables
        return [piece if text is None else text.encode() for text, piece in zip(texts, data, strict=True)]

    def token_text(self, token: int) -> tuple[str, bytes | None]:
        """One token by itself, special tokens by name; and its bytes, where they are no text by themselves."""
        if token in self._special:
            return self.tokenizer.id_to_token(token) or "", None
        kind, texts, data, _ = self._tables
        if kind == "window":
            return self.tokenizer.decode([token]), None
        if (text := texts[token]) is not None:
            return text, None
        text = _whole_text(data[token])
        return (REPLACEMENT, data[token]) if text is None else (text, None)

    def logprob(self, token: int, logprob: float, best: Sequence[tuple[int, float]]) -> Logprob:
        """A token's log-probability, and the *best* ones as (id, log-probability): where those are asked for, it is
        one of them or stands behind them."""
        if best and all(id != token for id, _ in best):
            best = [*best, (token, logprob)]
        text, data = self.token_text(token)
        return Logprob(logprob, tuple(self._alternative(*each) for each in best), text, data)

    def _alternative(self, token: int, logprob: float) -> TopLogprob:
        text, data = self.token_text(token)
        return TopLogprob(token, text, logprob, data)

    @cached_property
    def _tables(self) -> tuple[str, list[str | None], list[bytes], int]:
        """(kind of decoder, text by id or None, bytes by id, leading spaces to strip)."""
        decoder = json.loads(self.tokenizer.to_str()).get("decoder") or {}
        steps = decoder["decoders"] if decoder.get("type") == "Sequence" else [decoder]
        types = [step.get("type") for step in steps]
        size = max(self.vocab_size, self.tokenizer.get_vocab_size())
        if types == ["ByteLevel"]:
            data = self._bytes_of_byte_level(size)
            return "bytes", [_whole_text(item) for item in data], data, 0
        strip = 0
        if types and types[-1] == "Strip" and steps[-1]["content"] == " " and not steps[-1]["stop"]:
            strip = int(steps.pop()["start"])
            types.pop()
        if types[-2:] == ["ByteFallback", "Fuse"] and all(
            step.get("type") == "Replace" and "String" in step["pattern"] for step in steps[:-2]
        ):
            replacements = [(step["pattern"]["String"], step["content"]) for step in steps[:-2]]
            return "fallback", *self._texts_of_fallback(size, replacements), strip
        return "window", [], [], 0

    def _named(self, size: int) -> Iterable[tuple[int, str]]:
        """(id, name) of every token that gives text."""
        for id in range(size):
            name = self.tokenizer.id_to_token(id)
            if name is not None and id not in self._special:
                yield id, name

    def _bytes_of_byte_level(self, size: int) -> list[bytes]:
        alphabet = _byte_level_alphabet()
        data = [b""] * size
        for id, name in self._named(size):
            try:
                data[id] = bytes([alphabet[char] for char in name])
            except KeyError:  # an added token outside the alphabet stands for itself
                data[id] = name.encode()
        return data

    def _texts_of_fallback(
        self, size: int, replacements: list[tuple[str, str]]
    ) -> tuple[list[str | None], list[bytes]]:
        texts: list[str | None] = [""] * size
        data = [b""] * size
        for id, name in self._named(size):
            for old, new in replacements:
                name = name.replace(old, new)
            if re.fullmatch(r"<0x[0-9A-Fa-f]{2}>", name):
                texts[id], data[id] = None, bytes([int(name[3:5], 16)])
            else:
                texts[id] = name
        return texts, data


def _whole_text(data: bytes) -> str | None:
    try:
        return data.decode()
    except UnicodeDecodeError:
        return None
