"""Llama and Mistral, and Mixtral, which is Mistral with experts."""

from __future__ import annotations

import dataclasses
import math

from penstock.engines.openvino.ir.config import Config
from penstock.engines.openvino.ir.families import common
from penstock.engines.openvino.ir.plan import Experts, Plan
from penstock.engines.openvino.ir.refusal import unbuildable
from penstock.engines.openvino.ir.rope import rotary_of


def llama(config: Config) -> Plan:
    config.ignore("rope_interleaved")  # false in SmolLM2's config; the library knows no such key
    window = config.get("sliding_window")
    if window and window < config.number("max_position_embeddings", default=math.inf):
        raise unbuildable("its config has a sliding window, which Llamas do not have")
    return common.plan(config)


def mistral(config: Config) -> Plan:
    return _sliding(config, 4096)


def mixtral(config: Config) -> Plan:
    layers = config.whole("num_hidden_layers")
    experts = Experts(
        config.whole("num_local_experts", default=8),
        config.whole("num_experts_per_tok", default=2),
        normed=True,
        layers=frozenset(range(layers)),
        router="block_sparse_moe.gate",
        expert="block_sparse_moe.experts.{}",
        names=("w1", "w3", "w2"),
    )
    rotary = (rotary_of(config, common.head_of(config), theta=1e6),) * layers
    return dataclasses.replace(_sliding(config, None), rotary=rotary, experts=experts)


def mistral3_seeing(config: Config) -> Plan:
    text = config.text("MistralForCausalLM")
    plan = mistral(text)
    text.done()
    return plan


def _sliding(config: Config, default: int | None) -> Plan:
    kinds = [common.SLIDING] * config.whole("num_hidden_layers")
    return common.plan(config, windows=common.windows(config, kinds, config.get("sliding_window", default)))


FAMILIES = {
    "LlamaForCausalLM": llama,
    "MistralForCausalLM": mistral,
    "Mistral3ForConditionalGeneration": mistral3_seeing,
    "MixtralForCausalLM": mixtral,
}
