"""``--option NAME=VALUE`` as a frozen struct: each engine has one, whose fields tell types, bounds and defaults."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin

import msgspec
from msgspec import Meta
from msgspec import inspect as kinds

from penstock.core.errors import ModelLoadError

T = TypeVar("T", bound=msgspec.Struct)

#: How many there are of what cannot be none, how many of what can (0 has a meaning of its own), and how much.
Positive = Annotated[int, Meta(ge=1)]
Count = Annotated[int, Meta(ge=0)]
Amount = Annotated[float, Meta(ge=0)]


class TextOptions(msgspec.Struct, frozen=True):
    """Options of engines that make text themselves: how the model writes calls and thoughts, by a name of
    `penstock.engines.text.formats.table`; auto: its chat template says it, none: all is text."""

    tool_format: str = "auto"
    reasoning_format: str = "auto"


class EmbeddingOptions(TextOptions, frozen=True):
    """Of models that embed: ``pooling``: cls, mean, last, or auto, what the folder says. ``normalize``: vectors have
    the length 1. ``max_length``: tokens that an input may have, 0 for what the folder says; ``truncate``: longer ones
    are cut instead of refused. ``query_instruction``, ``passage_instruction``: what is put before a text; empty: what
    the folder says. ``matryoshka``: may vectors be cut to fewer dimensions? on, off, or auto, what the folder says.
    ``step_tokens``: computed at once, with padding.
    """

    pooling: Literal["cls", "mean", "last", "auto"] = "auto"
    normalize: bool = True
    max_length: Count = 0
    truncate: bool = False
    query_instruction: str = ""
    passage_instruction: str = ""
    matryoshka: Literal["on", "off", "auto"] = "auto"
    step_tokens: Positive = 1024


_SWITCH = {"true": True, "on": True, "yes": True, "1": True, "false": False, "off": False, "no": False, "0": False}


def parse(options: type[T], given: Mapping[str, Any], engine: str) -> T:
    """An instance of *options* with the values *given* (texts, mostly) for its fields.

    What the values mean together is checked by the struct itself (``__post_init__``). Raises `ModelLoadError` for an
    unknown name (with the nearest known one) or a bad value.
    """
    fields = {field.name: field for field in msgspec.structs.fields(options)}
    values: dict[str, Any] = {}
    for name, value in given.items():
        if name not in fields:
            if name == "adapters":
                raise ModelLoadError(
                    f"The {engine} engine serves no LoRA adapters: transformers, vllm and llama do. Or merge it into "
                    "the model's weights (peft's merge_and_unload) and serve those."
                )
            near = difflib.get_close_matches(name, fields, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"it has {', '.join(fields)}."
            raise ModelLoadError(f"The {engine} engine has no option {name!r}: {hint}")
        values[name] = _value(name, str(value), fields[name].type)
    return options(**values)


def _value(name: str, text: str, kind: Any) -> Any:
    value: Any = _SWITCH.get(text.lower(), text) if kind is bool else text
    try:
        return msgspec.convert(value, kind, strict=False)
    except msgspec.ValidationError:
        raise ModelLoadError(f"Option {name} is {_described(kind)}, not {text!r}.") from None


def _described(kind: Any) -> str:
    """What a value of *kind* has to be, for people."""
    if get_origin(kind) is Literal:
        *others, last = map(str, get_args(kind))
        return f"{', '.join(others)} or {last}" if others else last
    match kinds.type_info(kind):
        case kinds.BoolType():
            return "on or off"
        case (kinds.IntType() | kinds.FloatType()) as number:
            bounds = {"at least": number.ge, "more than": number.gt, "at most": number.le, "less than": number.lt}
            stated = [f"{words} {bound:,.10g}" for words, bound in bounds.items() if bound is not None]
            what = "a whole number" if isinstance(number, kinds.IntType) else "a number"
            return f"{what}, {' and '.join(stated)}" if stated else what
        case _:
            return "something else"
