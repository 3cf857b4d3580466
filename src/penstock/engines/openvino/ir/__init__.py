"""Builds an OpenVINO model from a Hugging Face folder: safetensors and config.json, no torch.

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

from penstock.core.errors import ModelLoadError
from penstock.engines.frames import Progress
from penstock.engines.openvino.ir.decoder import build_decoder
from penstock.engines.openvino.ir.encoder import PREFIXES, build_encoder
from penstock.engines.openvino.ir.weights import Weights
from penstock.engines.openvino.ov import ov
from penstock.engines.parts.modules import embeds, module_files

#: Part of the cache key: raise it when the network that is built changes.
VERSION = 1

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


def built(folder: Path, cache: Path, progress: Progress) -> Path:
    """The folder with the OpenVINO model of the safetensors *folder*, built under *cache* if it is not there yet.

    It is found again by the config and by the weights' sizes and times. Raises `ModelLoadError`.
    """
    config_file = folder / "config.json"
    if not config_file.is_file():
        raise ModelLoadError(f"{folder} has weights but no config.json: copy the model's config.json there.")
    target = cache / f"{folder.name}-{_digest(folder, config_file)}"
    if (target / "openvino_model.xml").is_file():
        return target
    progress("converting the weights", None)
    config = json.loads(config_file.read_text(encoding="utf-8"))
    architecture = (config.get("architectures") or [""])[0]
    encoder = architecture in PREFIXES
    if embeds(folder) and not encoder:
        raise ModelLoadError(
            f"{folder} makes vectors with a {architecture or 'network without a name'}, which is not built here: serve "
            "it with --engine transformers, or export it with optimum-intel (optimum-cli export openvino --task "
            "feature-extraction --model MODEL FOLDER)."
        )
    cache.mkdir(parents=True, exist_ok=True)
    # Built beside its place and moved there in one go: two processes may build the same model at once.
    scratch = Path(tempfile.mkdtemp(dir=cache, prefix=".building-"))
    try:
        with Weights(folder) as weights:
            model = build_encoder(config, weights) if encoder else build_decoder(config, weights)
            ov.save_model(model, scratch / "openvino_model.xml", compress_to_fp16=False)
        for name in _kept(folder):
            (scratch / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(folder / name, scratch / name)
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


def _kept(folder: Path) -> list[str]:
    """The files of *folder* that are needed beside the network."""
    return [name for name in TEXT_FILES if (folder / name).is_file()] + module_files(folder)


def _digest(folder: Path, config_file: Path) -> str:
    digest = hashlib.sha256(f"{VERSION} {ov.__version__}\n".encode())
    for name in _kept(folder):
        digest.update(name.encode() + (folder / name).read_bytes())
    for path in sorted(folder.glob("*.safetensors")):
        stat = path.stat()
        digest.update(f"{path.name} {stat.st_size} {stat.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:16]
