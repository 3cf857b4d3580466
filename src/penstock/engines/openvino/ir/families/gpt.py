"""GPT-2 (learned positions) and GPT-NeoX, which Pythia is (rotary ones, parallel)."""

from __future__ import annotations

import math

from penstock.engines.openvino.ir.config import Config
from penstock.engines.openvino.ir.families import common
from penstock.engines.openvino.ir.plan import Names, Norm, Plan
from penstock.engines.openvino.ir.refusal import unbuildable
from penstock.engines.openvino.ir.rope import rotary_of


def gpt2(config: Config) -> Plan:
    config.refuse("scale_attn_by_inverse_layer_idx", "its scores are scaled by layer")
    config.refuse("add_cross_attention", "it attends to another network")
    config.ignore("reorder_and_upcast_attn", "n_inner", "n_positions")
    if not config.flag("scale_attn_weights", True):
        raise unbuildable("its scores are not scaled")
    layers, heads, hidden = config.whole("n_layer"), config.whole("n_head"), config.whole("n_embd")
    return Plan(
        layers=layers,
        hidden=hidden,
        heads=heads,
        kv_heads=heads,
        head=hidden // heads,
        norm=Norm(config.number("layer_norm_epsilon", default=1e-5), "layer"),
        activation=config.get("activation_function", "gelu_new"),
        tied=config.flag("tie_word_embeddings", True),
        rotary=(None,) * layers,
        windows=(0,) * layers,
        attention_scale=1 / math.sqrt(hidden // heads),
        transposed=True,
        names=Names(
            embedding="transformer.wte",
            positions="transformer.wpe",
            layer="transformer.h.{}",
            final_norm="transformer.ln_f",
            before_attention="ln_1",
            fused="attn.c_attn",
            output="attn.c_proj",
            before_mlp="ln_2",
            gate="",
            up="mlp.c_fc",
            down="mlp.c_proj",
        ),
    )


def gpt_neox(config: Config) -> Plan:
    head = common.head_of(config)
    part = config.number("rotary_pct", default=0.25)
    theta = config.number("rotary_emb_base", default=10_000.0)
    return common.plan(
        config,
        norm=Norm(config.number("layer_norm_eps", default=1e-5), "layer"),
        activation=config.get("hidden_act", "gelu"),
        rotary=(rotary_of(config, head, part=part, theta=theta),) * config.whole("num_hidden_layers"),
        parallel=config.flag("use_parallel_residual", True),
        fused="grouped",
        names=Names(
            embedding="gpt_neox.embed_in",
            layer="gpt_neox.layers.{}",
            final_norm="gpt_neox.final_layer_norm",
            head="embed_out",
            fused="attention.query_key_value",
            output="attention.dense",
            gate="",
            up="mlp.dense_h_to_4h",
            down="mlp.dense_4h_to_h",
        ),
    )


FAMILIES = {"GPT2LMHeadModel": gpt2, "GPTNeoXForCausalLM": gpt_neox}
