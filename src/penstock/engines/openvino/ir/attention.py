"""Attention over a cache, in the form that OpenVINO's paged-attention transformation takes: it reads from these nodes
which tensors are cached, how scores are scaled and how wide a layer's window is."""

from __future__ import annotations

from typing import Any

import numpy as np

from penstock.engines.openvino.ir.nodes import constant, floats, op, split
from penstock.engines.openvino.ir.plan import Plan, Rotary
from penstock.engines.openvino.ir.refusal import unbuildable
from penstock.engines.openvino.ir.rope import LONG
from penstock.engines.openvino.ov import ov, paged_attention_transformation

HIDDEN = -65504.0


def check_windows(model: Any, plan: Plan) -> None:
    """Refuse a *model* in which the paged-attention transformation does not find each layer's window: it goes by the
    shape of a graph, and another version of OpenVINO may look for another one."""
    if not any(plan.windows):
        return
    paged = model.clone()
    paged_attention_transformation(paged)
    nodes = [node for node in paged.get_ordered_ops() if node.get_type_name() == "PagedAttentionExtension"]
    of_layer = {node.input_value(CACHE_INPUT).get_any_name(): node.input_value(WINDOW_INPUT) for node in nodes}
    windows = [op.result(of_layer[f"key_cache.{layer}"]) for layer in range(plan.layers)]
    found = ov.compile_model(ov.Model(windows, []), "CPU")([])
    if [int(found[layer]) for layer in range(plan.layers)] != list(plan.windows):
        raise unbuildable(f"OpenVINO {ov.__version__} does not carry its sliding windows")


#: Inputs of the operation that the transformation puts in place of attention.
CACHE_INPUT, WINDOW_INPUT = 3, 10


class Attention:
    """What the layers share. Queries, keys and values are [batch, heads, tokens, head]; *ids* [batch, tokens], *mask*
    [batch, all tokens], *positions* [batch, tokens]."""

    def __init__(self, plan: Plan, ids: Any, mask: Any, positions: Any, beams: Any) -> None:
        self._plan = plan
        self._beams = beams
        self._positions = positions
        self._batch = op.gather(op.shape_of(ids), constant([0]), constant(0))
        self._new = op.gather(op.shape_of(ids), constant([1]), constant(0))
        self._total = op.gather(op.shape_of(mask), constant([1]), constant(0))
        self._mask = mask
        self._turns: dict[Rotary, tuple[Any, Any]] = {}
        self._masks: dict[int, Any] = {}
        self.sinks: list[Any] = []

    def __call__(self, query: Any, key: Any, value: Any, layer: int) -> Any:
        """[batch, heads, tokens, head]. What was computed of earlier tokens is in the cache."""
        rotary = self._plan.rotary[layer]
        if rotary is not None:
            query, key = self._turned(query, rotary), self._turned(key, rotary)
        # The names pair what is read with what is written; the paged-attention transformation goes by them.
        key = self._cached(key, f"past_key_values.{layer}.keypresent.{layer}.key")
        value = self._cached(value, f"past_key_values.{layer}.valuepresent.{layer}.value")
        scale = floats(self._plan.attention_scale)
        mask = self._visible(self._plan.windows[layer])
        return op.scaled_dot_product_attention(
            query, self._repeated(key), self._repeated(value), mask, scale, causal=False
        )

    # ---------------------------------------------------------------------------- who sees whom

    def _visible(self, window: int) -> Any:
        """[batch, 1, new tokens, all tokens]: 0 where a token may look, very negative elsewhere. *window*: how many
        tokens it sees, itself included; 0: all before it."""
        if window not in self._masks:
            self._masks[window] = self._sliding(window) if window else self._causal()
        return self._masks[window]

    def _causal(self) -> Any:
        rows, columns, padding = self._grid()
        return op.select(op.logical_and(op.less_equal(columns, rows), padding), floats(0.0), floats(HIDDEN))

    def _sliding(self, window: int) -> Any:
        # Built as the transformation looks for it (gpt-oss's mask): from anything else it takes no window.
        rows, columns, padding = self._grid()
        yes = constant(True, np.bool_)
        near = op.greater(columns, op.add(rows, constant(-window)))
        seen = op.bitwise_and(op.bitwise_and(yes, near), op.less_equal(columns, rows))
        seen = op.bitwise_and(op.bitwise_and(yes, seen), padding)
        shape = op.concat([self._batch, constant([1]), self._new, self._total], 0)
        mask = op.select(op.broadcast(seen, shape), floats(0.0), floats(HIDDEN))
        return op.slice(mask, constant([0]), self._total, constant([1]), constant([3]))

    def _grid(self) -> tuple[Any, Any, Any]:
        """Positions of the new tokens and of all, and which are no padding, to be compared with each other."""
        one, zero = constant(1), constant(0)
        new, total = op.squeeze(self._new, zero), op.squeeze(self._total, zero)
        rows = op.unsqueeze(op.range(op.subtract(total, new), total, one, "i64"), constant([0, 1, 3]))
        columns = op.unsqueeze(op.range(zero, total, one, "i64"), constant([0, 1, 2]))
        return rows, columns, op.unsqueeze(op.convert(self._mask, "boolean"), constant([1, 2]))

    # ---------------------------------------------------------------------------- where a token is

    def _turned(self, x: Any, rotary: Rotary) -> Any:
        cos, sin = self._turn(rotary)
        pairs = len(rotary.frequencies)
        rest = self._plan.head - 2 * pairs
        turned, *passed = split(x, [2 * pairs, rest]) if rest else [x]
        if rotary.interleaved:
            turned = op.reshape(turned, constant([0, 0, 0, pairs, 2]), True)
            first, second = split(turned, [1, 1])
            other = op.concat([op.multiply(second, floats(-1.0)), first], -1)
            turned = op.add(op.multiply(turned, cos), op.multiply(other, sin))
            turned = op.reshape(turned, constant([0, 0, 0, 2 * pairs]), True)
        else:
            one, axis = constant([1]), constant([3])
            first = op.slice(turned, constant([0]), constant([pairs]), one, axis)
            second = op.slice(turned, constant([pairs]), constant([2**31 - 1]), one, axis)
            other = op.concat([op.multiply(second, floats(-1.0)), first], -1)
            turned = op.add(op.multiply(turned, cos), op.multiply(other, sin))
        return op.concat([turned, *passed], -1) if passed else turned

    def _turn(self, rotary: Rotary) -> tuple[Any, Any]:
        """Cosines and sines, [batch, 1, tokens, 2 × pairs], or [batch, 1, tokens, pairs, 1] for neighbours."""
        if rotary not in self._turns:
            positions = op.unsqueeze(self._positions, constant(2))
            frequencies = floats(np.array(rotary.frequencies).reshape(1, 1, -1))
            if rotary.longer:
                is_long = op.greater_equal(positions, constant(LONG))
                positions = op.subtract(positions, op.select(is_long, constant(LONG), constant(0)))
                frequencies = op.select(is_long, floats(np.array(rotary.longer).reshape(1, 1, -1)), frequencies)
            angles = op.multiply(op.convert(positions, "f32"), frequencies)
            if rotary.interleaved:
                angles = op.unsqueeze(angles, constant([1, 4]))
            else:
                angles = op.unsqueeze(op.concat([angles, angles], -1), constant(1))
            cos, sin = op.cos(angles), op.sin(angles)
            if rotary.scale != 1.0:
                cos, sin = (op.multiply(part, floats(rotary.scale)) for part in (cos, sin))
            self._turns[rotary] = cos, sin
        return self._turns[rotary]

    # ---------------------------------------------------------------------------- the cache

    def _cached(self, x: Any, name: str) -> Any:
        heads, head = self._plan.kv_heads, self._plan.head
        empty = op.broadcast(floats(0.0), op.concat([self._batch, constant([heads, 0, head])], 0))
        past = op.read_value(empty, name, ov.Type.f32, ov.PartialShape([-1, heads, -1, head]))
        whole = op.concat([op.gather(past, self._beams, constant(0)), x], 2)
        self.sinks.append(op.assign(whole, name))
        return whole

    def _repeated(self, x: Any) -> Any:
        """Each key/value head once per query head that shares it."""
        plan = self._plan
        if plan.kv_heads == plan.heads:
            return x
        tokens = op.gather(op.shape_of(x), constant([2]), constant(0))
        target = op.concat(
            [self._batch, constant([plan.kv_heads, plan.heads // plan.kv_heads]), tokens, constant([plan.head])], 0
        )
        wide = op.broadcast(op.unsqueeze(x, constant(2)), target)
        return op.reshape(wide, constant([0, plan.heads, -1, plan.head]), True)
