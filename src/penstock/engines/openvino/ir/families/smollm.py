"""SmolLM 3: Llama, with every fourth layer's queries and keys not turned."""

from __future__ import annotations

from penstock.engines.openvino.ir.config import Config
from penstock.engines.openvino.ir.families import common
from penstock.engines.openvino.ir.plan import Plan
from penstock.engines.openvino.ir.rope import rotary_of


def smollm3(config: Config) -> Plan:
    layers, interval = config.whole("num_hidden_layers"), config.whole("no_rope_layer_interval", default=4)
    turned = config.get("no_rope_layers") or [(layer + 1) % interval != 0 for layer in range(layers)]
    window = config.get("sliding_window") if config.flag("use_sliding_window") else None
    kinds = [common.FULL if turns or not window else common.SLIDING for turns in turned]
    kinds = common.layer_kinds(config, kinds)
    config.ignore("max_window_layers")
    rotary = rotary_of(config, common.head_of(config), theta=2e6)
    return common.plan(
        config,
        tied=config.flag("tie_word_embeddings", True),
        rotary=tuple(rotary if turns else None for turns in turned),
        windows=common.windows(config, kinds, window),
    )


FAMILIES = {"SmolLM3ForCausalLM": smollm3}
