"""The tensors of a decoder by its family's names, whatever stands before them in the files; none may be left over."""

from __future__ import annotations

from typing import Any

from penstock.engines.openvino.ir.plan import Names
from penstock.engines.openvino.ir.refusal import unbuildable

#: Ends of the names of tensors that nothing is computed with: tables and masks that old files have.
NO_WEIGHTS = (
    "rotary_emb.inv_freq",
    "rotary_emb.cos_cached",
    "rotary_emb.sin_cached",
    ".attn.bias",
    ".attn.masked_bias",
    ".attention.bias",
    ".attention.masked_bias",
)
#: What the text part of a larger network (one that sees, say) is called.
TEXT_PART = "language_model."


class Tensors:
    """*weights*: see `penstock.engines.openvino.ir.decoder.build_decoder`. A network that was saved without its head
    lacks the first part of the names, one that is a part of a larger network has another in front."""

    def __init__(self, weights: Any, names: Names) -> None:
        self._weights = weights
        self._head = names.head
        self._base = names.embedding.split(".")[0] + "."
        table = names.embedding.removeprefix(self._base) + ".weight"
        ways = (self._base, "", TEXT_PART + self._base, self._base + TEXT_PART)
        self._found = next((way for way in ways if way + table in weights), self._base)
        self._asked: set[str] = set()

    def __contains__(self, name: str) -> bool:
        return self._name(name) in self._weights

    def constant(self, name: str, turned: bool = False) -> Any:
        """A node that gives the tensor in float32; *turned*: [in, out] as [out, in].

        Raises `ModelLoadError` where there is none."""
        name = self._name(name)
        self._asked.add(name)
        return self._weights.constant(name, turned)

    def done(self) -> None:
        """Refuse weights that nobody asked for: the network would compute something with them."""
        head = self._name(f"{self._head}.weight")
        strange = sorted(
            name
            for name in self._weights
            if name not in self._asked
            and name != head
            and not name.endswith(NO_WEIGHTS)
            and (TEXT_PART not in self._found or name.startswith(self._found))
        )
        if strange:
            raise unbuildable(f"its files have weights that have no place in the network, such as {strange[0]}")

    def _name(self, name: str) -> str:
        if name.startswith(self._base):
            return self._found + name.removeprefix(self._base)
        within = TEXT_PART + name
        return within if name.startswith(self._head) and within in self._weights else name
