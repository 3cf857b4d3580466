"""What is asked of a server: prompts of random tokens, as ids or as text, the same ones for every server compared."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import cycle
from pathlib import Path
from typing import Any

from benchmarks.client import Exchange
from benchmarks.dialects import Dialect, Prompt

# The alphabet of make_models.py, so that its tokenizers know these words.
_SYLLABLES = "ka lo mi ter an dor sel vin qua re po sti gru ham zen ox ul ne fra tch bel ix cor mun".split()  # noqa: SIM905


DISTINCT = 1024


@dataclass(frozen=True)
class Workload:
    """A stream of similar requests, reproducible by its seed."""

    dialect: str = "completions"
    prompts: str = "ids"
    """`ids` (random token ids) or `text` (random words)."""
    min_prompt: int = 16
    max_prompt: int = 32
    """Prompt length in tokens. Without a tokenizer a text prompt has this many words instead."""
    shared_prefix: int = 0
    """Tokens that all prompts begin with, in front of those of their own: a system prompt."""
    vocab: int = 2000
    """Random ids are drawn from [10, vocab)."""
    max_tokens: int = 64
    tokenizer: str = ""
    """Path of a `tokenizer.json`; makes text prompts of exactly the wanted number of tokens."""
    seed: int = 1
    body: dict[str, Any] = field(default_factory=dict)
    """Further fields of every request's JSON; null removes a field."""

    def prompt_list(self, number: int) -> list[Prompt]:
        """The first `number` prompts."""
        rng = random.Random(self.seed)
        if self.prompts == "ids":
            shared = self._ids(rng, self.shared_prefix)
            return [shared + self._ids(rng, rng.randint(self.min_prompt, self.max_prompt)) for _ in range(number)]
        measure = self._measure()
        before = _text(rng, self.shared_prefix, measure) + "\n\n" if self.shared_prefix else ""
        return [before + _text(rng, rng.randint(self.min_prompt, self.max_prompt), measure) for _ in range(number)]

    def _ids(self, rng: random.Random, count: int) -> list[int]:
        return [rng.randrange(10, self.vocab) for _ in range(count)]

    def exchanges(self, dialect: Dialect, model: str, extra: dict[str, Any], number: int = 0) -> Iterator[Exchange]:
        """Requests without end, all written before this returns; the prompts repeat after `number` or `DISTINCT`."""
        prompts = self.prompt_list(min(number or DISTINCT, DISTINCT))
        bodies = [
            json.dumps(dialect.body(model, prompt, self.max_tokens, self.body | extra), separators=(",", ":")).encode()
            for prompt in prompts
        ]
        return (Exchange(body, self.max_tokens) for body in cycle(bodies))

    def _measure(self) -> Any:
        if not self.tokenizer:
            return lambda text: text.count(" ") + 1
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(Path(self.tokenizer)))
        return lambda text: len(tokenizer.encode(text).ids)


def _text(rng: random.Random, length: int, measure: Any) -> str:
    """Random words until the text has `length` tokens (or, when a word of many tokens came last, a few more)."""
    words: list[str] = []
    while not words or measure(" ".join(words)) < length:
        words.append("".join(rng.choices(_SYLLABLES, k=rng.randint(1, 3))))
    return " ".join(words)
