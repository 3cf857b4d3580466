"""EXAONE 4: norms behind the parts; in its hybrids, layers that see everything are not turned."""

from __future__ import annotations

from penstock.engines.openvino.ir.config import Config
from penstock.engines.openvino.ir.families import common
from penstock.engines.openvino.ir.plan import Norm, Plan
from penstock.engines.openvino.ir.refusal import unbuildable
from penstock.engines.openvino.ir.rope import rotary_of


def exaone4(config: Config) -> Plan:
    window, pattern = config.get("sliding_window", 4096), config.get("sliding_window_pattern", 4)
    if not window or not pattern:
        window = None
        default = [common.FULL] * config.whole("num_hidden_layers")
    elif isinstance(pattern, int):
        default = common.every(config, pattern)
    elif config.get("layer_types"):
        default = []
    else:
        raise unbuildable(f"which of its layers slide is written as {pattern!r}")
    kinds = common.layer_kinds(config, default)
    rotary = rotary_of(config, common.head_of(config))
    return common.plan(
        config,
        norm=Norm(config.number("rms_norm_eps", default=1e-5)),
        rotary=tuple(rotary if window is None or kind == common.SLIDING else None for kind in kinds),
        windows=common.windows(config, kinds, window),
        names=common.BEHIND,
    )


FAMILIES = {"Exaone4ForCausalLM": exaone4}
