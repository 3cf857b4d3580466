"""A model's text side, made of its files: prompts into token ids."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from penstock.core.errors import ContextLengthExceeded, InvalidRequest, ModelLoadError, Unsupported
from penstock.core.events import Logprob, TopLogprob
from penstock.core.foreign import whole
from penstock.core.job import Message, Request, Sampling, Tool
from penstock.core.tasks import Tokenized
from penstock.engines.child.notices import notify
from penstock.engines.models import check_tokenizer
from penstock.engines.text.chat_template import ChatTemplate
from penstock.engines.text.conversation import conversation, strings_in, variables_of
from penstock.engines.text.detokenize import (
    REPLACEMENT,
    ByteFallbackDetokenizer,
    ByteLevelDetokenizer,
    Detokenizer,
    WindowDetokenizer,
    byte_level_alphabet,
)
from penstock.engines.text.formats.table import choose
from penstock.engines.text.masks import Follows
from penstock.engines.text.reply import Reply

#: Context length when no file tells one.
DEFAULT_CONTEXT = 2048

_ROLE = re.compile(r"[A-Za-z0-9_.-]{1,64}")

# Code points that Unicode guarantees will never be characters: marks that no real text contains.
_MARKS = tuple(chr(code) for code in range(0xFDD0, 0xFDF0))


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


def _chat_templates(folder: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """A model's templates by name; most have one, which is ``default``."""
    source = config.get("chat_template") or read_json(folder / "chat_template.json").get("chat_template")
    named: dict[str, str] = {}
    if isinstance(source, list):  # [{"name": "default", "template": …}, …]
        named = {entry["name"]: entry["template"] for entry in source}
    elif isinstance(source, str):
        named = {"default": source}
    for name, file in (
        ("default", folder / "chat_template.jinja"),
        *((file.stem, file) for file in sorted(folder.glob("additional_chat_templates/*.jinja"))),
    ):
        if file.is_file():
            named[name] = file.read_text(encoding="utf-8", errors="replace")
    return named


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
        chat_template: str | Mapping[str, str] | None = None,
    ) -> None:
        """*chat_template*: one, or several by name (``default``, ``tool_use``)."""
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
        self._names: dict[str, Any] = {
            name: string
            for name in ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")
            if (string := _token_string(tokenizer_config.get(name))) is not None
        }
        more = tokenizer_config.get("additional_special_tokens") or tokenizer_config.get("extra_special_tokens") or []
        self._names["additional_special_tokens"] = [each for each in map(_token_string, more) if each is not None]
        bos = self._names.get("bos_token")
        self.bos_id = None if bos is None else tokenizer.token_to_id(bos)
        self._add_bos = tokenizer_config.get("add_bos_token")
        self.eos_ids = self._find_eos(generation_config, config)

        self._chat: ChatTemplate | None = None
        self._with_tools: ChatTemplate | None = None
        self.no_chat = ""
        """Why it cannot chat, where its template cannot be read."""
        named = {"default": chat_template} if isinstance(chat_template, str) else chat_template or {}
        try:
            if (source := named.get("default") or next(iter(named.values()), None)) is not None:
                self._chat = ChatTemplate(source, self._names)
            if (source := named.get("tool_use")) is not None and self._chat is not None:
                self._with_tools = ChatTemplate(source, self._names)
        except ModelLoadError as error:
            self._chat, self.no_chat = None, error.message
            notify("engine.no_chat", error=error.message)
        self._marks_of: dict[frozenset[str], dict[int, str]] = {}
        self.use_formats("auto", "auto")

    def use_formats(self, tools: str, reasoning: str) -> None:
        """How it writes calls and thoughts, by name, as the engines' options have it. Raises `ModelLoadError`."""
        knows = self.tokenizer.token_to_id
        source = "".join(template.source for template in (self._chat, self._with_tools) if template is not None)
        self.formats = choose(source, lambda word: knows(word) is not None, tools, reasoning)
        special = [self.tokenizer.id_to_token(id) or "" for id in self._special]
        self._special_pattern = _any_of(special)
        """Tokens that nobody may write in a message; and those, and marks of thoughts and calls that are tokens."""
        marks = {word for word in self.formats.words if knows(word) is not None}
        self._token_pattern = _any_of([*special, *marks])

    @classmethod
    def load(cls, folder: Path, tokenizer: Tokenizer | None = None) -> TextModel:
        """Read a model folder. Raises `ModelLoadError` when there is no usable ``tokenizer.json`` and no *tokenizer* is
        given instead."""
        path = folder / "tokenizer.json"
        if tokenizer is None:
            check_tokenizer(folder)
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
            chat_template=_chat_templates(folder, tokenizer_config),
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
            return self.encode_chat(
                request.messages or (), request.callable_tools, begun=request.continue_final, request=request
            )
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

    def encode_chat(
        self,
        messages: Sequence[Message],
        tools: Sequence[Tool] = (),
        *,
        begun: bool = False,
        request: Request | None = None,
    ) -> list[int]:
        """Messages through the chat template. *begun*: the last one is the beginning of the reply, and stays open.
        *request* may tell the template more.

        A special token written out in a message is encoded as plain text, so that nobody can end a turn or forge a
        system prompt: a mark that is no character is put inside it before the template runs, and the rendered text
        is tokenized in pieces, cut at the marks. Text without special tokens is not touched.
        """
        if self._chat is None:
            raise Unsupported(
                f"{self.no_chat or 'This model has no chat template'}: give 'prompt' instead of 'messages'.",
                param="messages",
            )
        template = self._with_tools if tools and self._with_tools is not None else self._chat
        turns, shown = conversation(messages, tools, template)
        told = {} if request is None else variables_of(request, template)
        texts = [*strings_in(turns), *strings_in(shown), *strings_in(told)]
        self.check_size(sum(map(len, texts)), "messages")
        for message in messages:
            # Templates put roles between the halves of a special token: <|{{ role }}|>.
            if not _ROLE.fullmatch(message.role):
                raise InvalidRequest("A message's role is a word: system, user, assistant, tool.", param="messages")
        mark = next((mark for mark in _MARKS if all(mark not in text for text in texts)), None)
        if mark is None:
            raise InvalidRequest("The messages are full of code points that are not characters.", param="messages")
        turns = [self._defuse_turn(turn, mark) for turn in turns]
        shown, told = self._defuse_all(shown, mark), self._defuse_all(told, mark)
        if begun:
            turns[-1] = _with_mark(turns[-1], mark * 2)  # the turn is cut off here
        rendered = template.render(turns, reply=not begun, tools=shown, variables=told)
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

    def _defuse_turn(self, turn: dict[str, Any], mark: str) -> dict[str, Any]:
        """A past reply may have thoughts in it, between marks that the template looks for; nobody else has."""
        pattern = self._special_pattern if turn["role"] == "assistant" else self._token_pattern
        defused: dict[str, Any] = self._defuse_all(turn, mark, pattern)
        return defused

    def _defuse_all(self, value: Any, mark: str, pattern: re.Pattern[str] | None = None) -> Any:
        pattern = pattern or self._token_pattern
        if isinstance(value, str):
            # A mark between any two characters, so that no shorter special token is left inside a longer one. A special
            # token of one character cannot be cut; no tokenizer in use has one.
            return pattern.sub(lambda match: mark.join(match.group()), value)
        if isinstance(value, list):
            return [self._defuse_all(part, mark, pattern) for part in value]
        if isinstance(value, dict):
            return {
                self._defuse_all(name, mark, pattern): self._defuse_all(part, mark, pattern)
                for name, part in value.items()
            }
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
            return ByteLevelDetokenizer(texts, data)
        if kind == "fallback":
            return ByteFallbackDetokenizer(texts, data, 0 if continuing else strip)
        return WindowDetokenizer(self.tokenizer.decode)

    def reply(
        self,
        request: Request,
        limit: int,
        prefix: Iterable[int] = (),
        guide: Follows | None = None,
        *,
        prompt: Sequence[int | str] = (),
    ) -> Reply:
        """One choice of *request*, at most *limit* tokens, behind its *prompt* and what an earlier attempt logged."""
        detokenizer = self.detokenizer(continuing=request.messages is None or request.continue_final)
        sampling = request.sampling
        reader = self.formats.reader(request, opened=self.opens_thought(request, prompt))
        return Reply(
            detokenizer,
            sampling,
            self.eos_ids,
            limit,
            prefix,
            reader=reader,
            marks=self._marks(reader.words) if reader is not None else None,
            guide=guide,
            thinks=[id for word in self.formats.begins if (id := self.tokenizer.token_to_id(word)) is not None],
            bad_words=[spelling for word in sampling.bad_words for spelling in self.spellings(word)],
        )

    def opens_thought(self, request: Request, prompt: Sequence[int | str]) -> bool:
        """Has the *prompt* begun a thought: by what the chat template put at its end, or in the reply's beginning?"""
        begins, ends = self.formats.begins, self.formats.ends
        if request.messages is None or not begins:
            return False
        if request.continue_final:
            text = request.messages[-1].content
            return max(map(text.rfind, begins)) > max(map(text.rfind, ends))
        return any(self._ends_with(prompt, word) for word in begins)

    def _ends_with(self, prompt: Sequence[int | str], word: str) -> bool:
        """Is *word* the end of a prompt, but for white space? A token of that name, where there is one: a text that
        somebody wrote has none (`_defuse_turn`)."""
        tail = [id for id in prompt[-24:] if isinstance(id, int)]
        text = str(self.tokenizer.decode(tail, skip_special_tokens=False))
        token = self.tokenizer.token_to_id(word)
        return text.rstrip().endswith(word) and (token is None or token in tail[-8:])

    def _marks(self, words: frozenset[str]) -> dict[int, str]:
        """The special tokens that are in *words*: the detokenizer says nothing of them."""
        if words not in self._marks_of:
            names = ((id, self.tokenizer.id_to_token(id) or "") for id in self._special - self.eos_ids)
            self._marks_of[words] = {id: name for id, name in names if name and any(name in word for word in words)}
        return self._marks_of[words]

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
        alphabet = byte_level_alphabet()
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


def _any_of(words: Iterable[str]) -> re.Pattern[str]:
    """Any of *words*, the longest where there are several."""
    return re.compile("|".join(map(re.escape, sorted(filter(None, words), key=len, reverse=True))) or "(?!)")


def _with_mark(turn: dict[str, Any], mark: str) -> dict[str, Any]:
    """A turn with *mark* behind its content."""
    if isinstance(parts := turn["content"], list):
        return {**turn, "content": [{"type": "text", "text": parts[0]["text"] + mark}]}
    return {**turn, "content": parts + mark}


def _whole_text(data: bytes) -> str | None:
    try:
        return data.decode()
    except UnicodeDecodeError:
        return None
