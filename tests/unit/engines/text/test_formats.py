"""Thoughts and calls in the forms of all families, however the text is cut."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.core.calls import read_calls
from penstock.core.errors import ModelLoadError
from penstock.core.events import Phase
from penstock.core.job import Message, Request, ResponseFormat, Tool
from penstock.engines.text.formats.table import THOUGHTS, TOOLS, Formats, choose
from penstock.engines.text.formats.tags import typed

SCHEMA = {
    "type": "object",
    "properties": {
        "city": {"type": "string"},
        "days": {"type": "integer"},
        "where": {"type": "object"},
        "full": {"type": "boolean"},
    },
}
ASKED = (Tool("get_weather", "", SCHEMA), Tool("clock"), Tool("files.read", "", SCHEMA))

#: Arguments with everything that a form may stumble over; what a form has no way to write is left out for it.
CITY = 'Ul"m\\ \t<b> {x} [y] </é> 🚰'
FULL: dict[str, Any] = {"city": CITY, "days": 3, "where": {"a": [1, {"b": None}], "c": "d"}, "full": True}


QUOTE = '<|"|>'


def request(**fields: Any) -> Request:
    return Request(model="m", messages=(Message("user", "?"),), **{"tools": ASKED, **fields})


def read(formats: Formats, text: str, cuts: Any = (), *, opened: bool = False, **fields: Any) -> tuple[str, str, Any]:
    """(thoughts, text, calls) of a reply that comes in pieces."""
    reader = formats.reader(request(**fields), opened=opened)
    assert reader is not None
    segments = []
    for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True):
        segments += reader.push(text[start:end])
    segments += reader.finish()
    parts = {phase: "".join(part for each, part in segments if each is phase) for phase in Phase}
    calls = [(call.name, call.arguments) for call in read_calls(parts[Phase.TOOL])]
    return parts[Phase.REASONING], parts[Phase.TEXT], calls


def arguments(calls: Any) -> list[tuple[str, Any]]:
    return [(name, json.loads(text)) for name, text in calls]


def js(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def xml(value: Any) -> str:
    return value if isinstance(value, str) else js(value)


def gemma(value: Any, quote: str) -> str:
    if isinstance(value, str):
        return f"{quote}{value}{quote}"
    if isinstance(value, dict):
        return "{" + ",".join(f"{name}:{gemma(part, quote)}" for name, part in value.items()) + "}"
    return f"[{','.join(gemma(part, quote) for part in value)}]" if isinstance(value, list) else js(value)


def python(name: str, given: dict[str, Any]) -> str:
    return f"{name}({', '.join(f'{key}={value!r}' for key, value in given.items())})"


def qwen(name: str, given: dict[str, Any]) -> str:
    inside = "".join(f"<parameter={key}>\n{xml(value)}\n</parameter>\n" for key, value in given.items())
    return f"<function={name}>\n{inside}</function>"


def glm(name: str, given: dict[str, Any], line: str) -> str:
    pairs = (f"<arg_key>{k}</arg_key>{line}<arg_value>{xml(v)}</arg_value>{line}" for k, v in given.items())
    return f"<tool_call>{name}{line}{''.join(pairs)}</tool_call>"


def invoke(name: str, given: dict[str, Any]) -> str:
    inside = "".join(f'<parameter name="{key}">{xml(value)}</parameter>\n' for key, value in given.items())
    return f'<invoke name="{name}">\n{inside}</invoke>'


def dsml(name: str, given: dict[str, Any]) -> str:
    inside = "".join(
        f'<｜DSML｜parameter name="{key}" string="{js(isinstance(value, str))}">{xml(value)}</｜DSML｜parameter>\n'
        for key, value in given.items()
    )
    return f'<｜DSML｜invoke name="{name}">\n{inside}</｜DSML｜invoke>'


def named(calls: Any, key: str = "arguments", name: str = "name") -> list[str]:
    return [js({name: each, key: given}) for each, given in calls]


def both(head: str, tail: str, calls: list[str]) -> str:
    return "\n".join(f"{head}{call}{tail}" for call in calls)


#: How each family writes calls. None: nothing may stand before them.
WRITE: dict[str, Any] = {
    "hermes": lambda calls: both("<tool_call>\n", "\n</tool_call>", named(calls)),
    "granite": lambda calls: f"<|tool_call|>[{', '.join(named(calls))}]",
    "phi4_mini": lambda calls: f"<|tool_call|>[{', '.join(named(calls))}]<|/tool_call|>",
    "jamba": lambda calls: "<tool_calls>[\n" + ",\n".join(named(calls)) + "\n]</tool_calls>",
    "nemotron": lambda calls: f"<TOOLCALL>[{', '.join(named(calls))}]</TOOLCALL>",
    "internlm": lambda calls: both("<|action_start|><|plugin|>\n", "<|action_end|>", named(calls, "parameters")),
    "command_r": lambda calls: (
        "<|START_ACTION|>[\n"
        + ",\n".join(
            js({"tool_call_id": str(i), "tool_name": name, "parameters": given})
            for i, (name, given) in enumerate(calls)
        )
        + "\n]<|END_ACTION|>"
    ),
    "command_r1": lambda calls: f"Action: ```json\n[{', '.join(named(calls, 'parameters', 'tool_name'))}]\n```",
    "apertus": lambda calls: (
        f"<|tools_prefix|>[{', '.join(js({name: given}) for name, given in calls)}]<|tools_suffix|>"
    ),
    "kimi": lambda calls: (
        "<|tool_calls_section_begin|>"
        + "".join(
            f"<|tool_call_begin|>functions.{name}:{i}<|tool_call_argument_begin|>{js(given)}<|tool_call_end|>"
            for i, (name, given) in enumerate(calls)
        )
        + "<|tool_calls_section_end|>"
    ),
    "deepseek": lambda calls: (
        "<｜tool▁calls▁begin｜>"
        + "\n".join(
            f"<｜tool▁call▁begin｜>function<｜tool▁sep｜>{name}\n```json\n{js(given)}\n```<｜tool▁call▁end｜>"
            for name, given in calls
        )
        + "<｜tool▁calls▁end｜>"
    ),
    "deepseek_v31": lambda calls: (
        "<｜tool▁calls▁begin｜>"
        + "".join(f"<｜tool▁call▁begin｜>{name}<｜tool▁sep｜>{js(given)}<｜tool▁call▁end｜>" for name, given in calls)
        + "<｜tool▁calls▁end｜>"
    ),
    "deepseek_v32": lambda calls: (
        "<｜DSML｜function_calls>\n" + "\n".join(dsml(*call) for call in calls) + "\n</｜DSML｜function_calls>"
    ),
    "qwen3_coder": lambda calls: both("<tool_call>\n", "\n</tool_call>", [qwen(*call) for call in calls]),
    "seed_oss": lambda calls: both("<seed:tool_call>\n", "\n</seed:tool_call>", [qwen(*call) for call in calls]),
    "minimax": lambda calls: (
        "<minimax:tool_call>\n" + "\n".join(invoke(*call) for call in calls) + "\n</minimax:tool_call>"
    ),
    "glm": lambda calls: "\n".join(glm(*call, "\n") for call in calls),
    "glm_47": lambda calls: "".join(glm(*call, "") for call in calls),
    "mistral": lambda calls: f"[TOOL_CALLS][{', '.join(named(calls))}]",
    "mistral_v11": lambda calls: "".join(
        f"[TOOL_CALLS]{name}[CALL_ID]a1b2c3d4e[ARGS]{js(given)}" for name, given in calls
    ),
    "mistral_v13": lambda calls: "".join(f"[TOOL_CALLS]{name}[ARGS]{js(given)}" for name, given in calls),
    "lfm2": lambda calls: f"<|tool_call_start|>[{', '.join(python(*call) for call in calls)}]<|tool_call_end|>",
    "olmo3": lambda calls: "<function_calls>\n" + "\n".join(python(*call) for call in calls) + "\n</function_calls>",
    "llama4": lambda calls: f"<|python_start|>[{', '.join(python(*call) for call in calls)}]<|python_end|>",
    "llama3": lambda calls: "<|python_tag|>" + "; ".join(named(calls, "parameters")),
    "llama3_custom": lambda calls: "".join(f"<function={name}>{js(given)}</function>" for name, given in calls),
    "gemma": lambda calls: f"```tool_code\n[{', '.join(python(*call) for call in calls)}]\n```",
    "gemma_hermes": lambda calls: both("<tool_call>", "</tool_call>", named(calls)),
    "functiongemma": lambda calls: "".join(
        f"<start_function_call>call:{name}{gemma(given, '<escape>')}<end_function_call>" for name, given in calls
    ),
    "gemma4": lambda calls: "".join(
        f"<|tool_call>call:{name}{gemma(given, QUOTE)}<tool_call|>" for name, given in calls
    ),
    "harmony": lambda calls: (
        "<|end|><|start|>assistant".join(
            f"<|channel|>commentary to=functions.{name} <|constrain|>json<|message|>{js(given)}"
            for name, given in calls
        )
        + "<|call|>"
    ),
}
#: Forms that are written where nothing else is: (format, how).
ALONE: dict[str, Any] = {
    "llama3": lambda calls: "; ".join(named(calls, "parameters")),
    "hermes": lambda calls: "\n".join(named(calls)),
    "mistral": lambda calls: f"[{', '.join(named(calls))}]",
    "llama4": lambda calls: f"[{', '.join(python(*call) for call in calls)}]",
    "pythonic": lambda calls: f"[{', '.join(python(*call) for call in calls)}]",
    "gemma": lambda calls: f"[{', '.join(named(calls))}]",
}
#: How thoughts are written: what stands before and behind them.
THINK = {
    "think": ("<think>\n", "\n</think>\n\n"),
    "mistral": ("[THINK]", "[/THINK]"),
    "command_r": ("<|START_THINKING|>", "<|END_THINKING|><|START_RESPONSE|>"),
    "seed_oss": ("<seed:think>", "</seed:think>"),
    "apertus": ("<|inner_prefix|>", "<|inner_suffix|>"),
    "granite": ("Here is my thought process:\n", "\nHere is my response:\n"),
    "granite33": ("<think>", "</think><response>"),
    "ernie": ("<think>\n", "\n</think>\n\n<response>\n"),
    "hunyuan": ("<think>\n", "\n</think>\n<answer>\n"),
    "kimi": ("◁think▷", "◁/think▷"),
    "gemma4": ("<|channel>thought\n", "<channel|>"),
    "harmony": ("<|channel|>analysis<|message|>", "<|end|><|start|>assistant<|channel|>final<|message|>"),
}


def format_of(case: str) -> str:
    return case if case in TOOLS else case.rpartition("_")[0].replace("llama3_custom", "llama3")


def of(case: str, thoughts: str = "") -> Formats:
    return Formats(format_of(case), "harmony" if format_of(case) == "harmony" else thoughts)


def test_every_format_of_the_table_is_tried() -> None:
    assert {format_of(case) for case in WRITE} | set(ALONE) == set(TOOLS)
    assert set(THINK) == set(THOUGHTS)


@pytest.mark.parametrize("case", WRITE)
class TestCalls:
    def test_one_call(self, case: str) -> None:
        for name, values in (("get_weather", FULL), ("clock", {}), ("files.read", {"city": "a"})):
            thoughts, text, calls = read(of(case), WRITE[case]([(name, values)]))
            assert (thoughts, text) == ("", "")
            assert arguments(calls) == [(name, values)]

    def test_several_calls(self, case: str) -> None:
        wanted = [("get_weather", FULL), ("clock", {}), ("get_weather", {"city": "Köln"})]
        _, text, calls = read(of(case), WRITE[case](wanted))
        assert (text, arguments(calls)) == ("", wanted)
        _, text, calls = read(of(case), WRITE[case](wanted), parallel_tool_calls=False)
        assert (text, arguments(calls)) == ("", wanted[:1])

    def test_a_text_before(self, case: str) -> None:
        written = WRITE[case]([("get_weather", FULL)])
        before = "<|channel|>final<|message|>I look.<|end|><|start|>assistant" if case == "harmony" else "I look.\n\n"
        _, text, calls = read(of(case), before + written)
        assert (text, arguments(calls)) == ("I look.", [("get_weather", FULL)])

    def test_a_thought_before(self, case: str) -> None:
        written = WRITE[case]([("get_weather", FULL)])
        kind = "harmony" if case == "harmony" else "think"
        begin, end = THINK[kind]
        end = end.removesuffix("<|channel|>final<|message|>")
        thoughts, text, calls = read(of(case, "think"), f"{begin}Hm, {CITY}{end}{written}")
        assert (thoughts, text, arguments(calls)) == (f"Hm, {CITY}", "", [("get_weather", FULL)])

    def test_a_call_in_a_thought_is_a_thought(self, case: str) -> None:
        if case == "harmony":
            pytest.skip("a call has a message of its own")
        written = WRITE[case]([("get_weather", FULL)])
        thoughts, text, calls = read(of(case, "think"), f"<think>\nPerhaps {written} then</think>No.")
        assert (thoughts, text, calls) == (f"Perhaps {written} then", "No.", [])

    def test_nobody_is_called(self, case: str) -> None:
        written = WRITE[case]([("rm", FULL)])
        assert read(of(case), written)[1:] == (written.removesuffix("<|call|>"), [])
        if case != "harmony":
            assert read(of(case), f"So: {written} and on")[1:] == (f"So: {written} and on", [])

    def test_without_tools_it_is_text(self, case: str) -> None:
        written = WRITE[case]([("get_weather", FULL)])
        thoughts, text, calls = read(of(case, "think"), written, tool_choice="none")
        assert (thoughts, text, calls) == ("", written.removesuffix("<|call|>"), [])

    def test_cut_off(self, case: str) -> None:
        """Up to every character: what is no call yet is text, and what is said of one can be continued."""
        written = WRITE[case]([("get_weather", {"city": "Ulm", "days": 3})])
        whole = '{"city": "Ulm", "days": 3}'
        for end in range(len(written)):
            _, text, calls = read(of(case), written[:end])
            if calls:
                ((name, so_far),) = calls
                assert name == "get_weather"
                assert whole.startswith(so_far) or (case == "harmony" and so_far == "{}")
                assert not text.strip("`")
            elif case != "harmony":
                assert text == written[:end]

    @settings(max_examples=25, deadline=None)
    @given(st.data())
    def test_any_cut(self, case: str, data: st.DataObject) -> None:
        calls = WRITE[case]([("get_weather", FULL), ("rm", {"city": "x"}), ("clock", {})])
        text = data.draw(st.sampled_from([calls, f"<think>a {calls}\n</think> b\n", f"Hm. {calls[:-9]}", calls * 2]))
        formats = of(case, "think")
        cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=12)))
        assert read(formats, text, cuts) == read(formats, text) == read(formats, text, range(1, len(text)))

    def test_a_resume_at_any_place_says_the_same(self, case: str) -> None:
        text = f"<think>a</think>b {WRITE[case]([('get_weather', {'city': 'Ulm'}), ('clock', {})])} c"
        formats = of(case, "think")
        first = formats.reader(request())
        assert first is not None
        said: list[tuple[Phase, str]] = []
        for end in range(1, len(text) + 1):
            said += first.push(text[end - 1 : end])
            again = formats.reader(request())
            assert again is not None
            assert joined(again.push(text[:end])) == joined(said)
            assert again.phase == first.phase


def joined(segments: list[tuple[Phase, str]]) -> list[str]:
    return ["".join(text for each, text in segments if each is phase) for phase in Phase]


@pytest.mark.parametrize("name", ALONE)
def test_calls_that_are_all_of_the_reply(name: str) -> None:
    wanted = [("get_weather", FULL), ("clock", {})]
    written = ALONE[name](wanted)
    assert arguments(read(Formats(name), written)[2]) == wanted
    assert arguments(read(Formats(name, "think"), f"<think>Hm.</think>\n\n{written}")[2]) == wanted
    for text in (f"So: {written}", f"{written} and on", ALONE[name]([("rm", {})]), written[:-1]):
        assert read(Formats(name), text)[1:] == (text, [])


@pytest.mark.parametrize("name", THINK)
class TestThoughts:
    def test_a_thought(self, name: str) -> None:
        begin, end = THINK[name]
        formats = Formats("", name)
        assert read(formats, f"{begin}So {CITY}\n\nwell{end}Hello!\nYou", tools=()) == (
            f"So {CITY}\n\nwell",
            "Hello!\nYou",
            [],
        )
        assert read(formats, f"{begin}So{end}", tools=()) == ("So", "", [])
        assert read(formats, f"{begin}So wel", tools=()) == ("So wel", "", [])
        assert read(formats, f"{begin}{end}Hi", tools=()) == ("", "Hi", [])

    def test_any_cut(self, name: str) -> None:
        begin, end = THINK[name]
        text = f"{begin} So.\n\n{end} Hello! \n{begin}Hm{end}You"
        assert read(Formats("", name), text) == read(Formats("", name), text, range(1, len(text)))

    def test_one_that_the_prompt_opened(self, name: str) -> None:
        if name == "harmony":
            pytest.skip("no prompt does")
        _, end = THINK[name]
        assert read(Formats("", name), f"So.{end}Hi", opened=True, tools=()) == ("So.", "Hi", [])

    def test_the_phase_of_what_is_read(self, name: str) -> None:
        begin, end = THINK[name]
        reader = Formats("", name).reader(request(tools=()))
        assert reader is not None
        reader.push(f"{begin}S")
        assert (reader.phase, reader.thinking) == (Phase.REASONING, True)
        reader.push(f"o{end}H")
        assert (reader.phase, reader.thinking) == (Phase.TEXT, False)


def test_a_mark_inside_a_line_is_text() -> None:
    text = "The tag <think> begins a thought."
    assert read(Formats("", "think"), text) == ("", text, [])
    assert read(Formats("", "think"), f"{text}\n<think>So.</think> Yes") == ("So.", f"{text}Yes", [])


def test_calls_end_a_thought_where_a_family_does_so() -> None:
    call = WRITE["kimi"]([("clock", {})])
    assert read(Formats("kimi", "kimi"), f"<think>So.{call}") == ("So.", "", [("clock", "{}")])


def test_arguments_come_while_they_are_written() -> None:
    """Wherever the family writes JSON."""
    for case, write in WRITE.items():
        text = write([("get_weather", {"city": "Ulm", "days": 3})])
        if js({"city": "Ulm", "days": 3}) not in text:
            continue
        reader = of(case).reader(request())
        assert reader is not None
        head = text[: text.index("m", text.index("Ul")) + 1]
        assert joined(reader.push(head))[Phase.TOOL] == '{"name": "get_weather", "arguments": {"city": "Ulm'
        assert reader.phase is Phase.TOOL


def test_arguments_that_break_leave_a_broken_call_and_no_other() -> None:
    text = '<tool_call>{"name": "clock", "arguments": {"a": oops}}</tool_call> <tool_call>{"name": "clock"}</tool_call>'
    _, rest, calls = read(Formats("hermes"), text)
    assert calls == [("clock", '{"a": ')]
    assert rest == 'oops}}</tool_call> <tool_call>{"name": "clock"}</tool_call>'


def test_line_breaks_in_strings_are_escaped() -> None:
    for call in ('{"name": "clock", "arguments": {"a": "b\n\tc"}}', '{"arguments": {"a": "b\n\tc"}, "name": "clock"}'):
        _, _, calls = read(Formats("hermes"), f"<tool_call>{call}</tool_call>")
        assert calls == [("clock", '{"a": "b\\n\\tc"}')]


def test_the_end_mark_of_a_value_may_be_in_it() -> None:
    value = "a </parameter> b\n\n<parameter> c"
    assert arguments(read(Formats("qwen3_coder"), qwen("get_weather", {"city": value, "days": 2}))[2]) == [
        ("get_weather", {"city": value, "days": 2})
    ]


@pytest.mark.parametrize(
    ("text", "schema", "value"),
    [
        ("5", {"type": "string"}, "5"),
        ("null", {"type": ["string", "null"]}, None),
        ("5", {"anyOf": [{"type": "string"}, {"type": "integer"}]}, "5"),
        (" 5 ", {"type": "integer"}, 5),
        ("five", {"type": "integer"}, "five"),
        ("True", {"type": "boolean"}, True),
        ("true", {"type": "boolean"}, True),
        ("[1, 2]", {"type": "array"}, [1, 2]),
        ("{'a': None}", {"type": "object"}, {"a": None}),
        ('{"a": [true]}', {}, {"a": [True]}),
        ("x y", {}, "x y"),
        ("5", {"$ref": "#/$defs/s"}, "5"),
        ("5", {"enum": ["5", "6"]}, "5"),
        ("5", {"enum": [5, 6]}, 5),
    ],
)
def test_values_are_what_the_schema_says(text: str, schema: dict[str, Any], value: Any) -> None:
    whole = {"type": "object", "properties": {"a": schema}, "$defs": {"s": {"type": "string"}}}
    assert typed(text, "a", whole) == value


@pytest.mark.parametrize(
    "code",
    [
        "[clock(__import__('os'))]",
        "[clock(a=open('x'))]",
        "[clock(a=1)(b=2)]",
        "[clock(**{'a': 1})]",
        "[clock(a=b'x')]",
        "[clock(a={1: 2})]",
        "[clock(a=1e999)]",
        "[clock(a=" + "[" * 5000 + "]" * 5000 + ")]",
        "[x for x in clock()]",
        "[clock, clock()]",
        "[]",
    ],
)
def test_python_that_is_no_call_is_text(code: str) -> None:
    for name, text in (("lfm2", f"<|tool_call_start|>{code}<|tool_call_end|>"), ("pythonic", code)):
        assert read(Formats(name), text)[1:] == (text, [])


def test_builtin_tools_of_llama() -> None:
    search = (Tool("brave_search"),)
    text = '<|python_tag|>brave_search.call(query="weather in Ulm")'
    assert arguments(read(Formats("llama3"), text, tools=search)[2]) == [("brave_search", {"query": "weather in Ulm"})]
    assert read(Formats("llama3"), text)[1:] == (text, [])


def test_a_call_in_gemmas_code() -> None:
    text = "```tool_code\nprint(default_api.get_weather(city='Ulm'))\n```"
    assert arguments(read(Formats("gemma"), text)[2]) == [("get_weather", {"city": "Ulm"})]


def test_harmony_in_other_orders() -> None:
    text = (
        "<|channel|>analysis<|message|>One.<|end|><|start|>assistant<|channel|>commentary<|message|>I look.<|end|>"
        "<|start|>assistant<|channel|>analysis<|message|>Two.<|end|>"
        '<|start|>assistant to=functions.clock<|channel|>commentary json<|message|>{"a": 1}<|call|>'
    )
    assert read(Formats("harmony", "harmony"), text) == ("One.\nTwo.", "I look.", [("clock", '{"a": 1}')])
    assert read(Formats("harmony", "harmony"), " to=functions.clock<|channel|>commentary<|message|>{}") == (
        "",
        "",
        [("clock", "{}")],
    )
    assert read(Formats("harmony", "harmony"), "Plain.") == ("", "Plain.", [])


@settings(max_examples=300, deadline=None)
@given(
    st.sampled_from(sorted(TOOLS)),
    st.text('<>/|tool_calparmetrfunin{}[]()=:;,"\\ \nTO`.x1'),
    st.lists(st.sampled_from([word for each, _ in TOOLS.values() for word in (*each.begins, *each.marks)]), max_size=4),
    st.randoms(),
)
def test_nothing_is_lost_of_a_text_without_calls(name: str, noise: str, marks: list[str], random: Any) -> None:
    for mark in marks:
        at = random.randint(0, len(noise))
        noise = noise[:at] + mark + noise[at:]
    if name == "harmony":
        return
    _, text, calls = read(Formats(name), noise)
    assert calls or text == noise


def test_a_call_that_is_forced_is_read_in_the_logs_form() -> None:
    text = '{"name": "get_weather", "arguments": {"city": "Ulm"}}'
    for case in ("hermes", "glm", "harmony"):
        written = f"<|channel|>final<|message|>{text}" if case == "harmony" else text
        assert arguments(read(of(case), written, tool_choice="required")[2]) == [("get_weather", {"city": "Ulm"})]
        form = ResponseFormat("json_object")
        assert arguments(read(of(case), written, response_format=form)[2]) == [("get_weather", {"city": "Ulm"})]
        written = written.replace("get_weather", "answer")
        assert read(of(case), written, response_format=form)[1:] == (text.replace("get_weather", "answer"), [])
    assert read(Formats("glm"), text[:-5], tool_choice="required")[2] == [("get_weather", '{"city": "U')]


def no(word: str) -> bool:
    return False


class TestChoice:
    @pytest.mark.parametrize(
        ("template", "tools", "thoughts"),
        [
            ("{% if tools %}<tool_call>{% endif %}", "hermes", ""),
            ("<tool_call><function=x><parameter=y> <think>", "qwen3_coder", "think"),
            ("<tool_call><arg_key>", "glm", ""),
            ("<|start_header_id|> {% if tools %}", "llama3", ""),
            ("[TOOL_CALLS] [THINK]", "mistral", "mistral"),
            ("<|start|><|channel|>", "harmony", "harmony"),
            ("<start_of_turn>", "gemma", ""),
            ("<｜tool▁calls▁begin｜> content.split('</think>')", "deepseek", "think"),
            ("{% for m in messages %}", "hermes", ""),
            ("", "", ""),
        ],
    )
    def test_the_template_says_it(self, template: str, tools: str, thoughts: str) -> None:
        assert choose(template, no) == Formats(tools, thoughts)

    def test_so_do_tokens(self) -> None:
        assert choose("{% for m in messages %}", lambda word: word == "<think>").thoughts == "think"

    def test_the_operator_has_the_last_word(self) -> None:
        assert choose("<tool_call> <think>", no, "glm", "none") == Formats("glm", "")
        assert choose("<tool_call> <think>", no, "none") == Formats("", "think")

    def test_nobody_knows_that_format(self) -> None:
        with pytest.raises(ModelLoadError, match="tool_format knows no format 'hermess': did you mean 'hermes'"):
            choose("x", no, "hermess")
        with pytest.raises(ModelLoadError, match="reasoning_format knows no format 'x'"):
            choose("x", no, reasoning_format="x")
