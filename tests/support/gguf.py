"""Our own small models as GGUF files, so that llama.cpp can be tested on weights that the other engines have too.

For folders (safetensors) of the architectures in `PAIRED` with a byte-level BPE ``tokenizer.json``; the names are those
of the `gguf` package, and the permutation of the rotary halves is that of llama.cpp's converter.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from safetensors import safe_open

from penstock.models.catalogue import PACKAGED

TYPES = {
    "f32": gguf.GGMLQuantizationType.F32,
    "f16": gguf.GGMLQuantizationType.F16,
    "q4_1": gguf.GGMLQuantizationType.Q4_1,
    "q8_0": gguf.GGMLQuantizationType.Q8_0,
}
#: Are the numbers that are rotated together side by side?
PAIRED = {"llama": True, "smollm3": True, "granite": True, "qwen2": False, "qwen3": False, "olmo2": False}
#: Numbers of a config that only some architectures have.
_NUMBERS = {
    "attention_multiplier": "add_attention_scale",
    "embedding_multiplier": "add_embedding_scale",
    "residual_multiplier": "add_residual_scale",
    "logits_scaling": "add_logit_scale",
}
FILE_TYPES = {
    "f32": gguf.LlamaFileType.ALL_F32,
    "f16": gguf.LlamaFileType.MOSTLY_F16,
    "q4_1": gguf.LlamaFileType.MOSTLY_Q4_1,
    "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0,
}


def bundled_gguf(folder: Path, weights: str = "f32") -> Path:
    """The model in the box, in *folder*."""
    return convert(PACKAGED / "millrace", folder / f"millrace-{weights}.gguf", weights)


def convert(model: Path, target: Path, weights: str = "f32", vocabulary: str = "gpt2", quotients: Any = None) -> Path:
    """Write the model folder *model* to *target*; *weights*: one of `TYPES` (matrices; the norms stay f32).
    *vocabulary*: of another kind than the model's has some made-up tokens instead. *quotients*: of the rotary
    frequencies, by which Llama 3's files have them divided."""
    config = json.loads((model / "config.json").read_text())
    architecture = config["model_type"]
    writer = gguf.GGUFWriter(target, architecture)
    heads, kv_heads = config["num_attention_heads"], config.get("num_key_value_heads", config["num_attention_heads"])
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    writer.add_name(model.name)
    writer.add_file_type(FILE_TYPES[weights])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    theta = (config.get("rope_parameters") or config).get("rope_theta") or config.get("rope_theta", 10000.0)
    writer.add_rope_freq_base(theta)
    writer.add_vocab_size(config["vocab_size"])
    for name, add in _NUMBERS.items():
        if name in config:
            getattr(writer, add)(config[name])
    if quotients is not None:
        writer.add_tensor("rope_freqs.weight", np.asarray(quotients, np.float32))
    if vocabulary == "gpt2":
        _add_tokenizer(writer, model, config)
    else:
        _add_vocabulary(writer, vocabulary, config["vocab_size"])
    kinds = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(kinds[architecture], config["num_hidden_layers"])
    for file in sorted(model.glob("*.safetensors")):
        with safe_open(file, "numpy") as tensors:
            for name in tensors.keys():  # noqa: SIM118  # not a mapping
                tensor = tensors.get_tensor(name).astype(np.float32)
                if PAIRED[architecture] and (part := name.split(".")[-2]) in ("q_proj", "k_proj"):
                    tensor = _interleave(tensor, heads if part == "q_proj" else kv_heads)
                _add_tensor(writer, names.get_name(name, (".weight", ".bias")), tensor, weights)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


def _add_tensor(writer: Any, name: str, tensor: Any, weights: str) -> None:
    kind = gguf.GGMLQuantizationType.F32
    if tensor.ndim > 1 and (weights == "f16" or tensor.shape[-1] % 32 == 0):
        kind = TYPES[weights]
    writer.add_tensor(name, gguf.quantize(tensor, kind), raw_dtype=kind)


def _interleave(weight: Any, heads: int) -> Any:
    """From halves (Hugging Face) to pairs (llama.cpp) of rotated dimensions."""
    return weight.reshape(heads, 2, len(weight) // heads // 2, -1).swapaxes(1, 2).reshape(weight.shape)


def lora_gguf(target: Path, matrices: dict[str, tuple[Any, Any]], alpha: float) -> Path:
    """A LoRA adapter for llama.cpp: by tensor of the model, what leads down ([rank, in]) and up ([out, rank])."""
    writer = gguf.GGUFWriter(target, "llama")
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", alpha)
    for name, (down, up) in matrices.items():
        writer.add_tensor(f"{name}.lora_a", down.astype(np.float32))
        writer.add_tensor(f"{name}.lora_b", up.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


def _add_vocabulary(writer: Any, kind: str, size: int) -> None:
    """Bytes from token 3 on, words behind them."""
    control, normal, byte = gguf.TokenType.CONTROL, gguf.TokenType.NORMAL, gguf.TokenType.BYTE
    tokens = ["<unk>", "<s>", "</s>"]
    if kind == "rwkv":
        tokens += [f"\\x{value:02x}" for value in range(256)] + ["the", "\\n\\n", " water", "\\\\a", "größer", "水"]
    else:
        tokens += [f"<0x{value:02X}>" for value in range(256)] + [
            "▁",
            "▁the",
            "th",
            "h",
            "t",
            "e",
            "he",
            "größer",
            "水",
        ]
    kinds = [gguf.TokenType.UNKNOWN, control, control] + [normal if kind == "rwkv" else byte] * 256
    tokens += [f"w{id}" for id in range(len(tokens), size)]
    writer.add_tokenizer_model(kind)
    writer.add_token_list(tokens)
    writer.add_token_types(kinds + [normal] * (size - len(kinds)))
    writer.add_token_scores([-float(id) for id in range(size)])
    writer.add_token_merges(["t h", "h e"])
    for name, id in (("unk", 0), ("bos", 1), ("eos", 2)):
        getattr(writer, f"add_{name}_token_id")(id)


def _add_tokenizer(writer: Any, model: Path, config: dict[str, Any]) -> None:
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    settings = json.loads((model / "tokenizer_config.json").read_text())
    added = {token["id"]: token for token in tokenizer["added_tokens"]}
    names = {id: name for name, id in tokenizer["model"]["vocab"].items()}
    names |= {id: token["content"] for id, token in added.items()}
    tokens = [names.get(id, f"[unused{id}]") for id in range(config["vocab_size"])]
    kinds = [
        gguf.TokenType.UNUSED
        if id not in names
        else gguf.TokenType.NORMAL
        if id not in added
        else gguf.TokenType.CONTROL
        if added[id]["special"]
        else gguf.TokenType.USER_DEFINED
        for id in range(len(tokens))
    ]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges(
        [merge if isinstance(merge, str) else " ".join(merge) for merge in tokenizer["model"]["merges"]]
    )
    ids = {name: id for id, name in names.items()}
    eos = config["eos_token_id"] if isinstance(config["eos_token_id"], list) else [config["eos_token_id"]]
    writer.add_eos_token_id(eos[0])
    if len(eos) > 1:
        writer.add_eot_token_id(eos[1])
    bos = settings.get("bos_token")
    if (id := ids.get(bos.get("content") if isinstance(bos, dict) else bos)) is not None:
        writer.add_bos_token_id(id)
    writer.add_add_bos_token(bool(settings.get("add_bos_token")))
    writer.add_add_space_prefix(False)
    if template := settings.get("chat_template"):
        writer.add_chat_template(template)


# ------------------------------------------------------------------------------------------ encoders

_ENCODER_NAMES = {
    "embeddings.word_embeddings": "token_embd",
    "embeddings.position_embeddings": "position_embd",
    "embeddings.token_type_embeddings": "token_types",
    "embeddings.LayerNorm": "token_embd_norm",
}
_ENCODER_LAYER_NAMES = {
    "attention.self.query": "attn_q",
    "attention.self.key": "attn_k",
    "attention.self.value": "attn_v",
    "attention.output.dense": "attn_output",
    "attention.output.LayerNorm": "attn_output_norm",
    "intermediate.dense": "ffn_up",
    "output.dense": "ffn_down",
    "output.LayerNorm": "layer_output_norm",
}


def encoder_gguf(model: Path, target: Path) -> Path:
    """Write the folder of a BERT (`tests.support.encoder`) to *target*, with the mean of its tokens' vectors."""
    config = json.loads((model / "config.json").read_text())
    writer = gguf.GGUFWriter(target, "bert")
    writer.add_name(model.name)
    writer.add_file_type(FILE_TYPES["f32"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_layer_norm_eps(config["layer_norm_eps"])
    writer.add_causal_attention(False)
    writer.add_pooling_type(gguf.PoolingType.MEAN)
    vocabulary = json.loads((model / "tokenizer.json").read_text())["model"]["vocab"]
    names = sorted(vocabulary, key=lambda name: vocabulary[name])
    special = [name.startswith("[") and name.endswith("]") for name in names]
    writer.add_tokenizer_model("bert")
    writer.add_tokenizer_pre("default")
    # Where a word begins is written out, instead of where it goes on.
    writer.add_token_list(
        [
            name if control else name[2:] if name.startswith("##") else f"\u2581{name}"
            for name, control in zip(names, special, strict=True)
        ]
    )
    writer.add_token_types([gguf.TokenType.CONTROL if control else gguf.TokenType.NORMAL for control in special])
    writer.add_token_type_count(config["type_vocab_size"])
    writer.add_pad_token_id(vocabulary["[PAD]"])
    writer.add_unk_token_id(vocabulary["[UNK]"])
    writer.add_bos_token_id(vocabulary["[CLS]"])
    writer.add_sep_token_id(vocabulary["[SEP]"])
    writer.add_add_bos_token(True)
    writer.add_add_sep_token(True)
    for file in sorted(model.glob("*.safetensors")):
        with safe_open(file, "numpy") as tensors:
            for name in tensors.keys():  # noqa: SIM118  # not a mapping
                base, _, kind = name.rpartition(".")
                if (layer := re.fullmatch(r"encoder\.layer\.(\d+)\.(.+)", base)) is not None:
                    base = f"blk.{layer[1]}.{_ENCODER_LAYER_NAMES[layer[2]]}"
                elif base.startswith("pooler"):
                    continue
                else:
                    base = _ENCODER_NAMES[base]
                writer.add_tensor(f"{base}.{kind}", tensors.get_tensor(name).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target
