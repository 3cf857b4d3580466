"""Pairs of servers: which can be compared here, and what is said about them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from benchmarks import compare, pairs
from benchmarks.compare import Comparison, Scenario
from benchmarks.load import Result
from benchmarks.processes import TargetError
from benchmarks.stats import Spread, Times
from benchmarks.targets import Target, default_variables, fill, load_targets

TIMES = Times(1.0, 2.0, 3.0, 1.5)


def result(speed: float, label: str = "c=1") -> Result:
    return Result(label, 4, {}, 0, 1.0, 256, 256, 1.0, speed, 4.0, TIMES, TIMES, TIMES, [])


def scenario(**pairs_: list[str]) -> Scenario:
    return Scenario("t", "test", {}, [1], pairs=pairs_, variables={"models": "/nowhere", "shape": "S"})


@pytest.fixture
def comparison() -> Comparison:
    """Ours is always twice as fast as its peer of the same round, on a machine that gets slower."""
    found = Comparison(scenario(a=["theirs", "ours"], b=["other", "gone"]))
    for speed in (100.0, 50.0, 10.0):
        found.add("theirs", result(speed))
        found.add("ours", result(2 * speed))
        found.add("other", result(60.0))
    return found


def test_a_ratio_is_of_the_same_round(comparison: Comparison) -> None:
    assert pairs.ratios(comparison, "ours", "theirs", "c=1") == Spread(2.0, 2.0, 2.0)


def test_the_fastest_of_each_side_and_no_winner_where_ranges_overlap(comparison: Comparison) -> None:
    assert pairs.fastest(comparison, "c=1") == ("ours", "other")
    assert pairs.winner(comparison, "c=1") == "ours or other"
    comparison.cells["ours"]["c=1"] = [result(70.0)] * 3
    assert pairs.winner(comparison, "c=1") == "ours"
    comparison.add("alone", result(80.0))
    assert pairs.fastest(comparison, "c=1") == ("alone", "other"), "what is in no pair is ours"


def test_the_table_has_a_pair_with_both_sides_only(comparison: Comparison) -> None:
    comparison.failed["gone"] = "it\ndid not start"
    text = comparison.markdown()
    assert "| a: ours ÷ theirs" in text
    assert " 2 (2–2) |" in text
    assert "b: gone" not in text
    assert "- gone was left out: it did not start" in text


def test_what_is_not_installed_is_left_out_with_its_pair(tmp_path: Path) -> None:
    (tmp_path / "S.gguf").touch()
    catalogue = {
        "theirs": Target("theirs", ["sh", "{models}/{shape}.gguf"]),
        "ours": Target("ours", ["sh", "{shape}={models}/{shape}.gguf"]),
        "other": Target("other", ["/no/such/server"], peer="torch"),
        "modelless": Target("modelless", ["sh", "{shape}={models}/{shape}-q8_0.gguf"]),
    }
    whole = scenario(a=["theirs", "ours"], b=["other", "ours"])
    whole = replace(
        whole, targets=["theirs", "ours", "other", "modelless"], variables={"models": str(tmp_path), "shape": "S"}
    )
    here, absent = pairs.installed(whole, catalogue)
    assert (list(here.pairs), here.targets) == (["a"], ["theirs", "ours"])
    assert absent == [
        "other: no /no/such/server (`make peers PEERS=torch` sets it up)",
        f"modelless: no {tmp_path}/S-q8_0.gguf (`make models` makes them)",
    ]
    assert pairs.installed(whole, catalogue, ["b"])[0].pairs == {}


def test_a_target_that_does_not_start_ends_its_own_turns_only(monkeypatch: pytest.MonkeyPatch) -> None:
    catalogue = {"bad": Target("bad", ["/no/such/server"]), "worse": Target("worse", ["false"], ready_timeout=5)}
    monkeypatch.setattr(compare, "load_targets", lambda: catalogue)
    told: list[str] = []
    paired = replace(scenario(a=["bad", "worse"]), targets=["bad", "worse"])
    found = compare.run_comparison(paired, 2, fail=told.append)
    assert list(found.failed) == ["bad", "worse"]
    assert len(told) == 2
    assert "cannot start /no/such/server" in told[0]
    assert "worse exited with 1" in told[1]
    with pytest.raises(TargetError):
        compare.run_comparison(replace(paired, pairs={}), 1)


def test_the_scenario_of_the_peers_is_whole() -> None:
    catalogue, found = load_targets(), Scenario.load("peers")
    assert set(found.targets) <= catalogue.keys()
    assert {target for pair in found.pairs.values() for target in pair} < set(found.targets)
    for name in found.targets:
        command = fill(catalogue[name].command, default_variables() | {"port": "1", "data_dir": "d"})
        assert not [word for word in command if "{" in word], f"{name} has a placeholder that nothing fills"
    for shape in ("S", "M"):
        sized = replace(found, variables={"shape": shape})
        assert all(sized.requests_at(level) >= level for level in found.concurrency)
