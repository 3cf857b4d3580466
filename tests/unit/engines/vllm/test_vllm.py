"""The vllm engine over a recording of what vLLM answered (see `recording`), and what it refuses to load.

What the real vLLM does is tested by ``make test-vllm``.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest
from tests.unit.engines.vllm import recording
from tests.unit.engines.vllm.recording import SCENARIOS, Played, play

from penstock.core.errors import InvalidRequest, ModelLoadError
from penstock.core.events import Prefix
from penstock.core.job import Request, ResponseFormat, Sampling
from penstock.core.ports import ModelInfo, Output
from penstock.engines.child.backend import load_backend
from penstock.engines.options import parse
from penstock.engines.text.model import TextModel
from penstock.engines.vllm.engine import Sampled, VLLMBackend, _rank, sampling_params
from penstock.engines.vllm.options import VLLMOptions
from penstock.models.catalogue import PACKAGED

RECORDED = json.loads(recording.FILE.read_text())
SCENARIO_NAMES = list(RECORDED["scenarios"])


def plain(value: Any) -> Any:
    """As it looks after a way through JSON."""
    return json.loads(msgspec.json.encode(value))


class Recorded:
    """A `Core` that answers as vLLM did, and only to the calls that vLLM was asked."""

    def __init__(self, calls: list[Any]) -> None:
        self.counts_prefix: bool = RECORDED["about"]["counts_prefix"]
        self.left = list(calls)

    def _next(self, *asked: Any) -> list[Any]:
        assert self.left, f"vLLM was not asked {asked}"
        call: list[Any] = self.left.pop(0)
        assert plain(asked) == call[: len(asked)]
        return call[len(asked) :]

    def add(
        self, id: str, prompt: list[int], params: dict[str, Any], guide: Any, logged: int, adapter: int = 0
    ) -> None:
        (refusal,) = self._next("add", id, prompt, params, guide, logged)
        if refusal is not None:
            raise ValueError(refusal)

    def abort(self, ids: list[str]) -> None:
        self._next("abort", ids)

    def step(self) -> list[Sampled]:
        (sampled,) = self._next("step")
        return msgspec.convert(sampled, list[Sampled])


def backend(core: Recorded) -> VLLMBackend:
    info = msgspec.convert(RECORDED["about"]["info"], ModelInfo)
    text = TextModel.load(PACKAGED / "millrace")
    text.context_length, text.vocab_size = info.context_length, info.vocab_size
    made = VLLMBackend("millrace", text, core, 64, info.precision)
    assert made.info == msgspec.structs.replace(info, tool_format="hermes")
    return made


@pytest.fixture(scope="module")
def played() -> dict[str, Played]:
    """Every scenario, over the recording; each may continue those before it."""
    results: dict[str, Played] = {}
    for name, actions in SCENARIOS.items():
        core = Recorded(RECORDED["scenarios"][name]["calls"])
        engine = backend(core)
        results[name] = play(engine, actions, results)
        assert core.left == [], f"{name}: vLLM was asked more than it is now"
        assert not engine.busy
        assert not engine._running
    return results


def text_of(played: Played, key: int = 1, choice: int = 0) -> str:
    return "".join(
        text
        for output in played.outputs
        if output.key == key
        for text, c in zip(output.texts, output.choices or [0] * len(output.texts), strict=True)
        if c == choice
    )


def last(played: Played, key: int = 1) -> Output:
    return [output for output in played.outputs if output.key == key][-1]


def test_every_scenario_is_recorded() -> None:
    assert list(SCENARIOS) == SCENARIO_NAMES


@pytest.mark.parametrize(("cached", "expected"), [(3, 3), (9, 4)], ids=["of the prompt", "and of what is logged"])
def test_what_vllm_had_of_a_prompt_is_told_with_its_count(cached: int, expected: int) -> None:
    add, *steps = RECORDED["scenarios"]["greedy"]["calls"]
    steps = [["step", [[*sampled, cached] for sampled in step]] for _, step in steps]
    first, *others = play(backend(Recorded([add, *steps])), SCENARIOS["greedy"], {}).outputs
    assert (first.prompt_tokens, first.cached_tokens) == (4, expected)
    assert {output.cached_tokens for output in others} == {0}


@pytest.mark.parametrize("name", SCENARIO_NAMES)
def test_the_same_comes_of_it(played: dict[str, Played], name: str) -> None:
    recorded = RECORDED["scenarios"][name]
    assert played[name].outputs == msgspec.convert(recorded["outputs"], list[Output])
    assert played[name].refusal == recorded["refusal"]


def test_a_resume_goes_on_where_the_log_ends(played: dict[str, Played]) -> None:
    for name, cut in (("greedy", 7), ("penalties", 15)):
        (prefix,) = recording.logged(played[name].outputs, 1, cut)
        assert prefix.text + text_of(played[f"{name}, resumed"]) == text_of(played[name])
        assert last(played[f"{name}, resumed"]).finish == last(played[name]).finish
    end = played["resumed behind its last token"].outputs
    assert [(output.ids, output.finish) for output in end] == [([], last(played["greedy"]).finish)]


def test_replies_end_as_they_should(played: dict[str, Played]) -> None:
    def reasons(name: str) -> tuple[str, ...]:
        finish = last(played[name]).finish
        assert finish is not None
        return finish.finish_reasons

    assert reasons("chat until the end token") == ("stop",)
    assert text_of(played["chat until the end token"]).endswith(".")
    assert reasons("stop string") == ("stop",)
    assert "old" not in text_of(played["stop string"])
    assert text_of(played["greedy"]).startswith(text_of(played["stop string"]))
    assert reasons("three sampled choices") == ("length",) * 3
    texts = [text_of(played["three sampled choices"], choice=choice) for choice in range(3)]
    assert len(set(texts)) == 3


def test_a_json_reply_obeys_its_schema_also_when_it_is_resumed(played: dict[str, Played]) -> None:
    (prefix,) = recording.logged(played["JSON"].outputs, 1, 6)
    for text in (text_of(played["JSON"]), prefix.text + text_of(played["JSON, resumed"])):
        value = json.loads(text)
        assert set(value) == {"name", "kind", "tame"}
        assert value["kind"] in ("fox", "owl")
        assert isinstance(value["tame"], bool)


def test_a_beginning_that_breaks_the_schema_fails_for_good(played: dict[str, Played]) -> None:
    output = last(played["JSON whose beginning breaks the schema"])
    assert output.ids == []
    assert output.finish is not None
    assert output.finish.error is not None
    assert output.finish.error.code == "engine_error"
    assert not output.retryable


def test_logprobs_are_the_models_own_and_in_order(played: dict[str, Played]) -> None:
    entries = [entry for output in played["bias and logprobs"].outputs for entry in output.logprobs or []]
    assert len(entries) == 3
    for entry in entries:
        assert entry is not None
        assert [top.logprob for top in entry.top] == sorted((top.logprob for top in entry.top), reverse=True)
        assert [top.id for top in entry.top].index(42) == 2, "the biased token is not among the likely ones"
        assert (entry.text, entry.data, entry.logprob) == (entry.top[2].text, None, entry.top[2].logprob)
    alone = [entry for output in played["logprobs of the chosen alone"].outputs for entry in output.logprobs or []]
    assert [entry is not None and entry.top for entry in alone] == [()] * 3


def test_an_aborted_request_says_no_more_and_its_neighbours_end(played: dict[str, Played]) -> None:
    batch = played["a batch, one of it aborted"]
    assert sum(len(output.ids) for output in batch.outputs if output.key == 1) == 12
    assert sum(len(output.ids) for output in batch.outputs if output.key == 3) == 4
    assert last(batch, 2).finish is None


# ---------------------------------------------------------------------------------------------- what is asked


def params(prefix: int = 0, choice: int = 0, counts_prefix: bool = True, **sampling: Any) -> dict[str, Any]:
    request = Request("m", prompt="x", sampling=Sampling(**{"temperature": 1.0, **sampling}))
    return sampling_params(request, choice, 64, [7] * prefix, frozenset({2}), counts_prefix)


def test_a_seed_is_another_one_for_every_choice_and_every_resumption() -> None:
    seeds = [params(prefix, choice, seed=1)["seed"] for prefix in (0, 1, 2) for choice in (0, 1)]
    assert len(set(seeds)) == 6
    assert params(2, 1, seed=1)["seed"] == seeds[5], "and the same when it is asked again"
    assert "seed" not in params()


def test_penalties_go_to_vllm_unless_it_would_begin_anew_with_them() -> None:
    assert params(presence_penalty=1.0)["presence_penalty"] == 1.0
    resumed = params(3, presence_penalty=1.0, repetition_penalty=1.2)
    assert "presence_penalty" not in resumed
    assert resumed["extra_args"] == {"logged": 3, "presence_penalty": 1.0, "repetition_penalty": 1.2}
    assert params(3, repetition_penalty=1.2)["repetition_penalty"] == 1.2, "this one counts the prompt too"
    assert params(3, frequency_penalty=1.0, counts_prefix=False)["frequency_penalty"] == 1.0


def test_tokens_of_the_reply_are_asked_for_once() -> None:
    assert params(10)["max_tokens"] == 54


def test_what_vllm_gives_up_is_tried_again() -> None:
    core = Recorded(
        [
            ["add", "1-0", *RECORDED["scenarios"]["greedy"]["calls"][0][2:]],
            ["step", [["1-0", [], None, "error"]]],
        ]
    )
    engine = backend(core)
    result = play(engine, SCENARIOS["greedy"], {})
    assert last(result).retryable
    assert not engine.busy


def test_a_late_token_of_an_aborted_request_is_dropped() -> None:
    greedy = RECORDED["scenarios"]["greedy"]["calls"]
    core = Recorded(
        [greedy[0], greedy[1], ["abort", ["1-0"]], ["add", "2-0", *greedy[0][2:]], ["step", [["1-0", [9]]]]]
    )
    engine = backend(core)
    add = SCENARIOS["greedy"][0]
    assert isinstance(add, recording.Add)
    engine.add(1, add.request, [Prefix([], [])], 1)
    assert len(engine.step()) == 1
    engine.abort(1)
    engine.add(2, add.request, [Prefix([], [])], 1)
    assert engine.step() == []


# ---------------------------------------------------------------------------------------------- loading


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tensor_parallel": "2"}, "did you mean 'tensor_parallel_size'"),
        ({"trust_remote_code": "on"}, "no option 'trust_remote_code'"),
        ({"dtype": "int3"}, "dtype is auto, bfloat16"),
        ({"max_num_seqs": "many"}, "max_num_seqs is a whole number, at least 0, not 'many'"),
        ({"max_num_seqs": "-1"}, "max_num_seqs is a whole number, at least 0, not '-1'"),
        ({"gpu_memory_utilization": "90"}, "a number, at least 0 and at most 1, not '90'"),
        ({"tensor_parallel_size": "0"}, "at least 1"),
    ],
)
def test_options_are_checked(options: dict[str, str], message: str) -> None:
    with pytest.raises(ModelLoadError, match=message):
        parse(VLLMOptions, options, "vllm")


def test_weights_that_can_run_code_are_not_loaded(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ModelLoadError, match="safetensors"):
        load_backend("vllm", "m", str(tmp_path), {}, lambda what, fraction: None)
    with pytest.raises(ModelLoadError, match="no model folder"):
        load_backend("vllm", "m", str(tmp_path / "nothing"), {}, lambda what, fraction: None)


def test_where_vllm_is_missing_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)  # what an import of it then meets is an ImportError
    monkeypatch.setattr("penstock.engines.vllm.engine._prepare_environment", lambda: None)
    with pytest.raises(ModelLoadError, match=r"pip install 'penstock\[vllm\]'"):
        load_backend("vllm", "millrace", None, {}, lambda what, fraction: None)


def test_ends_and_bad_words_go_to_vllm() -> None:
    asked = params(min_tokens=10, stop_token_ids=(5, 9), bad_words=("oh", "no"))
    assert (asked["min_tokens"], asked["stop_token_ids"], asked["bad_words"]) == (10, [2, 5, 9], ["oh", "no"])
    assert params(4, min_tokens=10)["min_tokens"] == 6, "what is logged counts"
    assert "min_tokens" not in params(10, min_tokens=10)


@pytest.mark.parametrize(
    ("form", "guide"),
    [
        (ResponseFormat("json_object"), {"json": {"type": "object"}}),
        (ResponseFormat("regex", pattern="a+"), {"regex": "a+"}),
        (ResponseFormat("choice", choices=("a", "b")), {"choice": ["a", "b"]}),
        (ResponseFormat("grammar", grammar='start: "a"'), {"grammar": 'start: "a"'}),
    ],
)
def test_forms_go_to_vllm_in_its_words(form: ResponseFormat, guide: dict[str, Any]) -> None:
    core = Recorded([["add", "1-0", [5], None, guide, 0, None]])
    asked: list[Any] = []
    core.add = lambda id, prompt, params, guide, logged, adapter: asked.append(guide)  # type: ignore[method-assign]
    backend(core).add(1, Request("m", prompt_ids=(5,), response_format=form), [Prefix()], 1)
    assert asked == [guide]
    with pytest.raises(InvalidRequest, match="empty"):
        backend(core).add(2, Request("m", prompt_ids=(5,), response_format=ResponseFormat("choice")), [Prefix()], 1)


def test_a_request_for_an_adapter_is_one_of_vllms() -> None:
    asked: list[int] = []

    class Noted(Recorded):
        def add(self, *given: Any) -> None:
            asked.append(given[-1])

    text = TextModel.load(PACKAGED / "millrace")
    engine = VLLMBackend("base", text, Noted([]), 64, "float32", ("sql", "chat"))
    for key, model in enumerate(("base", "chat", "sql", "base")):
        engine.add(key, Request(model, prompt_ids=(5, 6)), [Prefix()], 1)
    assert asked == [0, 2, 1, 0]


def test_room_is_made_for_the_largest_rank(tmp_path: Path) -> None:
    for name, config in {"a": {"r": 8}, "b": {"r": 16, "rank_pattern": {"q_proj": 40}}, "c": {"r": 4096}}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "adapter_config.json").write_text(json.dumps(config))
    assert _rank([tmp_path / "a"]) == 8
    assert _rank([tmp_path / "a", tmp_path / "b"]) == 64
    with pytest.raises(ModelLoadError, match="512 at most, not 4096"):
        _rank([tmp_path / "c"])
