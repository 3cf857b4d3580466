"""The transformers engine: any causal language model of the library, on a CPU or a CUDA device.

The library's modules compute the network. What of it needs to know about batches is attention, and the library lets
that be replaced: the tokens of all running sequences go through the model as one row without padding, and `network`
keeps their keys and values and lets each look back on its own. So batching, sampling, resuming and every field are the
same as for other engines (`batching`), which the library's own continuous batching could not give: it has no seeds, no
logit bias, no log-probabilities, no ``n``, and it was the slower one on a CPU and on a GPU.

A GPU computes a step of a small model faster than Python asks for it. So there a step in which every sequence adds one
token is recorded once for each rounded batch size and length (`RecordedStep`) and replayed with new numbers (CUDA
graphs).

Not every architecture computes attention through that interface. Whether one does is found out at the start, on the
model itself (`check`): its logits in uneven steps of two sequences are compared with those of the unchanged model.
Where they differ, or the model refuses, replies are made by ``generate`` in batches that nobody can join (`static`).
"""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
)

from penstock.core.errors import ModelLoadError
from penstock.core.ports import ModelInfo
from penstock.engines.adapters import check_folders
from penstock.engines.child.backend import Backend
from penstock.engines.child.notices import notify
from penstock.engines.frames import Progress
from penstock.engines.models import weights_folder
from penstock.engines.parts.batching import STEP_TOKENS, ContinuousBatching
from penstock.engines.parts.embedding import EmbeddingBackend, recipe_of
from penstock.engines.parts.kvcache import fit_context
from penstock.engines.parts.static import StaticBatching
from penstock.engines.text.model import TextModel
from penstock.engines.transformers import check, checkpoint
from penstock.engines.transformers.adapters import Adapters
from penstock.engines.transformers.embed import TorchEncoder, is_encoder
from penstock.engines.transformers.generate import Generate
from penstock.engines.transformers.network import DTYPES, TorchNetwork
from penstock.engines.transformers.options import TransformersOptions

#: Weights up to this many bytes are computed in float32 on a CPU unless the operator chooses otherwise.
SMALL = 2_000_000_000
#: Tokens that a step on a GPU computes at most: it has room for more beside the running sequences than a CPU.
GPU_STEP_TOKENS = 2048


def load(name: str, path: str | None, options: TransformersOptions, progress: Progress) -> Backend:
    """See `penstock.engines.child.backend.Loader`."""
    folder = weights_folder(name, path, progress)
    device = _device(options.device)
    # It makes a plan for every length, which took longer than all else of a step.
    torch.backends.cuda.enable_cudnn_sdp(False)
    if options.threads:
        torch.set_num_threads(options.threads)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.filterwarnings("ignore")
    progress(f"loading the weights on {device}", None)
    text = _text(folder)
    text.use_formats(options.tool_format, options.reasoning_format)
    dtype = _dtype(options.dtype, device, folder)
    if is_encoder(folder, options):
        encoder = TorchEncoder(folder, dtype, device, options)
        recipe = recipe_of(folder, text, options, encoder.modules)
        return EmbeddingBackend(
            name, "transformers", text, encoder, recipe, slots=options.slots, step_tokens=options.step_tokens
        )
    model = checkpoint.read(AutoModelForCausalLM, folder, dtype, device)
    text.vocab_size = min(text.vocab_size, model.get_output_embeddings().weight.shape[0])

    adapters = Adapters(check_folders(options.adapters))
    adapters.attach(model)
    network = TorchNetwork(model, device, adapters)
    reason: str | None = "static batching was asked for"
    if options.batching != "static":
        progress("checking continuous batching", None)
        reason = check.why_not(model, network, text.vocab_size, adapters)
        if reason is not None and options.batching == "continuous":
            raise ModelLoadError(f"{name} cannot be batched continuously: {reason}. Use --option batching=auto.")
    if reason is None:
        text.context_length = fit_context(
            text.context_length, options.context, options.slots, network.token_bytes, options.cache_gb, _memory(device)
        )
        network.resize(options.slots, text.context_length)
        # On a CPU in float32 greedy replies were the same alone, in batches and after a resume.
        exact = device.type == "cpu" and model.dtype == torch.float32
        tokens = STEP_TOKENS if device.type == "cpu" else GPU_STEP_TOKENS
        return ContinuousBatching(
            name,
            "transformers",
            text,
            network,
            slots=options.slots,
            deterministic=exact,
            step_tokens=tokens,
            adapters=adapters.names,
        )

    if options.batching == "auto":
        notify("engine.static_batching", error=reason)
    model.set_attn_implementation("sdpa" if getattr(model, "_supports_sdpa", False) else "eager")
    progress("checking batches", None)
    together = check.together(model, device, text.vocab_size)
    if together == "any" and network.recompute_beyond is not None:
        together = "equal"  # the longest text of a batch says for all how positions are computed
    text.context_length = min(text.context_length, options.context or text.context_length)
    info = ModelInfo(
        name=name,
        engine="transformers",
        context_length=text.context_length,
        precision=network.precision,
        vocab_size=text.vocab_size,
        chat=text.has_chat_template,
        no_chat=text.no_chat,
        tool_format=text.formats.tools,
        reasoning_format=text.formats.thoughts,
        unsupported=() if text.has_token_bytes else ("response_format",),
        tasks=("generate", "tokenize"),
    )
    generate = Generate(model, device, model.get_output_embeddings().weight.shape[0], options.slots, adapters)
    return StaticBatching(info, text, generate, slots=options.slots, window=options.window / 1000, together=together)


def _device(wanted: str) -> torch.device:
    if wanted == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(wanted)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ModelLoadError(f"torch cannot use the device {wanted!r}: {error}") from error
    return device


def _dtype(wanted: str, device: torch.device, folder: Path) -> Any:
    if wanted != "auto":
        return DTYPES[wanted]
    if device.type != "cpu":
        return "auto"
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    return torch.float32 if size <= SMALL else torch.bfloat16


def _memory(device: torch.device) -> int | None:
    """Bytes of the device's memory; None for the machine's."""
    return None if device.type == "cpu" else int(torch.cuda.get_device_properties(device).total_memory)


def _text(folder: Path) -> TextModel:
    """The model's text side; a tokenizer that comes as vocabulary and merges is put together by the library."""
    if not (folder / "tokenizer.json").is_file():
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
            return TextModel.load(folder, Tokenizer.from_str(tokenizer.backend_tokenizer.to_str()))
        except (AttributeError, OSError, ValueError, ImportError) as error:
            raise ModelLoadError(
                f"{folder} has no tokenizer.json, and none could be made of its other files: {error}"
            ) from error
    return TextModel.load(folder)


os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
