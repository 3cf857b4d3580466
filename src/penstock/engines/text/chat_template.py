"""A model's chat template: messages into the text of a prompt."""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from penstock.core.errors import InvalidRequest, ModelLoadError


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes HTML; templates written for Hugging Face expect plain JSON.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _strftime_now(form: str) -> str:
    return datetime.datetime.now().strftime(form)


class _Generation(jinja2.ext.Extension):
    """``{% generation %} … {% endgeneration %}``: what the model wrote, for those who train it. Shown as it is."""

    tags: set[str] = {"generation"}  # noqa: RUF012 (Jinja's own type)

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        # With a scope of its own, as in Hugging Face's library: what is set inside is not seen behind it.
        return jinja2.nodes.CallBlock(self.call_method("_show"), [], [], body).set_lineno(line)

    def _show(self, caller: Callable[[], str]) -> str:
        return caller()


class ChatTemplate:
    """A model's own Jinja template, in a sandbox: operators choose models, but models come from the internet.

    Raises `ModelLoadError` for one that cannot be read.
    """

    def __init__(self, source: str, variables: Mapping[str, Any]) -> None:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
        )
        environment.filters["tojson"] = tojson
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = _strftime_now
        self._variables = dict(variables)
        self.takes_tools = "tools" in source
        """Does it show tools and their calls? `with_tools_as_text` is for those that do not."""
        self.takes_developers = "developer" in source
        """Does it know that role? `with_developers_as_system` is for those that do not."""
        try:
            self._template = environment.from_string(source)
        except (jinja2.TemplateError, RecursionError) as error:
            raise ModelLoadError(f"The model's chat template cannot be read: {error}") from error

    def render(
        self, messages: Sequence[Mapping[str, Any]], *, reply: bool = True, tools: Sequence[Mapping[str, Any]] = ()
    ) -> str:
        """The prompt text, with (*reply*) the beginning of the reply's turn at its end.

        Raises `InvalidRequest` with the template's own words when it refuses the messages.
        """
        try:
            return self._template.render(
                **self._variables,
                messages=[dict(message) for message in messages],
                add_generation_prompt=reply,
                tools=[dict(tool) for tool in tools] or None,
            )
        except Exception as error:  # a template is somebody else's program: it may raise anything
            raise InvalidRequest(
                f"The model's chat template refuses these messages: {error}", param="messages"
            ) from error
