"""What a decoder is made of, as its family reads it from a config: `penstock.engines.openvino.ir.decoder` builds it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class Norm:
    """``rms``: divided by the root of the mean square; ``layer``: the mean is taken away before. ``offset``: added
    to the weight (Gemma's weights are kept around 0). A bias is used where the files have one."""

    epsilon: float
    kind: Literal["rms", "layer"] = "rms"
    offset: float = 0.0
    bare: bool = False
    """It has no weight."""


@dataclass(frozen=True)
class Rotary:
    """How positions turn queries and keys. ``frequencies``: angle per position of each pair; what the pairs leave of a
    head is not turned. ``scale``: of cosines and sines. ``interleaved``: pairs are neighbours, not halves apart.
    ``longer``: other frequencies, of texts of more than ``trained`` tokens."""

    frequencies: tuple[float, ...]
    scale: float = 1.0
    interleaved: bool = False
    longer: tuple[float, ...] = ()
    trained: int = 0


@dataclass(frozen=True)
class Experts:
    """A mixture in place of the MLP: the *chosen* likeliest of *count* experts. ``normed``: their shares sum to 1."""

    count: int
    chosen: int
    normed: bool
    layers: frozenset[int]
    router: str = "mlp.gate"
    expert: str = "mlp.experts.{}"
    names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Names:
    """What the tensors are called, without .weight and .bias. Those from ``query`` to ``after_mlp`` stand behind
    ``layer``. An empty name: the family has no such part."""

    embedding: str = "model.embed_tokens"
    positions: str = ""
    project_in: str = ""
    project_out: str = ""
    layer: str = "model.layers.{}"
    final_norm: str = "model.norm"
    head: str = "lm_head"

    before_attention: str = "input_layernorm"
    query: str = "self_attn.q_proj"
    key: str = "self_attn.k_proj"
    value: str = "self_attn.v_proj"
    fused: str = ""
    """Query, key and value in one."""
    query_norm: str = ""
    key_norm: str = ""
    output: str = "self_attn.o_proj"
    after_attention: str = ""

    before_mlp: str = "post_attention_layernorm"
    gate: str = "mlp.gate_proj"
    up: str = "mlp.up_proj"
    gate_up: str = ""
    """Gate and up in one."""
    down: str = "mlp.down_proj"
    after_mlp: str = ""


@dataclass(frozen=True)
class Plan:
    """A decoder. ``rotary`` and ``windows`` have an entry per layer: None, 0: not turned; all tokens are seen."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head: int
    norm: Norm
    activation: str
    tied: bool
    rotary: tuple[Rotary | None, ...]
    windows: tuple[int, ...]
    attention_scale: float
    names: Names = field(default_factory=Names)
    fused: Literal["blocks", "grouped"] = "blocks"
    """The order in ``names.fused``: all queries, all keys, all values; or each key's queries, that key, its value."""
    norms_whole: bool = False
    """Query and key norms go over all heads at once, not over each."""
    transposed: bool = False
    """The weights of layers are [in, out] (GPT-2)."""
    parallel: bool = False
    """Attention and MLP both see the block's input."""
    norm_after_sum: bool = False
    """``before_attention`` and ``before_mlp`` come behind the sums instead (the oldest way)."""
    first_position: int = 0
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    logit_scale: float = 1.0
    logit_cap: float = 0.0
    clip: float = 0.0
    """Queries, keys and values are cut to ± this; 0: they are not."""
    experts: Experts | None = None
