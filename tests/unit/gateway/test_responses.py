"""A response is a fold of its log: its events and their numbers, its items, and the conversation that goes on."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.core.errors import ErrorInfo, InvalidRequest, PenstockError, Unsupported
from penstock.core.events import Ended, Event, Logprob, Phase, TokenPhase, Tokens, TopLogprob, fold
from penstock.core.job import Job, Message, Request, Sampling, Status, Tool, ToolCall, Usage
from penstock.gateway.dialects.responses.answers import FunctionCallItem
from penstock.gateway.dialects.responses.bodies import CreateResponse, InputItem
from penstock.gateway.dialects.responses.items import Item, View, input_items, messages, output_items, owner, view_of
from penstock.gateway.dialects.responses.stream import last_number, render, whole
from penstock.gateway.http import decode
from tests.support.sse import Event as Seen
from tests.support.sse import Parser

GOLDEN = Path(__file__).parent / "golden"
WEATHER = Tool("weather", "The weather.", {"type": "object", "properties": {"city": {"type": "string"}}})
CALL = '!{"name": "weather", "arguments": {"city": "Ulm"}}'
#: What stands before a token of the tests that is a thought, or a part of a call.
PHASES = {"~": Phase.REASONING, "!": Phase.TOOL}

#: What tokens may be: text, nothing, what breaks lines, and the parts of calls.
PIECES = st.lists(
    st.text(max_size=4)
    | st.sampled_from(["", " ", "\n", "\u2028", "~", "~Hm", "~\n", CALL, CALL[:30], "!" + CALL[30:], "{", '"']),
    max_size=25,
)
ENDS = st.sampled_from(
    [
        (Status.COMPLETED, ("stop",), None),
        (Status.COMPLETED, ("length",), None),
        (Status.COMPLETED, ("tool_calls",), None),
        (Status.CANCELLED, (), ErrorInfo("The job was cancelled.", "invalid_request_error", None, "cancelled")),
        (Status.FAILED, (), ErrorInfo("It broke.", "server_error", None, "engine_error")),
        (Status.EXPIRED, (), ErrorInfo("Too late.", "server_error", None, "expired")),
    ]
)


def job(view: View, *, tools: tuple[Tool, ...] = (), **fields: Any) -> Job:
    request = Request(
        model="m",
        messages=(Message("user", "?"),),
        sampling=Sampling(temperature=0.5, max_tokens=100),
        tools=tools,
        tool_choice=fields.pop("tool_choice", "auto"),
    )
    return Job(
        **{
            "id": "job_" + "ab" * 16,
            "tenant": "t",
            "request": request,
            "created_at": 100.5,
            "view": msgspec.json.encode(view),
            **fields,
        }
    )


def log(
    texts: Sequence[str],
    cuts: Sequence[int] = (),
    end: tuple[Status, tuple[str, ...], ErrorInfo | None] = (Status.COMPLETED, ("stop",), None),
    logprobs: bool = False,
) -> list[Event]:
    """The log of these tokens, cut into runs before the positions *cuts*; each run is of a later attempt."""
    events: list[Event] = []
    places = sorted({0, *(cut % len(texts) for cut in cuts), len(texts)}) if texts else [0]
    for attempt, (start, stop) in enumerate(pairwise(places), 1):
        part = list(texts[start:stop])
        probable: list[Logprob | None] = [Logprob(-0.5, (TopLogprob(1, text, -0.5),)) for text in part]
        ids = list(range(start, stop))
        phases: list[TokenPhase] = [PHASES.get(text[:1], Phase.TEXT) for text in part]
        plain = [text[1:] if text[:1] in PHASES else text for text in part]
        known = phases if plain != part else None
        events.append(Tokens(start + 1, attempt, ids, plain, None, probable if logprobs else None, known))
    status, reasons, error = end
    return [*events, Ended(len(texts) + 1, 1, status, reasons, Usage(3, len(texts)), error)]


async def replay(events: Sequence[Event]) -> AsyncIterator[Event]:
    for event in events:
        yield event


async def ended_at() -> float:
    return 107.25


def written(job: Job, view: View, events: Sequence[Event], after: int = -1) -> bytes:
    async def joined() -> bytes:
        return b"".join([block async for block in render(job, view, replay(events), ended_at, after)])

    return asyncio.run(joined())


def seen(raw: bytes) -> list[Seen]:
    """As any client reads it; and what no stream may do."""
    assert raw.isascii()
    parser = Parser()
    events = parser.feed(raw)
    assert parser.empty_blocks == 0
    assert [event.retry is not None for event in events] == [True][: len(events)] + [False] * (len(events) - 1)
    return events


def sequence(job: Job, view: View, events: Sequence[Event], after: int = -1) -> list[Any]:
    """The data of every event, whose frame says the same."""
    found = seen(written(job, view, events, after))
    for number, event in enumerate(found, after + 1):
        assert event.id == str(number)
        assert event.data["sequence_number"] == number
        assert event.data["type"] == event.event
    return [event.data for event in found]


SPACES: list[dict[str, Any]] = [
    {"type": "function", "name": "shell", "description": "A shell.", "parameters": {"type": "object"}, "strict": False},
    {
        "type": "namespace", "name": "mcp__calendar__", "description": "Plan events.",
        "tools": [{"type": "function", "name": "_create", "parameters": {"type": "object"}, "defer_loading": True}],
    },
    {
        "type": "namespace", "name": "crm", "description": "Customers.",
        "tools": [{"type": "function", "name": name, "parameters": {"type": "object"}} for name in ("find", "shell")],
    },
]  # fmt: skip


class TestNamespaces:
    """Tools in namespaces, as agents bring them: models know flat names, clients get back what they gave."""

    def body(self, **fields: Any) -> CreateResponse:
        return decode(json.dumps({"model": "m", "input": "x", "tools": SPACES, **fields}).encode(), CreateResponse)

    def asked(self, **fields: Any) -> Request:
        return self.body(**fields).request((Item("message", role="user", content=("x",)),), 10)

    def test_models_know_their_functions_by_flat_names(self) -> None:
        names = [tool.name for tool in self.asked().callable_tools]
        assert names == ["shell", "mcp__calendar___create", "crm__find", "crm__shell"]

    @pytest.mark.parametrize(
        ("flat", "namespace", "name"),
        [
            ("shell", None, "shell"), ("mcp__calendar___create", "mcp__calendar__", "_create"),
            ("crm__find", "crm", "find"), ("crm__shell", "crm", "shell"),
        ],
    )  # fmt: skip
    def test_a_call_has_the_name_and_the_namespace_apart(self, flat: str, namespace: str | None, name: str) -> None:
        body = self.body()
        view = msgspec.json.decode(body.view(()), type=View)
        of = job(view, tools=self.asked().tools)
        call = f'!{{"name": "{flat}", "arguments": {{"a": 1}}}}'
        events = sequence(of, view, log([call[:20], "!" + call[20:]], end=(Status.COMPLETED, ("tool_calls",), None)))
        items = [event["item"] for event in events if "item" in event]
        assert len(items) == 2
        for item in items:
            assert (item["name"], item.get("namespace")) == (name, namespace)
        done = next(event for event in events if event["type"] == "response.function_call_arguments.done")
        assert done["name"] == name
        # … and goes back to the model under the name that it used, whether it is sent again or referred to.
        (item,) = events[-1]["response"]["output"]
        output = {"type": "function_call_output", "call_id": item["call_id"], "output": "done"}
        given = [InputItem(role="user", content="x"), *(msgspec.convert(each, InputItem) for each in (item, output))]
        sent = messages(None, [each.plain(place) for place, each in enumerate(given)])
        kept = messages(
            None, [given[0].plain(0), *output_items([msgspec.convert(item, FunctionCallItem)]), given[2].plain(2)]
        )
        assert sent[1:] == kept[1:]
        assert [call.name for call in sent[1].tool_calls] == [flat]

    def test_they_are_told_again_as_they_came(self) -> None:
        view = json.loads(self.body().view(()))
        assert [(tool["type"], tool["name"]) for tool in view["tools"]] == [
            ("function", "shell"), ("namespace", "mcp__calendar__"), ("namespace", "crm"),
        ]  # fmt: skip
        assert [tool["name"] for tool in view["tools"][2]["tools"]] == ["find", "shell"]

    @pytest.mark.parametrize(
        ("choice", "names"),
        [
            ({"type": "function", "name": "shell"}, ["shell"]),
            ({"type": "function", "namespace": "crm", "name": "shell"}, ["crm__shell"]),
            ({"type": "allowed_tools", "mode": "auto", "tools": [{"type": "namespace", "name": "crm"}]},
             ["crm__find", "crm__shell"]),
            ({"type": "allowed_tools", "mode": "required",
              "tools": [{"type": "function", "namespace": "crm", "name": "find"},
                        {"type": "function", "name": "shell"}]},
             ["shell", "crm__find"]),
        ],
        ids=["function", "of a namespace", "a namespace", "some"],
    )  # fmt: skip
    def test_choices(self, choice: dict[str, Any], names: list[str]) -> None:
        assert [tool.name for tool in self.asked(tool_choice=choice).callable_tools] == names


class TestTheSequence:
    @pytest.mark.parametrize(
        ("name", "texts", "end", "fields", "view"),
        [
            (
                "text",
                ["A", "", " river"],
                (Status.COMPLETED, ("stop",), None),
                {},
                View(metadata={"k": "v"}, store=False),
            ),
            (
                "calls",
                ["~", "~Hm", "~.", "Well", ".", CALL, CALL],
                (Status.COMPLETED, ("tool_calls",), None),
                {"tools": (WEATHER,)},
                View(background=True, instructions="Be brief.", previous_response_id="resp_" + "cd" * 16),
            ),
            (
                "cancelled",
                ["1 ", "2 "],
                (Status.CANCELLED, (), ErrorInfo("Cancelled.", "invalid_request_error", None, "cancelled")),
                {},
                View(background=True),
            ),
        ],
    )
    def test_the_bytes(self, name: str, texts: list[str], end: Any, fields: Any, view: View) -> None:
        golden = GOLDEN / f"responses_{name}.sse"
        assert written(job(view, **fields), view, log(texts, end=end)) == golden.read_bytes()

    @given(PIECES, ENDS, st.lists(st.integers(0, 24)), st.booleans(), st.booleans(), st.booleans())
    def test_it_does_not_depend_on_how_the_log_was_cut(
        self, texts: list[str], end: Any, cuts: list[int], tools: bool, logprobs: bool, background: bool
    ) -> None:
        view = View(background=background)
        of = job(view, tools=(WEATHER,) if tools else ())
        once = sequence(of, view, log(texts, (), end, logprobs))
        assert sequence(of, view, log(texts, cuts, end, logprobs)) == once
        assert sequence(of, view, log(texts, range(len(texts)), end, logprobs)) == once
        assert asyncio.run(last_number(of, view, replay(log(texts, cuts, end, logprobs)))) == len(once) - 1

    @given(PIECES, ENDS, st.lists(st.integers(0, 24)), st.booleans(), st.data())
    def test_a_resume_anywhere_gives_exactly_the_rest(
        self, texts: list[str], end: Any, cuts: list[int], tools: bool, data: st.DataObject
    ) -> None:
        view = View(background=True)
        of = job(view, tools=(WEATHER,) if tools else ())
        events = log(texts, cuts, end)
        once = sequence(of, view, events)
        after = data.draw(st.integers(-1, len(once) - 1))
        ended = msgspec.structs.replace(of, status=end[0], attempt=1, tokens=len(texts))
        assert sequence(ended, view, events, after) == once[after + 1 :]

    @given(PIECES, ENDS, st.booleans(), st.booleans(), st.sampled_from(["auto", "required"]))
    def test_its_parts_are_its_whole(
        self, texts: list[str], end: Any, tools: bool, logprobs: bool, choice: str
    ) -> None:
        """Deltas make the items, items make the output, and the last event is what a GET answers."""
        view = View()
        of = job(view, tools=(WEATHER,) if tools else (), tool_choice=choice if tools else "auto")
        events = log(texts, (), end, logprobs)
        once = sequence(of, view, events)
        *_, last = once
        assert last["response"] == json.loads(msgspec.json.encode(whole(of, view, fold(events), 107.25)))
        assert [event["type"] for event in once[:2]] == ["response.created", "response.in_progress"]
        assert sum(event["type"] in TERMINAL for event in once) == 1
        assert last["type"] in TERMINAL
        output = last["response"]["output"]
        assert [event["item"] for event in once if event["type"] == "response.output_item.done"] == output
        assert [event["item"]["id"] for event in once if event["type"] == "response.output_item.added"] == [
            item["id"] for item in output
        ]
        for index, item in enumerate(output):
            deltas = [
                event["delta"]
                for event in once
                if event["type"] in DELTAS and event["output_index"] == index and event["item_id"] == item["id"]
            ]
            text = item["arguments"] if item["type"] == "function_call" else item["content"][0]["text"]
            assert "".join(deltas) == text
            assert item["id"].endswith(f"_{index}")
        said = [item["content"][0] for item in output if item["type"] == "message"]
        assert "".join(part["text"] for part in said) == "".join(text for text in texts if text[:1] not in PHASES)
        if logprobs and texts and not any(text[:1] in PHASES for text in texts) and any(texts):
            assert [entry["token"] for entry in said[0]["logprobs"]] == texts

    def test_a_reply_of_nothing_is_an_empty_message(self) -> None:
        view = View()
        ends = (("stop", "completed"), ("length", "incomplete"), ("content_filter", "incomplete"))
        for reason, status in ends:
            *_, last = sequence(job(view), view, log(["", ""], end=(Status.COMPLETED, (reason,), None)))
            (item,) = last["response"]["output"]
            assert (item["content"][0]["text"], item["status"]) == ("", status)
            assert last["response"]["status"] == status
            why = {"length": "max_output_tokens"}.get(reason, reason)
            assert last["response"]["incomplete_details"] == ({"reason": why} if status == "incomplete" else None)

    def test_a_call_that_was_cut_is_incomplete(self) -> None:
        view = View()
        of = job(view, tools=(WEATHER,), tool_choice="required")
        texts = ['!{"name": "weather", "argu', '!ments": {"ci', '!ty": "U']
        *_, last = sequence(of, view, log(texts, end=(Status.COMPLETED, ("length",), None)))
        (item,) = last["response"]["output"]
        assert (item["arguments"], item["status"]) == ('{"city": "U', "incomplete")
        assert last["response"]["incomplete_details"] == {"reason": "max_output_tokens"}

    @pytest.mark.parametrize(
        ("error", "code"),
        [
            (
                ErrorInfo("Too long.", "invalid_request_error", "messages", "context_length_exceeded"),
                "context_length_exceeded",
            ),
            (ErrorInfo("Not so.", "invalid_request_error", "messages", "invalid_request"), "invalid_prompt"),
            (ErrorInfo("Full.", "rate_limit_error", None, "overloaded"), "rate_limit_exceeded"),
            (ErrorInfo("Killed engines.", "server_error", None, "poisoned"), "server_error"),
        ],
    )
    def test_a_failure_has_one_of_openais_codes(self, error: ErrorInfo, code: str) -> None:
        view = View()
        *_, last = sequence(job(view), view, log([], end=(Status.FAILED, (), error)))
        assert last["type"] == "response.failed"
        assert last["response"]["error"]["code"] == code
        assert last["response"]["error"]["message"] == error.message
        assert last["response"]["error"]["param"] == {"messages": "input"}.get(error.param or "")
        assert last["response"]["output"] == []


TERMINAL = {"response.completed", "response.incomplete", "response.failed"}
DELTAS = {"response.output_text.delta", "response.reasoning_text.delta", "response.function_call_arguments.delta"}


class TestBeyondTheEnd:
    @pytest.mark.parametrize(
        "fields",
        [
            {"status": Status.COMPLETED, "attempt": 1, "tokens": 2},
            {"status": Status.RUNNING, "attempt": 1, "tokens": 2},
            {"status": Status.RUNNING, "attempt": 1, "tokens": 0},
            {"status": Status.QUEUED, "attempt": 0, "tokens": 0},
        ],
    )
    def test_who_saw_more_than_there_is_is_told(self, fields: dict[str, Any]) -> None:
        view = View(background=True)
        (event,) = seen(written(job(view, **fields), view, log(["a", "b"]), 1000))
        assert event.event == "error"
        assert event.id is None
        assert event.data["code"] == event.data["error"]["code"] == "log_rewound"
        assert event.data["sequence_number"] == 1001

    def test_who_saw_everything_gets_nothing(self) -> None:
        view = View()
        last = len(sequence(job(view), view, log(["a"]))) - 1
        assert written(job(view, status=Status.COMPLETED, attempt=1, tokens=1), view, log(["a"]), last) == b""

    def test_who_waits_for_more_is_not_disturbed(self) -> None:
        view = View(background=True)
        of = job(view, status=Status.RUNNING, attempt=1, tokens=1)
        assert sequence(of, view, log(["a", "b"], (1,)), 5)[0]["type"] == "response.output_text.delta"

    def test_a_log_that_is_rewound_meanwhile(self) -> None:
        async def torn() -> AsyncIterator[Event]:
            from penstock.core.errors import LogRewound

            yield Tokens(1, 1, [1], ["a"])
            raise LogRewound("Lost.")

        async def read() -> bytes:
            view = View()
            return b"".join([block async for block in render(job(view), view, torn(), ended_at)])

        *_, last = seen(asyncio.run(read()))
        assert last.data["error"]["code"] == "log_rewound"


class TestWhenItIsWritten:
    def read(self, **fields: Any) -> list[list[str]]:
        """The events of each block: what is written at once."""

        async def blocks() -> list[list[str]]:
            view = View(background=True)
            parts = render(job(view, **fields), view, replay(log(["a"])), ended_at)
            return [[event.event for event in Parser().feed(block)] async for block in parts]

        return asyncio.run(blocks())

    def test_that_it_runs_is_told_once_it_does(self) -> None:
        queued, *_ = self.read(status=Status.QUEUED)
        assert queued == ["response.created", "response.queued"]
        running, *_ = self.read(status=Status.RUNNING, attempt=1)
        assert running == ["response.created", "response.queued", "response.in_progress"]

    def test_what_waits_to_go_on_has_begun(self) -> None:
        again, *_ = self.read(status=Status.QUEUED, attempt=1)
        assert again[-1] == "response.in_progress"


class TestConversations:
    def test_turns(self) -> None:
        items = [
            Item("message", role="developer", content=("In ", "French.")),
            Item("message", role="user", content=("Weather?",)),
            Item("message", role="assistant", content=("I look.",)),
            Item("function_call", call_id="1", name="weather", arguments="{}"),
            Item("function_call", call_id="2", name="clock", arguments="{}"),
            Item("function_call_output", call_id="2", output="noon"),
            Item("function_call_output", call_id="1", output="sun"),
            Item("message", role="assistant", content=("Sun.",)),
            Item("message", role="assistant", content=("At noon.",)),
            Item("message", role="user", content=("a",)),
            Item("message", role="user", content=("b",)),
        ]
        calls = (ToolCall("1", "weather", "{}"), ToolCall("2", "clock", "{}"))
        assert messages("Be brief.", items) == (
            Message("system", "Be brief.\n\nIn French."),
            Message("user", "Weather?"),
            Message("assistant", "I look.", calls),
            Message("tool", "noon", tool_call_id="2"),
            Message("tool", "sun", tool_call_id="1"),
            Message("assistant", "Sun.\n\nAt noon."),
            Message("user", "a"),
            Message("user", "b"),
        )

    @pytest.mark.parametrize(
        ("items", "message"),
        [
            ([Item("function_call", call_id="1", name="f", arguments="{}")], "No tool output found"),
            ([Item("function_call_output", call_id="1", output="x")], "No tool call found"),
        ],
    )
    def test_calls_and_outputs_belong_together(self, items: list[Item], message: str) -> None:
        with pytest.raises(InvalidRequest, match=message):
            messages(None, items)

    def test_items_have_ids_that_stay(self) -> None:
        view = View(items=(Item("message", role="user", content=("a",)), Item("message", "msg_mine", "user", ("b",))))
        of = job(view)
        kept = view_of(of)
        assert kept == view
        first, second = input_items(of, view)
        assert (first.id, second.id) == ("msg_" + "ab" * 16 + "_in0", "msg_mine")
        assert owner(first.id) == of.id
        assert owner(second.id) is None

    @pytest.mark.parametrize("view", [b"", b"{}", b'{"object":"batch"}', b"\x00"])
    def test_what_is_no_responses_view(self, view: bytes) -> None:
        assert view_of(msgspec.structs.replace(job(View()), view=view)) is None


class TestBodies:
    def refused(self, **fields: Any) -> PenstockError:
        with pytest.raises(InvalidRequest) as caught:
            self.prepare(**fields)
        return caught.value

    def prepare(self, **fields: Any) -> Request:
        body = msgspec.convert({"model": "m", "input": "x", **fields}, CreateResponse)
        items = [item.plain(0) for item in body.input] if isinstance(body.input, list) else []
        return body.request((*items, Item("message", role="user", content=("x",))), 10)

    @pytest.mark.parametrize(
        ("fields", "param"),
        [
            ({"conversation": "conv_1"}, "conversation"),
            ({"prompt": {"id": "pmpt_1"}}, "prompt"),
            ({"context_management": [{"type": "compaction"}]}, "context_management"),
            ({"moderation": {"model": "x"}}, "moderation"),
            ({"truncation": "auto"}, "truncation"),
            ({"text": {"verbosity": "low"}}, "text.verbosity"),
            ({"max_tokens": 5}, "max_tokens"),
            ({"response_format": {"type": "json_object"}}, "response_format"),
            ({"n": 2}, "n"),
            ({"tools": [{"type": "web_search"}]}, "tools[0]"),
            ({"tool_choice": {"type": "mcp", "server_label": "x"}}, "tool_choice"),
            ({"input": [{"type": "computer_call_output", "call_id": "x"}]}, "input[0]"),
            (
                {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]},
                "input[0].content[0]",
            ),
        ],
    )
    def test_what_cannot_be_honoured(self, fields: dict[str, Any], param: str) -> None:
        error = self.refused(**fields)
        assert isinstance(error, Unsupported)
        assert error.param == param

    @pytest.mark.parametrize(
        ("fields", "param"),
        [
            ({"background": True, "store": False}, "background"),
            ({"tools": [{"type": "function"}]}, "tools[0].name"),
            ({"tool_choice": "required"}, "tool_choice"),
            (
                {
                    "tool_choice": {
                        "type": "allowed_tools",
                        "mode": "auto",
                        "tools": [{"type": "function", "name": "f"}],
                    }
                },
                "tool_choice",
            ),
            ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format.schema"),
            ({"input": [{"role": "user"}]}, "input[0]"),
            ({"input": [{"type": "function_call", "name": "f"}]}, "input[0]"),
            ({"input": [{"type": "function_call_output", "call_id": "f"}]}, "input[0]"),
        ],
    )
    def test_what_contradicts_itself(self, fields: dict[str, Any], param: str) -> None:
        error = self.refused(**fields)
        assert not isinstance(error, Unsupported)
        assert error.param == param

    def test_neutral_values_pass(self) -> None:
        body = msgspec.convert(
            {
                "model": "m",
                "input": "x",
                "truncation": "disabled",
                "reasoning": {"effort": None, "summary": "auto"},
                "text": {"verbosity": "medium", "format": {"type": "text"}},
                "conversation": None,
                "n": 1,
                "include": ["reasoning.encrypted_content"],
                "stream_options": {"include_obfuscation": False},
                "unknown": 1,
            },
            CreateResponse,
        )
        request = body.request((Item("message", role="user", content=("x",)),), 10)
        assert request.sampling == Sampling(max_tokens=10, temperature=1.0)
        assert request.response_format is None

    @pytest.mark.parametrize(
        "kind",
        [
            "web_search", "web_search_preview", "file_search", "local_shell", "shell", "computer_use_preview", "mcp",
            "image_generation", "code_interpreter", "custom", "apply_patch", "tool_search", "whatever_comes_next",
        ],
    )  # fmt: skip
    def test_tools_that_are_not_here_are_named(self, kind: str) -> None:
        """Clients have some of them on by themselves: the message says where it is and that it has to go."""
        function = {"type": "function", "name": "f", "parameters": {}}
        for place, tools in (
            ("tools[1]", [function, {"type": kind, "name": "x"}]),
            ("tools[0].tools[1]", [{"type": "namespace", "name": "n", "tools": [function, {"type": kind}]}]),
        ):
            error = self.refused(tools=tools)
            assert isinstance(error, Unsupported)
            assert error.param == place
            assert f"{place}: there is no tool of type {kind!r} here" in error.message
            assert "Leave it out of the tools" in error.message
            assert ('web_search = "disabled"' in error.message) == kind.startswith("web_search")

    def test_namespaces_have_functions_only(self) -> None:
        inner = {"type": "namespace", "name": "n", "tools": [{"type": "function", "name": "f"}]}
        assert self.refused(tools=[{"type": "namespace", "name": "m", "tools": [inner]}]).param == "tools[0].tools[0]"
        assert self.refused(tools=[{"type": "namespace", "tools": []}]).param == "tools[0].name"
        many = [{"type": "function", "name": f"f{i}"} for i in range(70)]
        spaces = [{"type": "namespace", "name": name, "tools": many} for name in ("a", "b")]
        assert self.refused(tools=spaces).param == "tools"
        twice = [{"type": "function", "name": "n__f"}, inner]
        assert "two tools named 'n__f'" in self.refused(tools=twice).message

    def test_allowed_tools(self) -> None:
        tools = [{"type": "function", "name": name, "parameters": {}} for name in ("a", "b", "c")]
        choice = {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "b"}]}
        body = msgspec.convert({"model": "m", "input": "x", "tools": tools, "tool_choice": choice}, CreateResponse)
        request = body.request((Item("message", role="user", content=("x",)),), 10)
        assert [tool.name for tool in request.callable_tools] == ["b"]
        assert request.tool_choice == "required"
        view = json.loads(body.view(()))
        assert view["tool_choice"] == choice
        assert [tool["name"] for tool in view["tools"]] == ["a", "b", "c"]

    @pytest.mark.parametrize(
        ("fields", "logprobs"),
        [
            ({}, None),
            ({"include": ["message.output_text.logprobs"]}, 0),
            ({"include": ["message.output_text.logprobs"], "top_logprobs": 3}, 3),
            ({"top_logprobs": 3}, 3),
            ({"top_logprobs": 0}, None),
        ],
    )
    def test_logprobs(self, fields: dict[str, Any], logprobs: int | None) -> None:
        body = msgspec.convert({"model": "m", "input": "x", **fields}, CreateResponse)
        assert body.request((Item("message", role="user", content=("x",)),), 10).sampling.logprobs == logprobs
