"""OLMo 1 (layer norms without weights) and OLMo 2 and 3 (norms behind the parts, queries and keys normed whole)."""

from __future__ import annotations

from penstock.engines.openvino.ir.config import Config
from penstock.engines.openvino.ir.families import common
from penstock.engines.openvino.ir.plan import Norm, Plan


def olmo(config: Config) -> Plan:
    return common.plan(config, norm=Norm(1e-5, "layer", bare=True), clip=config.get("clip_qkv") or 0.0)


def olmo2(config: Config) -> Plan:
    return common.plan(
        config, norm=Norm(config.number("rms_norm_eps", default=1e-5)), names=common.BEHIND, norms_whole=True
    )


FAMILIES = {"OlmoForCausalLM": olmo, "Olmo2ForCausalLM": olmo2}
