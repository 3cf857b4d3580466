"""Builds an OpenVINO model from a Hugging Face folder (safetensors and config.json) or a GGUF file, no torch.

Whatever a config asks for that is not known here is refused, never ignored: a network that is nearly right writes
nonsense.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from penstock.core.errors import ModelLoadError
from penstock.engines.frames import Progress
from penstock.engines.openvino.ir.decoder import build_decoder
from penstock.engines.openvino.ir.encoder import PREFIXES, build_encoder
from penstock.engines.openvino.ir.gguf import GgufWeights
from penstock.engines.openvino.ir.quantized import quantized
from penstock.engines.openvino.ir.weights import Safetensors, Source, Weights
from penstock.engines.openvino.ov import ov
from penstock.engines.openvino.precision import Stored
from penstock.engines.parts.modules import embeds, module_files
from penstock.engines.text.gguf import GgufFile, write_text

#: Part of the cache key: raise it when the network that is built changes.
VERSION = 4

#: Where the network's file says how its weights are stored, if it is not in floating point.
WEIGHTS = ["penstock", "weights"]

#: Files that the text side needs, copied beside the model.
TEXT_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "chat_template.json",
    "sentence_bert_config.json",
    "config_sentence_transformers.json",
)


def built(place: Path, cache: Path, progress: Progress, stored: Stored = "as they are") -> Path:
    """The folder with the OpenVINO model of *place*, a folder with safetensors or a .gguf file, its weights *stored* in
    so many bits; built under *cache* if it is not there yet.

    It is found again by the config and by the weights' sizes and times. Raises `ModelLoadError`.
    """
    if place.is_dir() and not (place / "config.json").is_file():
        raise ModelLoadError(f"{place} has weights but no config.json: copy the model's config.json there.")
    target = cache / f"{place.stem if place.is_file() else place.name}-{_digest(place, stored)}"
    if (target / "openvino_model.xml").is_file():
        return target
    progress("converting the weights", 0.0)
    cache.mkdir(parents=True, exist_ok=True)
    # Built beside its place and moved there in one go: two processes may build the same model at once.
    scratch = Path(tempfile.mkdtemp(dir=cache, prefix=".building-"))
    try:
        _build(place, scratch, stored, progress)
        scratch.chmod(0o755)
        try:
            os.rename(scratch, target)
        except OSError:
            if not (target / "openvino_model.xml").is_file():
                raise
    except OSError as error:
        raise ModelLoadError(f"Cannot write the converted model under {cache}: {error}") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return target


def is_packed(place: Path) -> bool:
    """Are most weights of a .gguf file or of a folder stored in whole numbers of few bits?"""
    return bool(_source(place)[1].kind)


def _kept(folder: Path) -> list[str]:
    """The files of *folder* that are needed beside the network."""
    return [name for name in TEXT_FILES if (folder / name).is_file()] + module_files(folder)


def _source(place: Path) -> tuple[dict[str, Any], Source]:
    """The config and the weights of a model."""
    if place.is_file():
        weights = GgufWeights(GgufFile(place))
        return weights.config, weights
    config = json.loads((place / "config.json").read_text(encoding="utf-8"))
    architecture = (config.get("architectures") or ["network without a name"])[0]
    if embeds(place) and architecture not in PREFIXES:
        raise ModelLoadError(
            f"{place} makes vectors with a {architecture}, which is not built here: serve it with --engine "
            "transformers, or export it with optimum-intel (optimum-cli export openvino --task feature-extraction "
            "--model MODEL FOLDER)."
        )
    settings = config.pop("quantization_config", None)
    return config, quantized(place, settings) if settings else Safetensors(place)


def _build(place: Path, target: Path, stored: Stored, progress: Progress) -> None:
    config, source = _source(place)
    if isinstance(source, GgufWeights):
        write_text(source.file, target)  # before the long part: its vocabulary may be one that cannot be served
        (target / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    else:
        for name in _kept(place):
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(place / name, target / name)
    weights = Weights(source, stored, int((config.get("text_config") or config).get("vocab_size", 0)), progress)
    encoder = (config.get("architectures") or [""])[0] in PREFIXES
    model = build_encoder(config, weights) if encoder else build_decoder(config, weights)
    if stored == "as they are" and source.kind:
        model.set_rt_info(source.kind, WEIGHTS)
    try:
        ov.save_model(model, target / "openvino_model.xml", compress_to_fp16=False)
    except RuntimeError as error:  # OpenVINO does not say of what kind
        raise OSError(f"{error}") from error


def _digest(place: Path, stored: Stored) -> str:
    digest = hashlib.sha256(f"{VERSION} {stored} {ov.__version__}\n".encode())
    for name in _kept(place) if place.is_dir() else []:
        digest.update(name.encode() + (place / name).read_bytes())
    for path in sorted(place.glob("*.safetensors")) if place.is_dir() else [place]:
        stat = path.stat()
        digest.update(f"{path.name} {stat.st_size} {stat.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:16]
