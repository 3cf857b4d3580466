"""``--option`` values as an engine's struct, and what is said of those that are not."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import msgspec
import pytest
from msgspec import Meta

from penstock.core.errors import ModelLoadError
from penstock.engines.adapters import adapter_names, parse_adapters
from penstock.engines.options import Amount, Count, Positive, parse
from penstock.engines.plugin import find_engine


class Options(msgspec.Struct, frozen=True):
    slots: Positive = 8
    context: Count = 0
    cache_gb: Amount = 0.0
    share: Annotated[float, Meta(gt=0, le=1)] = 0.5
    any_number: int = 0
    precision: Literal["f32", "fast", "auto"] = "auto"
    caching: bool = True
    device: str = "CPU"

    def __post_init__(self) -> None:
        if self.context and self.device == "TPU":
            raise ModelLoadError("A TPU has a context of its own.")


def test_values_come_as_texts_or_as_they_are() -> None:
    given = {"slots": "3", "cache_gb": "0.5", "caching": "off", "precision": "f32", "device": "7", "context": 9}
    assert parse(Options, given, "mine") == Options(3, 9, 0.5, precision="f32", caching=False, device="7")
    assert parse(Options, {"caching": False}, "mine") == parse(Options, {"caching": "No"}, "mine")
    assert parse(Options, {}, "mine") == Options()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"slotz": "3"}, "The mine engine has no option 'slotz': did you mean 'slots'?"),
        ({"zzz": "3"}, "The mine engine has no option 'zzz': it has slots, context, cache_gb, share, any_number, "),
        ({"slots": "0"}, "Option slots is a whole number, at least 1, not '0'."),
        ({"slots": "2.5"}, "Option slots is a whole number, at least 1, not '2.5'."),
        ({"context": "-1"}, "Option context is a whole number, at least 0, not '-1'."),
        ({"cache_gb": "much"}, "Option cache_gb is a number, at least 0, not 'much'."),
        ({"share": "1.5"}, "Option share is a number, more than 0 and at most 1, not '1.5'."),
        ({"any_number": "x"}, "Option any_number is a whole number, not 'x'."),
        ({"precision": "f64"}, "Option precision is f32, fast or auto, not 'f64'."),
        ({"caching": "maybe"}, "Option caching is on or off, not 'maybe'."),
        ({"context": "1", "device": "TPU"}, "A TPU has a context of its own."),
    ],
)
def test_what_is_wrong_is_said_with_what_is_right(given: dict[str, str], message: str) -> None:
    with pytest.raises(ModelLoadError) as caught:
        parse(Options, given, "mine")
    assert caught.value.message.startswith(message)


@pytest.mark.parametrize("engine", ["openvino", "upstream", "synthetic"])
def test_an_engine_without_adapters_says_who_has_them(engine: str) -> None:
    with pytest.raises(ModelLoadError, match="serves no LoRA adapters: transformers, vllm and llama do"):
        parse(find_engine(engine).options, {"adapters": "a=/b"}, engine)


def test_adapters_are_names_and_paths() -> None:
    assert parse_adapters("sql=/a/b, chat=/c") == {"sql": Path("/a/b"), "chat": Path("/c")}
    assert adapter_names({"slots": "4"}) == ()
    for wrong, words in (("sql", "NAME=PATH"), ("=/a", "NAME=PATH"), ("a=/b,a=/c", "two adapters 'a'")):
        with pytest.raises(ModelLoadError, match=words):
            parse_adapters(wrong)
