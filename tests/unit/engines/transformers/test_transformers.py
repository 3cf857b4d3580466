"""What the transformers engine adds to the engine contract: architectures, and the way to those that refuse."""

from __future__ import annotations

import json
import select
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.support import tiny_models
from tests.support.torch import NO_TORCH, TORCH

from penstock.core.errors import ModelLoadError
from penstock.core.events import Prefix
from penstock.core.job import Request, ResponseFormat, Sampling
from penstock.core.ports import Output

if TORCH is None:
    pytest.skip(NO_TORCH, allow_module_level=True)

import torch
import transformers
from tests.support.torch_models import DEVICE, GPT2, GREEDY, OPT, generate, loaded, model, plain, request

from penstock.engines.parts.batching import ContinuousBatching
from penstock.engines.parts.static import StaticBatching
from penstock.engines.transformers.network import RECORDED, RecordedStep, TorchNetwork

PROMPTS = [(5, 6, 7), tuple(range(40, 90)), (200, 100, 50, 25), (9,)]


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Steps in the form that is recorded on a GPU, on any device; their widths and lengths. On a CPU each is computed
    anew instead of replayed."""
    shapes = []
    replay = TorchNetwork._replay

    def record(self: RecordedStep) -> None:
        self._logits = self.forward()

    def note(self: TorchNetwork, inputs: Any) -> Any:
        result = replay(self, inputs)
        shapes[:] = self._recorded
        return result

    monkeypatch.setattr(TorchNetwork, "_replay", note)
    if DEVICE not in RECORDED:
        monkeypatch.setattr("penstock.engines.transformers.network.RECORDED", {DEVICE})
        monkeypatch.setattr(RecordedStep, "_record", record)
    return shapes


ARCHITECTURES = pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("llama", {}),
        ("opt", OPT),
        ("qwen3", {}),
        ("mistral", {"sliding_window": 8}),
        ("gpt2", GPT2),
        ("gpt_neox", {}),
        ("phi3", {"pad_token_id": 1}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)


@ARCHITECTURES
def test_architectures_are_batched_continuously_and_say_what_the_library_says(
    tmp_path: Path, kind: str, changes: dict[str, Any]
) -> None:
    folder = model(tmp_path, kind, **changes)
    backend = loaded(folder, batching="continuous")
    assert isinstance(backend, ContinuousBatching)
    # Memory that is given out next has seen anything: a cache must not believe what it finds there.
    for size in (1, 2, 4, 8):
        used = [torch.full((size * 4 * 256 * 16,), torch.nan) for _ in range(8)]
        del used
    together = generate(backend, *map(request, PROMPTS))
    for prompt, (ids, _) in zip(PROMPTS, together, strict=True):
        assert ids == plain(folder, prompt, 12), kind
    whole = together[1][0]
    (rest, _), *_ = generate(backend, request(PROMPTS[1]), prefix=Prefix(whole[:5], [""] * 5))
    assert whole[:5] + rest == whole


@ARCHITECTURES
def test_steps_of_rounded_sizes_compute_the_same(
    tmp_path: Path, kind: str, changes: dict[str, Any], recorded: list[tuple[int, int]]
) -> None:
    folder = model(tmp_path, kind, **changes)
    backend = loaded(folder, batching="continuous")
    for prompt, (ids, _) in zip(PROMPTS, generate(backend, *map(request, PROMPTS)), strict=True):
        assert ids == plain(folder, prompt, 12), kind
    assert recorded == [(4, 64)]
    longer = Sampling(max_tokens=80, temperature=0.0, ignore_eos=True)
    (ids, _), (others, _) = generate(backend, request(PROMPTS[0], longer), request(PROMPTS[1]))
    assert ids == plain(folder, PROMPTS[0], 80)
    assert others == plain(folder, PROMPTS[1], 12)
    assert recorded == [(4, 64), (2, 64), (1, 64), (1, 128)]


def test_a_model_that_cannot_be_recorded_is_computed_step_by_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recorded: list[tuple[int, int]]
) -> None:
    def refuse(self: RecordedStep) -> None:
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(RecordedStep, "_record", refuse)
    folder = tiny_models.llama(tmp_path / "m")
    backend = loaded(folder, batching="continuous")
    assert generate(backend, request((5, 6, 7)))[0][0] == plain(folder, (5, 6, 7), 12)
    assert recorded == []


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        # Its attention has a cap on scores, which is not one that we compute.
        ("gemma2", {"attn_logit_softcapping": 5.0, "query_pre_attn_scalar": 16}),
        # No attention at all: it keeps a state, which a row of several sequences would run together.
        ("mamba", {"state_size": 8, "expand": 2}),
    ],
    ids=["gemma2", "mamba"],
)
def test_architectures_that_refuse_are_run_in_static_batches(
    tmp_path: Path, kind: str, changes: dict[str, Any]
) -> None:
    folder = model(tmp_path, kind, **changes)
    with pytest.raises(ModelLoadError, match="cannot be batched continuously"):
        loaded(folder, batching="continuous")
    backend = loaded(folder)
    assert isinstance(backend, StaticBatching)
    assert not backend.info.deterministic
    (ids, _), *_ = generate(backend, request((5, 6, 7)))
    assert ids == plain(folder, (5, 6, 7), 12)


def test_static_batches_gather_those_that_want_as_many_tokens(tmp_path: Path) -> None:
    batches: list[list[int]] = []
    backend = loaded(tiny_models.llama(tmp_path / "m"), batching="static", window="200")
    assert isinstance(backend, StaticBatching)
    run: Callable[..., None] = backend._generate

    def watched(rows: Any, steps: int) -> None:
        batches.append([steps] * len(rows))
        run(rows, steps)

    backend._generate = watched
    longer = Sampling(max_tokens=20, temperature=0.0, ignore_eos=True)
    asked = [request((5, 6, 7)), request((8, 9), longer), request((10,)), request((11, 12, 13, 14), longer)]
    found = generate(backend, *asked)
    assert sorted(batches) == [[12, 12], [20, 20]]
    assert [len(ids) for ids, _ in found] == [12, 20, 12, 20]
    alone = [generate(backend, each)[0] for each in asked]
    assert alone == found


def test_an_aborted_row_leaves_its_batch_running(tmp_path: Path) -> None:
    backend = loaded(tiny_models.llama(tmp_path / "m"), batching="static", window="100")
    backend.add(1, request((5, 6), Sampling(max_tokens=200, temperature=0.0, ignore_eos=True)), [Prefix()], 1)
    backend.add(2, request((7, 8), Sampling(max_tokens=200, temperature=0.0, ignore_eos=True)), [Prefix()], 1)
    seen: list[Output] = []
    while not any(output.key == 1 for output in seen):
        select.select([backend.wakeup], [], [], 60)
        seen += backend.step()
    backend.abort(1)
    seen.clear()
    while backend.busy:
        select.select([backend.wakeup], [], [], 60)
        seen += backend.step()
    assert {output.key for output in seen} == {2}
    assert seen[-1].finish is not None


def test_a_batch_of_which_all_rows_are_aborted_within_its_window(tmp_path: Path) -> None:
    backend = loaded(tiny_models.llama(tmp_path / "m"), batching="static", window="300")
    backend.add(1, request((5, 6)), [Prefix()], 1)
    time.sleep(0.1)  # now the window is open, and its batch is of one
    backend.abort(1)
    time.sleep(0.3)
    ((ids, _),) = generate(backend, request((7, 8)))
    assert len(ids) == 12


@pytest.mark.parametrize("batching", ["continuous", "static"])
def test_json_is_held_to_its_schema_also_after_a_cut(tmp_path: Path, batching: str) -> None:
    backend = loaded(tiny_models.llama(tmp_path / "m"), batching=batching)
    schema = {"type": "object", "properties": {"a": {"enum": ["mill", "gate"]}}, "required": ["a"]}
    asked = Request(
        "tiny",
        prompt="x",
        sampling=Sampling(max_tokens=60, temperature=0.0),
        response_format=ResponseFormat("json_schema", {**schema, "additionalProperties": False}),
    )
    ((ids, text),) = generate(backend, asked)
    assert json.loads(text)["a"] in ("mill", "gate")
    ((rest, _),) = generate(backend, asked, prefix=Prefix(ids[:4], [""] * 4))
    assert ids[:4] + rest == ids


@pytest.mark.parametrize(("dtype", "precision"), [("auto", "f32"), ("bf16", "bf16")])
def test_the_precision_is_chosen_and_told(tmp_path: Path, dtype: str, precision: str) -> None:
    backend = loaded(tiny_models.llama(tmp_path / "m", dtype="BF16"), dtype=dtype, device="cpu")
    assert backend.info.precision == precision
    assert backend.info.deterministic is (precision == "f32")
    assert len(generate(backend, request((5, 6, 7)))[0][0]) == 12


def test_only_safetensors_are_read(tmp_path: Path) -> None:
    folder = tiny_models.llama(tmp_path / "m")
    weights = folder / "model.safetensors"
    torch.save({}, folder / "pytorch_model.bin")
    weights.unlink()
    with pytest.raises(ModelLoadError, match="safetensors"):
        loaded(folder)


def test_a_tokenizer_of_vocabulary_and_merges_is_put_together(tmp_path: Path) -> None:
    """As in facebook/opt-125m, which has no tokenizer.json."""
    folder = model(tmp_path, "opt", **OPT)
    saved = json.loads((folder / "tokenizer.json").read_text())["model"]
    (folder / "vocab.json").write_text(json.dumps(saved["vocab"]))
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in saved["merges"]]
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges))
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GPT2Tokenizer"}))
    backend = loaded(folder)
    ((_, text),) = generate(backend, Request("tiny", prompt="the mill turns", sampling=GREEDY))
    assert text


def test_what_cannot_be_served_says_why(tmp_path: Path) -> None:
    folder = tiny_models.llama(tmp_path / "m")
    for options, words in (
        ({"dtype": "f8"}, "dtype is f32"),
        ({"slot": "3"}, "slots"),
        ({"device": "cuda:7"}, "cuda:7"),
    ):
        with pytest.raises(ModelLoadError, match=words):
            loaded(folder, **options)
    (folder / "config.json").write_text('{"model_type": "nonsense"}')
    with pytest.raises(ModelLoadError, match="nonsense"):
        loaded(folder)


def test_the_version_is_one_that_was_tested() -> None:
    assert int(transformers.__version__.split(".")[0]) >= 5
