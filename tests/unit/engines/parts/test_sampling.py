"""Drawing tokens: filters, penalties, and that a row depends on nothing but itself."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.core.job import Sampling
from penstock.engines.parts.sampling import Sampler, stream_key, uniform

VOCAB = 700
LOGITS = (np.random.default_rng(1).normal(size=VOCAB) * 2).astype(np.float32)


def draws(sampling: Sampling, count: int = 400, logits: Any = LOGITS, **state: Any) -> np.ndarray[Any, Any]:
    """*count* first tokens of as many differently seeded sequences."""
    sampler = Sampler(count, len(logits))
    for slot in range(count):
        sampler.occupy(slot, sampling, stream_key(slot, 0), **state)
    tokens, _ = sampler.draw(np.tile(logits, (count, 1)), np.arange(count), np.ones(count, np.int64))
    return np.array(tokens)


def probabilities(logits: Any, temperature: float = 1.0) -> np.ndarray[Any, Any]:
    values = np.exp((logits - logits.max()).astype(np.float64) / temperature)
    return values / values.sum()


def test_numbers_are_uniform_and_independent() -> None:
    keys = np.array([stream_key(seed, choice) for seed in range(100) for choice in range(8)], np.uint64)
    assert len(set(keys.tolist())) == 800
    numbers = np.stack([uniform(keys, np.full(800, position)) for position in range(50)])
    assert numbers.min() >= 0
    assert numbers.max() < 1
    assert abs(numbers.mean() - 0.5) < 0.01
    assert abs(numbers.std() - 12**-0.5) < 0.01
    assert abs(np.corrcoef(numbers[1:].ravel(), numbers[:-1].ravel())[0, 1]) < 0.02
    assert abs(np.corrcoef(numbers[:, 1:].ravel(), numbers[:, :-1].ravel())[0, 1]) < 0.02


def test_temperature_zero_is_the_best_token() -> None:
    assert set(draws(Sampling(temperature=0)).tolist()) == {int(LOGITS.argmax())}


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_samples_follow_the_distribution(temperature: float) -> None:
    tokens = draws(Sampling(temperature=temperature), 20_000)
    seen = np.bincount(tokens, minlength=VOCAB) / len(tokens)
    assert np.abs(seen - probabilities(LOGITS, temperature)).sum() < 0.25
    assert np.abs(seen - probabilities(LOGITS, temperature)).max() < 0.015


def kept(sampling: Sampling) -> set[int]:
    """Which tokens the filters leave, by their definitions (a slow, plain version)."""
    order = np.argsort(-LOGITS, kind="stable")
    p = probabilities(LOGITS, sampling.temperature)
    best = order[: sampling.top_k or VOCAB]
    cumulated = np.cumsum(p[best] / p[best].sum())
    nucleus = best[: int(np.searchsorted(cumulated, sampling.top_p)) + 1] if sampling.top_p < 1 else best
    return {int(token) for token in nucleus if p[token] >= sampling.min_p * p.max()}


@pytest.mark.parametrize(
    "filters",
    [
        {"top_k": 1},
        {"top_k": 5},
        {"top_k": 5000},
        {"top_p": 0.5},
        {"top_p": 0.05},
        {"top_p": 0.97, "temperature": 2.0},  # more than the shortcut looks at
        {"min_p": 0.1},
        {"min_p": 1.0},
        {"top_k": 20, "top_p": 0.8},
        {"top_k": 600, "top_p": 0.99, "temperature": 2.0},
        {"top_k": 20, "top_p": 0.9, "min_p": 0.2},
    ],
)
def test_filters_keep_exactly_what_they_should(filters: dict[str, Any]) -> None:
    sampling = Sampling(**{"temperature": 1.0, **filters})
    expected = kept(sampling)
    seen = set(draws(sampling, 30_000).tolist())
    assert seen <= expected
    p = probabilities(LOGITS, sampling.temperature)
    likely = {token for token in expected if p[token] / p[list(expected)].sum() > 1e-3}
    assert likely <= seen


SAMPLINGS = st.builds(
    Sampling,
    temperature=st.sampled_from([0.0, 0.3, 1.0]),
    top_k=st.sampled_from([0, 0, 3, 50]),
    top_p=st.sampled_from([1.0, 1.0, 0.5, 0.95]),
    min_p=st.sampled_from([0.0, 0.0, 0.1]),
    presence_penalty=st.sampled_from([0.0, 0.0, 1.0]),
    frequency_penalty=st.sampled_from([0.0, 0.0, 0.5]),
    repetition_penalty=st.sampled_from([1.0, 1.0, 1.3]),
)


@given(samplings=st.lists(SAMPLINGS, min_size=1, max_size=6), seed=st.integers(0, 2**32))
def test_a_row_draws_the_same_alone_as_in_any_batch(samplings: list[Sampling], seed: int) -> None:
    logits = (np.random.default_rng(seed).normal(size=(len(samplings), VOCAB)) * 3).astype(np.float32)
    together = Sampler(8, VOCAB)
    slots = np.arange(len(samplings)) + 1
    positions = slots * 7
    for slot, sampling in zip(slots, samplings, strict=True):
        together.occupy(int(slot), sampling, int(slot) * 1000, [1, 2], [3, 4, 4])
    tokens, _ = together.draw(logits.copy(), slots, positions)
    for row, sampling in enumerate(samplings):
        alone = Sampler(1, VOCAB)
        alone.occupy(0, sampling, int(slots[row]) * 1000, [1, 2], [3, 4, 4])
        assert alone.draw(logits[row : row + 1].copy(), np.array([0]), positions[row : row + 1])[0] == [tokens[row]]


def test_a_bias_bans_and_forces() -> None:
    best = int(LOGITS.argmax())
    assert best not in draws(Sampling(temperature=1.0, logit_bias={best: -100.0})).tolist()
    assert set(draws(Sampling(temperature=1.0, logit_bias={7: 100.0})).tolist()) == {7}


def test_presence_and_frequency_count_the_reply_only() -> None:
    logits = np.zeros(4, np.float32)
    presence = Sampling(temperature=0, presence_penalty=1.0, logprobs=0)
    assert draws(presence, 1, logits, prompt=[0], reply=[1])[0] == 0
    # Negative logits go down too (not up, as where a penalty is applied by the sign).
    assert draws(presence, 1, logits - 5, prompt=[], reply=[0, 1, 2])[0] == 3
    frequency = Sampling(temperature=0, frequency_penalty=0.5)
    assert draws(frequency, 1, logits, prompt=[], reply=[0, 0, 1, 2, 3, 3])[0] == 1


def test_repetition_counts_the_prompt_too_and_works_on_either_sign() -> None:
    sampling = Sampling(temperature=0, repetition_penalty=2.0)
    assert draws(sampling, 1, np.array([1.0, 0.9, 0.8], np.float32), prompt=[0], reply=[1])[0] == 2
    assert draws(sampling, 1, np.array([-1.0, -1.1, -1.2], np.float32), prompt=[0], reply=[1])[0] == 2


def test_a_continuation_draws_what_would_have_been_drawn() -> None:
    sampling = Sampling(temperature=1.0, presence_penalty=0.5, frequency_penalty=0.3, repetition_penalty=1.2)
    sampler = Sampler(2, VOCAB)
    sampler.occupy(0, sampling, 42, [1, 2, 3])
    reply: list[int] = []
    for position in range(1, 21):
        reply += sampler.draw(LOGITS[None].copy(), np.array([0]), np.array([position]))[0]
    sampler.occupy(1, sampling, 42, [1, 2, 3], reply[:10])
    again = [sampler.draw(LOGITS[None].copy(), np.array([1]), np.array([position]))[0][0] for position in range(11, 21)]
    assert again == reply[10:]


def test_logprobs_are_the_models_own() -> None:
    sampler = Sampler(1, VOCAB)
    best = int(LOGITS.argmax())
    sampler.occupy(0, Sampling(temperature=0.5, top_k=1, logit_bias={7: 100.0}, logprobs=3), 1)
    tokens, logprobs = sampler.draw(LOGITS[None].copy(), np.array([0]), np.array([1]))
    own = np.log(probabilities(LOGITS))
    logprob, top = logprobs[0]
    assert tokens == [7]
    assert logprob == pytest.approx(own[7])
    assert [token for token, _ in top] == np.argsort(-LOGITS)[:3].tolist()
    assert top[0] == (best, pytest.approx(own[best]))


def test_seeds_differ_by_choice_and_chance() -> None:
    assert stream_key(5, 0) == stream_key(5, 0)
    assert stream_key(-5, 0) != stream_key(5, 0)
    assert stream_key(5, 0) != stream_key(5, 1)
    assert stream_key(None, 0) != stream_key(None, 0)
