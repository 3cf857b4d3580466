"""A reply of the transformers engine is what the library says of its prompt alone, whoever runs beside it; and of whole
weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tests.support import tiny_models
from tests.support.torch import NO_TORCH, TORCH

from penstock.core.errors import ModelLoadError
from penstock.core.events import Prefix
from penstock.core.job import Sampling

if TORCH is None:
    pytest.skip(NO_TORCH, allow_module_level=True)

from safetensors.torch import load_file, save_file
from tests.support.torch_models import generate, loaded, model, plain, request

from penstock.engines.parts.batching import ContinuousBatching
from penstock.engines.parts.static import StaticBatching

#: Long enough to leave a window of 16 behind.
GREEDY = Sampling(max_tokens=24, temperature=0.0, ignore_eos=True)
PROMPTS = [(5, 6, 7), tuple(range(40, 90)), (200, 100, 50, 25), (9,)]

SWITCH = 64
LONGROPE: dict[str, Any] = {
    "initializer_range": 0.3,  # positions must show in the tokens
    "original_max_position_embeddings": SWITCH,
    "rope_scaling": {"type": "longrope", "short_factor": [1.0] * 8, "long_factor": [4.0 + i for i in range(8)]},
}
#: Short for good, short until its reply grows, as long as the switch, long from the beginning, and in several chunks.
OF_LENGTHS = [(5, 6, 7), tuple(range(40, 90)), tuple(range(100, 164)), tuple(range(20, 90)), (7, 8, 9) * 60]


@pytest.mark.parametrize("step_tokens", [512, 48], ids=["prompts in one step", "prompts in chunks"])
def test_longrope_is_chosen_for_each_text_by_its_own_length(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step_tokens: int
) -> None:
    monkeypatch.setattr("penstock.engines.transformers.engine.STEP_TOKENS", step_tokens)
    folder = model(tmp_path, "phi3", **LONGROPE)
    backend = loaded(folder)
    assert isinstance(backend, ContinuousBatching)
    right = [plain(folder, prompt, 24) for prompt in OF_LENGTHS]
    together = generate(backend, *(request(prompt, GREEDY) for prompt in OF_LENGTHS))
    assert [ids for ids, _ in together] == right
    # A reply that has grown beyond the switch goes on behind it.
    ((rest, _),) = generate(backend, request(OF_LENGTHS[1], GREEDY), prefix=Prefix(right[1][:18], [""] * 18))
    assert right[1][:18] + rest == right[1]


def test_longrope_in_static_batches_has_texts_of_one_length_beside_each_other(tmp_path: Path) -> None:
    folder = model(tmp_path, "phi3", **LONGROPE)
    backend = loaded(folder, batching="static")
    prompts = [*OF_LENGTHS[:4], tuple(range(90, 140))]
    together = generate(backend, *(request(prompt, GREEDY) for prompt in prompts))
    assert [ids for ids, _ in together] == [plain(folder, prompt, 24) for prompt in prompts]


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        (
            "llama4_text",
            {"attention_chunk_size": 16, "num_local_experts": 4, "intermediate_size_mlp": 96, "no_rope_layers": [1, 0]},
        ),
        ("phimoe", {"sliding_window": 16, "num_local_experts": 4}),
        ("mistral", {"sliding_window": 16}),
        ("gemma3_text", {"sliding_window": 16, "query_pre_attn_scalar": 16}),
    ],
    ids=["llama4", "phimoe", "mistral", "gemma3"],
)
def test_windows_and_chunks_are_kept_beyond_their_end(tmp_path: Path, kind: str, changes: dict[str, Any]) -> None:
    folder = model(tmp_path, kind, **changes)
    together = generate(loaded(folder), *(request(prompt, GREEDY) for prompt in PROMPTS))
    for prompt, (ids, _) in zip(PROMPTS, together, strict=True):
        assert ids == plain(folder, prompt, 24), kind


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("rwkv", {"attention_hidden_size": 64, "context_length": 256}),
        ("recurrent_gemma", {"lru_width": 64, "attention_window_size": 16, "num_hidden_layers": 3}),
    ],
    ids=["rwkv", "recurrentgemma"],
)
def test_models_that_take_padding_for_text_are_given_none(tmp_path: Path, kind: str, changes: dict[str, Any]) -> None:
    folder = model(tmp_path, kind, **changes)
    backend = loaded(folder)
    assert isinstance(backend, StaticBatching)
    prompts = [*PROMPTS, (10, 11, 12)]
    together = generate(backend, *(request(prompt, GREEDY) for prompt in prompts))
    for prompt, (ids, _) in zip(prompts, together, strict=True):
        assert ids == plain(folder, prompt, 24), kind


# ------------------------------------------------------------------------------------------ the weights


def _changed(folder: Path, change: Any) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def test_weights_that_the_files_lack_are_not_made_up(tmp_path: Path) -> None:
    folder = tiny_models.llama(tmp_path / "m")
    _changed(folder, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(ModelLoadError, match=r"model\.layers\.1\.mlp\.up_proj\.weight are not in its files"):
        loaded(folder)


def test_a_tied_head_is_not_missed(tmp_path: Path) -> None:
    folder = tiny_models.llama(tmp_path / "m", tie_word_embeddings=True)
    assert generate(loaded(folder), request((5, 6, 7)))[0][0] == plain(folder, (5, 6, 7), 12)


def test_weights_that_the_model_would_go_without_are_told(tmp_path: Path) -> None:
    """A checkpoint with biases whose config.json has forgotten them."""
    folder = tiny_models.llama(tmp_path / "m", attention_bias=True)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "attention_bias": False}))
    with pytest.raises(ModelLoadError, match=r"q_proj\.bias .*5 more of its files have no place"):
        loaded(folder)


def test_tables_that_old_checkpoints_carry_are_no_weights(tmp_path: Path) -> None:
    folder = tiny_models.llama(tmp_path / "m")
    right = plain(folder, (5, 6, 7), 12)
    table = load_file(folder / "model.safetensors")["model.norm.weight"][:8].clone()
    _changed(folder, lambda tensors: tensors.update({"model.layers.0.self_attn.rotary_emb.inv_freq": table}))
    assert generate(loaded(folder), request((5, 6, 7)))[0][0] == right
