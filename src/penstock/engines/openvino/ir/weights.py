"""The tensors of a model's files, as nodes of a network."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import safe_open

from penstock.core.errors import ModelLoadError
from penstock.engines.openvino.ov import ov

op = ov.opset13


class Weights:
    """All tensors of a folder's safetensors files, by name."""

    def __init__(self, folder: Path) -> None:
        paths = sorted(folder.glob("*.safetensors"))
        if not paths:
            raise ModelLoadError(f"{folder} has no *.safetensors files.")
        try:
            self._files: list[Any] = [safe_open(path, "np") for path in paths]
        except Exception as error:  # safetensors' own exception type, or OSError
            raise ModelLoadError(f"The weights in {folder} cannot be read: {error}") from error
        self._file_of: dict[str, Any] = {}
        for file in self._files:
            self._file_of.update(dict.fromkeys(file.keys(), file))
        self._paths = dict(zip(map(id, self._files), paths, strict=True))

    def __enter__(self) -> Weights:
        return self

    def __exit__(self, *_: object) -> None:
        self._file_of.clear()
        self._files.clear()

    def __contains__(self, name: str) -> bool:
        return name in self._file_of

    def constant(self, name: str) -> Any:
        """A node that gives the tensor in float32; 16-bit weights are stored as they are and widened on use."""
        file = self._file_of.get(name)
        if file is None:
            raise ModelLoadError(f"The weights lack the tensor {name!r}: is the download complete?")
        dtype = file.get_slice(name).get_dtype()
        if dtype == "F32":
            return op.constant(file.get_tensor(name))
        if dtype == "F16":
            return op.convert(op.constant(file.get_tensor(name)), "f32")
        if dtype == "BF16":
            # numpy has no bfloat16: take the raw bytes.
            raw, shape = _raw_tensor(self._paths[id(file)], name)
            tensor = ov.Tensor(ov.Type.bf16, ov.Shape(shape))
            tensor.data.view(np.uint8).reshape(-1)[:] = raw
            return op.convert(op.constant(tensor), "f32")
        raise ModelLoadError(
            f"The tensor {name!r} is {dtype}: only float32, float16 and bfloat16 weights can be built."
        )


def _raw_tensor(path: Path, name: str) -> tuple[npt.NDArray[np.uint8], list[int]]:
    """A tensor's bytes and shape (the format: 8 bytes of header length, the header as JSON, the data)."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        entry = json.loads(file.read(size))[name]
        begin, end = entry["data_offsets"]
        return np.fromfile(file, np.uint8, end - begin, offset=begin), entry["shape"]
