"""Small pieces of networks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from penstock.engines.openvino.ov import ov

op = ov.opset13

#: By the names that configs have.
ACTIVATIONS: dict[str, Callable[[Any], Any]] = {
    "silu": op.swish,
    "swish": op.swish,
    "relu": op.relu,
    "relu2": lambda x: op.power(op.relu(x), floats(2.0)),
    "gelu": lambda x: op.gelu(x, "erf"),
    "gelu_new": lambda x: op.gelu(x, "tanh"),
    "gelu_fast": lambda x: op.gelu(x, "tanh"),
    "gelu_pytorch_tanh": lambda x: op.gelu(x, "tanh"),
}


def constant(value: Any, dtype: type = np.int64) -> Any:
    return op.constant(np.array(value, dtype=dtype))


def floats(value: Any) -> Any:
    return constant(value, np.float32)


def entry(name: str, shape: list[int], kind: Any) -> Any:
    """An input of the network."""
    node = op.parameter(shape, kind, name=name)
    node.output(0).set_names({name})
    return node


def split(x: Any, sizes: list[int], axis: int = -1) -> list[Any]:
    """*x* in pieces of *sizes* along *axis*."""
    pieces = op.variadic_split(x, constant(axis), constant(sizes))
    return [pieces.output(i) for i in range(len(sizes))]


def times(x: Any, factor: float) -> Any:
    return x if factor == 1.0 else op.multiply(x, floats(factor))
