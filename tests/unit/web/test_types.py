"""The page's idea of what the API answers (`types.d.ts`) is what ``/openapi.json`` says."""

from __future__ import annotations

import re
from importlib.resources import files

import pytest

from penstock.gateway import openapi
from penstock.gateway.app import OPERATIONS

TEXT = files("penstock").joinpath("web/js/types.d.ts").read_text().split("// ----")[1]
INTERFACES = {
    name: (base, dict(re.findall(r"^  (\w+)(\??):", body, re.MULTILINE)))
    for name, base, body in re.findall(r"^export interface (\w+)(?: extends (\w+))? \{\n(.*?)^\}", TEXT, re.M | re.S)
}
#: What is called otherwise, or stands inside another schema.
CALLED = {"Failure": "Error"}
SCHEMAS = openapi.document(OPERATIONS)["components"]["schemas"]


@pytest.mark.parametrize("name", INTERFACES)
def test_every_field_is_answered(name: str) -> None:
    base, fields = INTERFACES[name]
    schema = SCHEMAS[CALLED.get(name, name)]
    known = set(schema["properties"])
    assert set(fields) | set(INTERFACES[base][1] if base else ()) <= known
    always = {field for field, optional in fields.items() if not optional}
    assert always <= set(schema["required"])


def test_there_are_some() -> None:
    assert len(INTERFACES) > 10
