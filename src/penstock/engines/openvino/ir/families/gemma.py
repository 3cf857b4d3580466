"""Gemma 1, 2 and 3: weights of norms around 0, scaled embeddings, a gelu; from 2 on norms behind the parts too, and
layers that slide."""

from __future__ import annotations

import math
from typing import Any

from penstock.engines.openvino.ir.config import Config
from penstock.engines.openvino.ir.families import common
from penstock.engines.openvino.ir.plan import Names, Norm, Plan
from penstock.engines.openvino.ir.refusal import unbuildable
from penstock.engines.openvino.ir.rope import rotary_of

SANDWICH: dict[str, str] = {
    "after_attention": "post_attention_layernorm",
    "before_mlp": "pre_feedforward_layernorm",
    "after_mlp": "post_feedforward_layernorm",
}


def gemma(config: Config) -> Plan:
    # Its first configs said "gelu" and meant the other one.
    activation = config.get("hidden_activation") or config.get("hidden_act", "gelu_pytorch_tanh")
    config.refuse("use_bidirectional_attention", "its tokens see those behind them")
    return _plan(config, activation="gelu_pytorch_tanh" if activation == "gelu" else activation)


def gemma2(config: Config) -> Plan:
    if config.get("attn_logit_softcapping", 50.0):
        raise unbuildable("its attention scores are capped (softcapping), which paged attention cannot")
    config.refuse("use_bidirectional_attention", "its tokens see those behind them")
    kinds = common.layer_kinds(config, common.every(config, 2))
    return _plan(
        config,
        names=Names(**SANDWICH),
        windows=common.windows(config, kinds, config.get("sliding_window", 4096)),
        attention_scale=1 / math.sqrt(config.number("query_pre_attn_scalar", default=256)),
        logit_cap=config.get("final_logit_softcapping", 30.0) or 0.0,
        activation=config.get("hidden_activation", "gelu_pytorch_tanh"),
    )


def gemma3(config: Config) -> Plan:
    config.refuse("attn_logit_softcapping", "its attention scores are capped (softcapping)")
    config.refuse("use_bidirectional_attention", "its tokens see those behind them")
    interval = config.whole("sliding_window_pattern", "_sliding_window_pattern", default=6)
    kinds = common.layer_kinds(config, common.every(config, interval))
    head = config.whole("head_dim", default=256)
    # Older configs scale only the layers that see everything.
    given, scaling = config.get("rope_parameters") or {}, config.get("rope_scaling") or {}
    full = {"rope_theta": config.get("rope_theta"), **scaling, **given.get(common.FULL, {})}
    sliding = {"rope_theta": config.get("rope_local_base_freq"), **given.get(common.SLIDING, {})}
    turns = {
        common.FULL: rotary_of(config, head, theta=1e6, rope=full),
        common.SLIDING: rotary_of(config, head, theta=1e4, rope=sliding),
    }
    return _plan(
        config,
        names=Names(query_norm="self_attn.q_norm", key_norm="self_attn.k_norm", **SANDWICH),
        windows=common.windows(config, kinds, config.get("sliding_window", 4096)),
        rotary=tuple(turns[kind] for kind in kinds),
        attention_scale=1 / math.sqrt(config.number("query_pre_attn_scalar", default=256)),
        logit_cap=config.get("final_logit_softcapping") or 0.0,
        activation=config.get("hidden_activation", "gelu_pytorch_tanh"),
    )


def gemma3_seeing(config: Config) -> Plan:
    text = config.text("Gemma3ForCausalLM")
    plan = gemma3(text)
    text.done()
    return plan


def _plan(config: Config, **changes: Any) -> Plan:
    config.ignore("hidden_act")
    return common.plan(
        config,
        norm=Norm(config.number("rms_norm_eps", default=1e-6), offset=1.0),
        head=config.whole("head_dim", default=256),
        tied=config.flag("tie_word_embeddings", True),
        embedding_scale=math.sqrt(config.whole("hidden_size")),
        **changes,
    )


FAMILIES = {
    "GemmaForCausalLM": gemma,
    "Gemma2ForCausalLM": gemma2,
    "Gemma3ForCausalLM": gemma3,
    "Gemma3ForConditionalGeneration": gemma3_seeing,
}
