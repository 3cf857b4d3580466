"""Replies that obey a schema, a grammar, or a tool's parameters."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from penstock.core.calls import read_calls
from penstock.core.job import Message, ResponseFormat, Tool
from penstock.core.ports import Engine, Finish
from penstock.testing.engine.driver import (
    PERSON,
    Contract,
    assert_obeys,
    guided_lease,
    lease,
    needs,
    needs_determinism,
    run,
)


class GuidedContract(Contract):
    async def test_a_guided_reply_obeys_its_schema(self, engine: Engine) -> None:
        needs(engine, "response_format")
        guided = [guided_lease(engine, temperature=0.8, seed=seed) for seed in range(4)]
        for result in await run(engine, *guided):
            assert result.finish == Finish(("stop",))
            assert_obeys(result.text)

    async def test_any_object(self, engine: Engine) -> None:
        needs(engine, "response_format")
        wanted = lease(engine, max_tokens=400, temperature=0.8, response_format=ResponseFormat("json_object"))
        (result,) = await run(engine, wanted)
        assert result.finish is not None
        assert result.finish.error is None
        assert result.text.startswith("{")
        if result.finish.finish_reasons == ("stop",):
            assert isinstance(json.loads(result.text), dict)

    async def test_a_guided_reply_is_cut_by_max_tokens(self, engine: Engine) -> None:
        needs(engine, "response_format")
        (result,) = await run(engine, guided_lease(engine, max_tokens=4))
        assert result.finish == Finish(("length",))
        assert len(result.ids) == 4

    async def test_a_guided_reply_resumes_inside_its_json(self, engine: Engine) -> None:
        needs(engine, "response_format")
        (whole,) = await run(engine, guided_lease(engine))
        assert_obeys(whole.text)
        for cut in sorted({1, len(whole.ids) // 3, len(whole.ids) // 2, len(whole.ids) - 1, len(whole.ids)}):
            logged: dict[str, Any] = {"prefix": whole.ids[:cut], "texts": whole.texts[:cut], "attempt": 2}
            (rest,) = await run(engine, guided_lease(engine, **logged))
            assert rest.finish == Finish(("stop",))
            assert_obeys("".join(whole.texts[:cut]) + rest.text)
            if engine.models[0].deterministic:
                assert whole.ids[:cut] + rest.ids == whole.ids

    async def test_a_guided_reply_disturbs_nobody(self, engine: Engine) -> None:
        needs(engine, "response_format")
        needs_determinism(engine)
        (alone,) = await run(engine, lease(engine))
        first, guided, last = await run(engine, lease(engine), guided_lease(engine), lease(engine))
        assert first.ids == last.ids == alone.ids
        assert_obeys(guided.text)

    async def test_a_schema_that_cannot_be_followed_is_refused(self, engine: Engine) -> None:
        needs(engine, "response_format")
        bad = ResponseFormat("json_schema", {"type": "object", "properties": {"a": {"type": "nonsense"}}})
        refused, good = await run(engine, lease(engine, response_format=bad), lease(engine))
        assert refused.finish is not None
        assert refused.finish.error is not None
        assert good.finish == Finish(("length",))

    async def test_a_call_that_must_be_made(self, engine: Engine) -> None:
        needs(engine, "response_format", "tools")
        if not engine.models[0].chat:
            pytest.skip("no chat template")
        tools = (Tool("look_up", "Looks a person up.", PERSON), Tool("wait", "Waits."))
        asked = {"messages": (Message("user", "Who is it?"),), "tools": tools, "tool_choice": "required"}
        wanted = guided_lease(engine, response_format=None, tool_name="look_up", **asked)
        (result,) = await run(engine, wanted)
        assert result.finish == Finish(("tool_calls",))
        assert result.text == ""
        (call,) = read_calls(result.folded.calls[0])
        assert call.name == "look_up"
        assert_obeys(call.arguments)

    # ------------------------------------------------------------------------------------ replies of another form

    @pytest.mark.parametrize(
        ("form", "right"),
        [
            (ResponseFormat("regex", pattern=r"[A-Z][a-z]{2,9}é\d{3}"), r"[A-Z][a-z]{2,9}é\d{3}"),
            (ResponseFormat("choice", choices=("yes, it is", 'no "🚰"', "perhaps\n")), 'yes, it is|no "🚰"|perhaps\n'),
            (ResponseFormat("grammar", grammar='start: "<" N ("," N){1,3} ">"\nN: /[0-9]/'), "<[0-9](,[0-9]){1,3}>"),
            (ResponseFormat("grammar", grammar='root ::= "a" ("b" | "c")+ "d"'), "a[bc]+d"),
        ],
        ids=["regex", "choice", "lark", "gbnf"],
    )
    async def test_a_guided_reply_of_another_form(self, engine: Engine, form: ResponseFormat, right: str) -> None:
        needs(engine, "response_format")
        settings: dict[str, Any] = {"max_tokens": 200, "response_format": form}
        for wanted in ({"temperature": 0.9, "seed": 3}, {"stop": ("no such words",)}):
            (whole,) = await run(engine, lease(engine, **settings, **wanted))
            if whole.finish != Finish(("length",)):
                assert whole.finish == Finish(("stop",))
                assert re.fullmatch(right, whole.text)
            for cut in sorted({1, len(whole.ids) // 2}):
                logged: dict[str, Any] = {"prefix": whole.ids[:cut], "texts": whole.texts[:cut], "attempt": 2}
                (rest,) = await run(engine, lease(engine, **settings, **wanted, **logged))
                if rest.finish != Finish(("length",)):
                    assert re.fullmatch(right, "".join(whole.texts[:cut]) + rest.text)

    @pytest.mark.parametrize(
        "form",
        [
            ResponseFormat("regex", pattern="(?<=a)b"),
            ResponseFormat("regex", pattern="(a{1000}){1000}"),
            ResponseFormat("choice", choices=()),
            ResponseFormat("grammar", grammar="start: nobody"),
            ResponseFormat("grammar", grammar='root ::= "a" ('),
        ],
        ids=["look-behind", "too large", "none", "unknown name", "broken"],
    )
    async def test_a_guided_reply_of_a_form_that_is_none(self, engine: Engine, form: ResponseFormat) -> None:
        needs(engine, "response_format")
        refused, good = await run(engine, lease(engine, response_format=form), lease(engine))
        assert refused.finish is not None
        assert refused.finish.error is not None
        assert (refused.finish.error.code, refused.finish.error.param) == ("invalid_request", "response_format")
        assert good.finish == Finish(("length",))
