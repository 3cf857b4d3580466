"""Everything that can be measured starts: each target under two requests, each scenario, each command.

Figures are not looked at, only that every request was answered in full. The models are the bundled one under the names
of the benchmarks' own. What a target needs that is not installed is the reason why it is skipped, or, where Penstock's
own side can be asked all the same, what it has to complain of.
"""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from benchmarks.compare import Scenario, run_comparison, scenario_names
from benchmarks.load import Plan, run_load
from benchmarks.processes import TargetError
from benchmarks.scenarios import batch, cold_start, fairness
from benchmarks.targets import Running, Target, default_variables, fill, load_targets
from benchmarks.workload import Workload
from tests.support.gguf import convert

from penstock.models.catalogue import PACKAGED

TARGETS = load_targets()
SCENARIOS = {name: Scenario.load(name) for name in scenario_names()}
#: What each engine of Penstock that has to be installed besides imports.
LIBRARIES = {"transformers": "torch", "llama": "xllamacpp"}
LONG = pytest.mark.long


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `make models` makes, of one shape: the bundled model under its names."""
    folder = tmp_path_factory.mktemp("models")
    (folder / "S").symlink_to(PACKAGED / "millrace")
    for name, weights in (("S.gguf", "f32"), ("S-q8_0.gguf", "q8_0")):
        convert(PACKAGED / "millrace", folder / name, weights)
    return folder


def variables(models: Path, target: Target) -> dict[str, str]:
    """With the peers' environments where they are; else with our own where it has the engine's library."""
    found = default_variables() | {"models": str(models)}
    library = LIBRARIES.get(engine(target) or ("llama" if target.name.startswith("llama") else ""))
    if not library or not importlib.util.find_spec(library) or not target.missing(found):
        return found
    return found | {"torch_penstock": found["penstock"], "torch_python": found["python"]}


def engine(target: Target) -> str:
    """The engine of Penstock that *target* serves with, or an empty string."""
    words = [word for command in (*target.beside, target.command) for word in command]
    return words[words.index("--engine") + 1] if "--engine" in words and "serve" in words else ""


def load_of(target: Target, found: dict[str, str]) -> Scenario:
    """Two requests of the load that the target is measured under."""
    named = (scenario for scenario in SCENARIOS.values() if target.name in scenario.targets)
    workload = next(named, SCENARIOS["vs_engine"]).workload
    if workload.get("dialect", "completions") == "completions":
        # Without it chunks are counted, of which one may have two tokens on a busy machine.
        told = {"stream_options": {"include_usage": True}}
        workload = {**workload, "body": {**workload.get("body", {}), **told}}
    return Scenario("smoke", "", workload, [1], [target.name], requests=2, warmup=1, verify=True, variables=found)


#: One of each kind: the others are these with other options.
QUICK = frozenset({"backend", "penstock", "penstock-llama", "fleet", "canned", "penstock-upstream"})


@pytest.mark.parametrize("name", [pytest.param(name, marks=[] if name in QUICK else LONG) for name in TARGETS])
def test_a_target_starts_and_answers(name: str, models: Path) -> None:
    target = TARGETS[name]
    found = variables(models, target)
    scenario = load_of(target, found)
    started = found | {"port": "1", "upstream_port": "1", "data_dir": "d", "redis": "redis://127.0.0.1/0"}
    filled = fill([target.command, target.beside, target.env, target.model], started)
    assert not re.search(r"\{\w+\}", str(filled)), "a placeholder that nothing fills"
    why = target.missing(found)
    if why and engine(target):
        # Penstock's own side as far as it gets: it wants the engine's library, and nothing else is wrong with it.
        ours = [found["penstock"], *target.command[1:]]
        with (
            pytest.raises(TargetError, match=r"pip install|No module named"),
            Running(replace(target, command=ours), found),
        ):
            pass
    if why:
        pytest.skip(why)
    [result] = run_comparison(scenario, rounds=1).cells[name]["c=1"]
    assert (result.requests, result.errors, result.short_replies) == (2, {}, 0), result.samples
    assert result.tokens == 2 * scenario.cell_workload(0).max_tokens


@LONG
@pytest.mark.parametrize("arm", [*(("batch", arm) for arm in batch.ARMS), *(("cold", arm) for arm in cold_start.ARMS)])
def test_the_servers_of_a_measurement_start_and_answer(arm: tuple[str, str], models: Path) -> None:
    module = batch if arm[0] == "batch" else cold_start
    target = replace(module.SERVER, command=[*module.SERVER.command, *module.ARMS[arm[1]]])
    with Running(target, default_variables() | {"models": str(models)}) as running:
        workload = SCENARIOS["vs_engine"].cell_workload(0)
        result = run_load(running.server(), replace(workload, max_tokens=4), Plan(1, requests=1))
    assert (result.requests, result.errors) == (1, {}), result.samples


@pytest.mark.parametrize("name", SCENARIOS)
def test_a_scenario_names_what_there_is(name: str, models: Path) -> None:
    scenario = SCENARIOS[name]
    assert scenario.targets
    assert set(scenario.targets) <= set(TARGETS)
    assert scenario.baseline in ("", *scenario.targets)
    shapes = ["S"] if isinstance(scenario.requests, int) else list(scenario.requests)
    for shape in shapes:
        found = {**scenario.variables, "shape": shape}
        assert all(replace(scenario, variables=found).requests_at(level) > 0 for level in scenario.concurrency)
    # Its prompts can be made, with a tokenizer where it wants one.
    small = replace(scenario, variables=scenario.variables | {"models": str(models), "shape": "S"})
    assert len(small.cell_workload(0).prompt_list(2)) == 2


@pytest.mark.parametrize(
    "line",
    [
        "load --target canned --dialect completions --prompts ids -c 1 -n 2 --verify",
        "ceiling --events 64 --dialect chat -c 1 --burst 8",
        "compare vs_engine --rounds 1 -c 1 -n 2 --target backend --set models={models} --verify",
        "idle-connections --connections 3 --seconds 0.2",
        "slow-reader --target canned --dialect chat --rounds 1 -c 1 --duration 0.2 --lead 0",
        "broker --part append --blocks 1",
    ],
)
def test_a_command_runs_to_its_end(line: str, models: Path, tmp_path: Path) -> None:
    arguments = [*fill(line.split(), {"models": str(models)}), "--out", str(tmp_path / "out")]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", *arguments], capture_output=True, text=True, timeout=100, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "out.json").exists()


@LONG
def test_fairness_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fairness, "TENANTS", tuple(replace(tenant, jobs=100) for tenant in fairness.TENANTS))
    run = fairness.measure(default_variables() | {"rate": "5"}, fairness.WEIGHTS["unequal"], 1.0)
    assert all(run.samples.values())
    assert sum(samples[-1] for samples in run.samples.values()) > 0
    assert "Fairness" in fairness.markdown({"unequal": run})


def test_a_batch_is_measured(monkeypatch: pytest.MonkeyPatch, models: Path) -> None:
    monkeypatch.setattr(batch, "ARMS", {"batch": []})
    workload = Workload(dialect="chat", prompts="text", max_tokens=2)
    plan = Plan(rate=8, duration=0.5)
    turns = batch.measure(default_variables() | {"models": str(models)}, workload, plan, 1, lines=4, line_tokens=2)
    [turn] = turns["batch"]
    assert (turn.load.errors, turn.seconds > 0) == ({}, True)
    assert "A batch of 4 lines" in batch.markdown(turns, 1, 4)
