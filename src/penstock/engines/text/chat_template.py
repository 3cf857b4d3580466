"""A model's chat template: messages into the text of a prompt."""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.meta
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

    What it makes of a conversation that it may not know is tried out: templates are programs, and do not tell.

    Raises `ModelLoadError` for one that cannot be read.
    """

    def __init__(self, source: str, variables: Mapping[str, Any]) -> None:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
        )
        environment.filters["tojson"] = tojson
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = _strftime_now
        self.source = source
        self._given = dict(variables)
        self.takes_tools = "tools" in source
        """Does it show tools? Else they are told as text (`penstock.engines.text.conversation`)."""
        self.takes_calls = "tool_calls" in source
        """Does it show calls, and what tools answer?"""
        self.takes_developers = "developer" in source
        """Does it know that role?"""
        self.short_ids = re.search(r"length\s*!=\s*9", source) is not None
        """Must the ids of calls have nine letters and digits (Mistral)?"""
        self.thought_keys = tuple(key for key in ("reasoning_content", "reasoning", "thinking") if _has(key, source))
        """What it calls the thoughts of a past turn."""
        try:
            self._template = environment.from_string(source)
            self.variables = jinja2.meta.find_undeclared_variables(environment.parse(source))
            """What it asks for."""
        except (jinja2.TemplateError, RecursionError) as error:
            raise ModelLoadError(f"The model's chat template cannot be read: {error}") from error

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        reply: bool = True,
        tools: Sequence[Mapping[str, Any]] = (),
        variables: Mapping[str, Any] = {},
    ) -> str:
        """The prompt text, with (*reply*) the beginning of the reply's turn at its end. *variables*: what a request
        tells it besides.

        Raises `InvalidRequest` with the template's own words when it refuses the messages.
        """
        try:
            return self._template.render(
                **{
                    **self._given,
                    "documents": None,
                    **variables,
                    "messages": [dict(message) for message in messages],
                    "add_generation_prompt": reply,
                    "tools": [dict(tool) for tool in tools] or None,
                }
            )
        except Exception as error:  # a template is somebody else's program: it may raise anything
            raise InvalidRequest(
                f"The model's chat template refuses these messages: {error}", param="messages"
            ) from error

    def _shows(self, word: str, *messages: Mapping[str, Any]) -> bool | None:
        """Is *word* shown of *messages*? None: they are refused."""
        try:
            return word in self.render(messages)
        except InvalidRequest:
            return None

    @cached_property
    def takes_system(self) -> bool:
        """Does it take a system message? Gemma's refuse it, others leave it out."""
        user = {"role": "user", "content": _PROBE}
        return bool(self._shows(_WORD, {"role": "system", "content": _WORD}, user)) or not self._shows(_PROBE, user)

    @cached_property
    def takes_parts(self) -> bool:
        """Must content be a list of parts?"""
        parts = {"role": "user", "content": [{"type": "text", "text": _WORD}]}
        return not self._shows(_WORD, {"role": "user", "content": _WORD}) and bool(self._shows(_WORD, parts))

    @cached_property
    def takes_argument_texts(self) -> bool:
        """Must the arguments of calls be JSON text? Most templates want the object."""

        def call(arguments: Any) -> dict[str, Any]:
            function = {"name": "probe", "arguments": arguments}
            return {
                "role": "assistant",
                "content": "",
                "tool_calls": [{"id": "a" * 9, "type": "function", "function": function}],
            }

        def shown(arguments: Any) -> bool:
            return bool(self._shows(f'"{_WORD}"', {"role": "user", "content": _PROBE}, call(arguments)))

        return not shown({_WORD: 1}) and shown(f'{{"{_WORD}": 1}}')


#: Words that no template has.
_WORD, _PROBE = "qxzword", "qxzprobe"


def _has(key: str, source: str) -> bool:
    """Is *key* looked up in *source*, as an attribute or by name?"""
    return re.search(rf"""\.{key}\b|['"]{key}['"]""", source) is not None
