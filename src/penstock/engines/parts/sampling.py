"""Drawing tokens from logits, for all running sequences at once.

The random number of a token depends on nothing but (seed, choice, position in the reply), and each row is computed by
itself: from the same logits a sequence draws the same tokens alone, in any batch, and after a resume.

Order, as in vLLM: bias, penalties, the reply's mask, temperature, top_k, top_p (of what top_k left), min_p. Every one
of the last three keeps the tokens above some value, so together they are one threshold per row. Reported
log-probabilities are the model's own, before all of this.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from penstock.core.job import Sampling

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]

_GOLDEN = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1
#: Weights are summed in blocks of this many tokens; only the block that is drawn is looked at closer.
_BLOCK = 128
#: top_p looks at this many of the best tokens first, then at eight times as many, and so on.
_NUCLEUS = 256


def _mix(x: Any) -> Any:
    """SplitMix64's output function, on uint64 arrays."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def uniform(keys: npt.NDArray[np.uint64], positions: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """Numbers in [0, 1), one per (key, position)."""
    bits = _mix(keys + positions.astype(np.uint64) * np.uint64(_GOLDEN))
    numbers: npt.NDArray[np.float64] = (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53
    return numbers


def stream_key(seed: int | None, choice: int) -> int:
    """What names a choice's stream of random numbers; a fresh one without a seed."""
    if seed is None:
        return secrets.randbits(64)
    state = np.array([(seed & _MASK), choice + 1], dtype=np.uint64)
    return int(_mix(_mix(state[:1] + np.uint64(_GOLDEN)) + state[1:] * np.uint64(_GOLDEN))[0])


class _Adjustment:
    """Bias and penalties of one sequence. Presence and frequency count the reply, repetition also the prompt."""

    def __init__(self, sampling: Sampling, vocab: int, prompt: Iterable[int], reply: Iterable[int]) -> None:
        self._presence = sampling.presence_penalty
        self._frequency = sampling.frequency_penalty
        self._repetition = sampling.repetition_penalty
        self._offset = np.zeros(vocab, np.float32)
        for token, bias in sampling.logit_bias.items():
            self._offset[token] += bias
        self._biased = bool(sampling.logit_bias or self._presence or self._frequency)
        self._counted: set[int] = set()
        self._seen = np.zeros(vocab, np.bool_)
        if self._repetition != 1.0:
            self._seen[list(prompt)] = True
        for token in reply:
            self.accept(token)

    def accept(self, token: int) -> None:
        if self._frequency:
            self._offset[token] -= self._frequency
        if self._presence and token not in self._counted:
            self._counted.add(token)
            self._offset[token] -= self._presence
        self._seen[token] = True

    def apply(self, logits: Floats) -> None:
        if self._repetition != 1.0:
            seen = logits[self._seen]
            logits[self._seen] = np.where(seen > 0, seen / self._repetition, seen * self._repetition)
        if self._biased:
            logits += self._offset


class Mask(Protocol):
    """Forbids tokens (`penstock.engines.parts.guide.Guide`, `penstock.engines.text.masks.Bans`)."""

    def mask(self, logits: Floats) -> None:
        """Set the logits of tokens that must not be drawn to -inf, in one row; never all of them."""
        ...


class Sampler:
    """The sampling state of every slot, column-wise: one row of logits a slot.

    ``draw`` may change the logits it is given.
    """

    def __init__(self, slots: int, vocab: int) -> None:
        self.vocab = vocab
        self._sampled = np.zeros(slots, np.bool_)
        self._filtered = np.zeros(slots, np.bool_)
        self._scale = np.ones(slots, np.float32)
        self._top_k = np.full(slots, vocab)
        self._top_p = np.ones(slots, np.float64)
        self._min_p = np.zeros(slots, np.float64)
        self._key = np.zeros(slots, np.uint64)
        self._adjustments: dict[int, _Adjustment] = {}
        self._logprobs: dict[int, int] = {}
        self._guides: dict[int, Mask] = {}

    def occupy(
        self,
        slot: int,
        sampling: Sampling,
        key: int,
        prompt: Sequence[int] = (),
        reply: Sequence[int] = (),
        guide: Mask | None = None,
    ) -> None:
        """Give *slot* to a sequence. *reply* are the tokens that an earlier attempt drew; *guide* says which may come
        next (whoever owns it tells it what was drawn)."""
        self._sampled[slot] = sampling.temperature > 0
        # Colder than this is greedy to float32 anyway, and the reciprocal must stay finite.
        self._scale[slot] = 1.0 / max(sampling.temperature, 1e-4) if sampling.temperature > 0 else 1.0
        self._top_k[slot] = min(sampling.top_k, self.vocab) or self.vocab
        self._top_p[slot] = sampling.top_p
        self._min_p[slot] = sampling.min_p
        self._filtered[slot] = self._top_k[slot] < self.vocab or sampling.top_p < 1 or sampling.min_p > 0
        self._key[slot] = key
        self._adjustments.pop(slot, None)
        if (
            sampling.logit_bias
            or sampling.presence_penalty
            or sampling.frequency_penalty
            or sampling.repetition_penalty != 1.0
        ):
            self._adjustments[slot] = _Adjustment(sampling, self.vocab, prompt, reply)
        self._guides.pop(slot, None)
        if guide is not None:
            self._guides[slot] = guide
        self._logprobs.pop(slot, None)
        if sampling.logprobs is not None:
            self._logprobs[slot] = sampling.logprobs

    def vacate(self, slot: int) -> None:
        self._guides.pop(slot, None)
        self._adjustments.pop(slot, None)
        self._logprobs.pop(slot, None)

    def draw(
        self, logits: Floats, slots: Ints, positions: Ints
    ) -> tuple[list[int], dict[int, tuple[float, list[tuple[int, float]]]]]:
        """One token per row, the *positions*-th of its reply.

        Also, by row, for slots that asked: the token's log-probability and the best alternatives, best first.
        """
        raw: dict[int, tuple[Floats, int]] = {}
        if self._logprobs or self._adjustments or self._guides:
            for row, slot in enumerate(slots.tolist()):
                if (count := self._logprobs.get(slot)) is not None:
                    raw[row] = (logits[row].copy(), count)
                if (adjustment := self._adjustments.get(slot)) is not None:
                    adjustment.apply(logits[row])
                if (guide := self._guides.get(slot)) is not None:
                    guide.mask(logits[row])

        tokens = self._choose(logits, slots, positions).tolist()

        if self._adjustments:
            for slot, token in zip(slots.tolist(), tokens, strict=True):
                if (adjustment := self._adjustments.get(slot)) is not None:
                    adjustment.accept(token)
        return tokens, {row: alternatives(values, tokens[row], count) for row, (values, count) in raw.items()}

    def _choose(self, logits: Floats, slots: Ints, positions: Ints) -> Ints:
        sampled = self._sampled[slots]
        if sampled.all():
            return self._sample(logits, slots, positions)
        tokens: Ints = logits.argmax(1)
        if not sampled.any():
            return tokens
        tokens[sampled] = self._sample(logits[sampled], slots[sampled], positions[sampled])
        return tokens

    def _sample(self, logits: Floats, slots: Ints, positions: Ints) -> Ints:
        rows, vocab = logits.shape
        weights = np.zeros((rows, -(-vocab // _BLOCK) * _BLOCK), np.float32)
        scaled = weights[:, :vocab]
        np.multiply(logits, self._scale[slots][:, None], out=scaled)
        scaled -= scaled.max(1, keepdims=True)
        filtered = self._filtered[slots]
        kept = None
        if filtered.all():
            kept = scaled >= self._thresholds(scaled, slots)[:, None]
        elif filtered.any():
            thresholds = np.full(rows, -np.inf, np.float32)
            thresholds[filtered] = self._thresholds(scaled[filtered], slots[filtered])
            kept = scaled >= thresholds[:, None]
        np.exp(scaled, out=scaled)
        if kept is not None:
            scaled *= kept  # several times faster than an assignment to those that are not

        # Inverse of the cumulative distribution, in two levels: the block, then the token in it.
        index = np.arange(rows)
        blocks = weights.reshape(rows, -1, _BLOCK)
        sums = blocks.sum(2).cumsum(1, dtype=np.float64)
        target = uniform(self._key[slots], positions) * sums[:, -1]
        block = np.minimum((sums <= target[:, None]).sum(1), sums.shape[1] - 1)
        rest = target - np.where(block > 0, sums[index, block - 1], 0.0)
        inner = blocks[index, block].cumsum(1, dtype=np.float64)
        token: Ints = block * _BLOCK + np.minimum((inner <= rest[:, None]).sum(1), _BLOCK - 1)
        # Rounding at the end of a block may lead to a token without weight: take the best one then.
        missed = weights[index, token] <= 0
        if missed.any():
            token[missed] = scaled[missed].argmax(1)
        return token

    def _thresholds(self, scaled: Floats, slots: Ints) -> Floats:
        """For each row the value below which tokens are dropped (the best token's value is 0)."""
        top_k, top_p, min_p = self._top_k[slots], self._top_p[slots], self._min_p[slots]
        with np.errstate(divide="ignore"):
            threshold = np.log(min_p).astype(np.float32)  # -inf where off
        nucleus = top_p < 1
        limited = top_k < scaled.shape[1]
        if not (nucleus.any() or limited.any()):
            return threshold
        wanted = int(top_k[limited].max()) if limited.any() else 0
        if nucleus.any():
            wanted = max(wanted, _NUCLEUS)
        best = _descending(scaled, wanted)
        rows = np.arange(len(scaled))
        if limited.any():
            kth = best[rows, np.minimum(top_k, best.shape[1]) - 1]
            threshold = np.where(limited, np.maximum(threshold, kth), threshold)
        if nucleus.any():
            threshold = np.maximum(threshold, self._nucleus(scaled, best, top_k, top_p))
        return threshold

    def _nucleus(self, scaled: Floats, best: Floats, top_k: Ints, top_p: npt.NDArray[np.float64]) -> Floats:
        """Of each row the value of the last token of the smallest set whose probability reaches top_p."""
        mass: npt.NDArray[np.float64] = np.exp(best).cumsum(1, dtype=np.float64)
        # Among top_k tokens the whole is what these weigh, else what the vocabulary weighs.
        total = np.where(
            top_k <= best.shape[1],
            mass[np.arange(len(best)), np.minimum(top_k, best.shape[1]) - 1],
            np.exp(scaled).sum(1, dtype=np.float64) if (top_k > best.shape[1]).any() else 0.0,
        )
        reached = mass >= (top_p * total)[:, None]
        result: Floats = best[np.arange(len(best)), reached.argmax(1)]
        result[top_p >= 1] = -np.inf
        beyond = ~reached[:, -1] & (top_p < 1)  # flat distributions: the best ones are not enough
        if beyond.any():
            if best.shape[1] == scaled.shape[1]:
                result[beyond] = -np.inf
            else:
                more = _descending(scaled[beyond], 8 * best.shape[1])
                result[beyond] = self._nucleus(scaled[beyond], more, top_k[beyond], top_p[beyond])
        return result


def _descending(values: Floats, count: int) -> Floats:
    """The *count* largest values of each row, largest first; all of them where there are fewer."""
    size = values.shape[1]
    if count < size:
        values = np.partition(values, size - count, axis=1)[:, size - count :]
    ordered: Floats = np.sort(values, axis=1)[:, ::-1]
    return ordered


def alternatives(logits: Floats, token: int, count: int) -> tuple[float, list[tuple[int, float]]]:
    """log-probability of *token* and the *count* likeliest tokens with theirs."""
    values = logits.astype(np.float64)
    values -= values.max()
    values -= np.log(np.exp(values).sum())
    top: list[tuple[int, float]] = []
    if count:
        count = min(count, len(values))
        best = np.argpartition(values, len(values) - count)[-count:]
        best = best[np.lexsort((best, -values[best]))]
        top = list(zip(best.tolist(), values[best].tolist(), strict=True))
    return float(values[token]), top
