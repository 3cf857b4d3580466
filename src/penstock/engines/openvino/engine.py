"""The OpenVINO engine: continuous batching over a paged key/value cache on a CPU (or another OpenVINO device).

OpenVINO runs the model, with the paged-attention kernels that its GenAI library uses too. What to run, where the cache
blocks are and how tokens are drawn is decided by us (`batching`), not by GenAI's pipeline, so that every field works
(GenAI has no logit bias and no alternatives' log-probabilities, and its penalties and random numbers start anew in a
continued reply), and because it is faster in large batches.

Exported encoders embed (`embedding`), with our tokens and our pooling: GenAI's pipeline for that takes texts only, does
not tell how many tokens they had, and cuts those that are too long without a word.

With ``precision`` f32, int8 and int4, activations and the cache are float32, however the weights are stored. Greedy
replies were then the same alone, in a batch, after a resume, and with or without prefix caching, in every reply that
was compared. Seeded ones draw from the same random numbers, but the attention kernel's last bits depend on the batch,
and now and then (2 of 64 replies of 150 tokens at temperature 1) a number falls between the two. ``fast``,
``int8-fast`` and ``int4-fast`` leave the formats to the device (bfloat16 and an 8-bit cache on recent CPUs): faster,
and none of that holds.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import psutil

from penstock.core.errors import ModelLoadError
from penstock.engines.child.backend import Backend
from penstock.engines.child.notices import notify
from penstock.engines.frames import Progress
from penstock.engines.openvino.files import ModelFiles, even_context, resolve
from penstock.engines.openvino.ir import WEIGHTS
from penstock.engines.openvino.ir.decoder import LONG_ROPE_TRAINED
from penstock.engines.openvino.ir.rope import LONG
from penstock.engines.openvino.options import OpenVINOOptions
from penstock.engines.openvino.ov import ov, paged_attention_transformation
from penstock.engines.openvino.precision import PRECISIONS
from penstock.engines.parts.batching import ContinuousBatching
from penstock.engines.parts.embedding import EmbeddingBackend, recipe_of
from penstock.engines.parts.kvcache import CACHE_SHARE
from penstock.engines.parts.modules import Modules, modules_of
from penstock.engines.parts.sampling import Floats, Ints
from penstock.engines.text.model import TextModel

#: Seconds of spare time, after loading, that go into compiling kernels for the batch sizes to come.
WARM_UP = 1.0


# ------------------------------------------------------------------------------------------ the network


class OpenVINONetwork:
    """A compiled decoder with its cache tensors: tokens of several sequences in, logits of some of them out."""

    def __init__(self, files: ModelFiles, options: OpenVINOOptions, context: int) -> None:
        core, model_file = ov.Core(), files.ir
        model = core.read_model(model_file)
        trained = model.get_rt_info(LONG_ROPE_TRAINED).astype(int) if model.has_rt_info(LONG_ROPE_TRAINED) else None
        self.recompute_beyond: int | None = trained
        paged_attention_transformation(model)
        _gather_before_head(model)
        known = {
            "input_ids",
            "position_ids",
            "past_lens",
            "subsequence_begins",
            "block_indices",
            "block_indices_begins",
            "max_context_len",
            "sampled_tokens_indices",
        }
        names = {port.get_any_name() for port in model.inputs}
        strange = sorted(name for name in names - known if not name.startswith(("key_cache.", "value_cache.")))
        if strange or "input_ids" not in names:
            raise ModelLoadError(
                f"{model_file} is not a plain decoder-only text model (it asks for {', '.join(strange) or 'no ids'}). "
                "Serve it with another engine."
            )
        self.precision = _told(model, files.precision)
        self.exact = PRECISIONS[files.precision].exact
        properties = options.properties(exact=self.exact)
        if self.exact:
            properties["KV_CACHE_PRECISION"] = "f32"
        compiled = core.compile_model(model, options.device, properties)
        self._request = compiled.create_infer_request()
        self._ports = {port.get_any_name(): port for port in compiled.inputs}
        self.vocab = int(compiled.output(0).partial_shape[-1].get_length())

        caches = [port for name, port in self._ports.items() if name.startswith(("key_cache.", "value_cache."))]
        shapes = [[dimension.get_length() for dimension in list(port.partial_shape)[1:]] for port in caches]
        # Blocks of values are [heads, tokens, size]. Those of keys may be larger: an 8-bit cache has its scales there.
        self.block_size = int(self._ports["value_cache.0"].partial_shape[2].get_length())
        block_bytes = sum(
            int(np.prod(shape)) * port.element_type.bitwidth // 8 for shape, port in zip(shapes, caches, strict=True)
        )
        per_sequence = -(-context // self.block_size)
        budget = options.cache_gb * 1e9 or psutil.virtual_memory().total * CACHE_SHARE
        self.blocks = min(options.slots * per_sequence, int(budget // block_bytes))
        if self.blocks < per_sequence:
            raise ModelLoadError(
                f"A cache of {budget / 1e9:.1f} GB cannot hold one context of {context} tokens, which takes "
                f"{per_sequence * block_bytes / 1e9:.1f} GB: raise the option cache_gb."
            )
        # Untouched pages of these cost nothing: the memory is taken as sequences grow into it.
        for port, shape in zip(caches, shapes, strict=True):
            self._request.set_tensor(port, ov.Tensor(port.element_type, ov.Shape([self.blocks, *shape])))

    def run(self, **inputs: np.ndarray[Any, Any]) -> Floats:
        """Logits, one row per entry of ``sampled_tokens_indices``; valid (and writable) until the next call."""
        if self.recompute_beyond is not None:
            long = np.repeat(inputs["total_lens"] > self.recompute_beyond, np.diff(inputs["subsequence_begins"]))
            inputs["position_ids"] = np.where(long, inputs["position_ids"] + LONG, inputs["position_ids"])
        for name, value in inputs.items():
            if (port := self._ports.get(name)) is not None:
                self._request.set_tensor(port, ov.Tensor(value, shared_memory=True))
        self._request.infer()
        logits: Floats = self._request.get_output_tensor(0).data.reshape(-1, self.vocab)
        if "sampled_tokens_indices" not in self._ports:
            logits = logits[inputs["sampled_tokens_indices"]]
        return logits


def _told(model: Any, precision: str) -> str:
    """The precision for people: with the kind of the weights, where they are as their files have them and packed."""
    return (
        f"{precision} ({model.get_rt_info(WEIGHTS).astype(str)} weights)" if model.has_rt_info(WEIGHTS) else precision
    )


def _gather_before_head(model: Any) -> None:
    """Compute logits only for the tokens that are asked for: a prompt needs those of its last token only.

    Where the head is not a plain matrix product the model is left as it is.
    """
    node = model.outputs[0].get_node().input_value(0).get_node()
    while node.get_type_name() in ("Add", "Convert", "Multiply", "Tanh", "Divide") and node.get_input_size():
        node = node.input_value(0).get_node()
    if node.get_type_name() != "MatMul":
        return
    opset = ov.opset13
    indices = opset.parameter([-1], ov.Type.i64, name="sampled_tokens_indices")
    indices.output(0).set_names({"sampled_tokens_indices"})
    gathered = opset.gather(node.input_value(0), indices, opset.constant(np.int64(0)))
    node.input(0).replace_source_output(gathered.output(0))
    model.add_parameters([indices])
    model.validate_nodes_and_infer_types()


#: What exported encoders call the vectors of tokens, and those of texts.
TOKEN_VECTORS, TEXT_VECTORS = ("last_hidden_state", "token_embeddings"), "sentence_embedding"


class OpenVINOEncoder:
    """See `penstock.engines.parts.embedding.Encoder`. Where the network makes the vectors of texts itself, they are
    taken, unless another *pooling* than "auto" is asked for."""

    def __init__(self, files: ModelFiles, options: OpenVINOOptions) -> None:
        core, model_file = ov.Core(), files.ir
        model = core.read_model(model_file)
        names = {name for port in model.outputs for name in port.get_names()}
        self.modules: Modules | None = None
        output = TEXT_VECTORS
        if TEXT_VECTORS not in names or options.pooling != "auto":
            output = next(name for name in TOKEN_VECTORS if name in names)
            self.modules = modules_of(files.text, options.pooling)
        self._inputs = {port.get_any_name() for port in model.inputs}
        if strange := sorted(self._inputs - {"input_ids", "attention_mask", "token_type_ids", "position_ids"}):
            raise ModelLoadError(
                f"{model_file} is not a plain text encoder: it asks for {', '.join(strange)}. Export it with "
                "optimum-intel (optimum-cli export openvino --task feature-extraction --model MODEL FOLDER)."
            )
        self.precision = _told(model, files.precision)
        properties = options.properties(exact=PRECISIONS[files.precision].exact)
        compiled = core.compile_model(model, options.device, properties)
        self._request = compiled.create_infer_request()
        self._output = compiled.output(output)
        size = int(self._output.partial_shape[-1].get_length())
        self.dimensions = self.modules.dimensions(size) if self.modules is not None else size

    def run(self, ids: Ints, mask: Ints) -> Floats:
        positions = np.broadcast_to(np.arange(ids.shape[1]), ids.shape)
        given = {
            "input_ids": ids,
            "attention_mask": mask,
            "token_type_ids": np.zeros_like(ids),
            "position_ids": np.ascontiguousarray(positions),
        }
        self._request.infer({name: ov.Tensor(given[name]) for name in self._inputs})
        result: Floats = self._request.get_tensor(self._output).data
        return self.modules(result, mask) if self.modules is not None else result


def _embeds(model_file: Path) -> bool:
    """Is it an encoder, and not a model that writes?"""
    names = {name for port in ov.Core().read_model(model_file).outputs for name in port.get_names()}
    return "logits" not in names and not names.isdisjoint({*TOKEN_VECTORS, TEXT_VECTORS})


def _embedding(name: str, files: ModelFiles, text: TextModel, options: OpenVINOOptions) -> EmbeddingBackend:
    encoder = OpenVINOEncoder(files, options)
    recipe = recipe_of(files.text, text, options, encoder.modules)
    return EmbeddingBackend(
        name, "openvino", text, encoder, recipe, slots=options.slots, step_tokens=options.step_tokens
    )


def load(name: str, path: str | None, options: OpenVINOOptions, progress: Progress) -> Backend:
    """See `penstock.engines.child.backend.Loader`."""
    files = resolve(name, path, progress, options.precision)
    text = TextModel.load(files.text)
    text.use_formats(options.tool_format, options.reasoning_format)
    progress("compiling the model", None)
    try:
        if _embeds(files.ir):
            return _embedding(name, files, text, options)
        if (even := even_context(files, text.context_length)) < text.context_length:
            notify("engine.context_cut", error=f"{even} tokens: beyond, all texts of a batch have one LongRoPE")
            text.context_length = even
        network = OpenVINONetwork(files, options, text.context_length)
    except RuntimeError as error:
        raise ModelLoadError(f"OpenVINO cannot load {files.ir} on {options.device}: {error}") from error
    backend = ContinuousBatching(
        name,
        "openvino",
        text,
        network,
        slots=options.slots,
        deterministic=network.exact,
        prefix_caching=options.prefix_caching,
    )
    backend.spare_time = backend.warm_up(WARM_UP)
    return backend
