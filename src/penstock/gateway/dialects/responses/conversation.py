"""What a request refers to: earlier responses and their items, as one conversation."""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from penstock.core.errors import ExpiredResult, InvalidRequest, NotFound, PreviousResponseNotFound, RequestTooLarge
from penstock.core.job import Job
from penstock.gateway.dialects.responses.bodies import CreateResponse, InputItem
from penstock.gateway.dialects.responses.items import (
    Item,
    View,
    ended_status,
    input_items,
    job_id,
    output_items,
    owner,
    response_id,
    view_of,
)
from penstock.gateway.dialects.responses.stream import whole
from penstock.gateway.jobs import Jobs


async def conversation(jobs: Jobs, body: CreateResponse) -> tuple[Item, ...]:
    """The whole input of a request: that of the response before it, its output, and what is new.

    Raises `RequestTooLarge` where that, written out, would be no body that is taken: a few bytes can refer to much.
    """
    room = jobs.config.max_body
    items: list[Item] = []
    if body.previous_response_id is not None:
        items = await _before(jobs, body.previous_response_id)
    given = [InputItem(role="user", content=body.input)] if isinstance(body.input, str) else body.input or []
    references = [item.reference for item in given if item.reference is not None]
    referenced = await _referenced(jobs, references, room)
    items += [
        item.plain(place) if item.reference is None else referenced[item.reference] for place, item in enumerate(given)
    ]
    known: set[str] = set()
    for item in items:
        if item.id and item.id in known:  # nor could a list of them be paged
            raise InvalidRequest(f"There are two items with the id {item.id[:100]!r}: leave one out.", param="input")
        known.add(item.id)
    if (body.previous_response_id is not None or references) and _size(items) > room:
        raise _too_large(room)
    return tuple(items)


def _size(items: Iterable[Item]) -> int:
    return sum(len(msgspec.json.encode(item)) for item in items)


def _too_large(room: int) -> RequestTooLarge:
    return RequestTooLarge(
        f"The conversation is larger than {room} bytes with all that it refers to: leave old items out of it.",
        param="input",
    )


async def _before(jobs: Jobs, previous: str) -> list[Item]:
    """The conversation up to the end of an earlier response."""
    try:
        job, view = await find(jobs, previous)
    except NotFound as error:
        gone = " Its retention is over." if isinstance(error, ExpiredResult) else ""
        raise PreviousResponseNotFound(
            f"Previous response with id {previous!r} not found.{gone}", param="previous_response_id"
        ) from error
    completion = await jobs.completion(job) if job.status.terminal else None
    status = ended_status(completion.ended) if completion is not None and completion.ended is not None else None
    if completion is None or status not in ("completed", "incomplete"):
        raise InvalidRequest(
            f"Previous response with id {previous!r} is {status or 'not completed yet'}: only one that has an output "
            "can be continued.",
            param="previous_response_id",
        )
    return [*input_items(job, view), *output_items(whole(job, view, completion, None).output)]


async def _referenced(jobs: Jobs, references: Iterable[str], room: int) -> dict[str, Item]:
    """Items by their ids, of *room* bytes together at most; each response that has some of them is read once."""
    wanted: dict[str | None, dict[str, None]] = {}
    for reference in references:
        wanted.setdefault(owner(reference), {})[reference] = None
    found: dict[str, Item] = {}
    size = 0
    for job, ids in wanted.items():
        items = await _items(jobs, job) if job is not None else {}
        if (missing := next((id for id in ids if id not in items), None)) is not None:
            raise NotFound(
                f"Item with id {missing!r} not found. Items are kept with responses that are stored: send the item "
                "itself.",
                param="input",
            )
        found |= {id: items[id] for id in ids}
        if (size := size + _size(items[id] for id in ids)) > room:
            raise _too_large(room)
    return found


async def _items(jobs: Jobs, job: str) -> dict[str, Item]:
    """What a stored response has of items, by their ids; nothing if there is none."""
    try:
        found, view = await find(jobs, response_id(job))
        items = input_items(found, view)
        if found.status.terminal:
            items += output_items(whole(found, view, await jobs.completion(found), None).output)
    except NotFound:
        return {}
    return {item.id: item for item in items}


async def find(jobs: Jobs, response: str) -> tuple[Job, View]:
    """A stored response's job and view. Raises `NotFound`, `ExpiredResult`."""
    missing = NotFound(f"Response with id {response!r} not found.", param="response_id")
    if (job := job_id(response)) is None:
        raise missing
    try:
        found = await jobs.get(job)
    except ExpiredResult:
        raise ExpiredResult(f"Response with id {response!r}: its retention is over.", param="response_id") from None
    except NotFound:
        raise missing from None
    view = view_of(found)
    if view is None or not view.store:
        raise missing
    return found, view
