"""What vLLM's token routes answer."""

from __future__ import annotations

from penstock.api.base import WireType


class Tokens(WireType, frozen=True):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class Detokenized(WireType, frozen=True):
    prompt: str
