"""LoRA adapters on the transformers engine: each request what its adapter alone gives, whoever runs beside it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.support import tiny_models
from tests.support.torch import NO_TORCH, TORCH

from penstock.core.errors import ModelLoadError
from penstock.core.job import Request, Sampling
from penstock.engines.openvino.files import resolve

if TORCH is None:
    pytest.skip(NO_TORCH, allow_module_level=True)

from tests.support.lora import adapter, merged
from tests.support.torch_models import generate, loaded, plain

from penstock.engines.parts.batching import ContinuousBatching
from penstock.engines.parts.static import StaticBatching

GREEDY = Sampling(max_tokens=12, temperature=0.0, ignore_eos=True)
PROMPTS = [(5, 6, 7), tuple(range(40, 90)), (200, 100, 50, 25), (9,)]


class Folders:
    """A model, two adapters of it that change different layers, and what peft makes of each."""

    def __init__(self, folder: Path) -> None:
        self.base = tiny_models.llama(folder / "base")
        self.adapters = {
            "tiny-a": adapter(self.base, folder / "a"),
            "tiny.b": adapter(self.base, folder / "b", seed=2, r=2, target_modules="all-linear", use_rslora=True),
        }
        self.whole = {"tiny": self.base} | {
            name: merged(self.base, path, folder / f"{name}-merged") for name, path in self.adapters.items()
        }

    @property
    def option(self) -> str:
        return ",".join(f"{name}={path}" for name, path in self.adapters.items())


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    return Folders(tmp_path_factory.mktemp("lora"))


def request(model: str, prompt: tuple[int, ...]) -> Request:
    return Request(model, prompt_ids=prompt, sampling=GREEDY)


@pytest.mark.parametrize(("batching", "kind"), [("continuous", ContinuousBatching), ("static", StaticBatching)])
def test_each_gets_what_its_merged_weights_give(folders: Folders, batching: str, kind: type) -> None:
    backend = loaded(folders.base, adapters=folders.option, batching=batching)
    assert isinstance(backend, kind)
    asked = [(model, prompt) for prompt in PROMPTS for model in folders.whole]
    right = [plain(folders.whole[model], prompt, 12) for model, prompt in asked]
    assert len({tuple(ids) for ids in right[:3]}) == 3, "an adapter that changes nothing"
    assert [ids for ids, _ in generate(backend, *(request(*each) for each in asked))] == right
    for each, ids in zip(asked[:3], right, strict=False):
        assert generate(backend, request(*each))[0][0] == ids


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"bias": "all"}, "bias"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"target_modules": ["embed_tokens"]}, "Embedding"),
    ],
)
def test_what_is_not_computed_beside_others_is_refused(
    folders: Folders, tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    path = adapter(folders.base, tmp_path / "odd", **changes)
    with pytest.raises(ModelLoadError, match=words):
        loaded(folders.base, adapters=f"odd={path}")


def test_an_adapter_of_another_model_is_refused(folders: Folders, tmp_path: Path) -> None:
    other = tiny_models.llama(tmp_path / "other", num_hidden_layers=3)
    path = adapter(other, tmp_path / "odd")
    with pytest.raises(ModelLoadError, match="does not fit"):
        loaded(folders.base, adapters=f"odd={path}")


@pytest.mark.parametrize(
    "serve",
    [
        lambda path: loaded(path),
        lambda path: resolve("tiny", str(path), lambda what, fraction: None),
    ],
    ids=["transformers", "openvino"],
)
def test_an_adapter_as_a_model_is_told_how_to_be_served(folders: Folders, serve: Callable[[Path], Any]) -> None:
    with pytest.raises(ModelLoadError, match=r"is a LoRA adapter, not a model.*--option adapters="):
        serve(folders.adapters["tiny-a"])
