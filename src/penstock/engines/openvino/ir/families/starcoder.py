"""Starcoder 2: layer norms, biases, a plain MLP, a window in every layer."""

from __future__ import annotations

from penstock.engines.openvino.ir.config import Config
from penstock.engines.openvino.ir.families import common
from penstock.engines.openvino.ir.plan import Names, Norm, Plan


def starcoder2(config: Config) -> Plan:
    config.ignore("norm_type", "mlp_type", "attention_softmax_in_fp32", "scale_attention_softmax_in_fp32")
    config.ignore("scale_attn_weights", "layer_norm_epsilon", "activation_function", "use_sliding_window")
    kinds = [common.SLIDING] * config.whole("num_hidden_layers")
    return common.plan(
        config,
        norm=Norm(config.number("norm_epsilon", default=1e-5), "layer"),
        activation=config.get("hidden_act", "gelu_pytorch_tanh"),
        tied=config.flag("tie_word_embeddings", True),
        windows=common.windows(config, kinds, config.get("sliding_window")),
        names=Names(gate="", up="mlp.c_fc", down="mlp.c_proj"),
    )


FAMILIES = {"Starcoder2ForCausalLM": starcoder2}
