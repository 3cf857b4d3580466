"""Phi 1, 1.5 and 2 (parallel, plain MLP) and Phi 3, 3.5 and 4 (Llama's network with fused projections)."""

from __future__ import annotations

from penstock.engines.openvino.ir.config import Config
from penstock.engines.openvino.ir.families import common
from penstock.engines.openvino.ir.plan import Names, Norm, Plan
from penstock.engines.openvino.ir.rope import rotary_of


def phi(config: Config) -> Plan:
    head = common.head_of(config)
    normed = config.flag("qk_layernorm")
    return common.plan(
        config,
        norm=Norm(config.number("layer_norm_eps", default=1e-5), "layer"),
        activation=config.get("hidden_act", "gelu_new"),
        parallel=True,
        rotary=(rotary_of(config, head, part=0.5),) * config.whole("num_hidden_layers"),
        names=Names(
            output="self_attn.dense",
            query_norm="self_attn.q_layernorm" if normed else "",
            key_norm="self_attn.k_layernorm" if normed else "",
            before_mlp="input_layernorm",
            gate="",
            up="mlp.fc1",
            down="mlp.fc2",
            final_norm="model.final_layernorm",
        ),
    )


def phi3(config: Config) -> Plan:
    kinds = [common.SLIDING] * config.whole("num_hidden_layers")
    config.ignore("full_attn_mod", "interpolate_factor", "lm_head_bias")  # the library knows none of them
    config.ignore("original_max_position_embeddings")  # read where the scaling needs it
    return common.plan(
        config,
        norm=Norm(config.number("rms_norm_eps", default=1e-5)),
        windows=common.windows(config, kinds, config.get("sliding_window")),
        names=Names(fused="self_attn.qkv_proj", gate_up="mlp.gate_up_proj"),
    )


FAMILIES = {"PhiForCausalLM": phi, "Phi3ForCausalLM": phi3}
