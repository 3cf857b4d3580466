"""Rotary positions that depend on how long a text is.

LongRoPE (Phi-3.5, Phi-4-mini) has two sets of frequencies: for texts up to the length that the model was first trained
with, and for longer ones. The library chooses one set for a whole call, by the largest position in it, so that a text's
reply would depend on who is beside it. Here each token gets the set of its own text. A text that grows beyond the
switch is computed anew, as the library's ``generate`` does for a request alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def switch_of(model: Any) -> int | None:
    """Up to how many tokens a text of *model* has the short frequencies; None where all texts have the same."""
    switches = {
        int(parameters["original_max_position_embeddings"])
        for module in _modules(model)
        for parameters in _parameters(module.config)
        if parameters.get("rope_type") == "longrope"
    }
    return min(switches, default=None)


def choose_by_text(model: Any, switch: int, is_long: Callable[[], torch.Tensor | None]) -> None:
    """From now on tokens get their set by *is_long*: of the tokens of the call ([tokens], or None where there are no
    long texts), which are of a text longer than *switch*."""
    for module in _modules(model):
        module.forward = _ByText(module.forward, switch, is_long)


class _ByText:
    """The library's ``forward`` of rotary positions, asked for both sets."""

    def __init__(self, forward: Any, switch: int, is_long: Callable[[], torch.Tensor | None]) -> None:
        self._forward = forward
        self._switch = switch
        self._is_long = is_long

    def __call__(self, x: Any, position_ids: torch.Tensor, **others: Any) -> Any:
        if (is_long := self._is_long()) is None:
            return self._forward(x, position_ids, **others)
        # The largest position decides: none beyond the switch, or one more that is.
        short = self._forward(x, position_ids.clamp(max=self._switch - 1), **others)
        beyond = torch.full_like(position_ids[:, :1], self._switch)
        long = self._forward(x, torch.cat([position_ids, beyond], dim=1), **others)
        chosen = is_long[None, :, None]
        return tuple(torch.where(chosen, far[:, :-1], near) for far, near in zip(long, short, strict=True))


def _modules(model: Any) -> list[Any]:
    """Those that compute rotary positions in two sets."""
    return [
        module
        for module in model.modules()
        if type(module).__name__.endswith("RotaryEmbedding")
        and any(
            parameters.get("rope_type") == "longrope" for parameters in _parameters(getattr(module, "config", None))
        )
    ]


def _parameters(config: Any) -> list[dict[str, Any]]:
    """What *config* says of rotary positions: of all layers, or of each kind of them."""
    written = getattr(config, "rope_parameters", None) or {}
    return [part for part in written.values() if isinstance(part, dict)] if "rope_type" not in written else [written]
