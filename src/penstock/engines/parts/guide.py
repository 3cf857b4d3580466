"""Replies that must have a form (`Request.form`): which tokens may come next.

llguidance compiles the schema, regular expression or grammar and reads the reply as bytes, so that a token may span any
number of JSON's own. Special tokens are never allowed, except the end token where the text may end. White space in JSON
is allowed where people put it, one space after a colon or a comma: a weak model that may write any amount of it writes
nothing else.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from functools import cached_property

import msgspec
import numpy as np
import numpy.typing as npt
from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper, grammar_from

from penstock.core.bounds import check_form
from penstock.core.errors import EngineError, InvalidRequest
from penstock.core.job import Request, ResponseFormat
from penstock.engines.text.masks import Follows
from penstock.engines.text.model import TextModel

Floats = npt.NDArray[np.float32]

#: Compiled grammars that are kept.
CACHED = 64
#: Symbols of a grammar. The largest that fit took some 0.3 s to compile, with everybody else waiting.
MAX_GRAMMAR = 50_000
#: What a regular expression may cost to begin with. One that takes more took some 0.2 s to be refused.
MAX_LEXER = 200_000

WHITE_SPACE = {"whitespace_flexible": False, "key_separator": ": ?", "item_separator": ", ?"}


class Guide:
    """What one reply may go on with. It lives as long as the reply, whatever slot that has."""

    __slots__ = ("_endless", "_matcher", "over")

    def __init__(self, matcher: LLMatcher, endless: bool) -> None:
        self._matcher = matcher
        self._endless = endless
        self.over = False
        """Is the text complete, and nothing can follow?"""

    @property
    def error(self) -> str | None:
        """Why it cannot go on: a step was too complex, or a token came that it had not allowed."""
        return _words(self._matcher.get_error()) if self._matcher.is_error() else None

    def mask(self, logits: Floats) -> None:
        """Take the tokens that must not come next out of one row of logits."""
        words = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        allowed = np.unpackbits(words, count=min(len(words) * 8, len(logits)), bitorder="little").view(np.bool_)
        if self._matcher.is_error():
            return  # the reply ends as a failure, whatever is drawn
        logits[len(allowed) :] = -np.inf
        logits[: len(allowed)][~allowed] = -np.inf

    def allows(self, token: int) -> bool:
        """May *token* come next?"""
        return token >= 0 and self._matcher.validate_tokens([token]) == 1

    def accept(self, token: int) -> None:
        """*token* was drawn, or logged by an earlier attempt."""
        matcher = self._matcher
        matcher.consume_token(token)
        # Without an end token a number, say, could go on for ever.
        self.over = matcher.is_stopped() or (self._endless and matcher.is_accepting())


class Guides:
    """Compiles what the replies to one model's requests have to be."""

    def __init__(self, text: TextModel) -> None:
        self._text = text
        self._endless = not text.eos_ids
        self._limits = LLParserLimits(max_grammar_size=MAX_GRAMMAR, verbose_errors=False)
        self._text_limits = LLParserLimits(
            max_grammar_size=MAX_GRAMMAR, initial_lexer_fuel=MAX_LEXER, verbose_errors=False
        )
        self._compiled: OrderedDict[bytes, LLMatcher] = OrderedDict()

    @cached_property
    def _tokenizer(self) -> LLTokenizer:
        """Made for the first request that needs it: large vocabularies take a moment."""
        tokens = self._text.token_bytes()
        # A token that does not exist stands for the end where the model has none: nobody can draw it.
        ends = sorted(self._text.eos_ids) or [len(tokens)]
        if self._endless:
            tokens.append(b"")
        return LLTokenizer(TokenizerWrapper(_Vocabulary(self._text, tokens, ends)), n_vocab=len(tokens), eos_token=ends)

    def begin(self, request: Request) -> Guide | None:
        """For one choice of *request*; None where its text is free. Raises `InvalidRequest` for a form that cannot be
        followed, in llguidance's words."""
        form = request.form
        if form is None:
            return None
        key = msgspec.json.encode(form)
        if (matcher := self._compiled.get(key)) is None:
            matcher = self._compiled[key] = self._compile(form, request)
            if len(self._compiled) > CACHED:
                self._compiled.popitem(last=False)
        self._compiled.move_to_end(key)
        return Guide(matcher.deep_copy(), self._endless)

    def _compile(self, form: ResponseFormat, request: Request) -> LLMatcher:
        what, param = _NAMES[form.type], "response_format"
        if request.response_format is None:
            what, param = "A tool's parameters", "tools"
        check_form(form, param)
        try:
            limits = self._limits if form.type == "json_schema" else self._text_limits
            matcher = LLMatcher(self._tokenizer, grammar_of(form), log_level=0, limits=limits)
            error = matcher.get_error()
            for _ in range(2):
                # One that nothing can satisfy shows at the first token only; one that is too large at the next look.
                if not error:
                    first = matcher.deep_copy()
                    first.compute_bitmask()
                    error = first.get_error() or (first.is_stopped() and "nothing satisfies it") or ""
        except (ValueError, RecursionError) as failure:
            error = str(failure)
        if error:
            raise InvalidRequest(f"{what} cannot be followed here: {_words(error)}.", param=param)
        return matcher


_NAMES = {
    "json_schema": "The JSON schema",
    "regex": "The regular expression",
    "choice": "The choices",
    "grammar": "The grammar",
}


def grammar_of(form: ResponseFormat) -> str:
    """A `Request.form` in llguidance's words. Raises `ValueError` for what is no grammar."""
    if (schema := form.json_schema) is None:
        return lark_of(form)
    # Nobody but us tells the compiler what to ignore.
    plain = {name: part for name, part in schema.items() if name != "x-guidance"}
    return LLMatcher.grammar_from_json_schema(plain, overrides=WHITE_SPACE)  # type: ignore[arg-type]


def lark_of(form: ResponseFormat) -> str:
    """A form other than JSON as a grammar in Lark's syntax. Raises `ValueError` for what is no grammar."""
    if form.type == "regex":
        made = msgspec.json.decode(LLMatcher.grammar_from_regex(form.pattern))
        return str(made["grammars"][0]["lark_grammar"])
    if form.type == "choice":
        return "start: " + " | ".join(map(json.dumps, form.choices))
    return grammar_from("grammar", form.grammar)  # in Lark's own syntax, or Backus and Naur's


def _words(error: str) -> str:
    """What llguidance says, all of it but where in its own code it was."""
    return error.partition("<backtrace>")[0].removesuffix("<non-verbose/>").strip().removesuffix(".")


def followed(guide: Follows | None) -> EngineError | None:
    """What went wrong with a reply that has ended, if anything did."""
    if guide is None or (error := guide.error) is None:
        return None
    return EngineError(f"The reply could not be held to its form any longer: {error}")


class _Vocabulary:
    """The model's tokens as llguidance wants to see them."""

    def __init__(self, text: TextModel, tokens: list[bytes], ends: list[int]) -> None:
        self.eos_token_id = ends[0]
        self.bos_token_id = text.bos_id
        self.tokens = tokens
        # What has no text could be drawn for ever without anything happening.
        self.special_token_ids = [id for id, data in enumerate(tokens) if not data]
        self._encode = text.tokenizer.encode
        self._longest = max(map(len, tokens))
        self._by_bytes = {data: id for id, data in reversed(list(enumerate(tokens))) if data}

    def __call__(self, text: str) -> list[int]:
        """*text* in the tokens that the model knows it by: what the schema leaves no choice in is written with them."""
        if not isinstance(text, str):
            raise TypeError("text only")
        ids: list[int] = self._encode(text, add_special_tokens=False).ids
        data = text.encode()
        if b"".join(self.tokens[id] for id in ids) == data:
            return ids
        return self._greedy(data)  # a tokenizer that puts a space before a text

    def _greedy(self, data: bytes) -> list[int]:
        ids: list[int] = []
        start = 0
        while start < len(data):
            for end in range(min(len(data), start + self._longest), start, -1):
                if (id := self._by_bytes.get(data[start:end])) is not None:
                    ids.append(id)
                    start = end
                    break
            else:
                raise ValueError("The tokenizer has no token for some byte.")
        return ids
