"""Anthropic's Messages, over jobs like any other. Judged by the official SDK unchanged."""

from __future__ import annotations

from datetime import UTC, datetime
from functools import partial

import msgspec
from starlette.types import ASGIApp

from penstock.core.errors import InvalidRequest, NotFound
from penstock.gateway.catalogue import Catalogue
from penstock.gateway.dialects.answers import ends
from penstock.gateway.dialects.anthropic.answers import (
    BlockDeltaEvent,
    BlockStartEvent,
    BlockStopEvent,
    InputTokens,
    MessageDeltaEvent,
    MessageErrorBody,
    MessageModel,
    MessageModelList,
    MessageStartEvent,
    MessageStopEvent,
    MessageView,
)
from penstock.gateway.dialects.anthropic.bodies import CountTokens, CreateMessage, UserId
from penstock.gateway.dialects.anthropic.errors import ANTHROPIC
from penstock.gateway.dialects.anthropic.stream import MessageWriter, reply
from penstock.gateway.dialects.fields import submission_of
from penstock.gateway.http import Call, json_reply, whole_number
from penstock.gateway.operation import Operation


async def messages(call: Call) -> ASGIApp:
    body = await call.body(CreateMessage)
    metadata = {name: value for name, value in (body.metadata or {}).items() if value is not None}
    user = metadata.get("user_id")
    submission = submission_of(
        call,
        msgspec.structs.replace(body, metadata=metadata),
        user=body.user_id or (_user(user) if user else None),
        on_disconnect="cancel",
    )
    job = await call.jobs.submit(body.request(), submission)
    headers = {"request-id": call.request_id}
    if body.stream:
        after = call.last_event_id or 0
        writer = MessageWriter(
            job,
            call.request_id,
            after=after,
            look=partial(call.jobs.get, job.id),
            replay=partial(call.jobs.log, job.id),
            shows_thinking=body.shows_thinking,
        )
        return await call.jobs.stream(call.jobs.follow(job, after), writer.render, headers)
    completion = await call.jobs.fold(job, call.disconnected)
    message = reply(job, completion, shows_thinking=body.shows_thinking)
    return json_reply(message, headers={"x-penstock-job": job.id, **headers})


async def count_tokens(call: Call) -> ASGIApp:
    body = await call.body(CountTokens)
    found = await call.tokens_of(msgspec.structs.replace(body.conversation(), task="tokenize"))
    return json_reply(InputTokens(len(found.tokens)), headers={"request-id": call.request_id})


def _user(text: str) -> str:
    try:
        return msgspec.convert(text, UserId)
    except msgspec.ValidationError as error:
        raise InvalidRequest(f"metadata.user_id: {error}", param="metadata.user_id") from error


# ---------------------------------------------------------------------------------------------- what is not ours


async def batches(call: Call) -> ASGIApp:
    raise NotFound("Message Batches are not offered: POST /v1/batches runs files of OpenAI's requests.")


# ---------------------------------------------------------------------------------------------- models


async def list_models(call: Call) -> ASGIApp:
    """A page of the models, by Anthropic's parameters: ``limit``, and ``after_id`` or ``before_id``."""
    limit = whole_number(call.query.get("limit", "20"), digits=4)
    after, before = call.query.get("after_id"), call.query.get("before_id")
    if limit is None or not 1 <= limit <= 1000:
        raise InvalidRequest("limit is between 1 and 1000.", param="limit")
    if after and before:
        raise InvalidRequest("A page begins after_id or ends before_id: send one of them.", param="before_id")
    names = call.catalogue.names
    for param, id in (("after_id", after), ("before_id", before)):
        if id and id not in names:
            raise InvalidRequest(f"There is no model {id[:100]!r}.", param=param)
    if before:
        rest = names[: names.index(before)]
        page = rest[-limit:]
    else:
        rest = names[names.index(after) + 1 :] if after else names
        page = rest[:limit]
    views = [_model(call.catalogue, name) for name in page]
    return json_reply(
        MessageModelList(views, len(rest) > len(page), *ends(views)), headers={"request-id": call.request_id}
    )


async def show_model(call: Call) -> ASGIApp:
    name = call.path["model"]
    call.catalogue.require(name)
    return json_reply(_model(call.catalogue, name))


def _model(catalogue: Catalogue, name: str) -> MessageModel:
    info = catalogue.info(name)
    created = datetime.fromtimestamp(int(catalogue.started_at), UTC)
    return MessageModel(
        type="model",
        id=name,
        display_name=name,
        created_at=created.isoformat().replace("+00:00", "Z"),
        lifecycle="active",
        max_input_tokens=info.context_length if info is not None and info.context_length else None,
    )


OPERATIONS = [
    Operation(
        "POST",
        "/v1/messages",
        messages,
        "Anthropic Messages",
        body=CreateMessage,
        answers={200: MessageView},
        events={
            "message_start": MessageStartEvent,
            "content_block_start": BlockStartEvent,
            "content_block_delta": BlockDeltaEvent,
            "content_block_stop": BlockStopEvent,
            "message_delta": MessageDeltaEvent,
            "message_stop": MessageStopEvent,
            "error": MessageErrorBody,
        },
        dialect=ANTHROPIC,
        generates=True,
    ),
    Operation(
        "POST",
        "/v1/messages/count_tokens",
        count_tokens,
        "How many tokens a message's input has",
        body=CountTokens,
        answers={200: InputTokens},
        dialect=ANTHROPIC,
    ),
    Operation("*", "/v1/messages/batches{rest:path}", batches, dialect=ANTHROPIC),
    Operation(
        "GET",
        "/v1/models",
        list_models,
        "The models served, in pages",
        answers={200: MessageModelList},
        dialect=ANTHROPIC,
        header="anthropic-version",
    ),
    Operation(
        "GET",
        "/v1/models/{model:path}",
        show_model,
        "One model",
        answers={200: MessageModel},
        dialect=ANTHROPIC,
        header="anthropic-version",
    ),
]
