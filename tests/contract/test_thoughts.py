"""Thoughts and calls of reasoning models, on every engine of the box, and of every family."""

from __future__ import annotations

from typing import ClassVar

import pytest
from tests.support.engines import OneProcess
from tests.support.families import FAMILIES
from tests.support.thoughts import script_of
from tests.support.torch import NO_TORCH, TORCH

from penstock.engines.host.process import EngineProcess, EngineSpec
from penstock.testing.engine import ThoughtContract
from penstock.testing.engine.thoughts import Script


class Thoughts(OneProcess, ThoughtContract):
    family = ""
    engine_name = "openvino"
    options: ClassVar[dict[str, str]] = {}

    @pytest.fixture(scope="class")
    @classmethod
    def spec(cls, tmp_path_factory: pytest.TempPathFactory) -> EngineSpec:
        made = FAMILIES[cls.family].make(tmp_path_factory.mktemp("scripted") / cls.family)
        path = made.gguf() if cls.engine_name == "llama" else made.folder
        return EngineSpec(cls.engine_name, cls.family, str(path), cls.options)

    @pytest.fixture
    def script(self) -> Script:
        return script_of(FAMILIES[self.family])

    async def test_its_family_is_known(self, engine: EngineProcess) -> None:
        (info,) = engine.models
        assert (info.tool_format, info.reasoning_format) == FAMILIES[self.family].format


class TestQwen3(Thoughts):
    family = "qwen3"


class TestQwen3Coder(Thoughts):
    family = "qwen3-coder"


class TestGLM(Thoughts):
    family = "glm"


class TestMistral(Thoughts):
    family = "mistral"


class TestDeepSeek(Thoughts):
    family = "deepseek"


class TestKimi(Thoughts):
    family = "kimi"


class TestCommandR(Thoughts):
    family = "command-r"


class TestGptOss(Thoughts):
    family = "gpt-oss"


class TestLlamaQwen3(Thoughts):
    family = "qwen3"
    engine_name = "llama"
    options: ClassVar[dict[str, str]] = {"context": "1024", "slots": "16"}


class TestLlamaGptOss(Thoughts):
    family = "gpt-oss"
    engine_name = "llama"
    options: ClassVar[dict[str, str]] = {"context": "1024", "slots": "16"}


@pytest.mark.skipif(TORCH is None, reason=NO_TORCH)
class TestTransformersQwen3(Thoughts):
    family = "qwen3"
    engine_name = "transformers"
    options: ClassVar[dict[str, str]] = {"batching": "continuous"}


@pytest.mark.skipif(TORCH is None, reason=NO_TORCH)
class TestTransformersStaticDeepSeek(Thoughts):
    family = "deepseek"
    engine_name = "transformers"
    options: ClassVar[dict[str, str]] = {"batching": "static", "slots": "16"}
