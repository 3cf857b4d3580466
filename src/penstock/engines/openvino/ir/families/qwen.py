"""Qwen 2, 2.5 and 3, dense and with experts."""

from __future__ import annotations

import dataclasses

from penstock.engines.openvino.ir.config import Config
from penstock.engines.openvino.ir.families import common
from penstock.engines.openvino.ir.plan import Experts, Names, Plan

QWEN3 = Names(query_norm="self_attn.q_norm", key_norm="self_attn.k_norm")


def qwen2(config: Config) -> Plan:
    return _dense(config, Names())


def qwen3(config: Config) -> Plan:
    return _dense(config, QWEN3, head=128)


def qwen3_moe(config: Config) -> Plan:
    layers, step = config.whole("num_hidden_layers"), config.whole("decoder_sparse_step", default=1)
    dense = set(config.get("mlp_only_layers") or [])
    sparse = frozenset(layer for layer in range(layers) if layer not in dense and (layer + 1) % step == 0)
    experts = Experts(
        config.whole("num_experts", "num_local_experts", default=128),
        config.whole("num_experts_per_tok", default=8),
        config.flag("norm_topk_prob"),
        sparse,
    )
    config.ignore("moe_intermediate_size", "max_window_layers")
    # Its library slides all layers, or none.
    window = config.get("sliding_window", 4096) if config.flag("use_sliding_window") else None
    kinds = [common.SLIDING] * layers
    plan = common.plan(config, names=QWEN3, windows=common.windows(config, kinds, window))
    return dataclasses.replace(plan, experts=experts)


def _dense(config: Config, names: Names, head: int | None = None) -> Plan:
    layers = config.whole("num_hidden_layers")
    window = config.get("sliding_window", 4096) if config.flag("use_sliding_window") else None
    first = config.whole("max_window_layers", default=28)
    kinds = [common.SLIDING if layer >= first else common.FULL for layer in range(layers)]
    kinds = common.layer_kinds(config, kinds)
    config.refuse("use_mrope", "its positions have several dimensions")
    return common.plan(config, names=names, windows=common.windows(config, kinds, window))


FAMILIES = {
    "Qwen2ForCausalLM": qwen2,
    "Qwen3ForCausalLM": qwen3,
    "Qwen3MoeForCausalLM": qwen3_moe,
}
