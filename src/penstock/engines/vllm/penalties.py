"""Penalties of a continued reply, as a logits processor of vLLM's.

vLLM takes the logged tokens of a continued reply for a part of the prompt. Presence and frequency penalties would then
count from the continuation on, and the reply would repeat itself. This counts the whole reply. It stands in for vLLM's
own penalties in requests that say so (``extra_args``: ``logged``, the number of the prompt's last tokens that are the
reply's, and the penalties), and costs the others nothing.

Imported by vLLM, in the process that has the model. Only there: it needs torch.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.sampling_params import SamplingParams
from vllm.v1.sample.logits_processor import AdapterLogitsProcessor


class ContinuedPenalties(AdapterLogitsProcessor):  # type: ignore[misc]
    def is_argmax_invariant(self) -> bool:
        return False

    def new_req_logits_processor(self, params: SamplingParams) -> Any:
        given = params.extra_args or {}
        if "logged" not in given:
            return None
        logged = given["logged"]
        presence, frequency = given.get("presence_penalty", 0.0), given.get("frequency_penalty", 0.0)
        repetition = given.get("repetition_penalty", 1.0)

        def penalize(prompt: list[int], output: list[int], logits: torch.Tensor) -> torch.Tensor:
            """In vLLM's order. *logits*: one row, [vocabulary]; changed in place."""
            if repetition != 1.0:
                seen = torch.tensor(sorted({*prompt, *output}), device=logits.device)
                values = logits[seen]
                logits[seen] = torch.where(values > 0, values / repetition, values * repetition)
            reply = torch.tensor(prompt[-logged:] + output, device=logits.device)
            tokens, counts = torch.unique(reply, return_counts=True)
            logits[tokens] -= frequency * counts + presence
            return logits

        return penalize
