"""The models: which there are and how they stand, and for their operator, to load and unload them."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, AsyncIterator

import msgspec
from starlette.types import ASGIApp

from penstock.api.errors import ErrorBody
from penstock.api.models import ModelList, ModelView
from penstock.core.errors import PenstockError
from penstock.core.ports import LoadProgress, ModelControl
from penstock.gateway.catalogue import Catalogue
from penstock.gateway.http import Call, Handler, Resource, decode, json_reply
from penstock.gateway.operation import Operation
from penstock.gateway.operator.answers import ProgressEvent
from penstock.gateway.parameters import Parameters
from penstock.gateway.sse import EventStream, frame

#: The models of this process's own workers.
MODELS: Resource[ModelControl] = Resource(
    "This gateway runs no models. Ask the worker that has it, on its metrics port, for instance "
    "penstock models load NAME --url http://WORKER:9100."
)


class ManageModel(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The body of ``POST /v1/models/{model}/load`` and ``/unload``. May be left out."""

    stream: bool = False


async def list_models(call: Call) -> ASGIApp:
    return json_reply(ModelList("list", [model_view(call.catalogue, name) for name in call.catalogue.names]))


async def show_model(call: Call) -> ASGIApp:
    name = call.path["model"]
    call.catalogue.require(name)
    return json_reply(model_view(call.catalogue, name))


async def load_model(call: Call) -> ASGIApp:
    """Load a model now; answers when it is ready, or streams the progress."""
    control = call.use(MODELS)
    return await _manage(call, control.load(call.path["model"]))


async def unload_model(call: Call) -> ASGIApp:
    """Unload a model; its running jobs get the time of a drain, the others wait for it or go to other workers."""
    control = call.use(MODELS)
    return await _manage(call, control.unload(call.path["model"]))


async def _manage(call: Call, progress: AsyncIterator[LoadProgress]) -> ASGIApp:
    raw = await call.raw_body()
    body = decode(raw, ManageModel) if raw.strip() else ManageModel()
    first = await anext(progress)  # what is refused at once is an HTTP error
    if body.stream:
        return EventStream(call.streams, _frames(call, first, progress))
    async for _ in progress:
        pass
    return json_reply(model_view(call.catalogue, call.path["model"]))


async def _frames(
    call: Call, first: LoadProgress, progress: AsyncIterator[LoadProgress]
) -> AsyncGenerator[bytes, None]:
    """``progress`` events, then ``done`` with the model, or ``error``."""
    async with contextlib.aclosing(progress):  # type: ignore[type-var]
        try:
            yield frame("progress", _progress(first))
            async for step in progress:
                yield frame("progress", _progress(step))
            yield frame("done", model_view(call.catalogue, call.path["model"]))
        except PenstockError as error:
            yield frame("error", ErrorBody.of(error.info))


def _progress(step: LoadProgress) -> ProgressEvent:
    return ProgressEvent(step.state, step.what, step.fraction)


def model_view(catalogue: Catalogue, name: str) -> ModelView:
    """A model as it stands."""
    info = catalogue.info(name)
    view = ModelView(
        id=name,
        object="model",
        created=int(catalogue.started_at),
        owned_by="penstock",
        state=catalogue.state(name),
        root=(info.parent if info is not None else "") or name,
        parent=(info.parent if info is not None else "") or None,
        engine=info.engine if info is not None else None,
    )
    if info is None or not info.context_length:  # it never was loaded
        return view
    return msgspec.structs.replace(
        view,
        context_length=info.context_length,
        precision=info.precision,
        deterministic=info.deterministic,
        chat=info.chat,
        tasks=list(info.tasks),
        unsupported=list(info.unsupported),
        dimensions=info.dimensions or None,
    )


_MODEL: Parameters = [{"name": "model", "in": "path", "required": True, "schema": {"type": "string"}}]
_EVENTS: dict[str, type] = {"progress": ProgressEvent, "done": ModelView, "error": ErrorBody}


def _management(path: str, handler: Handler, summary: str) -> Operation:
    return Operation(
        "POST",
        path,
        handler,
        summary,
        body=ManageModel,
        body_required=False,
        answers={200: ModelView},
        events=_EVENTS,
        parameters=_MODEL,
        scope="operator",
    )


OPERATIONS = [
    Operation(
        "GET",
        "/v1/models",
        list_models,
        "The models served. To who sends an anthropic-version: as Anthropic has them, in pages",
        answers={200: ModelList},
    ),
    _management("/v1/models/{model:path}/load", load_model, "Load a model of this process"),
    _management("/v1/models/{model:path}/unload", unload_model, "Unload a model of this process"),
    Operation("GET", "/v1/models/{model:path}", show_model, "One model", answers={200: ModelView}, parameters=_MODEL),
]
