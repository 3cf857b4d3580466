"""A tiny random Llama and tokenizers, made on the spot: no download, no torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

CORPUS = [
    "the mill turns and the water falls over the wheel",
    "größer, naïve, Ελλάδα, 水車が回る, 🚰 and 👩‍🔧 mend the gate",
    "submit once, stream anywhere, lose nothing 0123456789",
] * 20

SPECIAL = ["<s>", "<|user|>", "<|assistant|>", "<|end|>"]

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'nobody' %}{{ raise_exception('no such role') }}"
    "{% endif %}<|{{ m['role'] }}|>{{ m['content'] | trim }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def byte_level(vocab: int = 400) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_tokens([AddedToken("<think>", special=False), AddedToken("naïve→", special=False)])
    return tokenizer


def byte_fallback() -> Tokenizer:
    """Like Llama 2's: SentencePiece pieces, byte tokens, one leading space stripped."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += ["▁", *"abcdefghijklmnopqrstuvwxyz", "▁the", "th", "he", "▁w", "水"]
    merges = [("t", "h"), ("h", "e"), ("▁", "w")]
    vocab = {piece: id for id, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return tokenizer


def word_piece() -> Tokenizer:
    words = ["[UNK]", "the", "mill", "##s", "turn", "##ing", "water", ".", ",", "a", "##b", "##c"]
    tokenizer = Tokenizer(models.WordPiece({word: id for id, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.WordPiece()
    return tokenizer


def llama(folder: Path, *, dtype: str = "F32", seed: int = 0, **changes: Any) -> Path:
    """A Hugging Face folder: 2 layers, grouped query attention, untied head unless *changes* say otherwise."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = byte_level()
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
        "max_position_embeddings": 256,
        "rope_theta": 10000.0,
        "vocab_size": tokenizer.get_vocab_size(),
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": [3],
        **changes,
    }
    (folder / "config.json").write_text(json.dumps(config))
    tokenizer_config = {"bos_token": "<s>", "eos_token": {"content": "<|end|>"}, "chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer_config))

    random = np.random.default_rng(seed)
    hidden, inner, head = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    queries, keys = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config["vocab_size"], hidden)}
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        for name, rows, columns in (
            ("self_attn.q_proj", queries, hidden),
            ("self_attn.k_proj", keys, hidden),
            ("self_attn.v_proj", keys, hidden),
            ("self_attn.o_proj", hidden, queries),
            ("mlp.gate_proj", inner, hidden),
            ("mlp.up_proj", inner, hidden),
            ("mlp.down_proj", hidden, inner),
        ):
            shapes[f"{prefix}.{name}.weight"] = (rows, columns)
            if config.get("attention_bias") and "self_attn" in name:
                shapes[f"{prefix}.{name}.bias"] = (rows,)
        shapes[f"{prefix}.input_layernorm.weight"] = (hidden,)
        shapes[f"{prefix}.post_attention_layernorm.weight"] = (hidden,)
    shapes["model.norm.weight"] = (hidden,)
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (config["vocab_size"], hidden)
    tensors = {
        name: (np.ones(shape, np.float32) if "norm" in name else random.normal(0, 0.2, shape).astype(np.float32))
        for name, shape in shapes.items()
    }
    if dtype == "BF16":
        _save_bfloat16(tensors, folder / "model.safetensors")
    else:
        save_file(
            {name: tensor.astype(np.float16 if dtype == "F16" else np.float32) for name, tensor in tensors.items()},
            folder / "model.safetensors",
        )
    return folder


def as_bfloat16(tensor: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The upper halves of the float32 numbers (rounded towards zero)."""
    return (np.ascontiguousarray(tensor, np.float32).view(np.uint32) >> 16).astype(np.uint16)


def _save_bfloat16(tensors: dict[str, np.ndarray[Any, Any]], path: Path) -> None:
    header: dict[str, Any] = {}
    data = b""
    for name, tensor in tensors.items():
        raw = as_bfloat16(tensor).tobytes()
        header[name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    encoded = json.dumps(header).encode()
    path.write_bytes(len(encoded).to_bytes(8, "little") + encoded + data)
