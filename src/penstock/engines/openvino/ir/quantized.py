"""Safetensors whose weights somebody else has quantised: GPTQ, AWQ and compressed-tensors, in their common layouts.

Their numbers are kept: what is computed is, up to the rounding of float32, what their own kernels compute without
rounding activations. The layouts are those of the libraries that write them (AutoGPTQ and GPTQModel, AutoAWQ,
compressed-tensors); what is not known of a config is refused.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from penstock.engines.openvino.ir.packed import Packed
from penstock.engines.openvino.ir.refusal import unbuildable
from penstock.engines.openvino.ir.weights import Array, Plain, Safetensors

Codes = npt.NDArray[np.uint8]


def quantized(folder: Path, settings: Mapping[str, Any]) -> Safetensors:
    """The weights of a folder whose config has these *settings* as its ``quantization_config``."""
    method = settings.get("quant_method", "")
    if method not in _METHODS:
        raise unbuildable(f"its weights are quantized with {method or 'an unnamed method'}")
    source: Safetensors = _METHODS[method](folder, settings)
    return source


class _Quantized(Safetensors):
    """``of``: the suffixes of the tensors that one matrix is stored in."""

    of: tuple[str, ...]

    def __init__(self, folder: Path, bits: Any) -> None:
        super().__init__(folder)
        if bits not in (4, 8):
            raise unbuildable(f"its weights are quantized to {bits} bits")
        self.bits: int = bits
        self.kind = f"{type(self).__name__.strip('_').lower()} int{bits}"
        first = f".{self.of[0]}"
        self._matrices = {
            f"{name.removesuffix(first)}.weight": name.removesuffix(first)
            for name in super().names()
            if name.endswith(first)
        }

    def names(self) -> Iterable[str]:
        parts = tuple(f".{part}" for part in self.of)
        return [*self._matrices, *(name for name in super().names() if not name.endswith(parts))]

    def read(self, name: str) -> Plain | Packed:
        return self.matrix(self._matrices[name]) if name in self._matrices else super().read(name)

    @abstractmethod
    def matrix(self, name: str) -> Packed: ...

    def floats(self, name: str) -> npt.NDArray[np.float32]:
        return Plain(self.array(name)).widened()

    def unpacked(self, name: str, order: Iterable[int] | None = None) -> Codes:
        """Whole numbers of few bits out of int32, which hold them in *order* along the last axis, the lowest first."""
        return _unpacked(self.array(name), self.bits, order)

    def packed(self, codes: Codes, scale: Array, zero: Array | None) -> Packed:
        """Of [rows, columns]; *zero* where all are the middle: signed codes without one."""
        if codes.shape[1] % scale.shape[1]:
            raise unbuildable("its weights are quantized in groups of different sizes")
        middle = 1 << self.bits - 1
        if zero is None or (zero == middle).all():
            signed = (codes.astype(np.int16) - middle).astype(np.int8)
            return Packed(np.ascontiguousarray(signed), self.bits, np.ascontiguousarray(scale))
        return Packed(
            np.ascontiguousarray(codes), self.bits, np.ascontiguousarray(scale), np.ascontiguousarray(zero, np.uint8)
        )


class _GPTQ(_Quantized):
    """``qweight`` [columns / n, rows] holds n numbers of a column in an int32, ``qzeros`` [groups, rows / n] n zeros of
    a group, ``scales`` is [groups, rows]; ``g_idx`` tells each column's group."""

    of = ("qweight", "qzeros", "scales", "g_idx")

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        super().__init__(folder, settings.get("bits"))
        version = settings.get("checkpoint_format", "gptq")
        if version not in ("gptq", "gptq_v2"):
            raise unbuildable(f"its weights are quantized with GPTQ in the layout {version!r}")
        if settings.get("dynamic"):
            raise unbuildable("its weights are quantized with GPTQ differently from layer to layer")
        # The first version stores zeros less 1, of which 0 has become the largest number.
        self._less = 1 if version == "gptq" else 0

    def matrix(self, name: str) -> Packed:
        codes = _unpacked(self.array(f"{name}.qweight").T, self.bits)  # [rows, columns]
        scale = self.floats(f"{name}.scales").T
        zero = (self.unpacked(f"{name}.qzeros").T + np.uint8(self._less)) & np.uint8((1 << self.bits) - 1)
        packed = self.packed(codes, scale, zero)
        if f"{name}.g_idx" in self._entries:
            columns, groups = codes.shape[1], scale.shape[1]
            if not np.array_equal(self.array(f"{name}.g_idx"), np.arange(columns) // (columns // groups)):
                raise unbuildable("its weights are quantized with GPTQ in the order of activations (desc_act)")
        return packed


class _AWQ(_Quantized):
    """``qweight`` [columns, rows / 8] and ``qzeros`` [groups, rows / 8] hold 8 rows in an int32, even ones first;
    ``scales`` is [groups, rows]."""

    of = ("qweight", "qzeros", "scales")
    _ORDER = (0, 2, 4, 6, 1, 3, 5, 7)

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        super().__init__(folder, settings.get("bits", settings.get("w_bit")))
        version = str(settings.get("version", "gemm")).lower()
        if version != "gemm" or self.bits != 4:
            raise unbuildable(f"its weights are quantized with AWQ in the layout {version!r}, {self.bits} bits")

    def matrix(self, name: str) -> Packed:
        codes, zero = (self.unpacked(f"{name}.{part}", self._ORDER).T for part in ("qweight", "qzeros"))
        return self.packed(codes, self.floats(f"{name}.scales").T, zero)


class _CompressedTensors(_Quantized):
    """``weight_packed`` [rows, columns / n] holds n numbers of a row in an int32, ``weight_scale`` is [rows, groups],
    ``weight_zero_point`` [rows / n, groups], ``weight_shape`` tells rows and columns."""

    of = ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape")

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        layout = settings.get("format")
        schemes = list((settings.get("config_groups") or {}).values())
        if layout != "pack-quantized" or len(schemes) != 1 or schemes[0].get("input_activations"):
            raise unbuildable(f"its weights are quantized with compressed-tensors in the layout {layout!r}")
        weights = schemes[0].get("weights") or {}
        if (
            weights.get("type", "int") != "int"
            or weights.get("actorder")
            or weights.get("strategy") not in ("group", "channel")
        ):
            raise unbuildable("its weights are quantized with compressed-tensors in a way that is not known here")
        super().__init__(folder, weights.get("num_bits"))

    def matrix(self, name: str) -> Packed:
        rows, columns = map(int, self.array(f"{name}.weight_shape"))
        codes = self.unpacked(f"{name}.weight_packed")[:rows, :columns]
        zero = None
        if f"{name}.weight_zero_point" in self._entries:
            zero = _unpacked(self.array(f"{name}.weight_zero_point").T, self.bits).T[:rows]
        return self.packed(codes, self.floats(f"{name}.weight_scale"), zero)


_METHODS: dict[str, Any] = {"gptq": _GPTQ, "awq": _AWQ, "compressed-tensors": _CompressedTensors}


def _unpacked(packed: Array, bits: int, order: Iterable[int] | None = None) -> Codes:
    each = 32 // bits
    shifts = np.arange(each, dtype=np.uint32) * np.uint32(bits)
    numbers = np.ascontiguousarray(packed).view(np.uint32)[..., None] >> shifts & np.uint32((1 << bits) - 1)
    if order is not None:
        numbers = numbers[..., np.argsort(list(order))]
    return numbers.astype(np.uint8).reshape(*packed.shape[:-1], -1)
