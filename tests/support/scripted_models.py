"""Tiny models whose replies we write ourselves: real networks, so that every engine serves them for real.

A Llama of one layer. One head looks for the character in the prompt that selects a script, the others for the two
tokens before; the MLP has one unit for each step of a script and knows what comes next after these and the token
itself. Where nothing fits, the reply ends. No other reply has a chance, so sampling at a temperature of 1 gives the
same.

Text is cut into tokens that occur in one place only; the words given as tokens may occur anywhere. Prompts are
tokenized to single bytes.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from tests.support import gguf

#: Characters that select a script, where a user's message has one; nothing else of a prompt should.
SELECTORS = "~^@"

#: Around what a guide leaves no choice in.
GUIDED = "\0"

WIDTH = 128  # of a token's code, and of a head
HEADS = 3
SIZE = (HEADS + 2) * WIDTH + 80  # a token, what each head found, what comes next; and constants
ONE, SELECTS, OTHER = range(SIZE - 80, SIZE - 77)
THETA = 1e6
#: How clearly a head looks at one token: the scores of others are less by so much.
SHARP = 60.0
CONTEXT = 2048

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Scripted:
    """A model's folder, and of each selector the ids that it answers with (its end token is the last)."""

    folder: Path
    tokenizer: Tokenizer
    replies: dict[str, list[int]]

    def gguf(self) -> Path:
        """The same model for llama.cpp."""
        return gguf.convert(self.folder, self.folder.parent / f"{self.folder.name}.gguf")


def scripted(
    folder: Path,
    *,
    template: str,
    opening: str,
    scripts: Mapping[str, str],
    special: Iterable[str] = (),
    words: Iterable[str] = (),
    ends: tuple[str, ...] = ("<|im_end|>",),
) -> Scripted:
    """Make a model in *folder* that answers with the script whose selector the prompt has. *opening*: what the
    *template* ends a prompt with. *special*: tokens that are no text, *words*: other ones. The first of *ends* ends a
    script that has none of them at its own end. What stands between two `GUIDED` in a script a guide makes the model
    write, byte by byte, but for white space.
    """
    special = tuple(dict.fromkeys((*ends, *special)))
    scripts = {selector: script if script.endswith(ends) else script + ends[0] for selector, script in scripts.items()}
    cut = _Cut((*special, *words))
    pieces = {selector: cut.script(script) for selector, script in scripts.items()}
    tokenizer = _tokenizer(special, tuple(words), cut.pieces)
    last = [tokenizer.token_to_id(end) for end in ends]
    replies = {selector: [tokenizer.token_to_id(piece) for piece, _ in pieces[selector]] for selector in scripts}

    start = tokenizer.encode(f"  {opening}", add_special_tokens=False).ids[-3:]
    codes = _codes(tokenizer.get_vocab_size())
    steps: dict[tuple[int, ...], int] = {}
    for selector, reply in replies.items():
        (selecting,) = tokenizer.encode(selector, add_special_tokens=False).ids
        written = start + reply
        ways = [
            (following, guided, at)
            for at, (following, (_, guided)) in enumerate(zip(reply, pieces[selector], strict=True), 3)
        ]
        for following, guided, at in sorted(ways, key=lambda way: way[1]):
            known = steps.setdefault((written[at - 1], selecting, written[at - 2], written[at - 3]), following)
            assert guided or known == following, "the same three tokens of a script are followed by different ones"
    _write(folder, tokenizer, template, special, last, _tensors(codes, steps, last[0], tokenizer))
    return Scripted(folder, tokenizer, replies)


# ------------------------------------------------------------------------------------------ tokens


class _Cut:
    """Cuts scripts into tokens: the given *words*, and pieces of text, each of which occurs once."""

    def __init__(self, words: tuple[str, ...]) -> None:
        self._words = sorted(words, key=len, reverse=True)
        self._names = dict(zip(range(256), _alphabet(), strict=True))
        self.pieces: list[str] = []

    def script(self, script: str) -> list[tuple[str, bool]]:
        """The tokens, and whether a guide writes each."""
        result: list[tuple[str, bool]] = []
        for place, part in enumerate(script.split(GUIDED)):
            guided = place % 2 == 1
            tokens = [self._names[byte] for byte in part.encode()] if guided else self(part)
            result += [(token, guided) for token in tokens]
        return result

    def __call__(self, script: str) -> Iterator[str]:
        text = ""
        while script:
            word = next((word for word in self._words if script.startswith(word)), "")
            if word:
                yield from self._text(text)
                yield word
                text = ""
            else:
                text += script[0]
            script = script[len(word) or 1 :]
        yield from self._text(text)

    def _text(self, text: str) -> list[str]:
        """Of four bytes, wherever they end: also within a character. Longer where that piece has occurred."""
        names = [self._names[byte] for byte in text.encode()]
        found: list[str] = []
        while names:
            size = min(4, len(names))
            while (piece := "".join(names[:size])) in (*self.pieces, *found) and size < len(names):
                size += 1
            names = names[size:]
            if piece not in (*self.pieces, *found) and len(piece) > 1:
                found.append(piece)
                continue
            while found and (piece in (*self.pieces, *found) or len(piece) == 1):
                piece = found.pop() + piece  # the last bytes of the text belong to the piece before
            if piece in self.pieces or len(piece) == 1:
                return list(piece)
            found.append(piece)
        self.pieces += found
        return found


def _alphabet() -> list[str]:
    """The characters that stand for the bytes, in a byte-level vocabulary."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def _tokenizer(special: tuple[str, ...], words: tuple[str, ...], pieces: list[str]) -> Tokenizer:
    nothing = _alphabet()[0]
    names = [*_alphabet(), nothing * 2, *pieces]  # llama.cpp needs a merge: one that never happens
    vocabulary = {name: id for id, name in enumerate(names)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [(nothing, nothing)]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens([AddedToken(name, special=True, normalized=False) for name in special])
    tokenizer.add_tokens([AddedToken(name, special=False, normalized=False) for name in words])
    return tokenizer


# ------------------------------------------------------------------------------------------ the network


def _codes(count: int) -> Array:
    """A direction for each token, nearly at right angles to all others."""
    codes = np.random.default_rng(1).normal(size=(count, WIDTH))
    return codes / np.linalg.norm(codes, axis=1, keepdims=True)


def _tensors(codes: Array, steps: dict[tuple[int, ...], int], last: int, tokenizer: Tokenizer) -> dict[str, Array]:
    count = len(codes)
    token, *found, following = (slice(i * WIDTH, (i + 1) * WIDTH) for i in range(HEADS + 2))
    embedding = np.zeros((count, SIZE))
    embedding[:, token] = codes
    embedding[:, ONE] = embedding[:, OTHER] = 1
    for each in SELECTORS:
        (id,) = tokenizer.encode(each, add_special_tokens=False).ids
        embedding[id, SELECTS], embedding[id, OTHER] = 1, 0

    # The first head looks for what selects, in the slowest rotation; the others for a distance, in the faster ones.
    queries, keys = np.zeros((HEADS * WIDTH, SIZE)), np.zeros((HEADS * WIDTH, SIZE))
    half = WIDTH // 2
    strength = np.sqrt(SHARP * np.sqrt(WIDTH))
    queries[half - 1, ONE] = keys[half - 1, SELECTS] = strength
    turns = THETA ** (-np.arange(half) / half)
    turns = turns[turns > 1 / 64]
    strength /= np.sqrt(min(np.sum(1 - np.cos(turns * off)) for off in range(1, CONTEXT)))
    for distance in range(1, HEADS):
        for i, turn in enumerate(turns, distance * WIDTH):
            queries[i, ONE] = strength * np.cos(turn * distance)
            queries[i + half, ONE] = -strength * np.sin(turn * distance)
            keys[i, ONE] = strength
    values, output = np.zeros((HEADS * WIDTH, SIZE)), np.zeros((SIZE, HEADS * WIDTH))
    for head, place in enumerate(found):
        of_head = slice(head * WIDTH, (head + 1) * WIDTH)
        values[of_head, token] = output[place, of_head] = np.eye(WIDTH)

    # A unit of the MLP fires where all of them are those of its step.
    height, least = 30.0, HEADS + 0.7
    gate, up, down = np.zeros((len(steps), SIZE)), np.zeros((len(steps), SIZE)), np.zeros((SIZE, len(steps)))
    for unit, (known, next_one) in enumerate(steps.items()):
        for place, id in zip((token, *found), known, strict=True):
            gate[unit, place] = codes[id]
        gate[unit, ONE] = -least
        gate[unit] *= height / (HEADS + 1 - least)
        up[unit, ONE] = 1
        down[following, unit] = 10 / height * codes[next_one]
    logits = np.zeros((count, SIZE))
    logits[:, following] = 4 * codes
    logits[last, ONE] = 3  # the end, where nothing fits

    # Norms bring back what went in: its squares sum up to 3 (token, constants), and then to more.
    layer = "model.layers.0"
    return {
        "model.embed_tokens.weight": embedding,
        f"{layer}.input_layernorm.weight": np.full(SIZE, np.sqrt(3 / SIZE)),
        f"{layer}.self_attn.q_proj.weight": queries,
        f"{layer}.self_attn.k_proj.weight": keys,
        f"{layer}.self_attn.v_proj.weight": values,
        f"{layer}.self_attn.o_proj.weight": output,
        f"{layer}.post_attention_layernorm.weight": np.full(SIZE, np.sqrt((3 + HEADS) / SIZE)),
        f"{layer}.mlp.gate_proj.weight": gate,
        f"{layer}.mlp.up_proj.weight": up,
        f"{layer}.mlp.down_proj.weight": down,
        "model.norm.weight": np.ones(SIZE),
        "lm_head.weight": logits,
    }


def _write(
    folder: Path,
    tokenizer: Tokenizer,
    template: str,
    special: tuple[str, ...],
    last: list[int],
    tensors: dict[str, Array],
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": SIZE,
        "intermediate_size": len(tensors["model.layers.0.mlp.gate_proj.weight"]),
        "num_hidden_layers": 1,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS,
        "head_dim": WIDTH,
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
        "max_position_embeddings": CONTEXT,
        "rope_theta": THETA,
        "vocab_size": tokenizer.get_vocab_size(),
        "tie_word_embeddings": False,
        "eos_token_id": last,
    }
    (folder / "config.json").write_text(json.dumps(config))
    end = tokenizer.id_to_token(last[0])
    settings = {"eos_token": end, "additional_special_tokens": list(special), "chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    save_file(
        {name: np.ascontiguousarray(tensor, np.float32) for name, tensor in tensors.items()},
        folder / "model.safetensors",
    )
