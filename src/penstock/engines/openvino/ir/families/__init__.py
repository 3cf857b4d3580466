"""Families of decoders, one file each (or a few that are alike): how a config becomes a plan.

A new family is a function from `Config` to `Plan` and a line in its file's ``FAMILIES``. It reads every key that
changes what is computed, with the default that Hugging Face's library has for it; a config with any other key is
refused (`Config.done`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from penstock.engines.openvino.ir.config import Config
from penstock.engines.openvino.ir.families import (
    cohere,
    exaone,
    falcon,
    gemma,
    glm,
    gpt,
    granite,
    llama,
    olmo,
    opt,
    phi,
    qwen,
    smollm,
    stablelm,
    starcoder,
)
from penstock.engines.openvino.ir.plan import Plan
from penstock.engines.openvino.ir.refusal import unbuildable

#: By the name in a config's ``architectures``.
FAMILIES: Mapping[str, Callable[[Config], Plan]] = {
    **llama.FAMILIES,
    **qwen.FAMILIES,
    **gemma.FAMILIES,
    **phi.FAMILIES,
    **smollm.FAMILIES,
    **granite.FAMILIES,
    **olmo.FAMILIES,
    **cohere.FAMILIES,
    **glm.FAMILIES,
    **exaone.FAMILIES,
    **stablelm.FAMILIES,
    **starcoder.FAMILIES,
    **falcon.FAMILIES,
    **gpt.FAMILIES,
    **opt.FAMILIES,
}

#: Why others are refused, where it is not only that nobody wrote them.
REFUSED: Mapping[str, str] = {
    "BloomForCausalLM": "its positions are a bias of the scores (ALiBi)",
    "MptForCausalLM": "its positions are a bias of the scores (ALiBi)",
    "MambaForCausalLM": "it has a state in place of attention",
    "GptOssForCausalLM": "its experts are in a format of four bits (MXFP4)",
}


def plan_of(values: Mapping[str, Any]) -> Plan:
    """Of a config.json. Raises `ModelLoadError` where the config asks for what is not known or cannot be built."""
    config = Config(values)
    family = FAMILIES.get(config.architecture)
    if family is None:
        why = REFUSED.get(config.architecture, "it is none of those that can be built")
        raise unbuildable(f"its architecture is {config.architecture}: {why}")
    config.refuse("quantization_config", "its weights are quantized")
    plan = family(config)
    config.done()
    return plan
