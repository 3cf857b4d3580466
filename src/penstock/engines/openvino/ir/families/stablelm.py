"""StableLM 2 and 3B: Llama with layer norms, a quarter of each head turned."""

from __future__ import annotations

from penstock.engines.openvino.ir.config import Config
from penstock.engines.openvino.ir.families import common
from penstock.engines.openvino.ir.plan import Names, Norm, Plan
from penstock.engines.openvino.ir.rope import rotary_of


def stablelm(config: Config) -> Plan:
    config.refuse("qk_layernorm", "each of its heads has a norm of its own")
    parallel = config.flag("use_parallel_residual")
    rotary = rotary_of(config, common.head_of(config), part=0.25)
    return common.plan(
        config,
        norm=Norm(config.number("layer_norm_eps", "norm_eps", default=1e-5), "layer"),
        rotary=(rotary,) * config.whole("num_hidden_layers"),
        parallel=parallel,
        names=Names(before_mlp="input_layernorm") if parallel else Names(),
    )


FAMILIES = {"StableLmForCausalLM": stablelm}
