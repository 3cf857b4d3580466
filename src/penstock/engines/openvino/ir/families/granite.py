"""Granite 3 and the dense ones of 4: Llama, with a multiplier at each joint."""

from __future__ import annotations

from penstock.engines.openvino.ir.config import Config
from penstock.engines.openvino.ir.families import common
from penstock.engines.openvino.ir.plan import Plan


def granite(config: Config) -> Plan:
    return common.plan(
        config,
        attention_scale=config.number("attention_multiplier", default=1.0),
        embedding_scale=config.number("embedding_multiplier", default=1.0),
        residual_scale=config.number("residual_multiplier", default=1.0),
        logit_scale=1 / config.number("logits_scaling", default=1.0),
    )


FAMILIES = {"GraniteForCausalLM": granite}
