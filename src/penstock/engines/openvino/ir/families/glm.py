"""GLM 4 of 2024 (Glm) and of 2025 (Glm4): a half of each head turned, by neighbours; gate and up in one."""

from __future__ import annotations

from typing import Any

from penstock.engines.openvino.ir.config import Config
from penstock.engines.openvino.ir.families import common
from penstock.engines.openvino.ir.plan import Names, Norm, Plan
from penstock.engines.openvino.ir.rope import rotary_of


def glm(config: Config) -> Plan:
    return _plan(config, names=Names(gate_up="mlp.gate_up_proj"))


def glm4(config: Config) -> Plan:
    names = Names(
        gate_up="mlp.gate_up_proj", after_attention="post_self_attn_layernorm", after_mlp="post_mlp_layernorm"
    )
    return _plan(config, names=names)


def _plan(config: Config, **changes: Any) -> Plan:
    head = config.whole("head_dim", default=128)
    return common.plan(
        config,
        head=head,
        norm=Norm(config.number("rms_norm_eps", default=1.5625e-7)),
        rotary=(rotary_of(config, head, part=0.5, interleaved=True),) * config.whole("num_hidden_layers"),
        **changes,
    )


FAMILIES = {"GlmForCausalLM": glm, "Glm4ForCausalLM": glm4}
