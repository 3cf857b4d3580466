"""The models: which there are and how they stand, and for their operator, to load and unload them."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, AsyncIterator
from datetime import UTC, datetime
from typing import Any

import msgspec
from starlette.types import ASGIApp

from penstock.core.errors import Forbidden, InvalidRequest, ModelNotFound, PenstockError, Unsupported
from penstock.core.ports import LoadProgress, ModelControl
from penstock.gateway.http import Call, decode, json_reply
from penstock.gateway.sse import EventStream, frame


class ManageModel(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The body of ``POST /v1/models/{model}/load`` and ``/unload``. May be left out."""

    stream: bool = False


async def list_models(call: Call) -> ASGIApp:
    if "anthropic-version" in call.headers:
        return _for_anthropic(call)
    return json_reply({"object": "list", "data": [_model(call, name) for name in call.gateway.catalogue.names]})


async def show_model(call: Call) -> ASGIApp:
    name = call.path["model"]
    anthropic = "anthropic-version" in call.headers
    if name not in call.gateway.catalogue.names:
        raise ModelNotFound(f"The model {name!r} does not exist here.", param="model")
    return json_reply(_message_model(call, name) if anthropic else _model(call, name))


def _for_anthropic(call: Call) -> ASGIApp:
    """A page of the models, by Anthropic's parameters: ``limit``, and ``after_id`` or ``before_id``."""
    limit, after, before = call.query.get("limit", "20"), call.query.get("after_id"), call.query.get("before_id")
    if not (limit.isascii() and limit.isdigit() and len(limit) <= 4 and 1 <= int(limit) <= 1000):
        raise InvalidRequest("limit is between 1 and 1000.", param="limit")
    if after and before:
        raise InvalidRequest("A page begins after_id or ends before_id: send one of them.", param="before_id")
    names = call.gateway.catalogue.names
    for param, id in (("after_id", after), ("before_id", before)):
        if id and id not in names:
            raise InvalidRequest(f"There is no model {id[:100]!r}.", param=param)
    if before:
        rest = names[: names.index(before)]
        page = rest[-int(limit) :]
    else:
        rest = names[names.index(after) + 1 :] if after else names
        page = rest[: int(limit)]
    return json_reply(
        {
            "data": [_message_model(call, name) for name in page],
            "has_more": len(rest) > len(page),
            "first_id": page[0] if page else None,
            "last_id": page[-1] if page else None,
        },
        headers={"request-id": call.request_id},
    )


async def load_model(call: Call) -> ASGIApp:
    """Load a model now; answers when it is ready, or streams the progress."""
    control = _control(call)
    return await _manage(call, control.load(call.path["model"]))


async def unload_model(call: Call) -> ASGIApp:
    """Unload a model; its running jobs get the time of a drain, the others wait for it or go to other workers."""
    control = _control(call)
    return await _manage(call, control.unload(call.path["model"]))


def _control(call: Call) -> ModelControl:
    gateway = call.gateway
    if gateway.models is None:
        error = Unsupported(
            "This gateway runs no models. Ask the worker that has it, on its metrics port, for instance "
            "penstock models load NAME --url http://WORKER:9100."
        )
        error.status = 501
        raise error
    if not gateway.config.manageable:
        raise Forbidden(
            "Models can be loaded and unloaded on a loopback address only, since there is no authentication. On a "
            "closed network, PENSTOCK_INSECURE_PUBLIC=true allows it elsewhere."
        )
    return gateway.models


async def _manage(call: Call, progress: AsyncIterator[LoadProgress]) -> ASGIApp:
    raw = await call.raw_body()
    body = decode(raw, ManageModel) if raw.strip() else ManageModel()
    first = await anext(progress)  # what is refused at once is an HTTP error
    if body.stream:
        return EventStream(call.gateway.streams, _frames(call, first, progress))
    async for _ in progress:
        pass
    return json_reply(_model(call, call.path["model"]))


async def _frames(
    call: Call, first: LoadProgress, progress: AsyncIterator[LoadProgress]
) -> AsyncGenerator[bytes, None]:
    """``progress`` events, then ``done`` with the model, or ``error``."""
    async with contextlib.aclosing(progress):  # type: ignore[type-var]
        try:
            yield frame("progress", first)
            async for step in progress:
                yield frame("progress", step)
            yield frame("done", _model(call, call.path["model"]))
        except PenstockError as error:
            yield frame("error", {"error": error.info})


def _message_model(call: Call, name: str) -> dict[str, Any]:
    info = call.gateway.catalogue.info(name)
    created = datetime.fromtimestamp(int(call.gateway.started_at), UTC)
    return {
        "type": "model",
        "id": name,
        "display_name": name,
        "created_at": created.isoformat().replace("+00:00", "Z"),
        "lifecycle": "active",
        "max_input_tokens": info.context_length if info is not None and info.context_length else None,
    }


def _model(call: Call, name: str) -> dict[str, Any]:
    catalogue = call.gateway.catalogue
    view: dict[str, Any] = {
        "id": name,
        "object": "model",
        "created": int(call.gateway.started_at),
        "owned_by": "penstock",
        "state": catalogue.state(name),
    }
    info = catalogue.info(name)
    if info is not None:
        view |= {"engine": info.engine}
    if info is not None and info.context_length:  # else it was never loaded
        view |= {
            "context_length": info.context_length,
            "precision": info.precision,
            "deterministic": info.deterministic,
            "chat": info.chat,
            "tasks": info.tasks,
            "unsupported": info.unsupported,
        }
        if info.dimensions:
            view["dimensions"] = info.dimensions
    return view
