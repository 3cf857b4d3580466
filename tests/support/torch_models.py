"""Tiny random models of any architecture of the library, served by its engine and read by the library itself."""

from __future__ import annotations

import os
import select
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from penstock.core.events import Prefix
from penstock.core.job import Request, Sampling
from penstock.core.ports import Output
from penstock.engines.child.backend import Backend, load_backend
from tests.support import tiny_models

#: Set it to cuda to run all of this on a GPU.
DEVICE = os.environ.get("PENSTOCK_TEST_DEVICE", "cpu")

GREEDY = Sampling(max_tokens=12, temperature=0.0, ignore_eos=True)

SMALL: dict[str, Any] = {
    "vocab_size": 400,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": 3,
    "pad_token_id": 1,
}
OPT: dict[str, Any] = {"ffn_dim": 96, "word_embed_proj_dim": 64, "do_layer_norm_before": True}
GPT2: dict[str, Any] = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256, "vocab_size": 400}


def model(folder: Path, kind: str, **changes: Any) -> Path:
    """A random model of the architecture *kind*, as the library saves it, with our test tokenizer."""
    torch.manual_seed(1)
    config = AutoConfig.for_model(kind, **{**SMALL, **changes})
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    tiny_models.byte_level().save(str(folder / "tokenizer.json"))
    return folder


def loaded(folder: Path, **options: str) -> Backend:
    given = {"slots": "8", "device": DEVICE, **options}
    return load_backend("transformers", "tiny", str(folder), given, lambda what, fraction: None)


def generate(backend: Backend, *requests: Request, prefix: Prefix | None = None) -> list[tuple[list[int], str]]:
    """Each request's ids and text."""
    outputs: dict[int, list[Output]] = {key: [] for key in range(len(requests))}
    for key, request in enumerate(requests):
        backend.add(key, request, [prefix or Prefix()], 1)
    while backend.busy:
        if backend.wakeup is not None:
            select.select([backend.wakeup], [], [], 60)
        for output in backend.step():
            outputs[output.key].append(output)
    assert all(each[-1].finish is not None and each[-1].finish.error is None for each in outputs.values())
    return [
        ([id for o in each for id in o.ids], "".join(text for o in each for text in o.texts))
        for each in outputs.values()
    ]


def plain(folder: Path, prompt: tuple[int, ...], count: int) -> list[int]:
    """Greedy tokens by the library itself, one full forward pass each."""
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = list(prompt)
    with torch.inference_mode():
        for _ in range(count):
            ids.append(int(reference(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return ids[len(prompt) :]


def request(ids: tuple[int, ...], sampling: Sampling = GREEDY) -> Request:
    return Request("tiny", prompt_ids=ids, sampling=sampling)
