"""What vLLM's token routes answer."""

from __future__ import annotations

from penstock.gateway.http import Answer


class Tokens(Answer):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class Detokenized(Answer):
    prompt: str
