"""The wire types: what is left out, what is null, and that they stay readable as they grow."""

from __future__ import annotations

import msgspec
import pytest

from penstock import api
from penstock.api.base import WireType
from penstock.core.foreign import decode
from penstock.core.job import Status

TYPES = [kind for name in api.__all__ if issubclass(kind := getattr(api, name), WireType)]


@pytest.mark.parametrize("kind", TYPES, ids=lambda kind: kind.__name__)
def test_a_field_that_may_be_left_out_is_none_by_default(kind: type[WireType]) -> None:
    fields = msgspec.structs.fields(kind)
    assert {field.default for field in fields if not field.required} <= {None}
    assert all(field.default_factory is msgspec.NODEFAULT for field in fields)


def test_what_is_none_is_left_out_where_it_may_be_and_null_where_not() -> None:
    links = api.Links("/v1/jobs/j", "/v1/jobs/j/events", "/v1/jobs/j/cancel")
    assert msgspec.json.encode(api.Submitted("j", Status.QUEUED, None, links)) == (
        b'{"id":"j","status":"queued","position_in_queue":null,'
        b'"links":{"self":"/v1/jobs/j","events":"/v1/jobs/j/events","cancel":"/v1/jobs/j/cancel"}}'
    )
    token = api.TokenEvent("j", "Hello", 17, 1)
    assert msgspec.json.encode(token) == b'{"job_id":"j","token":"Hello","token_id":17,"attempt":1}'


def test_fields_of_a_later_version_are_ignored() -> None:
    read = decode(b'{"job_id":"j","token":"","token_id":1,"attempt":1,"colour":"blue"}', api.TokenEvent)
    assert read == api.TokenEvent("j", "", 1, 1)


def test_an_error_goes_there_and_back() -> None:
    error = api.Error("no", "invalid_request_error", "seed", "unsupported")
    assert api.Error.of(error.info) == error
