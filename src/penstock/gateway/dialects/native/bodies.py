"""What Penstock's own routes are asked."""

from __future__ import annotations

from penstock.core.job import ModelName, Request, TopLogprobs
from penstock.gateway.dialects.fields import ChatMessages, StructuredBody, TokenIds, plain
from penstock.gateway.http import Call


class GenerateJob(StructuredBody, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """The body of ``POST /v1/jobs``: a prompt (text or token ids) or messages, and how to sample."""

    model: ModelName | None = None
    prompt: str | TokenIds | None = None
    messages: ChatMessages | None = None
    logprobs: TopLogprobs | None = None

    def request(self, call: Call) -> Request:
        ids = self.prompt if isinstance(self.prompt, list) else None
        request = Request(
            model=self.model or call.catalogue.default,
            prompt=self.prompt if isinstance(self.prompt, str) else None,
            prompt_ids=tuple(ids) if ids is not None else None,
            messages=None if self.messages is None else plain(self.messages),
            sampling=self.sampling(max_tokens=64, temperature=0.7, logprobs=self.logprobs),
            n=self.n or 1,
        )
        return self.structured(request)


class Generate(GenerateJob, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """The body of ``POST /v1/generate``."""

    stream: bool = False
