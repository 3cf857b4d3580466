"""Mixtures of experts. All are computed, and those that were not chosen weigh nothing: the cost of a dense model of the
whole size, with exact results."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from penstock.engines.openvino.ir.nodes import constant, floats, op
from penstock.engines.openvino.ir.plan import Experts


def mixture(
    x: Any, prefix: str, experts: Experts, activated: Callable[[Any], Any], linear: Callable[[Any, str], Any]
) -> Any:
    """[batch, tokens, hidden]: what the chosen experts make of *x*, weighed by the router."""
    shares = _shares(linear(x, prefix + experts.router), experts)
    total = None
    for index in range(experts.count):
        gate, up, down = (f"{prefix}{experts.expert.format(index)}.{name}" for name in experts.names)
        inner = op.multiply(activated(linear(x, gate)), linear(x, up))
        share = op.gather(shares, constant([index]), constant(-1))
        made = op.multiply(linear(inner, down), share)
        total = made if total is None else op.add(total, made)
    return total


def _shares(scores: Any, experts: Experts) -> Any:
    """[batch, tokens, experts]: the weight of each, 0 of those that were not chosen."""
    likely = op.softmax(scores, -1)
    best = op.topk(likely, constant(experts.chosen), -1, "max", "value")
    values = best.output(0)
    if experts.normed:
        values = op.divide(values, op.reduce_sum(values, constant([-1]), keep_dims=True))
    nothing = op.multiply(likely, floats(0.0))
    return op.scatter_elements_update(nothing, op.convert(best.output(1), "i64"), values, constant(-1))
