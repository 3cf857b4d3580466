"""Command-R (Cohere) and Command-R7B (Cohere 2): parallel, neighbours turned, logits scaled."""

from __future__ import annotations

from typing import Any

from penstock.engines.openvino.ir.config import Config
from penstock.engines.openvino.ir.families import common
from penstock.engines.openvino.ir.plan import Names, Norm, Plan
from penstock.engines.openvino.ir.rope import rotary_of


def cohere(config: Config) -> Plan:
    normed = config.flag("use_qk_norm")
    return _plan(
        config,
        names=Names(
            before_mlp="input_layernorm",
            query_norm="self_attn.q_norm" if normed else "",
            key_norm="self_attn.k_norm" if normed else "",
        ),
    )


def cohere2(config: Config) -> Plan:
    """Layers that see everything are not turned."""
    config.ignore("use_parallel_block", "use_parallel_embedding", "rotary_pct", "use_embedding_sharing")
    config.ignore("position_embedding_type", "use_gated_activation", "order_of_interleaved_layers", "layer_switch")
    kinds = common.layer_kinds(config, common.every(config, config.whole("sliding_window_pattern", default=4)))
    head = config.whole("hidden_size") // config.whole("num_attention_heads")
    rotary = rotary_of(config, head, interleaved=True)
    return _plan(
        config,
        names=Names(before_mlp="input_layernorm"),
        rotary=tuple(rotary if kind == common.SLIDING else None for kind in kinds),
        windows=common.windows(config, kinds, config.get("sliding_window", 4096)),
    )


def _plan(config: Config, **changes: Any) -> Plan:
    rotary = rotary_of(config, common.head_of(config), theta=5e5, interleaved=True)
    scale = config.get("logit_scale", 0.0625)
    return common.plan(
        config,
        **{
            "norm": Norm(config.number("layer_norm_eps", default=1e-5), "layer"),
            "tied": config.flag("tie_word_embeddings", True),
            "rotary": (rotary,) * config.whole("num_hidden_layers"),
            "parallel": True,
            "logit_scale": 1.0 if scale is None else scale,
            **changes,
        },
    )


FAMILIES = {"CohereForCausalLM": cohere, "Cohere2ForCausalLM": cohere2}
