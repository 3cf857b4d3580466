"""`penstock.core.calls`: calls as the log has them."""

from __future__ import annotations

import itertools
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.core.calls import Call, CallReader, call_text, read_calls
from penstock.core.events import Ended, Phase, Prefix, Tokens, fold, joined_phases, segments, split_choices
from penstock.core.job import Status

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**9), 10**9) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
CALLS = st.lists(
    st.builds(
        lambda name, arguments, spaces: Call(name, json.dumps(arguments, ensure_ascii=spaces, indent=spaces or None)),
        st.text(min_size=1),
        st.dictionaries(st.text(), VALUES, max_size=3),
        st.booleans(),
    ),
    max_size=4,
)


@given(CALLS, st.lists(st.integers(0, 200), max_size=20))
def test_calls_come_back_however_the_text_is_cut(calls: list[Call], cuts: list[int]) -> None:
    text = "".join(map(call_text, calls))
    assert read_calls(text) == calls
    reader = CallReader()
    found: dict[int, list[str]] = {}
    places = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    for start, end in itertools.pairwise(places):
        for delta in reader.push(text[start:end]):
            if delta.name is not None:
                assert delta.index == len(found)
                found[delta.index] = [delta.name, ""]
            found[delta.index][1] += delta.arguments
    assert [Call(*each) for each in found.values()] == calls
    assert reader.calls == len(calls)


def test_arguments_are_given_out_as_they_come() -> None:
    reader = CallReader()
    assert reader.push('{"name": "find", "argu') == []
    assert [(delta.name, delta.arguments) for delta in reader.push('ments": {"a": "x')] == [
        ("find", ""),
        (None, '{"a": "x'),
    ]
    assert [delta.arguments for delta in reader.push('}"}')] == ['}"}']
    assert reader.push("}\n") == []


def test_what_a_guide_makes_a_model_write_is_read() -> None:
    assert read_calls('{"name":"a","arguments":{}}{ "name" : "b" , "arguments" : {"x": [1, {"y": "}"}]} } ') == [
        Call("a", "{}"),
        Call("b", '{"x": [1, {"y": "}"}]}'),
    ]


def test_arguments_that_are_no_json_are_taken_unchanged() -> None:
    raw = 'city="Paris"}'
    assert read_calls(call_text(Call("a", json.dumps(raw))) + call_text(Call("b", "{}"))) == [
        Call("a", raw),
        Call("b", "{}"),
    ]


def test_a_call_that_was_cut_off_has_what_came() -> None:
    assert read_calls('{"name": "a", "arguments": {"x": "y') == [Call("a", '{"x": "y')]


class TestPhases:
    RUN = Tokens(
        1,
        1,
        [1, 2, 3, 4],
        ["Hm", "", ".Yes", '{"name": "f", "arguments": {}}'],
        phases=[Phase.REASONING, Phase.REASONING, [(Phase.REASONING, 1), (Phase.TEXT, 3)], Phase.TOOL],
    )

    def test_a_fold_keeps_them_apart(self) -> None:
        found = fold([self.RUN, Ended(5, 1, Status.COMPLETED, ("stop",))])
        assert (found.reasoning, found.texts) == (["Hm."], ["Yes"])
        assert read_calls(found.calls[0]) == [Call("f", "{}")]
        assert found.pieces == [["", "", "Yes", ""]]

    def test_a_part_of_a_run_has_its_own(self) -> None:
        assert self.RUN.after(2).phases == [[(Phase.REASONING, 1), (Phase.TEXT, 3)], Phase.TOOL]
        assert self.RUN.up_to(1).phases == [Phase.REASONING]

    def test_a_prefix_has_them_by_choice(self) -> None:
        first, second = split_choices(
            [1, 2, 3], ["a", "b", "c"], [0, 1, 0], 2, [Phase.REASONING, Phase.TEXT, Phase.TEXT]
        )
        assert (first.phases, second.phases) == ([Phase.REASONING, Phase.TEXT], [Phase.TEXT])
        assert (first.text_of(Phase.REASONING), first.text_of(Phase.TEXT)) == ("a", "c")
        assert Prefix([1], ["a"]).text_of(Phase.TEXT) == "a"

    @pytest.mark.parametrize(
        ("first", "second", "joined"),
        [
            (None, None, None),
            ([Phase.TOOL], None, [Phase.TOOL, Phase.TEXT]),
            (None, [Phase.TOOL], [Phase.TEXT, Phase.TOOL]),
        ],
    )
    def test_joined_they_are_none_only_where_all_are_text(self, first: object, second: object, joined: object) -> None:
        assert joined_phases(first, 1, second, 1) == joined  # type: ignore[arg-type]

    def test_a_token_is_cut_where_it_changes(self) -> None:
        assert list(segments("ab", [(Phase.REASONING, 1), (Phase.TEXT, 1)])) == [
            (Phase.REASONING, "a"),
            (Phase.TEXT, "b"),
        ]
        assert list(segments("ab", Phase.TEXT)) == [(Phase.TEXT, "ab")]
