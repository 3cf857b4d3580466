"""The weights of a model as nodes of a network, however its files store them and in whatever precision is asked for."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from safetensors import safe_open

from penstock.core.errors import ModelLoadError
from penstock.engines.frames import Progress
from penstock.engines.openvino.ir.packed import Packed, smaller
from penstock.engines.openvino.ov import ov
from penstock.engines.openvino.precision import Stored

op = ov.opset13

Array = npt.NDArray[Any]


class Plain:
    """A tensor of float32, float16 or bfloat16. ``values``: as in the file; bfloat16, which numpy lacks, as uint16."""

    def __init__(self, values: Array) -> None:
        self.values = values

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    def node(self) -> Any:
        """In float32; 16-bit weights are stored as they are and widened on use. Shares the values' memory."""
        kind = {np.uint16: ov.Type.bf16, np.float16: ov.Type.f16}.get(self.values.dtype.type, ov.Type.f32)
        constant = op.constant(ov.Tensor(self.values, ov.Shape(list(self.shape)), kind), shared_memory=True)
        return constant if kind == ov.Type.f32 else op.convert(constant, "f32")

    def widened(self, rows: slice = slice(None)) -> npt.NDArray[np.float32]:
        values = self.values[rows]
        if values.dtype == np.uint16:
            return (values.astype(np.uint32) << 16).view(np.float32)
        return values.astype(np.float32)


class Source(Protocol):
    """The tensors of a model's files, by the names that Hugging Face's library gives them."""

    @property
    def kind(self) -> str:
        """How the matrices are stored, if not in floating point: q4_k_m, gptq …"""
        ...

    def names(self) -> Iterable[str]: ...

    def read(self, name: str) -> Plain | Packed:
        """Raises `ModelLoadError` for a tensor of a kind that cannot be read."""
        ...


class Weights:
    """What the builders of networks see: `constant`, and the names. Has to live as long as the network is not saved."""

    def __init__(self, source: Source, stored: Stored, vocab: int, progress: Progress) -> None:
        self._source, self._stored, self._vocab, self._progress = source, stored, vocab, progress
        self._names = frozenset(source.names())
        self._used: list[Plain | Packed] = []  # kept: nodes may share their memory

    def __contains__(self, name: str) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def constant(self, name: str, turned: bool = False) -> Any:
        """A node that gives the tensor in float32; *turned*: a matrix that is [in, out] here, as [out, in]."""
        if name not in self._names:
            raise ModelLoadError(f"The weights lack the tensor {name!r}: is the download complete?")
        tensor = self._source.read(name)
        if turned and isinstance(tensor, Plain):  # packed ones are [out, in] in every family
            tensor = Plain(np.ascontiguousarray(tensor.values.T))
        if bits := self._bits(name, tensor):
            tensor = smaller(tensor, bits)
        self._used.append(tensor)
        self._progress("converting the weights", min(1.0, len(self._used) / len(self._names)))
        return tensor.node()

    def _bits(self, name: str, tensor: Plain | Packed) -> int:
        """In how many bits a tensor has to be stored; 0: as it is."""
        if self._stored == "as they are" or len(tensor.shape) != 2 or any(part in name for part in _KEPT):
            return 0
        # Embedding and head are what a reply is most sensitive to.
        bits = 4 if self._stored == "int4" and tensor.shape[0] < self._vocab else 8
        return 0 if isinstance(tensor, Packed) and tensor.bits <= bits else bits


#: Small tables that are looked up, not multiplied with; and what chooses experts, where a little changes everything.
_KEPT = ("position", "token_type", "wpe", ".gate.")


class Safetensors:
    """A `Source`: all safetensors files of a folder."""

    kind = ""

    def __init__(self, folder: Path) -> None:
        paths = sorted(folder.glob("*.safetensors"))
        if not paths:
            raise ModelLoadError(f"{folder} has no *.safetensors files.")
        self._entries: dict[str, tuple[Path, int, dict[str, Any]]] = {}
        for path in paths:
            try:
                with safe_open(path, "np"):
                    pass  # it is whole
            except Exception as error:  # safetensors' own exception type, or OSError
                raise ModelLoadError(f"The weights in {path} cannot be read: {error}") from error
            begin, header = _header(path)
            self._entries.update({name: (path, begin, entry) for name, entry in header.items()})

    def names(self) -> Iterable[str]:
        return self._entries

    def array(self, name: str) -> Array:
        """A tensor as its file has it (bfloat16: uint16); its pages are read when they are used."""
        path, begin, entry = self._entries[name]
        kind, shape = _KINDS.get(entry["dtype"]), tuple(entry["shape"])
        if kind is None:
            raise _unreadable(name, entry["dtype"])
        if 0 in shape:
            return np.zeros(shape, kind)
        mapped = np.memmap(path, kind, "c", begin + entry["data_offsets"][0], shape)
        return mapped if mapped.flags.aligned else mapped.copy()

    def read(self, name: str) -> Plain | Packed:
        kind = self._entries[name][2]["dtype"]
        if kind not in ("F32", "F16", "BF16"):
            raise _unreadable(name, kind)
        return Plain(self.array(name))


_KINDS = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16, "I32": np.int32, "I64": np.int64}


def _unreadable(name: str, kind: str) -> ModelLoadError:
    return ModelLoadError(f"The tensor {name!r} is {kind}: only float32, float16 and bfloat16 weights can be built.")


def _header(path: Path) -> tuple[int, dict[str, Any]]:
    """Where the data of a safetensors file begin, and its tensors by name (the format: 8 bytes of header length, the
    header as JSON, the data)."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    return 8 + length, header
