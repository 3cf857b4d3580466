"""Is a model right in company? Found out at the start, on the model itself: its logits are compared with those that it
gives to each text alone.

Windows and chunks of attention are narrowed meanwhile, in the model and so in what it is compared with: two texts of
thirty tokens go beyond all of them, whatever the model's own are, and a check costs about a hundred tokens.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from penstock.engines.parts.sampling import Ints
from penstock.engines.parts.static import Together
from penstock.engines.transformers.adapters import Adapters
from penstock.engines.transformers.network import TorchNetwork

#: How far logits may be from those of the unchanged model, in their standard deviations.
TOLERANCE = {"float32": 0.01, "float16": 0.1, "bfloat16": 0.5}
#: What a window or chunk is narrowed to, in tokens, and what the library calls them.
NARROW = 8
WINDOWS = ("sliding_window", "sliding_window_size", "attention_window_size", "attention_chunk_size", "window_size")
#: Tokens of the texts, and what each has after each step: prefills, chunks beyond a window, a chunk beside a single
#: token, single tokens, one alone.
LENGTHS = (29, 21)
CUTS = [(4, 3), (12, 4), (26, 17), (27, 20), (28, 21), (29, 21)]
#: Tokens that a static batch adds.
ADDED = 4


def why_not(model: Any, network: TorchNetwork, vocab: int, adapters: Adapters) -> str | None:
    """Why continuous batching would go wrong for *model*; None when its logits are those of the unchanged model. Its
    attention is the network's from here on. Where there are *adapters*, one of the texts goes through the first."""
    given = texts(vocab, *LENGTHS)
    try:
        with torch.inference_mode(), _narrowed(model):
            numbers = np.array([min(1, len(adapters.names)), 0])
            wanted = []
            for text, adapters.alone in zip(given, numbers.tolist(), strict=True):
                wanted.append(model(network.tensor(text)[None], use_cache=False).logits[0].float().cpu())
            model.set_attn_implementation("penstock")
            had: Sequence[int] = (0, 0)
            for cut in CUTS:
                parts = [(i, given[i][had[i] : cut[i]]) for i in (0, 1) if cut[i] > had[i]]
                counts = [len(part) for _, part in parts]
                logits = network.run(
                    input_ids=np.concatenate([part for _, part in parts]),
                    position_ids=np.concatenate([np.arange(had[i], cut[i]) for i, _ in parts]),
                    adapters=numbers[[i for i, _ in parts]],
                    past_lens=np.array([had[i] for i, _ in parts]),
                    total_lens=np.array([cut[i] for i, _ in parts]),
                    subsequence_begins=np.cumsum([0, *counts]),
                    block_indices=np.array([i for i, _ in parts]),
                    block_indices_begins=np.arange(len(parts) + 1),
                    max_context_len=np.array(max(cut)),
                    sampled_tokens_indices=np.cumsum(counts) - 1,
                )
                for row, (i, _) in zip(torch.from_numpy(logits), parts, strict=True):
                    if not (far := off(row, wanted[i][cut[i] - 1])) <= tolerance(model):
                        return f"its logits are {far:.2g} standard deviations off"
                had = cut
    except Exception as error:  # whatever a stranger's module raises when it is called in a way it does not know
        return f"{type(error).__name__}: {error}"
    return None


def together(model: Any, device: torch.device, vocab: int) -> Together:
    """Which rows the library's ``generate`` computes in one batch as it does each alone. A model that ignores the mask
    (a state instead of attention) takes padding for text."""
    longer, shorter = texts(vocab, *LENGTHS)
    others = texts(vocab, LENGTHS[0], LENGTHS[0])
    with torch.inference_mode(), _narrowed(model):
        if _as_alone(model, device, [longer, shorter]):
            return "any"
        return "equal" if _as_alone(model, device, others) else "one"


def _as_alone(model: Any, device: torch.device, texts: Sequence[Ints]) -> bool:
    alone = [_generated(model, device, [text])[0] for text in texts]
    beside = _generated(model, device, texts)
    return all(
        off(row, right) <= tolerance(model)
        for rows, rights in zip(beside, alone, strict=True)
        for row, right in zip(rows, rights, strict=True)
    )


def _generated(model: Any, device: torch.device, texts: Sequence[Ints]) -> list[list[torch.Tensor]]:
    """Of each of *texts*, the scores of the tokens that are added to it, padded as `Generate` does."""
    width = max(map(len, texts))
    ids = torch.zeros((len(texts), width), dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for i, text in enumerate(texts):
        ids[i, width - len(text) :] = torch.from_numpy(text)
        mask[i, width - len(text) :] = 1
    told = _Told()
    model.generate(
        ids.to(device),
        attention_mask=mask.to(device),
        generation_config=GenerationConfig(
            pad_token_id=0, eos_token_id=None, max_new_tokens=ADDED, do_sample=False, use_cache=True
        ),
        logits_processor=LogitsProcessorList([told]),
    )
    return [[scores[i] for scores in told.scores] for i in range(len(texts))]


class _Told(LogitsProcessor):  # type: ignore[misc]
    """Keeps all scores, and has the same tokens added whatever they are."""

    def __init__(self) -> None:
        self.scores: list[torch.Tensor] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.scores.append(scores.float().cpu())
        forced = torch.full_like(scores, -torch.inf)
        forced[:, len(self.scores)] = 0
        return forced


def texts(vocab: int, *lengths: int) -> list[Ints]:
    random = np.random.default_rng(0)
    return [random.integers(0, vocab, length) for length in lengths]


def off(logits: torch.Tensor, right: torch.Tensor) -> float:
    return float((logits - right).abs().max() / right.std())


def tolerance(model: Any) -> float:
    return TOLERANCE[str(model.dtype).removeprefix("torch.")]


@contextlib.contextmanager
def _narrowed(model: Any) -> Iterator[None]:
    """No window or chunk of attention is wider than `NARROW` within this."""
    holders = {id(holder): holder for module in model.modules() for holder in (module, getattr(module, "config", None))}
    before = [
        (holder, name, value)
        for holder in holders.values()
        for name in WINDOWS
        if isinstance(value := getattr(holder, name, None), int) and value > NARROW
    ]
    try:
        for holder, name, _ in before:
            setattr(holder, name, NARROW)
        yield
    finally:
        for holder, name, value in before:
            setattr(holder, name, value)
