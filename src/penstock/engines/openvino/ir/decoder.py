"""The network of a decoder, made of the parts that its plan names (`penstock.engines.openvino.ir.families`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from penstock.engines.openvino.ir.attention import Attention, check_windows
from penstock.engines.openvino.ir.experts import mixture
from penstock.engines.openvino.ir.families import plan_of
from penstock.engines.openvino.ir.nodes import ACTIVATIONS, constant, entry, floats, op, split, times
from penstock.engines.openvino.ir.plan import Plan
from penstock.engines.openvino.ir.refusal import unbuildable
from penstock.engines.openvino.ir.tensors import Tensors
from penstock.engines.openvino.ov import ov

#: Where a built model says up to how many tokens a text has the shorter of two LongRoPEs.
LONG_ROPE_TRAINED = ["penstock", "long_rope_trained"]


def build_decoder(config: Mapping[str, Any], weights: Any) -> Any:
    """The stateful ``ov.Model`` in the form that OpenVINO's paged-attention transformation (and GenAI) expects.

    *weights* gives a float32 node by name (``constant(name)``) and knows its names (``in``, ``iter``).
    """
    plan = plan_of(config)
    if plan.activation not in ACTIVATIONS:
        raise unbuildable(f"its activation is {plan.activation}")
    ids = entry("input_ids", [-1, -1], ov.Type.i64)
    mask = entry("attention_mask", [-1, -1], ov.Type.i64)
    positions = entry("position_ids", [-1, -1], ov.Type.i64)
    beams = entry("beam_idx", [-1], ov.Type.i32)

    attention = Attention(plan, ids, mask, positions, beams)
    tensors = Tensors(weights, plan.names)
    network = _Network(plan, tensors, attention)
    x, embedding = network.embedded(ids, positions)
    for layer in range(plan.layers):
        x = network.block(x, layer)
    logits = network.logits(x, embedding)
    tensors.done()
    logits.output(0).set_names({"logits"})
    model = ov.Model([op.result(logits)], attention.sinks, [ids, mask, positions, beams], "decoder")
    if trained := max((rotary.trained for rotary in plan.rotary if rotary is not None), default=0):
        model.set_rt_info(trained, LONG_ROPE_TRAINED)
    check_windows(model, plan)
    return model


class _Network:
    """The parts. Activations are [batch, tokens, hidden]."""

    def __init__(self, plan: Plan, weights: Tensors, attention: Attention) -> None:
        self._plan = plan
        self._names = plan.names
        self._weights = weights
        self._attention = attention

    # ---------------------------------------------------------------------------- in and out

    def embedded(self, ids: Any, positions: Any) -> tuple[Any, Any]:
        """The tokens' vectors, and the table that they come from."""
        plan, names = self._plan, self._names
        embedding = self._weights.constant(f"{names.embedding}.weight")
        x = times(op.gather(embedding, op.convert(ids, "i32"), constant(0)), plan.embedding_scale)
        if names.project_in:
            x = self._linear(x, names.project_in)
        if names.positions:
            table = self._weights.constant(f"{names.positions}.weight")
            x = op.add(x, op.gather(table, op.add(positions, constant(plan.first_position)), constant(0)))
        return x, embedding

    def logits(self, x: Any, embedding: Any) -> Any:
        """[batch, tokens, vocabulary]."""
        plan, names = self._plan, self._names
        if names.final_norm:
            x = self._norm(x, names.final_norm)
        if names.project_out:
            x = self._linear(x, names.project_out)
        own = not plan.tied and f"{names.head}.weight" in self._weights
        logits = op.matmul(x, self._weights.constant(f"{names.head}.weight") if own else embedding, False, True)
        if f"{names.head}.bias" in self._weights:
            logits = op.add(logits, self._weights.constant(f"{names.head}.bias"))
        logits = times(logits, plan.logit_scale)
        if plan.logit_cap:
            logits = times(op.tanh(times(logits, 1 / plan.logit_cap)), plan.logit_cap)
        return logits

    # ---------------------------------------------------------------------------- a layer

    def block(self, x: Any, layer: int) -> Any:
        plan, names = self._plan, self._names
        prefix = names.layer.format(layer) + "."
        seen = x if plan.norm_after_sum else self._norm(x, names.before_attention, prefix)
        attended = self._norm(self._attended(seen, prefix, layer), names.after_attention, prefix)
        if plan.parallel:
            shared = names.before_mlp == names.before_attention
            seen = seen if shared else self._norm(x, names.before_mlp, prefix)
            return op.add(op.add(x, attended), self._mlp(seen, prefix, layer))
        x = op.add(x, times(attended, plan.residual_scale))
        if plan.norm_after_sum:
            seen = x = self._norm(x, names.before_attention, prefix)
        else:
            seen = self._norm(x, names.before_mlp, prefix)
        made = self._norm(self._mlp(seen, prefix, layer), names.after_mlp, prefix)
        x = op.add(x, times(made, plan.residual_scale))
        return self._norm(x, names.before_mlp, prefix) if plan.norm_after_sum else x

    def _attended(self, x: Any, prefix: str, layer: int) -> Any:
        plan = self._plan
        query, key, value = self._projected(x, prefix)
        out = self._attention(
            self._heads(query, plan.heads, self._names.query_norm, prefix),
            self._heads(key, plan.kv_heads, self._names.key_norm, prefix),
            self._heads(value, plan.kv_heads, "", prefix),
            layer,
        )
        merged = op.reshape(op.transpose(out, constant([0, 2, 1, 3])), constant([0, 0, plan.heads * plan.head]), True)
        return self._linear(merged, prefix + self._names.output)

    def _projected(self, x: Any, prefix: str) -> tuple[Any, Any, Any]:
        """Query, key and value, [batch, tokens, heads × head]."""
        plan, names = self._plan, self._names
        queries, keys = plan.heads * plan.head, plan.kv_heads * plan.head
        if not names.fused:
            parts = [self._linear(x, prefix + name) for name in (names.query, names.key, names.value)]
        elif plan.fused == "blocks":
            parts = split(self._linear(x, prefix + names.fused), [queries, keys, keys])
        else:
            shared = plan.heads // plan.kv_heads
            groups = constant([0, 0, plan.kv_heads, (shared + 2) * plan.head])
            grouped = op.reshape(self._linear(x, prefix + names.fused), groups, True)
            pieces = split(grouped, [shared * plan.head, plan.head, plan.head])
            sizes = (queries, keys, keys)
            parts = [op.reshape(piece, constant([0, 0, size]), True) for piece, size in zip(pieces, sizes, strict=True)]
        if plan.clip:
            parts = [op.clamp(part, -plan.clip, plan.clip) for part in parts]
        return parts[0], parts[1], parts[2]

    def _heads(self, x: Any, heads: int, norm: str, prefix: str) -> Any:
        """[batch, heads, tokens, head], from [batch, tokens, heads × head]."""
        if self._plan.norms_whole:
            x = self._norm(x, norm, prefix)
        x = op.reshape(x, constant([0, 0, heads, self._plan.head]), True)
        if not self._plan.norms_whole:
            x = self._norm(x, norm, prefix)
        return op.transpose(x, constant([0, 2, 1, 3]))

    def _mlp(self, x: Any, prefix: str, layer: int) -> Any:
        plan, names = self._plan, self._names
        if plan.experts is not None and layer in plan.experts.layers:
            return mixture(x, prefix, plan.experts, ACTIVATIONS[plan.activation], self._linear)
        activated = ACTIVATIONS[plan.activation]
        if names.gate_up:
            both = self._linear(x, prefix + names.gate_up)
            gate, up = op.split(both, constant(-1), 2).outputs()
            inner = op.multiply(activated(gate), up)
        elif names.gate:
            inner = op.multiply(activated(self._linear(x, prefix + names.gate)), self._linear(x, prefix + names.up))
        else:
            inner = activated(self._linear(x, prefix + names.up))
        return self._linear(inner, prefix + names.down)

    # ---------------------------------------------------------------------------- pieces

    def _linear(self, x: Any, name: str) -> Any:
        y = op.matmul(x, self._weights.constant(f"{name}.weight", self._plan.transposed), False, True)
        return op.add(y, self._weights.constant(f"{name}.bias")) if f"{name}.bias" in self._weights else y

    def _norm(self, x: Any, name: str, prefix: str = "") -> Any:
        """Over the last axis; no *name*: no norm."""
        if not name:
            return x
        name, norm = prefix + name, self._plan.norm
        if norm.kind == "layer":
            x = op.mvn(x, constant([-1]), True, norm.epsilon, "INSIDE_SQRT")
        else:
            mean = op.reduce_mean(op.power(x, floats(2.0)), constant(-1), keep_dims=True)
            x = op.multiply(x, op.divide(floats(1.0), op.sqrt(op.add(mean, floats(norm.epsilon)))))
        if norm.bare:
            return x
        weight = self._weights.constant(f"{name}.weight")
        x = op.multiply(x, op.add(weight, floats(norm.offset)) if norm.offset else weight)
        return op.add(x, self._weights.constant(f"{name}.bias")) if f"{name}.bias" in self._weights else x
