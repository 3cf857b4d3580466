"""Matrices in whole numbers of 4 or 8 bits, with a scale (and a zero) for each group of a row's columns.

A weight is ``(code - zero) * scale``. The device multiplies with the codes as they are: they are never widened to a
matrix of floats.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from penstock.engines.openvino.ov import ov

op = ov.opset13

Floats = npt.NDArray[np.float32]

#: Columns of a group of ``int4``.
GROUP = 32
#: Weights that are made smaller at once: memory for a few copies of them in float32 is taken.
_AT_ONCE = 1 << 22


class Wide(Protocol):
    """A matrix that can be had in float32, some rows of it at a time."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def widened(self, rows: slice = ...) -> Floats: ...


@dataclass(frozen=True)
class Packed:
    """``codes``: [rows, columns], uint8 or int8, of which 4 bits count where ``bits`` is 4. ``scale``: [rows, groups],
    float32. ``zero``: the same, of float32 or uint8, or None for 0.
    """

    codes: npt.NDArray[Any]
    bits: int
    scale: Floats
    zero: npt.NDArray[Any] | None = None

    def node(self) -> Any:
        """The float32 node [rows, columns] of a network, in the form that the device keeps packed."""
        (rows, columns), groups = self.codes.shape, self.scale.shape[1]
        x = op.convert(op.constant(self._tensor([rows, groups, columns // groups])), "f32")
        if self.zero is not None:
            zero = op.constant(np.ascontiguousarray(self.zero[..., None]))
            x = op.subtract(x, zero if self.zero.dtype == np.float32 else op.convert(zero, "f32"))
        x = op.multiply(x, op.constant(np.ascontiguousarray(self.scale[..., None])))
        return op.reshape(x, op.constant(np.array([rows, columns])), False)

    def _tensor(self, shape: list[int]) -> Any:
        if self.bits == 8:
            return ov.Tensor(np.ascontiguousarray(self.codes).reshape(shape))
        signed = self.codes.dtype == np.int8
        tensor = ov.Tensor(ov.Type.i4 if signed else ov.Type.u4, ov.Shape(shape))
        flat = self.codes.reshape(-1).view(np.uint8) & 15
        tensor.data.view(np.uint8).reshape(-1)[:] = flat[0::2] | flat[1::2] << 4
        return tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return self.codes.shape

    def widened(self, rows: slice = slice(None)) -> Floats:
        """The weights of these rows in float32."""
        codes, scale = self.codes[rows], self.scale[rows]
        grouped = codes.reshape(*scale.shape, -1).astype(np.float32)
        if self.zero is not None:
            grouped -= self.zero[rows][..., None]
        grouped *= scale[..., None]
        return grouped.reshape(codes.shape)


def with_minimum(codes: npt.NDArray[Any], bits: int, scale: Floats, minimum: Floats) -> Packed:
    """``code * scale + minimum`` in the one form that there is: up to the rounding of float32 the same numbers."""
    flat = scale == 0
    # A group without a scale is its minimum, whatever its codes are.
    zero = np.where(flat, -1.0, -minimum / np.where(flat, 1.0, scale)).astype(np.float32)
    grouped = codes.reshape(*scale.shape, -1)
    codes = np.where(flat[..., None], 0, grouped).astype(codes.dtype).reshape(codes.shape)
    return Packed(codes, bits, np.where(flat, minimum, scale).astype(np.float32), zero)


def int8(weights: Floats) -> Packed:
    """*weights* in 8 bits: symmetric, a scale for each row."""
    scale = np.abs(weights).max(axis=1, keepdims=True) / 127
    codes = np.rint(weights / np.where(scale == 0, 1, scale)).astype(np.int8)
    return Packed(codes, 8, scale.astype(np.float32))


def int4(weights: Floats) -> Packed:
    """*weights* in 4 bits, in groups of `GROUP`; 8 bits where no groups fit.

    Codes are spread evenly over a group's range; its scale and its zero are then those of the line through all (code,
    weight) with the least squared error.
    """
    rows, columns = weights.shape
    if columns % GROUP:
        return int8(weights)
    grouped = weights.reshape(rows, columns // GROUP, GROUP)
    low = grouped.min(axis=-1, keepdims=True)
    step = (grouped.max(axis=-1, keepdims=True) - low) / 15
    codes = np.rint((grouped - low) / np.where(step == 0, 1, step)).clip(0, 15)
    middle = codes.mean(axis=-1)
    away = codes - middle[..., None]
    power = (away**2).sum(axis=-1)
    scale = (away * grouped).sum(axis=-1) / np.where(power == 0, 1, power)
    minimum = grouped.mean(axis=-1) - scale * middle
    return with_minimum(codes.astype(np.uint8).reshape(rows, columns), 4, scale, minimum)


def smaller(matrix: Wide, bits: int) -> Packed:
    """*matrix* in 8 or 4 bits, a few rows at a time."""
    make = int8 if bits == 8 else int4
    rows, columns = matrix.shape
    step = max(1, _AT_ONCE // columns)
    parts = [make(matrix.widened(slice(i, i + step))) for i in range(0, rows, step)]
    zeros = [part.zero for part in parts if part.zero is not None]
    return Packed(
        np.concatenate([part.codes for part in parts]),
        parts[0].bits,
        np.concatenate([part.scale for part in parts]),
        np.concatenate(zeros) if zeros else None,
    )
