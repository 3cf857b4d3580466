"""What a model makes of a text, and of token ids: vLLM's ``/tokenize`` and ``/detokenize``. A job each, dropped once
answered."""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import UNSET, Meta
from starlette.types import ASGIApp

from penstock.core.errors import InvalidRequest, Unsupported
from penstock.core.job import ModelName, Request
from penstock.gateway.dialects.fields import (
    MAX_TOOLS,
    ChatMessages,
    StructuredBody,
    TemplateValues,
    TokenId,
    ToolBody,
    plain,
)
from penstock.gateway.dialects.tokens.answers import Detokenized, Tokens
from penstock.gateway.http import Call, json_reply
from penstock.gateway.operation import Operation


class Tokenize(msgspec.Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """The body of ``POST /tokenize``: a prompt, or messages as the chat template writes them."""

    model: ModelName | None = None
    prompt: str | None = None
    messages: ChatMessages | None = None
    tools: Annotated[list[ToolBody], Meta(max_length=MAX_TOOLS)] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool = False
    return_token_strs: bool | None = None
    chat_template_kwargs: TemplateValues | None = None

    def request(self, default_model: str) -> Request:
        if self.messages is not None:
            self._check_chat(self.messages)
        elif self.continue_final_message or self.add_generation_prompt is not None:
            raise InvalidRequest(
                "continue_final_message and add_generation_prompt belong to messages.", param="messages"
            )
        request = Request(
            model=self.model or default_model,
            task="tokenize",
            prompt=self.prompt,
            messages=None if self.messages is None else plain(self.messages),
            continue_final=self.continue_final_message,
            add_special_tokens=self.add_special_tokens is not False,
        )
        told = StructuredBody(tools=self.tools, chat_template_kwargs=self.chat_template_kwargs or UNSET)
        return told.structured(request)

    def _check_chat(self, messages: ChatMessages) -> None:
        if self.add_special_tokens:
            raise Unsupported(
                "add_special_tokens is for prompts: a chat template writes its own.", param="add_special_tokens"
            )
        if self.continue_final_message:
            if self.add_generation_prompt:
                raise InvalidRequest(
                    "continue_final_message goes on with the last message; add_generation_prompt would begin another.",
                    param="add_generation_prompt",
                )
            if messages[-1].role != "assistant":
                raise InvalidRequest(
                    "continue_final_message needs an assistant's message at the end.", param="continue_final_message"
                )
        elif self.add_generation_prompt is False:
            raise Unsupported(
                "add_generation_prompt: false is supported with continue_final_message: true only.",
                param="add_generation_prompt",
            )


class Detokenize(msgspec.Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """The body of ``POST /detokenize``."""

    tokens: list[TokenId]
    model: ModelName | None = None


async def tokenize(call: Call) -> ASGIApp:
    body = await call.body(Tokenize)
    request = body.request(call.catalogue.default_for("tokenize"))
    found = await call.tokens_of(request)
    length = await _context_length(call, request.model)
    strings = found.token_strs if body.return_token_strs else None
    return json_reply(Tokens(len(found.tokens), length, found.tokens, strings))


async def detokenize(call: Call) -> ASGIApp:
    body = await call.body(Detokenize)
    model = body.model or call.catalogue.default_for("tokenize")
    found = await call.tokens_of(Request(model=model, task="tokenize", prompt_ids=tuple(body.tokens)))
    return json_reply(Detokenized(found.text))


async def _context_length(call: Call, model: str) -> int:
    catalogue = call.catalogue
    if (info := catalogue.info(model)) is None or not info.context_length:
        await catalogue.refresh()  # it was loaded a moment ago
        info = catalogue.info(model)
    return 0 if info is None else info.context_length


OPERATIONS = [
    Operation(
        "POST", "/tokenize", tokenize, "The tokens of a prompt or of messages", body=Tokenize, answers={200: Tokens}
    ),
    Operation("POST", "/detokenize", detokenize, "The text of token ids", body=Detokenize, answers={200: Detokenized}),
]
