"""Networks of every family against the reference library, through the engine: greedy replies equal, logits close,
alone, beside others, continued in the middle, with prompts longer than windows and than a step."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.support.architectures import PLAIN, SIZES, made
from tests.support.torch import NO_TORCH, TORCH

from penstock.core.events import Prefix
from penstock.core.job import Request, Sampling
from penstock.core.ports import Output
from penstock.engines.child.backend import load_backend
from penstock.engines.openvino.ir.families import FAMILIES, REFUSED, plan_of

pytestmark = pytest.mark.skipif(TORCH is None, reason=NO_TORCH)

#: Of log-probabilities, whose differences in float32 come from the order of sums.
TOLERANCE = 1e-3

GEMMA3 = {
    **SIZES,
    "head_dim": 16,
    "sliding_window": 20,
    "sliding_window_pattern": 2,
    "query_pre_attn_scalar": 9,
    "rope_parameters": {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    },
}
#: A part of a network that the tests have no use for, as small as can be.
EYES = {
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "image_size": 28,
    "patch_size": 14,
}

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", {**SIZES}),
    "llama, biased": ("LlamaForCausalLM", {**SIZES, "attention_bias": True, "mlp_bias": True}),
    "llama, yarn": (
        "LlamaForCausalLM",
        {
            **SIZES,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1e4,
                "factor": 8.0,
                "original_max_position_embeddings": 128,
            },
        },
    ),
    "llama, dynamic": (
        "LlamaForCausalLM",
        {**SIZES, "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}},
    ),
    "mistral": ("MistralForCausalLM", {**SIZES, "sliding_window": 24}),
    "mixtral": ("MixtralForCausalLM", {**SIZES, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen2": (
        "Qwen2ForCausalLM",
        {**SIZES, "use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1},
    ),
    "qwen3": ("Qwen3ForCausalLM", {**SIZES, "head_dim": 16}),
    "qwen3 moe": (
        "Qwen3MoeForCausalLM",
        {
            **SIZES,
            "head_dim": 16,
            "num_experts": 6,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
            "norm_topk_prob": True,
            "mlp_only_layers": [1],
        },
    ),
    "gemma": ("GemmaForCausalLM", {**SIZES, "head_dim": 16}),
    "gemma2": (
        "Gemma2ForCausalLM",
        {
            **SIZES,
            "head_dim": 16,
            "sliding_window": 20,
            "attn_logit_softcapping": None,
            "final_logit_softcapping": 4.0,
            "query_pre_attn_scalar": 7,
        },
    ),
    "gemma3": ("Gemma3ForCausalLM", GEMMA3),
    "gemma3, seeing": (
        "Gemma3ForConditionalGeneration",
        {"text_config": GEMMA3, "vision_config": EYES, "mm_tokens_per_image": 4},
    ),
    "mistral3, seeing": (
        "Mistral3ForConditionalGeneration",
        {
            "text_config": {**SIZES, "model_type": "mistral", "sliding_window": None, "head_dim": 8},
            "vision_config": {**EYES, "model_type": "pixtral"},
        },
    ),
    "phi": ("PhiForCausalLM", {**SIZES}),
    "phi, normed": ("PhiForCausalLM", {**SIZES, "qk_layernorm": True}),
    "phi3": ("Phi3ForCausalLM", {**SIZES, "sliding_window": 30}),
    "phi4 mini": ("Phi3ForCausalLM", {**SIZES, "partial_rotary_factor": 0.75, "hidden_size": 64}),
    "phi3.5": (
        "Phi3ForCausalLM",
        {
            **SIZES,
            "original_max_position_embeddings": 150,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 1e4,
                "short_factor": [1.0, 1.2, 1.5, 2.0],
                "long_factor": [1.5, 3.0, 6.0, 12.0],
            },
        },
    ),
    "smollm3": ("SmolLM3ForCausalLM", {**SIZES, "num_hidden_layers": 5}),
    "granite": (
        "GraniteForCausalLM",
        {
            **SIZES,
            "attention_multiplier": 0.5,
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.4,
            "logits_scaling": 2.0,
        },
    ),
    "olmo": ("OlmoForCausalLM", {**SIZES, "clip_qkv": 0.7}),
    "olmo2": ("Olmo2ForCausalLM", {**SIZES}),
    "cohere": ("CohereForCausalLM", {**SIZES, "use_qk_norm": True}),
    "cohere2": ("Cohere2ForCausalLM", {**SIZES, "sliding_window": 20, "sliding_window_pattern": 2}),
    "glm": ("GlmForCausalLM", {**SIZES, "head_dim": 8}),
    "glm4": ("Glm4ForCausalLM", {**SIZES, "head_dim": 8}),
    "exaone4": ("Exaone4ForCausalLM", {**SIZES, "sliding_window": 20, "sliding_window_pattern": 2}),
    "exaone4, no windows": (
        "Exaone4ForCausalLM",
        {**SIZES, "sliding_window": None, "layer_types": ["full_attention"] * 3},
    ),
    "stablelm": ("StableLmForCausalLM", {**SIZES, "use_qkv_bias": True}),
    "stablelm, parallel": ("StableLmForCausalLM", {**SIZES, "use_parallel_residual": True}),
    "starcoder2": ("Starcoder2ForCausalLM", {**SIZES, "sliding_window": 25}),
    "falcon 7b": ("FalconForCausalLM", {**PLAIN, "bias": True}),
    "falcon 40b": ("FalconForCausalLM", {**PLAIN, "new_decoder_architecture": True, "num_kv_heads": 2}),
    "falcon rw": ("FalconForCausalLM", {**PLAIN, "multi_query": False, "parallel_attn": False, "alibi": False}),
    "gpt2": ("GPT2LMHeadModel", {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 1024}),
    "pythia": ("GPTNeoXForCausalLM", {**PLAIN}),
    "neox, one after the other": ("GPTNeoXForCausalLM", {**PLAIN, "use_parallel_residual": False}),
    "opt 125m": ("OPTForCausalLM", {**PLAIN, "ffn_dim": 48}),
    "opt 350m": ("OPTForCausalLM", {**PLAIN, "ffn_dim": 48, "do_layer_norm_before": False, "word_embed_proj_dim": 16}),
}

GREEDY = Sampling(max_tokens=40, temperature=0, ignore_eos=True, logprobs=3)
#: Shorter than every window, longer, longer than a step (512 tokens) computes.
LENGTHS = (5, 61, 130, 600)


#: What differs from another one in a detail only, or is rare.
RARE = {
    "llama, biased",
    "llama, dynamic",
    "gemma",
    "mistral3, seeing",
    "phi, normed",
    "phi4 mini",
    "olmo",
    "cohere",
    "glm",
    "exaone4",
    "exaone4, no windows",
    "stablelm, parallel",
    "falcon 40b",
    "falcon rw",
    "neox, one after the other",
    "opt 350m",
}


@pytest.fixture(
    scope="module",
    params=[pytest.param(name, marks=[pytest.mark.long] if name in RARE else []) for name in MODELS],
)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, Any]]:
    """The reference's model, and our engine's of the same files."""
    architecture, config = MODELS[request.param]
    folder = tmp_path_factory.mktemp("family") / "model"
    reference = made(folder, architecture, config)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PENSTOCK_CACHE", str(folder.parent / "cache"))
        yield reference, load_backend("openvino", "tiny", str(folder), {"slots": 8}, lambda what, fraction: None)


def test_replies_are_the_references(pair: tuple[Any, Any]) -> None:
    reference, backend = pair
    prompts = [np.random.default_rng(length).integers(4, 380, length).tolist() for length in LENGTHS]
    together = replies(backend, [(prompt, []) for prompt in prompts])
    for prompt, outputs in zip(prompts, together, strict=True):
        compare(reference, prompt, outputs)
    ids = [ids_of(outputs) for outputs in together]
    assert len({id for whole in ids for id in whole}) > 7  # a network that repeats itself would show little
    # Alone; what was computed of the prompt is found in the cache.
    for prompt, whole in list(zip(prompts, ids, strict=True))[1:3]:
        assert ids_of(replies(backend, [(prompt, [])])[0]) == whole
    # Continued, each somewhere else.
    cuts = (1, 17, 39, 20)
    continued = replies(backend, [(prompts[i], ids[i][:cut]) for i, cut in enumerate(cuts)])
    assert [ids_of(outputs) for outputs in continued] == [ids[i][cut:] for i, cut in enumerate(cuts)]


def test_every_family_is_compared() -> None:
    assert {architecture for architecture, _ in MODELS.values()} == set(FAMILIES)


def test_the_documents_say_which_families_there_are() -> None:
    page = (Path(__file__).parents[4] / "docs/engines.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `(\w+)` \| [^|]+ \| ([^|]+) \| [^|]+ \| [^|]+ \|$", page, re.MULTILINE))
    equal = {name for name, verdict in rows.items() if verdict.startswith("equal")}
    # Gemma 2 itself has capped scores; what is compared is one without.
    assert equal == set(FAMILIES) - {"Gemma2ForCausalLM"}
    assert {name for name in rows if rows[name].startswith("refused: ")} == {*REFUSED, "Gemma2ForCausalLM"}


def test_gemma_3_reads_the_positions_of_older_configs() -> None:
    config = {**GEMMA3, "architectures": ["Gemma3ForCausalLM"]}
    scaling = {"rope_theta": 1e6, "rope_local_base_freq": 1e4, "rope_scaling": {"rope_type": "linear", "factor": 8.0}}
    assert plan_of({**config, "rope_parameters": None, **scaling}) == plan_of(config)


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_weights_in_fewer_bits_are_alike_alone_and_together(
    precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """GPT-2: its matrices are the other way round than all others'."""
    monkeypatch.setenv("PENSTOCK_CACHE", str(tmp_path / "cache"))
    made(tmp_path / "model", *MODELS["gpt2"])
    options = {"slots": 8, "precision": precision}
    backend = load_backend("openvino", "tiny", str(tmp_path / "model"), options, lambda what, fraction: None)
    prompts = [list(range(4, length)) for length in (9, 60, 130)]
    together = [ids_of(outputs) for outputs in replies(backend, [(prompt, []) for prompt in prompts])]
    assert [ids_of(replies(backend, [(prompt, [])])[0]) for prompt in prompts] == together


def replies(backend: Any, asked: list[tuple[list[int], list[int]]]) -> list[list[Output]]:
    """Of prompts, each with the reply so far, computed together."""
    outputs: list[list[Output]] = [[] for _ in asked]
    for key, (prompt, sofar) in enumerate(asked):
        request = Request("tiny", prompt_ids=tuple(prompt), sampling=GREEDY)
        backend.add(key, request, [Prefix(sofar, [""] * len(sofar))], 1)
    while backend.busy:
        for output in backend.step():
            outputs[output.key].append(output)
    return outputs


def ids_of(outputs: list[Output]) -> list[int]:
    return [id for output in outputs for id in output.ids]


def compare(reference: Any, prompt: list[int], outputs: list[Output]) -> None:
    """Each token is the one that the reference finds likeliest behind those before it; so likely as it says."""
    import torch

    ids = ids_of(outputs)
    assert len(ids) == GREEDY.max_tokens
    texts = torch.tensor([prompt + ids])
    with torch.no_grad():
        logits = reference(texts).logits[0]
        # LongRoPE has other positions for all of a text that is longer than this.
        trained = getattr(reference.config, "original_max_position_embeddings", None)
        if trained is not None:
            logits[:trained] = reference(texts[:, :trained]).logits[0]
    logits = logits[len(prompt) - 1 : -1]
    assert logits.argmax(-1).tolist() == ids
    expected = torch.log_softmax(logits.double(), -1).numpy()
    logprobs = [logprob for output in outputs for logprob in output.logprobs or ()]
    for row, logprob in zip(expected, logprobs, strict=True):
        assert logprob is not None
        for top in logprob.top:
            assert abs(top.logprob - row[top.id]) < TOLERANCE
