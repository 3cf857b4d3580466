"""What vLLM is asked and what it answers, recorded, so that the vllm engine is tested where there is no vLLM.

`SCENARIOS` are played against a backend. Recording plays them over the real vLLM and writes down every call to it,
every answer, and what the backend made of them (``recording.json``); `test_vllm.py` plays them
over that. To record anew, with the Python of an environment that has vLLM, from the repository root::

    python -m tests.unit.engines.vllm.recording
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from penstock.core.errors import PenstockError
from penstock.core.events import Prefix
from penstock.core.job import Message, Request, ResponseFormat, Sampling
from penstock.core.ports import Output
from penstock.engines.vllm.engine import Core, Sampled, VLLMBackend

FILE = Path(__file__).parent / "recording.json"

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "kind": {"enum": ["fox", "owl"]},
        "tame": {"type": "boolean"},
    },
    "required": ["name", "kind", "tame"],
    "additionalProperties": False,
}


@dataclass(frozen=True)
class Add:
    """A request under *key*. ``behind``: the scenario whose reply it continues, and how many of its tokens are
    logged."""

    key: int
    request: Request
    behind: tuple[str, int] | None = None


@dataclass(frozen=True)
class Abort:
    key: int


@dataclass(frozen=True)
class Steps:
    """Step until *count* steps have brought something, or (None) until nothing runs."""

    count: int | None = None


def request(prompt: str | None = "Once upon a time", **given: Any) -> Request:
    """Greedy, 24 tokens, whatever the end token says; *given* are fields of `Request` and `Sampling`."""
    fields = {name: given.pop(name) for name in ("n", "messages", "prompt_ids", "response_format") if name in given}
    sampling = Sampling(**{"max_tokens": 24, "temperature": 0.0, "ignore_eos": True, **given})
    if "messages" in fields or "prompt_ids" in fields:
        prompt = None
    return Request("millrace", prompt=prompt, sampling=sampling, **fields)


PENALIZED = {"presence_penalty": 1.0, "frequency_penalty": 1.5, "repetition_penalty": 1.1, "max_tokens": 40}
GUIDED = {"response_format": ResponseFormat("json_schema", SCHEMA), "max_tokens": 80, "ignore_eos": False}

SCENARIOS: dict[str, list[Add | Abort | Steps]] = {
    "greedy": [Add(1, request()), Steps()],
    "greedy, resumed": [Add(1, request(), ("greedy", 7)), Steps()],
    "resumed behind its last token": [Add(1, request(), ("greedy", 24)), Steps()],
    "chat until the end token": [
        Add(1, request(messages=(Message("user", "What is a river?"),), max_tokens=200, ignore_eos=False)),
        Steps(),
    ],
    "stop string": [Add(1, request(stop=("old",), max_tokens=40)), Steps()],
    "three sampled choices": [Add(1, request(n=3, temperature=0.9, top_p=0.9, top_k=20, min_p=0.01, seed=11)), Steps()],
    "three sampled choices, resumed": [
        Add(1, request(n=3, temperature=0.9, top_p=0.9, top_k=20, min_p=0.01, seed=11), ("three sampled choices", 10)),
        Steps(),
    ],
    "penalties": [Add(1, request(**PENALIZED)), Steps()],
    "penalties, resumed": [Add(1, request(**PENALIZED), ("penalties", 15)), Steps()],
    "bias and logprobs": [Add(1, request(logit_bias={42: 100.0}, logprobs=2, max_tokens=3)), Steps()],
    "logprobs of the chosen alone": [Add(1, request(logprobs=0, max_tokens=3)), Steps()],
    "a batch, one of it aborted": [
        Add(1, request(max_tokens=12)),
        Add(2, request("Rain", max_tokens=50)),
        Steps(3),
        Abort(2),
        Add(3, request(prompt_ids=(5, 6, 7, 8, 9), max_tokens=4)),
        Steps(),
    ],
    "JSON": [Add(1, request(**GUIDED)), Steps()],
    "JSON, resumed": [Add(1, request(**GUIDED), ("JSON", 6)), Steps()],
    "JSON whose beginning breaks the schema": [Add(1, request(**GUIDED), ("greedy", 3)), Steps()],
    "a schema that vLLM refuses": [
        Add(1, request(response_format=ResponseFormat("json_schema", {"type": "string", "pattern": "(?<=a)b"}))),
        Steps(),
    ],
    "a prompt without room": [Add(1, request(prompt_ids=(7,) * 2000)), Steps()],
}


@dataclass
class Played:
    """``refusal``: the code of the error that the last `Add` met."""

    outputs: list[Output] = field(default_factory=list)
    refusal: str | None = None


def play(backend: VLLMBackend, actions: list[Add | Abort | Steps], earlier: dict[str, Played]) -> Played:
    """Do *actions*; *earlier* are the scenarios that they may continue."""
    played = Played()
    for action in actions:
        match action:
            case Add(key, request, behind):
                prefixes = [Prefix([], []) for _ in range(request.n)]
                if behind is not None:
                    prefixes = logged(earlier[behind[0]].outputs, request.n, behind[1])
                try:
                    backend.add(key, request, prefixes, 1 if behind is None else 2)
                except PenstockError as error:
                    played.refusal = error.code
            case Abort(key):
                backend.abort(key)
            case Steps(count):
                brought = 0
                while backend.busy and brought != count:
                    outputs = backend.step()
                    played.outputs += outputs
                    brought += bool(outputs)
    return played


def logged(outputs: list[Output], n: int, count: int) -> list[Prefix]:
    """The first *count* tokens of every choice of what key 1 produced."""
    prefixes = [Prefix([], []) for _ in range(n)]
    for output in outputs:
        for token, text, choice in zip(output.ids, output.texts, output.choices or [0] * len(output.ids), strict=True):
            if len(prefixes[choice].ids) < count:
                prefixes[choice].ids.append(token)
                prefixes[choice].texts.append(text)
    return prefixes


class Recorder:
    """A `Core` that writes down what is asked and answered. Steps that brought nothing are left out."""

    def __init__(self, core: Core) -> None:
        self._core = core
        self.counts_prefix = core.counts_prefix
        self.calls: list[Any] = []

    def add(
        self, id: str, prompt: list[int], params: dict[str, Any], guide: Any, logged: int, adapter: int = 0
    ) -> None:
        call = ["add", id, prompt, params, guide, logged]
        try:
            self._core.add(id, prompt, params, guide, logged)
            self.calls.append([*call, None])
        except ValueError as error:
            self.calls.append([*call, str(error)])
            raise

    def abort(self, ids: list[str]) -> None:
        self.calls.append(["abort", ids])
        self._core.abort(ids)

    def step(self) -> list[Sampled]:
        sampled = self._core.step()
        if sampled:
            self.calls.append(["step", sampled])
        return sampled


def record() -> None:
    import vllm

    from penstock.engines.child.backend import load_backend

    given = {"dtype": "float32"}
    backend = load_backend("vllm", "millrace", None, given, lambda what, fraction: print(what, flush=True))
    core, scenarios, earlier = backend._core, {}, {}
    for name, actions in SCENARIOS.items():
        backend._core = recorder = Recorder(core)
        earlier[name] = played = play(backend, actions, earlier)
        scenarios[name] = {"calls": recorder.calls, "outputs": played.outputs, "refusal": played.refusal}
        print(name, repr("".join(text for output in played.outputs for text in output.texts)), flush=True)
    about = {"vllm": vllm.__version__, "info": backend.info, "counts_prefix": core.counts_prefix}
    FILE.parent.mkdir(exist_ok=True)
    lines = [
        f"{msgspec.json.encode(name).decode()}: {msgspec.json.encode(s).decode()}" for name, s in scenarios.items()
    ]
    head = msgspec.json.encode(about).decode()
    FILE.write_text(f'{{"about": {head}, "scenarios": {{\n' + ",\n".join(lines) + "\n}}\n")


if __name__ == "__main__":
    record()
