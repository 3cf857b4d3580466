"""Make the benchmark models: Llama shapes S (4.2M parameters) and M (110M), and for GPUs L (1.1B, that of TinyLlama,
2.2 GB), with random weights, a BPE tokenizer and a chat template. Speed depends on the shape, not on what the weights
say. For llama.cpp, the same weights as GGUF files beside the folders: S.gguf (f32) and S-q8_0.gguf.

It needs torch, transformers and gguf, which Penstock does not: run it with a Python that has them and Penstock, in the
repository's root.

    python -m benchmarks.make_models [OUTPUT] [--shape S] [--shape M] [--shape L] [--only gguf]
"""

from __future__ import annotations

import argparse
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SYLLABLES = "ka lo mi ter an dor sel vin qua re po sti gru ham zen ox ul ne fra tch bel ix cor mun".split()  # noqa: SIM905
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


@dataclass(frozen=True)
class Shape:
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    kv_heads: int
    tied: bool
    spread: float
    """Standard deviation of the weights: wide enough that greedy choices are not razor-thin."""
    dtype: str = "float32"


SHAPES = {
    "S": Shape(2048, 256, 688, 4, 4, 4, tied=False, spread=0.08),
    "M": Shape(32000, 768, 2048, 12, 12, 12, tied=True, spread=0.05),
    "L": Shape(32000, 2048, 5632, 22, 32, 4, tied=False, spread=0.03, dtype="bfloat16"),
}


def make_model(shape: Shape, folder: Path) -> int:
    """Write config and weights; returns the number of parameters."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=2048,
        tie_word_embeddings=shape.tied,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
        initializer_range=shape.spread,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, shape.dtype))
    model.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    return sum(parameter.numel() for parameter in model.parameters())


def make_tokenizer(vocab_size: int, folder: Path) -> None:
    """Train a byte-level BPE on made-up words, padded to exactly `vocab_size` entries."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer: Any = Tokenizer(models.BPE(unk_token=None))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<unk>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_sentences(60_000), trainer)
    missing = vocab_size - tokenizer.get_vocab_size()
    if missing > 0:
        tokenizer.add_special_tokens([f"<extra_{number}>" for number in range(missing)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="</s>"
    )
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(folder)


def make_gguf(folder: Path) -> list[Path]:
    """The folder's weights for llama.cpp: f32, and 8 bits in blocks of 32."""
    from tests.support.gguf import convert

    return [
        convert(folder, folder.with_name(folder.name + suffix), weights)
        for suffix, weights in ((".gguf", "f32"), ("-q8_0.gguf", "q8_0"))
    ]


def _sentences(number: int) -> list[str]:
    rng = random.Random(0)
    words = sorted({"".join(rng.choices(SYLLABLES, k=rng.randint(1, 5))) for _ in range(60_000)})
    ends = [".", "!", "?", ": 12", "\n"]
    return [" ".join(rng.choices(words, k=rng.randint(5, 20))).capitalize() + rng.choice(ends) for _ in range(number)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", nargs="?", type=Path, default=Path(__file__).parent / "models")
    parser.add_argument("--shape", action="append", choices=SHAPES, help="repeatable; S and M by default")
    parser.add_argument("--only", choices=("folders", "gguf"), help="both by default; gguf converts what is there")
    arguments = parser.parse_args()
    for name in arguments.shape or ("S", "M"):
        folder = arguments.output / name
        if arguments.only != "gguf":
            folder.mkdir(parents=True, exist_ok=True)
            parameters = make_model(SHAPES[name], folder)
            make_tokenizer(SHAPES[name].vocab_size, folder)
            print(f"{folder}: {parameters / 1e6:.1f}M parameters, vocabulary {SHAPES[name].vocab_size}")
        if arguments.only != "folders":
            for path in make_gguf(folder):
                print(f"{path}: {path.stat().st_size / 2**20:.0f} MiB")


if __name__ == "__main__":
    main()
