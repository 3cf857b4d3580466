"""What OpenAI's chat completions and completions are asked."""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
from msgspec import UNSET, Meta, UnsetType

from penstock.core.errors import InvalidRequest, Unsupported
from penstock.core.job import MaxTokens, ModelName, OptionalIdentifier, Priority, Request, Sampling, Task, TopLogprobs
from penstock.gateway.dialects.fields import (
    ChatMessages,
    Count,
    Reasoning,
    StructuredBody,
    TokenId,
    TokenIds,
    plain,
    several,
)


class StreamOptions(msgspec.Struct, frozen=True):
    include_usage: bool = False


class OpenAIBody(StructuredBody, kw_only=True, frozen=True):
    """Fields of both generation routes. What OpenAI has and this server cannot honour is refused, not dropped."""

    model: ModelName
    stream: bool = False
    stream_options: StreamOptions | None = None
    user: OptionalIdentifier | None = None
    service_tier: str | None = None
    return_token_ids: bool = False

    def priority_class(self) -> Priority:
        return Priority.BATCH if self.service_tier == "flex" else Priority.NORMAL


class ChatCompletion(OpenAIBody, kw_only=True, frozen=True):
    """The body of ``POST /v1/chat/completions``."""

    messages: ChatMessages
    max_completion_tokens: MaxTokens | None = None
    logprobs: bool | None = None
    top_logprobs: TopLogprobs | None = None
    functions: list[Any] | None = None
    function_call: Any = None
    modalities: list[str] | None = None
    audio: Any = None
    continue_final_message: bool = False
    add_generation_prompt: bool | None = None
    include_reasoning: bool | UnsetType = UNSET
    """False: thoughts are not shown. They are counted, and cost what they cost."""
    reasoning: Reasoning | UnsetType = UNSET

    @property
    def shows_reasoning(self) -> bool:
        return self.include_reasoning is not False and not (self.reasoning and self.reasoning.exclude)

    def told(self, request: Request) -> Request:
        if not self.reasoning:
            return super().told(request)
        enabled = UNSET if self.reasoning.enabled is None else self.reasoning.enabled
        body = msgspec.structs.replace(
            self,
            reasoning=UNSET,
            reasoning_effort=self.reasoning_effort or self.reasoning.effort or UNSET,
            enable_thinking=enabled if self.enable_thinking is UNSET else self.enable_thinking,
        )
        return body.told(request)

    def request(self, default_max_tokens: int) -> Request:
        if self.functions or self.function_call not in (None, "none", "auto"):
            raise Unsupported("functions and function_call are not supported: use tools.", param="functions")
        if self.audio is not None or (self.modalities and self.modalities != ["text"]):
            raise Unsupported("Only text can be generated.", param="modalities")
        if self.top_logprobs and not self.logprobs:
            raise InvalidRequest("top_logprobs needs logprobs: true.", param="top_logprobs")
        # OpenAI has deprecated max_tokens for the longer name.
        body = msgspec.structs.replace(self, max_tokens=self.max_completion_tokens or self.max_tokens)
        request = Request(
            model=self.model,
            messages=plain(self.messages),
            sampling=body.sampling(
                max_tokens=default_max_tokens,
                temperature=1.0,
                logprobs=(self.top_logprobs or 0) if self.logprobs else None,
            ),
            n=self.n or 1,
            continue_final=self._begins_reply(),
        )
        return self.structured(request)

    def _begins_reply(self) -> bool:
        """Is the last message the beginning of the reply? (vLLM's fields, less the one that would contradict.)"""
        if not self.continue_final_message:
            if self.add_generation_prompt is False:
                raise Unsupported(
                    "add_generation_prompt: false is supported with continue_final_message: true only.",
                    param="add_generation_prompt",
                )
            return False
        if self.add_generation_prompt:
            raise InvalidRequest(
                "continue_final_message goes on with the last message; add_generation_prompt would begin another.",
                param="add_generation_prompt",
            )
        if self.messages[-1].role != "assistant":
            raise InvalidRequest(
                "continue_final_message needs an assistant's message at the end: the beginning of the reply.",
                param="continue_final_message",
            )
        return True


#: Prompts that one call may bring.
MAX_PROMPTS = 128

Prompt = str | tuple[int, ...]


class TextCompletion(OpenAIBody, kw_only=True, frozen=True):
    """The body of ``POST /v1/completions``: a prompt (a text, or token ids) or several, sampled alike.

    With ``echo`` the choice begins with the prompt, and where ``logprobs`` are asked for, with those of its tokens.
    """

    prompt: str | Annotated[list[str | TokenId | TokenIds], Meta(min_length=1)]
    max_tokens: Annotated[int, Meta(ge=0, le=2**63 - 1)] | None = None
    logprobs: TopLogprobs | None = None
    echo: bool = False
    suffix: str | None = None
    best_of: Count | None = None

    @property
    def prompts(self) -> tuple[Prompt, ...]:
        """Raises `InvalidRequest` for too many, or what is none; `Unsupported` for fields that nothing here honours."""
        if self.suffix:
            raise Unsupported("suffix is not supported.", param="suffix")
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise Unsupported("best_of is not supported beyond n.", param="best_of")
        if self.max_tokens == 0 and not self.echo:
            raise InvalidRequest(
                "max_tokens: 0 asks for nothing, unless the prompt is to be echoed.", param="max_tokens"
            )
        return several(self.prompt, MAX_PROMPTS, "prompt")

    def request(self, prompt: Prompt) -> Request:
        request = Request(
            model=self.model,
            prompt=prompt if isinstance(prompt, str) else None,
            prompt_ids=None if isinstance(prompt, str) else prompt,
            sampling=self.sampling(max_tokens=16, temperature=1.0, logprobs=self.logprobs),
            n=self.n or 1,
        )
        return self.structured(request)

    def requests(self, prompt: Prompt) -> list[Request]:
        """What is to be done with a prompt: to tell of its own tokens where it is echoed, and to generate."""
        reply = self.request(prompt)
        task: Task = "tokenize" if self.logprobs is None else "score"
        sampling = Sampling(logprobs=self.logprobs)
        echo = msgspec.structs.replace(reply, task=task, n=1, sampling=sampling, response_format=None)
        return ([echo] if self.echo else []) + ([reply] if self.max_tokens != 0 else [])
