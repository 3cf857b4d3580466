"""Which models are loaded: the rules, one by one; and what must hold whatever comes, on a machine of numbers."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.core.job import Priority
from penstock.core.ports import ModelInfo, QueueStats, WorkerInfo
from penstock.worker.placement import (
    Action,
    Fail,
    KeepSpares,
    Load,
    Memory,
    ModelState,
    Phase,
    Policy,
    Refuse,
    Unload,
    Wait,
    plan,
    plan_start,
)

POLICY = Policy(swap_after=30, idle_unload=0)
NOW = 1000.0


def model(name: str, phase: Phase = Phase.UNLOADED, **facts: object) -> ModelState:
    """On demand, and up for long where it is up."""
    state = ModelState(
        name=name, id=f"worker-{name}", phase=phase, on_demand=True, need=100, least=100,
        ready_at=0.0 if phase in (Phase.READY, Phase.UNLOADING) else None,
    )  # fmt: skip
    return msgspec.structs.replace(state, **facts)


def ready(name: str, **facts: object) -> ModelState:
    return model(name, Phase.READY, **facts)


def queued(*names: str, workers: Sequence[WorkerInfo] = ()) -> QueueStats:
    """One job waits for each of *names*."""
    return QueueStats(depth=dict.fromkeys(((name, Priority.NORMAL) for name in names), 1), jobs={}, workers=[*workers])


def other(name: str, state: str, id: str = "other") -> WorkerInfo:
    return WorkerInfo(id=id, models=(ModelInfo(name=name, engine="x", context_length=1),), state=state)


def decide(
    models: Sequence[ModelState],
    queue: QueueStats | None = None,
    *,
    budget: int = 0,
    overhead: int = 0,
    now: float = NOW,
    policy: Policy = POLICY,
) -> list[Action]:
    return plan([each.seen(queue, now) for each in models], queue, Memory(budget, overhead), now, policy)


# ---------------------------------------------------------------------------------------------- moves


class TestMoves:
    def test_only_what_is_drawn(self) -> None:
        with pytest.raises(ValueError, match="a cannot go from unloaded to ready"):
            model("a").loaded(NOW)

    def test_a_load_that_fails_is_tried_again_after_growing_pauses_and_then_fails(self) -> None:
        state, pauses = model("a", requested=True), []
        while state.phase is not Phase.FAILED:
            state = state.loading(NOW).load_failed(NOW, POLICY)
            pauses.append(state.retry_at - NOW)
        assert pauses == [0.5, 1.0, 30.0]
        assert not state.requested
        assert state.failures == 0, "after its rest it has as many attempts as before"

    def test_one_of_the_start_has_one_attempt(self) -> None:
        state = model("a", required=True).loading(NOW)
        assert state.load_failed(NOW, POLICY).phase is Phase.FAILED
        once_up = state.loaded(NOW).to(Phase.UNLOADING).ended(Memory(), NOW, POLICY).loading(NOW)
        assert once_up.load_failed(NOW, POLICY).phase is Phase.UNLOADED

    def test_what_turned_out_too_large_fails_once_it_is_unloaded(self) -> None:
        leaving = model("a", Phase.UNLOADING, least=200)
        assert leaving.ended(Memory(199), NOW, POLICY).phase is Phase.FAILED
        assert leaving.ended(Memory(200), NOW, POLICY).phase is Phase.UNLOADED

    def test_since_when_it_waits(self) -> None:
        state = model("a").seen(queued("a"), NOW)
        assert state.seen(queued("a"), NOW + 9).waiting_since == NOW
        assert state.seen(None, NOW + 9).waiting_since == NOW, "a queue that cannot be seen says nothing"
        assert state.seen(queued("b"), NOW + 9).waiting_since is None
        assert state.loading(NOW + 9).waiting_since is None
        assert ready("a").seen(queued("a"), NOW).waiting_since is None


# ---------------------------------------------------------------------------------------------- who is loaded


class TestDemand:
    def test_it_is_loaded_when_a_job_waits_for_it(self) -> None:
        assert decide([model("a"), model("b")], queued("b")) == [Load("b")]
        assert decide([model("a"), model("b")], queued()) == []

    def test_it_is_loaded_when_a_job_waits_for_an_adapter_of_it(self) -> None:
        state = model("a", adapters=("a-sql", "a-chat"))
        assert decide([state], queued("a-chat")) == [Load("a")]
        assert decide([state], queued("b")) == []

    def test_it_is_loaded_when_its_operator_says_so_even_if_the_queue_cannot_be_seen(self) -> None:
        assert decide([model("a", requested=True)]) == [Load("a")]

    def test_an_idle_one_is_unloaded_after_a_while(self) -> None:
        policy = Policy(idle_unload=10)
        assert decide([ready("a", used_at=NOW - 11)], policy=policy) == [Unload("a")]
        for stays in (
            ready("a", used_at=NOW - 9),
            ready("a", used_at=NOW - 11, ready_at=NOW - 9),
            ready("a", used_at=NOW - 11, busy=True),
            ready("a", used_at=NOW - 11, on_demand=False),
            model("a", Phase.LOADING, used_at=NOW - 11),
        ):
            assert decide([stays], policy=policy) == []
        assert decide([ready("a", used_at=NOW - 11), model("b")], queued("a"), policy=policy) == []
        assert decide([ready("a", used_at=0)]) == [], "0 is never"

    def test_jobs_are_left_to_a_worker_that_has_the_model(self) -> None:
        """But not for long: that one may be busy."""
        queue = queued("a", workers=[other("a", "ready")])
        waiting = model("a").seen(queue, NOW)
        assert decide([waiting], queue, now=NOW + 1.9) == []
        assert decide([waiting], queue, now=NOW + 2.1) == [Load("a")]
        asked_for = msgspec.structs.replace(waiting, requested=True)
        assert decide([asked_for], queue, now=NOW + 0.1) == [Load("a")], "its operator means this one"

    def test_jobs_are_left_to_a_worker_that_loads_the_model_as_long_as_it_does(self) -> None:
        loading, failed = (queued("a", workers=[other("a", state)]) for state in ("loading", "failed"))
        waiting = model("a").seen(loading, NOW)
        assert decide([waiting], loading, now=NOW + 119) == []
        assert decide([waiting], loading, now=NOW + 121) == [Load("a")]
        assert decide([waiting], failed, now=NOW + 3) == [Load("a")]

    def test_a_pause_begins_anew_when_another_worker_comes_up(self) -> None:
        waiting = model("a").seen(queued("a"), NOW)
        up = queued("a", workers=[other("a", "ready")])
        assert decide([waiting], up, now=NOW + 60) == []

    def test_of_several_workers_that_could_load_a_model_the_first_does(self) -> None:
        ids = ["worker-a", "worker-b", "worker-c"]
        for place, id in enumerate(ids):
            queue = queued("m", workers=[other("m", "unloaded", each) for each in ids])
            waiting = model("m", id=id).seen(queue, NOW)
            pause = 2 * POLICY.poll_interval * place
            assert decide([waiting], queue, now=NOW + pause + 0.01) == [Load("m")]
            if place:
                assert decide([waiting], queue, now=NOW + pause - 0.1) == []

    def test_between_two_attempts_to_load_it_there_is_a_pause(self) -> None:
        waiting = model("a", retry_at=NOW + 1)
        assert decide([waiting], queued("a")) == []
        assert decide([waiting], queued("a"), now=NOW + 1) == [Load("a")]

    def test_jobs_of_one_that_failed_are_refused_until_it_may_be_tried_again(self) -> None:
        failed = model("a", Phase.FAILED, retry_at=NOW + 30)
        assert decide([failed], queued("a")) == [Refuse("a")]
        assert decide([failed], queued()) == []
        assert decide([failed], queued("a"), now=NOW + 30) == [Load("a")]

    def test_they_are_left_to_a_worker_that_may_have_it(self) -> None:
        failed = model("a", Phase.FAILED, retry_at=NOW + 30)
        assert decide([failed], queued("a", workers=[other("a", "unloaded")])) == []
        assert decide([failed], queued("a", workers=[other("a", "failed")])) == [Refuse("a")]


# ---------------------------------------------------------------------------------------------- memory


class TestRoom:
    def test_what_fits_is_loaded_beside_the_others(self) -> None:
        models = [ready("a"), model("b")]
        assert decide(models, queued("b"), budget=200) == [Load("b")]
        assert decide(models, queued("b"), budget=200, overhead=1) == [Unload("a"), Wait("b", ("a",))]

    def test_two_that_do_not_fit_together_are_not_both_loaded(self) -> None:
        a, b = (model(name, waiting_since=since) for name, since in (("a", 2.0), ("b", 1.0)))
        assert decide([a, b], queued("a", "b"), budget=150) == [Load("b"), Wait("a", ("b",))]

    def test_the_least_recently_used_idle_model_makes_room(self) -> None:
        models = [ready("a", used_at=2), ready("b", used_at=1), ready("c", used_at=3), model("d")]
        assert decide(models, queued("d"), budget=300) == [Unload("b"), Wait("d", ("b", "a", "c"))]
        wide = [*models[:3], model("d", need=150)]
        assert decide(wide, queued("d"), budget=300)[:2] == [Unload("b"), Unload("a")]

    def test_what_is_about_to_be_free_is_waited_for(self) -> None:
        models = [model("a", Phase.UNLOADING), ready("b"), model("c")]
        assert decide(models, queued("c"), budget=200) == [Wait("c", ("a", "b"))]

    def test_nobody_is_unloaded_if_that_helps_nobody(self) -> None:
        models = [ready("a"), ready("b", busy=True), model("c", need=200)]
        assert decide(models, queued("c"), budget=200) == [Wait("c", ("a", "b"))]
        models = [ready("a"), ready("b", busy=True, ready_at=NOW), model("c", need=200, waiting_since=NOW - 30)]
        assert decide(models, queued("c"), budget=200) == [Wait("c", ("a", "b"))], "the idle one counts once"

    def test_spares_go_before_any_model_does(self) -> None:
        a = ready("a", used_at=2, spares=1, held_spares=1, wanted_spares=1)
        b = ready("b", used_at=1)
        assert decide([a, b, model("c")], queued("c"), budget=300)[:2] == [KeepSpares("a", 0), Load("c")]

    def test_a_busy_model_is_left_alone_until_others_have_waited_too_long(self) -> None:
        busy, waiting = ready("a", busy=True), model("b", waiting_since=NOW)
        for queue in (queued("b"), queued("a", "b")):
            assert decide([busy, waiting], queue, budget=100, now=NOW + 29) == [Wait("b", ("a",))]
            assert decide([busy, waiting], queue, budget=100, now=NOW + 30)[0] == Unload("a")
        assert decide([ready("a", ready_at=NOW), waiting], queued("a", "b"), budget=100, now=NOW + 29) == [
            Wait("b", ("a",))
        ], "it has jobs, if none of them runs yet"

    def test_it_has_its_own_turn_first(self) -> None:
        waiting = model("b", waiting_since=NOW)
        fresh = ready("a", busy=True, ready_at=NOW + 20)
        assert decide([fresh, waiting], queued("b"), budget=100, now=NOW + 49) == [Wait("b", ("a",))]
        assert decide([fresh, waiting], queued("b"), budget=100, now=NOW + 50)[0] == Unload("a")

    def test_of_busy_ones_the_one_goes_that_was_up_for_longest(self) -> None:
        models = [
            ready("a", busy=True, ready_at=2, used_at=1), ready("b", busy=True, ready_at=1, used_at=2),
            model("c", waiting_since=NOW - 30),
        ]  # fmt: skip
        assert decide(models, queued("c"), budget=200)[0] == Unload("b")

    def test_an_idle_one_goes_before_a_busy_one(self) -> None:
        models = [ready("a", busy=True, used_at=1), ready("b", used_at=2), model("c", waiting_since=NOW - 30)]
        assert decide(models, queued("c"), budget=200) == [Unload("b"), Wait("c", ("a", "b"))]

    def test_who_waits_for_longest_comes_first_and_before_all_whom_an_operator_asks_for(self) -> None:
        a, b = model("a", waiting_since=1), model("b", waiting_since=2)
        assert decide([b, a], queued("a", "b"), budget=100)[0] == Load("a")
        b = msgspec.structs.replace(b, requested=True)
        assert decide([a, b], queued("a", "b"), budget=100)[0] == Load("b")

    def test_small_ones_do_not_overtake_a_large_one_that_is_due(self) -> None:
        models = [
            ready("a", busy=True, ready_at=NOW - 5), model("large", need=200, waiting_since=NOW - 30),
            model("small", waiting_since=NOW - 1),
        ]  # fmt: skip
        queue = queued("a", "large", "small")
        assert Load("small") not in decide(models, queue, budget=200)
        early = decide(models, queue, budget=200, policy=Policy(swap_after=60))
        assert early == [Wait("large", ("a",)), Load("small")], "until then nobody gains if memory lies idle"

    def test_a_later_one_may_have_what_is_left_beside_a_room_that_is_being_made(self) -> None:
        models = [
            model("leaving", Phase.UNLOADING, need=200), model("large", need=200, waiting_since=1),
            model("small", waiting_since=2),
        ]  # fmt: skip
        queue = queued("large", "small")
        assert Load("small") in decide(models, queue, budget=300)
        assert Load("small") not in decide(models, queue, budget=299)

    def test_an_estimate_of_more_than_there_can_be_is_given_all_there_is(self) -> None:
        large = model("a", need=1000, least=100)
        assert decide([large, ready("b")], queued("a"), budget=500) == [Unload("b"), Wait("a", ("b",))]
        assert decide([large, model("b")], queued("a"), budget=500) == [Load("a")]

    def test_what_can_never_fit_fails_and_nobody_makes_room_in_vain(self) -> None:
        assert decide([ready("a"), model("b", least=201, need=300)], queued("b"), budget=200) == [
            Fail("b"),
            Refuse("b"),
        ]

    def test_who_grew_beyond_the_budget_has_spares_and_idle_models_ended(self) -> None:
        grown = ready("a", need=250, busy=True)
        spare = ready("b", spares=1, held_spares=1, wanted_spares=1)
        assert decide([grown, spare], budget=400)[:1] == [KeepSpares("b", 0)]
        assert Unload("b") not in decide([grown, spare], budget=400)
        assert Unload("b") in decide([grown, spare], budget=300)
        assert decide([grown], budget=200) == [], "a busy one is left alone"


class TestSpares:
    def test_they_are_held_as_far_as_there_is_room(self) -> None:
        a = ready("a", wanted_spares=3)
        assert decide([a]) == [KeepSpares("a", 3)]
        assert decide([a], budget=300) == [KeepSpares("a", 2)]
        assert decide([a], budget=199) == [KeepSpares("a", 0)]

    def test_two_models_do_not_count_on_the_same_room(self) -> None:
        models = [ready(name, wanted_spares=1) for name in "ab"]
        assert decide(models, budget=300) == [KeepSpares("a", 1), KeepSpares("b", 0)]

    def test_no_more_of_them_are_loaded_while_a_model_waits(self) -> None:
        spared = ready("a", wanted_spares=2, spares=1, held_spares=1)
        models = [spared, ready("b", busy=True), model("c", need=150)]
        assert KeepSpares("a", 2) not in decide(models, queued("c"), budget=1000)
        assert decide(models, queued("c"), budget=1000) == [Load("c"), KeepSpares("a", 1)]
        assert decide([model("a", Phase.LOADING, wanted_spares=1)]) == [KeepSpares("a", 0)]

    def test_one_of_a_model_on_demand_needs_no_more_room(self) -> None:
        assert decide([model("a", wanted_spares=1)], queued(), budget=100) == [KeepSpares("a", 1)]
        spared = model("a", wanted_spares=1, spares=1, held_spares=1)
        assert decide([spared, ready("b")], queued("a"), budget=200) == [Load("a")]

    def test_one_that_is_taken_counts_once(self) -> None:
        taking = model("a", wanted_spares=1, spares=1, held_spares=1).loading(NOW)
        assert decide([taking], budget=100) == [KeepSpares("a", 1)], "it is not ended under the load that takes it"
        assert decide([taking, model("b")], queued("b"), budget=200) == [Load("b"), KeepSpares("a", 1)]
        assert KeepSpares("a", 0) not in decide([taking, model("b")], queued("b"), budget=100)

    def test_one_that_is_ready_while_its_model_is_loaded_anew_counts_beside_it(self) -> None:
        loading = msgspec.structs.replace(model("a").loading(NOW), wanted_spares=1, spares=1, held_spares=1)
        assert decide([loading, model("b")], queued("b"), budget=200) == [KeepSpares("a", 0), Load("b")]

    def test_there_are_none_of_who_gave_its_memory_back_failed_or_has_not_been_up_at_the_start(self) -> None:
        for state in (
            model("a", emptied=True),
            model("a", Phase.FAILED),
            model("a", Phase.LOADING, on_demand=False, required=True),
        ):
            assert decide([msgspec.structs.replace(state, wanted_spares=1)], queued()) == [KeepSpares("a", 0)]


class TestStart:
    def test_in_their_order_what_fits_is_loaded_and_the_rest_is_left_for_later(self) -> None:
        models = [model(name, required=True, need=need) for name, need in (("a", 100), ("b", 150), ("c", 100))]
        assert plan_start(models, Memory(200)) == [Load("a"), Load("c")]
        assert plan_start(models, Memory()) == [Load("a"), Load("b"), Load("c")]

    def test_models_on_demand_are_not(self) -> None:
        assert plan_start([model("a")], Memory()) == []

    def test_it_ends_with_what_can_never_fit(self) -> None:
        models = [model(name, required=True, least=least) for name, least in (("a", 100), ("b", 201), ("c", 100))]
        assert plan_start(models, Memory(200)) == [Load("a"), Fail("b")]


# ---------------------------------------------------------------------------------------------- whatever comes


class Machine:
    """What the manager and its processes do, in seconds that are steps."""

    def __init__(self, needs: Sequence[int], spares: Sequence[int], *, budget: int, load: int, drain: int) -> None:
        self.now = 0.0
        self.memory = Memory(budget)
        self.policy = Policy(swap_after=10, poll_interval=0.5)
        self.load_time, self.drain_time = load, drain
        self.models = {
            name: model(name, need=need, least=need, wanted_spares=count)
            for name, need, count in zip("abcdef", needs, spares, strict=False)
        }
        self.kept = dict.fromkeys(self.models, 0)
        self.taken_at = dict.fromkeys(self.models, -9.0)
        self.done_at: dict[str, float] = {}

    def step(self, wanted: set[str]) -> list[Action]:
        """A second in which jobs wait for the models *wanted*, or run there."""
        self._advance()
        queue = queued(*wanted)
        for name, state in self.models.items():
            busy = state.phase is Phase.READY and name in wanted
            used_at = self.now if busy else state.used_at
            self.models[name] = msgspec.structs.replace(state, busy=busy, used_at=used_at).seen(queue, self.now)
        before = dict(self.models)
        actions = plan(list(before.values()), queue, self.memory, self.now, self.policy)
        for action in actions:
            self._do(action)
        self._check(before, actions)
        self.now += 1
        return actions

    def _do(self, action: Action) -> None:
        state = self.models[action.model]
        match action:
            case Load(name) if state.spares:
                taken = state.loading(self.now).loaded(self.now)
                self._set(taken, spares=state.spares - 1, held_spares=state.held_spares - 1)
                self.taken_at[name] = self.now
            case Load(name):
                self.models[name] = state.loading(self.now)
                self.done_at[name] = self.now + self.load_time
            case Unload(name):
                self.models[name] = state.to(Phase.UNLOADING)
                self.done_at[name] = self.now + self.drain_time
            case KeepSpares(name, count):
                self.kept[name] = count
                self._set(state, spares=min(state.spares, count), held_spares=min(state.held_spares, count))
            case Wait():
                assert state.phase is Phase.UNLOADED
            case Fail() | Refuse():
                raise AssertionError("all of them fit by themselves")

    def _set(self, state: ModelState, **changes: int) -> None:
        self.models[state.name] = msgspec.structs.replace(state, **changes)

    def _advance(self) -> None:
        for name, state in self.models.items():
            if state.held_spares > state.spares:
                self._set(state, spares=state.held_spares)
            elif state.held_spares < self.kept[name] and self.now - self.taken_at[name] >= 2:  # `standby.SETTLE`
                self._set(state, held_spares=state.held_spares + 1)
        for name in [name for name, at in self.done_at.items() if at <= self.now]:
            del self.done_at[name]
            state = self.models[name]
            loaded = state.phase is Phase.LOADING
            self.models[name] = state.loaded(self.now) if loaded else state.ended(self.memory, self.now, self.policy)

    def _check(self, before: dict[str, ModelState], actions: list[Action]) -> None:
        held = sum(state.need * (state.held_spares + state.phase.loaded) for state in self.models.values())
        assert held <= self.memory.budget, "the budget holds at every moment"
        waits = [state.waiting_since for state in before.values() if state.waiting_since is not None]
        due = any(self.now - since >= self.policy.swap_after for since in waits)
        for action in actions:
            if isinstance(action, Unload):
                victim = before[action.model]
                assert waits, "nobody is unloaded for nothing"
                if victim.busy:
                    assert due
                    assert self.now - (victim.ready_at or 0.0) >= self.policy.swap_after


@st.composite
def machines(draw: st.DrawFn) -> Machine:
    needs = draw(st.lists(st.integers(1, 10), min_size=2, max_size=5))
    spares = draw(st.lists(st.integers(0, 2), min_size=len(needs), max_size=len(needs)))
    budget = draw(st.integers(max(needs), sum(needs) + 5))
    return Machine(needs, spares, budget=budget, load=draw(st.integers(1, 8)), drain=draw(st.integers(1, 3)))


@given(machines(), st.data())
def test_whatever_is_wanted_the_budget_holds_and_nobody_makes_room_for_nothing(
    machine: Machine, data: st.DataObject
) -> None:
    for _ in range(data.draw(st.integers(1, 12))):
        wanted = data.draw(st.sets(st.sampled_from(sorted(machine.models))))
        for _ in range(data.draw(st.sampled_from([1, 3, 12]))):
            machine.step(wanted)


@settings(max_examples=40)
@given(machines(), st.data())
def test_every_model_gets_its_turn(machine: Machine, data: st.DataObject) -> None:
    """However much the others are wanted: after as many turns as there are others at the most."""
    wanted = data.draw(st.sets(st.sampled_from(sorted(machine.models)), min_size=1))
    turn = 2 * machine.policy.swap_after + machine.load_time + machine.drain_time + 5
    limit = len(machine.models) * turn
    while machine.now < 2 * limit:
        machine.step(wanted)
        longest = max(
            (machine.now - state.waiting_since for state in machine.models.values() if state.waiting_since is not None),
            default=0.0,
        )
        assert longest <= limit


@settings(max_examples=40)
@given(machines(), st.data())
def test_when_nobody_waits_nothing_moves(machine: Machine, data: st.DataObject) -> None:
    for _ in range(20):
        machine.step(data.draw(st.sets(st.sampled_from(sorted(machine.models)))))
    for _ in range(40):
        machine.step(set())
    assert all(isinstance(action, KeepSpares) for action in machine.step(set()))
    assert machine.models == {name: state.seen(queued(), machine.now) for name, state in machine.models.items()}
