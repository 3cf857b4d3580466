"""What most families have in common: Llama's names of keys and tensors, and layers of two kinds."""

from __future__ import annotations

import math
from typing import Any

from penstock.engines.openvino.ir.config import Config
from penstock.engines.openvino.ir.plan import Names, Norm, Plan
from penstock.engines.openvino.ir.refusal import unbuildable
from penstock.engines.openvino.ir.rope import rotary_of

#: Norms behind the parts instead of before them, and of queries and keys.
BEHIND = Names(
    before_attention="",
    after_attention="post_attention_layernorm",
    before_mlp="",
    after_mlp="post_feedforward_layernorm",
    query_norm="self_attn.q_norm",
    key_norm="self_attn.k_norm",
)
SLIDING, FULL = "sliding_attention", "full_attention"


def head_of(config: Config) -> int:
    return config.whole("head_dim", default=config.whole("hidden_size") // config.whole("num_attention_heads"))


def plan(config: Config, **changes: Any) -> Plan:
    """Llama's network, with *changes*: all layers alike, turned whole, scores scaled by the root of the head's size."""
    layers, heads, head = config.whole("num_hidden_layers"), config.whole("num_attention_heads"), head_of(config)
    parts: dict[str, Any] = {
        "layers": layers,
        "hidden": config.whole("hidden_size"),
        "heads": heads,
        "kv_heads": config.whole("num_key_value_heads", default=heads),
        "head": head,
        "activation": config.get("hidden_act", "silu"),
        "windows": (0,) * layers,
        "attention_scale": 1 / math.sqrt(head),
        **changes,
    }
    parts.setdefault("norm", Norm(config.number("rms_norm_eps", default=1e-6)))
    parts.setdefault("tied", config.flag("tie_word_embeddings"))
    if "rotary" not in parts:
        parts["rotary"] = (rotary_of(config, head),) * layers
    return Plan(**parts)


def layer_kinds(config: Config, default: list[str]) -> list[str]:
    """``sliding_attention`` or ``full_attention`` of each layer; *default* where the config does not say."""
    kinds = config.get("layer_types") or default
    if set(kinds) - {SLIDING, FULL} or len(kinds) != config.whole("num_hidden_layers"):
        raise unbuildable(f"its layers are {', '.join(sorted(set(kinds)))}")
    return list(kinds)


def every(config: Config, interval: int) -> list[str]:
    """Layers that slide, but each *interval*-th."""
    return [FULL if (layer + 1) % interval == 0 else SLIDING for layer in range(config.whole("num_hidden_layers"))]


def windows(config: Config, kinds: list[str], window: int | None) -> tuple[int, ...]:
    """A window that is not smaller than the context hides nothing."""
    if window is None or window >= config.number("max_position_embeddings", default=math.inf):
        window = 0
    return tuple(int(window) if kind == SLIDING else 0 for kind in kinds)
