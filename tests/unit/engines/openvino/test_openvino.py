"""The OpenVINO engine on a tiny random model: batching, continuing, finishing, refusing."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.support import tiny_models as tiny

from penstock.core.errors import ContextLengthExceeded, InvalidRequest, ModelLoadError
from penstock.core.events import Prefix
from penstock.core.job import Message, Request, Sampling
from penstock.core.ports import Output
from penstock.engines.child.backend import load_backend
from penstock.engines.openvino.files import resolve
from penstock.engines.parts.batching import ContinuousBatching

GREEDY = Sampling(max_tokens=40, temperature=0, ignore_eos=True)
# Few candidates: the network's last bits depend on the batch, and each candidate is a border that they may move.
SAMPLED = Sampling(
    max_tokens=40,
    temperature=1.0,
    top_k=5,
    top_p=0.95,
    seed=7,
    presence_penalty=0.4,
    frequency_penalty=0.4,
    repetition_penalty=1.1,
    ignore_eos=True,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.llama(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def backends(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], ContinuousBatching]:
    """By precision; each is loaded once."""

    @cache
    def of(precision: str) -> ContinuousBatching:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("PENSTOCK_CACHE", str(tmp_path_factory.mktemp("cache")))
            return loaded(folder, precision=precision)

    return of


@pytest.fixture(scope="module")
def backend(backends: Callable[[str], ContinuousBatching]) -> ContinuousBatching:
    return backends("auto")


#: What has to be the same whatever runs beside it. Weights of few bits are computed with in float32, too.
EXACT = pytest.mark.parametrize(
    ("precision", "sampling"),
    [("auto", GREEDY), ("auto", SAMPLED), ("int8", GREEDY), ("int4", GREEDY)],
    ids=["greedy", "sampled", "int8", "int4"],
)


def loaded(folder: Path, **options: Any) -> ContinuousBatching:
    backend = load_backend("openvino", "tiny", str(folder), {"slots": 8, **options}, lambda what, fraction: None)
    assert isinstance(backend, ContinuousBatching)
    return backend


def request(ids: Sequence[int] = (5, 6, 7), sampling: Sampling = GREEDY, n: int = 1) -> Request:
    return Request("tiny", prompt_ids=tuple(ids), sampling=sampling, n=n)


class Run:
    """Drives a backend; collects what came, by key."""

    def __init__(self, backend: ContinuousBatching) -> None:
        self.backend = backend
        self.outputs: dict[int, list[Output]] = {}

    def add(self, key: int, request: Request, prefixes: list[list[int]] | None = None) -> None:
        self.outputs[key] = []
        prefixes = prefixes or [[] for _ in range(request.n)]
        self.backend.add(key, request, [Prefix(ids, [""] * len(ids)) for ids in prefixes], 1)

    def step(self, times: int = 1) -> None:
        for _ in range(times):
            for output in self.backend.step():
                assert not self.outputs[output.key] or self.outputs[output.key][-1].finish is None
                self.outputs[output.key].append(output)

    def end(self) -> Run:
        while self.backend.busy:
            self.step()
        return self

    def ids(self, key: int = 0, choice: int = 0) -> list[int]:
        return [
            id
            for output in self.outputs[key]
            for id, of in zip(output.ids, output.choices or [0] * len(output.ids), strict=True)
            if of == choice
        ]

    def text(self, key: int = 0) -> str:
        return "".join(text for output in self.outputs[key] for text in output.texts)

    def reasons(self, key: int = 0) -> tuple[str, ...]:
        finish = self.outputs[key][-1].finish
        assert finish is not None
        return finish.finish_reasons


def generate(backend: ContinuousBatching, asked: Request | None = None, prefixes: list[list[int]] | None = None) -> Run:
    run = Run(backend)
    run.add(0, asked or request(), prefixes)
    return run.end()


def prompts(count: int) -> list[list[int]]:
    random = np.random.default_rng(3)
    return [random.integers(4, 300, random.integers(1, 100)).tolist() for _ in range(count)]


# ------------------------------------------------------------------------------------------ what a reply depends on


@EXACT
def test_a_reply_does_not_depend_on_what_runs_beside_it(
    backends: Callable[[str], ContinuousBatching], precision: str, sampling: Sampling
) -> None:
    backend = backends(precision)
    assert backend.info.deterministic
    together = Run(backend)
    for key, ids in enumerate(prompts(20)):  # more than there are slots
        together.add(key, request(ids, sampling))
        if key % 3 == 0:
            together.step(2)
    together.end()
    for key, ids in enumerate(prompts(20)):
        assert generate(backend, request(ids, sampling)).ids() == together.ids(key)


@EXACT
def test_a_continued_reply_is_the_one_that_was_interrupted(
    backends: Callable[[str], ContinuousBatching], precision: str, sampling: Sampling
) -> None:
    backend = backends(precision)
    for ids in prompts(5):
        whole = generate(backend, request(ids, sampling)).ids()
        for cut in (1, 17, 39):
            resumed = generate(backend, request(ids, sampling), [whole[:cut]])
            assert resumed.ids() == whole[cut:]


def test_the_cache_of_beginnings_changes_nothing(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PENSTOCK_CACHE", str(tmp_path))
    plain = loaded(folder, prefix_caching="off")
    cached = loaded(folder, prefix_caching="on")
    for ids in prompts(6):
        expected = generate(plain, request(ids)).ids()
        assert generate(cached, request(ids)).ids() == expected
        assert generate(cached, request(ids)).ids() == expected  # from the cache now
        assert generate(cached, request([*ids, *expected[:33]], GREEDY)).ids()[:7] == expected[33:]


def test_a_full_cache_sends_sequences_back_without_a_trace(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, backend: ContinuousBatching
) -> None:
    monkeypatch.setenv("PENSTOCK_CACHE", str(tmp_path))
    block = 2 * 2 * 32 * 16 * 4 * 2  # keys and values, layers, tokens, size, bytes, heads
    small = loaded(folder, cache_gb=block * 9 / 1e9)  # one context of 8 blocks fits, and a bit
    assert small._network.blocks < 12
    sampling = Sampling(max_tokens=120, temperature=0, ignore_eos=True)
    together = Run(small)
    for key, ids in enumerate(prompts(8)):
        together.add(key, request(ids, sampling))
    together.end()
    for key, ids in enumerate(prompts(8)):
        assert together.ids(key) == generate(backend, request(ids, sampling)).ids()
    assert small._pool.available == small._network.blocks


# ------------------------------------------------------------------------------------------ what is shared

BLOCK = 32
SHORT = Sampling(max_tokens=3, temperature=0, ignore_eos=True)


def tokens(count: int, seed: int) -> list[int]:
    return np.random.default_rng(seed).integers(4, 300, count).tolist()


@pytest.fixture
def computed(backend: ContinuousBatching, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many tokens each run of the network computed."""
    counts: list[int] = []
    run = backend._network.run

    def counting(**inputs: Any) -> Any:
        counts.append(len(inputs["input_ids"]))
        return run(**inputs)

    monkeypatch.setattr(backend._network, "run", counting)
    return counts


def cached(run: Run, key: int = 0) -> int:
    """What is told of the prompt's cached tokens, once."""
    assert [
        output.cached_tokens for output in run.outputs[key] if output.prompt_tokens is None and output.cached_tokens
    ] == []
    [told] = [output.cached_tokens for output in run.outputs[key] if output.prompt_tokens is not None]
    return told


@pytest.mark.parametrize(
    ("length", "expected"), [(100, 96), (96, 64), (97, 96), (33, 32), (32, 0), (5, 0)], ids=lambda value: str(value)
)
def test_a_prompt_that_was_there_is_cached_but_for_its_last_token(
    backend: ContinuousBatching, computed: list[int], length: int, expected: int
) -> None:
    prompt = tokens(length, seed=length)
    assert cached(generate(backend, request(prompt, SHORT))) == 0
    computed.clear()
    assert cached(generate(backend, request(prompt, SHORT))) == expected
    assert sum(computed) == length - expected + 2


def test_prompts_that_begin_alike_share_their_beginning(backend: ContinuousBatching, computed: list[int]) -> None:
    common = tokens(80, seed=1)
    generate(backend, request([*common, *tokens(30, seed=2)], SHORT))
    computed.clear()
    assert cached(generate(backend, request([*common, *tokens(25, seed=3)], SHORT))) == 64
    assert computed[0] == 105 - 64


def test_a_prompt_is_shared_as_soon_as_it_is_computed(backend: ContinuousBatching, computed: list[int]) -> None:
    common = tokens(70, seed=4)
    run = Run(backend)
    run.add(1, request([*common, 5], GREEDY))
    run.step()
    run.add(2, request([*common, 6], GREEDY))
    run.step()
    assert computed == [71, 1 + 71 - 64]
    run.end()
    assert (cached(run, 1), cached(run, 2)) == (0, 64)


def test_prompts_that_come_together_compute_their_beginning_once(
    backend: ContinuousBatching, computed: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also one that is longer than what a step computes."""
    monkeypatch.setattr(backend, "_step_tokens", 100)
    common = tokens(150, seed=5)
    run = Run(backend)
    for key in range(4):
        run.add(key, request([*common, 7 + key], SHORT))
    run.end()
    assert computed == [100, 51, 1 + 3 * (151 - 128), 4, 3]
    assert [cached(run, key) for key in range(4)] == [0, 128, 128, 128]
    for key in range(4):
        assert run.ids(key) == generate(backend, request([*common, 7 + key], SHORT)).ids()


def test_only_who_shares_a_beginning_waits_for_it(backend: ContinuousBatching, computed: list[int]) -> None:
    common = tokens(40, seed=6)
    run = Run(backend)
    for key in range(3):
        run.add(key, request([*common, 7 + key], SHORT))
    run.add(9, request(tokens(50, seed=7), SHORT))
    run.end()
    assert computed == [41 + 50, 2 + 2 * (41 - 32), 4, 2]
    assert [cached(run, key) for key in (0, 1, 2, 9)] == [0, 32, 32, 0]


def test_without_sharing_nobody_waits(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PENSTOCK_CACHE", str(tmp_path))
    run = Run(loaded(folder, prefix_caching="off"))
    for key in range(3):
        run.add(key, request(tokens(100, seed=40), SHORT))
    run.step()
    assert all(run.outputs[key] for key in range(3))
    run.end()
    assert [cached(run, key) for key in range(3)] == [0, 0, 0]


def test_choices_share_their_prompt_and_count_it_once(backend: ContinuousBatching, computed: list[int]) -> None:
    prompt = tokens(100, seed=8)
    first = generate(backend, request(prompt, SHORT, n=4))
    assert cached(first) == 0
    assert sum(computed) == 100 + 3 * 4 + 4 * 2
    assert cached(generate(backend, request(prompt, SHORT, n=4))) == 96


def test_a_reply_is_not_counted_as_cached(backend: ContinuousBatching) -> None:
    """Of an attempt that goes on with what is logged, which the cache may know as well."""
    prompt = tokens(40, seed=9)
    whole = generate(backend, request(prompt)).ids()
    assert cached(generate(backend, request(prompt), [whole[:30]])) == 40


def test_a_sequence_that_was_sent_back_tells_what_was_cached_at_first(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PENSTOCK_CACHE", str(tmp_path))
    block = 2 * 2 * BLOCK * 16 * 4 * 2
    small = loaded(folder, cache_gb=block * 9 / 1e9)
    run = Run(small)
    for key in range(3):
        run.add(key, request(tokens(50, seed=20 + key), Sampling(max_tokens=120, temperature=0, ignore_eos=True)))
    run.end()
    assert [cached(run, key) for key in range(3)] == [0, 0, 0]


def test_what_is_shared_takes_no_place_twice(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PENSTOCK_CACHE", str(tmp_path))
    block = 2 * 2 * BLOCK * 16 * 4 * 2
    small = loaded(folder, cache_gb=block * 9 / 1e9)
    common = tokens(6 * BLOCK, seed=30)
    run = Run(small)
    run.add(0, request([*common, 5], SHORT))
    run.step()
    run.add(1, request([*common, 6], SHORT))
    run.step()
    assert run.outputs[1], "it runs beside the first, whose blocks it has"
    run.end()
    assert small._pool.available == small._network.blocks


# ------------------------------------------------------------------------------------------ drawing


def test_a_seed_repeats_and_its_absence_does_not(backend: ContinuousBatching) -> None:
    hot = Sampling(max_tokens=20, temperature=2.0, ignore_eos=True)
    seeded = Sampling(max_tokens=20, temperature=2.0, ignore_eos=True, seed=1)
    assert generate(backend, request(sampling=seeded)).ids() == generate(backend, request(sampling=seeded)).ids()
    assert generate(backend, request(sampling=hot)).ids() != generate(backend, request(sampling=hot)).ids()


# ------------------------------------------------------------------------------------------ outputs


def test_the_first_output_counts_the_prompt_and_the_last_one_finishes(backend: ContinuousBatching) -> None:
    outputs = generate(backend).outputs[0]
    assert [output.prompt_tokens for output in outputs] == [3] + [None] * 39
    assert [output.finish is not None for output in outputs] == [False] * 39 + [True]
    assert all(len(output.ids) == len(output.texts) == 1 for output in outputs)
    assert outputs[-1].finish is not None
    assert outputs[-1].finish.finish_reasons == ("length",)


def test_text_is_what_decoding_the_ids_gives(backend: ContinuousBatching) -> None:
    for ids in prompts(5):
        run = generate(backend, request(ids))
        assert run.text() == backend._text.tokenizer.decode(run.ids())


def test_choices_are_generated_together_and_told_apart(backend: ContinuousBatching) -> None:
    sampling = Sampling(max_tokens=10, temperature=2.0, seed=5, ignore_eos=True)
    run = generate(backend, request(sampling=sampling, n=3))
    assert run.reasons() == ("length",) * 3
    choices = [run.ids(choice=choice) for choice in range(3)]
    assert [len(ids) for ids in choices] == [10] * 3
    assert choices[0] != choices[1] != choices[2]
    assert generate(backend, request(sampling=sampling)).ids() == choices[0]
    # Continued where each choice was.
    resumed = generate(backend, request(sampling=sampling, n=3), [choices[0][:4], choices[1], choices[2][:9]])
    assert resumed.ids(choice=0) == choices[0][4:]
    assert resumed.ids(choice=1) == []
    assert resumed.ids(choice=2) == choices[2][9:]
    assert resumed.reasons() == ("length",) * 3


def test_an_end_token_ends_the_reply(backend: ContinuousBatching) -> None:
    sampling = Sampling(max_tokens=10, temperature=0, logit_bias={3: 100.0})
    run = generate(backend, request(sampling=sampling))
    assert (run.ids(), run.text(), run.reasons()) == ([3], "", ("stop",))


def test_a_stop_string_ends_the_reply_before_it(backend: ContinuousBatching) -> None:
    whole = generate(backend).text()
    stop = whole[5:8]
    run = generate(backend, request(sampling=Sampling(max_tokens=40, temperature=0, ignore_eos=True, stop=(stop,))))
    assert run.text() == whole[: whole.index(stop)]
    assert run.reasons() == ("stop",)


def test_a_prefix_that_was_complete_is_only_finished(backend: ContinuousBatching) -> None:
    whole = generate(backend).ids()
    run = generate(backend, request(), [whole])
    assert run.ids() == []
    assert run.reasons() == ("length",)
    assert run.outputs[0][0].prompt_tokens == 3


def test_logprobs_of_the_token_and_of_alternatives(backend: ContinuousBatching) -> None:
    sampling = Sampling(max_tokens=3, temperature=0, ignore_eos=True, logprobs=4)
    for output in generate(backend, request(sampling=sampling)).outputs[0]:
        assert output.logprobs is not None
        logprob = output.logprobs[0]
        assert logprob is not None
        assert [top.logprob for top in logprob.top] == sorted((top.logprob for top in logprob.top), reverse=True)
        assert (logprob.top[0].id, logprob.top[0].logprob) == (output.ids[0], logprob.logprob)
        assert len(logprob.top) == 4
    assert generate(backend).outputs[0][0].logprobs is None


def test_messages_go_through_the_chat_template(backend: ContinuousBatching) -> None:
    run = generate(backend, Request("tiny", messages=(Message("user", "the mill"),), sampling=GREEDY))
    assert run.outputs[0][0].prompt_tokens == 4 + len(backend._text.tokenizer.encode("the mill").ids)


# ------------------------------------------------------------------------------------------ limits and ends


def test_max_tokens_is_cut_to_the_room_in_the_context(backend: ContinuousBatching) -> None:
    run = generate(backend, request([5] * 250, GREEDY))
    assert len(run.ids()) == 6
    assert run.reasons() == ("length",)


@pytest.mark.parametrize(
    ("asked", "error"),
    [
        (request([5] * 256), ContextLengthExceeded),
        (request([100_000]), InvalidRequest),
        (request(sampling=Sampling(logit_bias={100_000: 1.0})), InvalidRequest),
    ],
)
def test_what_is_refused_leaves_nothing_behind(
    backend: ContinuousBatching, asked: Request, error: type[Exception]
) -> None:
    with pytest.raises(error):
        backend.add(1, asked, [Prefix()], 1)
    assert not backend.busy


def test_an_aborted_request_is_silent_and_frees_its_place(backend: ContinuousBatching) -> None:
    run = Run(backend)
    for key in range(12):  # running, prefilling and waiting ones
        run.add(key, request(prompts(12)[key], SAMPLED, n=2 if key == 2 else 1))
    run.step(3)
    seen = {key: len(outputs) for key, outputs in run.outputs.items()}
    for key in (0, 2, 5, 11, 99):
        backend.abort(key)
    run.end()
    assert {key: len(run.outputs[key]) for key in (0, 2, 5, 11)} == {key: seen[key] for key in (0, 2, 5, 11)}
    assert run.reasons(1) == ("length",)
    assert sorted(backend._free_slots) == list(range(8))
    assert backend._pool.available == backend._network.blocks


def test_abort_before_a_finished_prefix_is_reported(backend: ContinuousBatching) -> None:
    run = Run(backend)
    run.add(0, request(), [generate(backend).ids()])
    backend.abort(0)
    assert not backend.busy
    assert backend.step() == []


# ------------------------------------------------------------------------------------------ loading


def test_what_the_engine_says_of_the_model(backend: ContinuousBatching) -> None:
    info = backend.info
    assert (info.name, info.engine, info.context_length, info.precision) == ("tiny", "openvino", 256, "f32")
    assert info.deterministic
    assert info.chat
    assert info.unsupported == ()


def test_the_fast_precision_works(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PENSTOCK_CACHE", str(tmp_path))
    fast = loaded(folder, precision="fast")
    assert not fast.info.deterministic
    assert len(generate(fast).ids()) == 40


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"precison": "f32"}, "did you mean 'precision'"),
        ({"zzz": "1"}, "it has .*precision, device"),
        ({"precision": "f64"}, "int4, int4-fast or auto"),
        ({"slots": "many"}, "number"),
        ({"slots": "0"}, "at least 1"),
        ({"prefix_caching": "maybe"}, "on or off"),
        ({"cache_gb": "0.000001"}, "raise the option cache_gb"),
        ({"device": "TPU"}, "TPU"),
    ],
)
def test_options_are_read_strictly(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, str], words: str
) -> None:
    monkeypatch.setenv("PENSTOCK_CACHE", str(tmp_path))
    with pytest.raises(ModelLoadError, match=words):
        loaded(folder, **options)


@pytest.mark.parametrize("template", [b"{% for %}", b"{{ '\xff' }}{% generation %}", b"{{ messages | nobody }}"])
def test_a_folder_whose_chat_template_cannot_be_read_completes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, template: bytes
) -> None:
    monkeypatch.setenv("PENSTOCK_CACHE", str(tmp_path / "cache"))
    folder = tiny.llama(tmp_path / "tiny")
    (folder / "chat_template.jinja").write_bytes(template)
    backend = loaded(folder)
    assert (backend.info.chat, "cannot be read" in backend.info.no_chat) == (False, True)
    assert generate(backend, request(sampling=Sampling(max_tokens=3, ignore_eos=True)))


def test_an_exported_longrope_is_served_where_all_texts_have_the_same(folder: Path, tmp_path: Path) -> None:
    exported = tmp_path / "exported"
    shutil.copytree(resolve("tiny", str(folder), lambda what, fraction: None, cache=tmp_path / "cache").text, exported)
    config = json.loads((exported / "config.json").read_text())
    factors = {"short_factor": [1.0] * 8, "long_factor": [4.0] * 8}
    config |= {"rope_scaling": {"type": "longrope", **factors}, "original_max_position_embeddings": 64}
    (exported / "config.json").write_text(json.dumps(config))
    backend = loaded(exported)
    assert backend.info.context_length == 64
    with pytest.raises(ContextLengthExceeded):
        backend.add(1, request(range(64)), [Prefix()], 1)
