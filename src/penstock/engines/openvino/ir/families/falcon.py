"""Falcon, old (7B: one key for all queries) and new (40B: grouped, two norms)."""

from __future__ import annotations

from penstock.engines.openvino.ir.config import Config
from penstock.engines.openvino.ir.families import common
from penstock.engines.openvino.ir.plan import Names, Norm, Plan


def falcon(config: Config) -> Plan:
    config.refuse("alibi", "its positions are a bias of the scores (ALiBi)")
    heads = config.whole("num_attention_heads", "n_head")
    new, parallel = config.flag("new_decoder_architecture"), config.flag("parallel_attn", True)
    shared = config.flag("multi_query", True)
    if new or not shared:
        kv_heads = config.whole("num_kv_heads", "n_head_kv", default=heads)
    else:
        kv_heads = 1
        config.ignore("num_kv_heads", "n_head_kv")
    norms = config.whole("num_ln_in_parallel_attn", default=2 if new else 1)
    before, before_mlp = "input_layernorm", "input_layernorm"
    if parallel and norms == 2:
        before, before_mlp = "ln_attn", "ln_mlp"
    elif not parallel:
        before_mlp = "post_attention_layernorm"
    config.ignore("ffn_hidden_size", "apply_residual_connection_post_layernorm", "num_key_value_heads")
    return common.plan(
        config,
        layers=config.whole("num_hidden_layers", "n_layer"),
        kv_heads=kv_heads,
        norm=Norm(config.number("layer_norm_epsilon", default=1e-5), "layer"),
        activation=config.get("activation", "gelu"),
        tied=config.flag("tie_word_embeddings", True),
        parallel=parallel or new,
        fused="grouped",
        names=Names(
            embedding="transformer.word_embeddings",
            layer="transformer.h.{}",
            final_norm="transformer.ln_f",
            before_attention=before,
            fused="self_attention.query_key_value",
            output="self_attention.dense",
            before_mlp=before_mlp,
            gate="",
            up="mlp.dense_h_to_4h",
            down="mlp.dense_4h_to_h",
        ),
    )


FAMILIES = {"FalconForCausalLM": falcon}
