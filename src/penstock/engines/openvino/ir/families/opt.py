"""OPT: learned positions that begin at 2; the one of 350M has its norms behind the sums, and narrower embeddings."""

from __future__ import annotations

from penstock.engines.openvino.ir.config import Config
from penstock.engines.openvino.ir.families import common
from penstock.engines.openvino.ir.plan import Names, Norm, Plan


def opt(config: Config) -> Plan:
    layers, hidden = config.whole("num_hidden_layers"), config.whole("hidden_size")
    before = config.flag("do_layer_norm_before", True)
    narrow = config.whole("word_embed_proj_dim", default=hidden) != hidden
    ends_normed = not config.flag("_remove_final_layer_norm") and before
    return common.plan(
        config,
        norm=Norm(1e-5, "layer", bare=not config.flag("layer_norm_elementwise_affine", True)),
        activation=config.get("activation_function", "relu"),
        tied=config.flag("tie_word_embeddings", True),
        rotary=(None,) * layers,
        first_position=2,
        norm_after_sum=not before,
        names=Names(
            embedding="model.decoder.embed_tokens",
            positions="model.decoder.embed_positions",
            project_in="model.decoder.project_in" if narrow else "",
            project_out="model.decoder.project_out" if narrow else "",
            layer="model.decoder.layers.{}",
            final_norm="model.decoder.final_layer_norm" if ends_normed else "",
            before_attention="self_attn_layer_norm",
            output="self_attn.out_proj",
            before_mlp="final_layer_norm",
            gate="",
            up="fc1",
            down="fc2",
        ),
    )


FAMILIES = {"OPTForCausalLM": opt}
