"""Batches that nobody can join, through the library's ``generate``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)

from penstock.engines.parts.sampling import Sampler
from penstock.engines.parts.static import Row
from penstock.engines.transformers.adapters import Adapters


class Generate:
    """Runs a batch of rows to its end through the library's ``generate``. Tokens are drawn by our sampler: each step's
    scores are replaced by the choice that was made."""

    def __init__(self, model: Any, device: torch.device, vocab: int, slots: int, adapters: Adapters) -> None:
        self._model = model
        self._adapters = adapters
        self._device = device
        self._sampler = Sampler(slots, vocab)
        model.generation_config = GenerationConfig(pad_token_id=0, eos_token_id=None)

    def __call__(self, rows: Sequence[Row], steps: int) -> None:
        width = max(len(row.ids) for row in rows)
        ids = torch.zeros((len(rows), width), dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for i, row in enumerate(rows):
            ids[i, width - len(row.ids) :] = torch.tensor(row.ids)
            mask[i, width - len(row.ids) :] = 1
            self._sampler.occupy(i, row.request.sampling, row.rng, row.prompt, row.reply.ids, row.reply.mask)
        draw = _Draw(rows, self._sampler)
        self._adapters.alone = self._adapters.number(rows[0].request.model)
        with torch.inference_mode():
            self._model.generate(
                ids.to(self._device),
                attention_mask=mask.to(self._device),
                max_new_tokens=steps,
                do_sample=False,
                logits_processor=LogitsProcessorList([draw]),
                stopping_criteria=StoppingCriteriaList([_Over(rows)]),
            )


class _Draw(LogitsProcessor):  # type: ignore[misc]
    def __init__(self, rows: Sequence[Row], sampler: Sampler) -> None:
        self._rows = rows
        self._sampler = sampler

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        open_rows = [i for i, row in enumerate(self._rows) if not row.over]
        chosen = torch.zeros(len(self._rows), dtype=torch.int64)
        if open_rows:
            slots = np.array(open_rows, np.int64)
            drawn = np.array([len(self._rows[i].reply.ids) + 1 for i in open_rows], np.int64)
            tokens, logprobs = self._sampler.draw(scores[open_rows].float().cpu().numpy().copy(), slots, drawn)
            for at, (i, token) in enumerate(zip(open_rows, tokens, strict=True)):
                self._rows[i].take(token, logprobs.get(at))
                chosen[i] = token
        forced = torch.full_like(scores, -torch.inf)
        forced[torch.arange(len(self._rows)), chosen.to(scores.device)] = 0
        return forced


class _Over(StoppingCriteria):  # type: ignore[misc]
    def __init__(self, rows: Sequence[Row]) -> None:
        self._rows = rows

    def __call__(self, input_ids: torch.Tensor, scores: Any, **others: Any) -> torch.Tensor:
        return torch.tensor([row.over for row in self._rows], device=input_ids.device)
