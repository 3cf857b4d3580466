"""The requests of the compatibility routes."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta

from penstock.core.job import ModelName
from penstock.gateway.dialects.fields import JobBody, TokenIds

#: Prompts that one call may bring.
MAX_PROMPTS = 256

Prompt = str | TokenIds
Prompts = Annotated[list[str | TokenIds], Meta(min_length=1, max_length=MAX_PROMPTS)]


class CompatBody(JobBody, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """What the bodies of all these routes share: how to sample, with which model, for whom."""

    model: ModelName | None = None


class PromptBody(CompatBody, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """The body of ``POST /submit_job``, ``/generate_stream`` and ``/api/v1/req``: a prompt (text or token ids)."""

    prompt: Prompt


class PromptsBody(CompatBody, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """The body of ``POST /generate`` and ``/basic_generate``: one ``prompt``, or several ``prompts`` sampled alike."""

    prompt: Prompt | None = None
    prompts: Prompts | None = None

    def __post_init__(self) -> None:
        if (self.prompt is None) == (self.prompts is None):
            raise ValueError("Give either one 'prompt' or a list of 'prompts'.")

    @property
    def one(self) -> Prompt:
        assert self.prompt is not None
        return self.prompt


class GenerateVLLM(CompatBody, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """The body of ``POST /generate_vllm``: prompts (texts or token ids), sampled alike."""

    prompts: Prompts
