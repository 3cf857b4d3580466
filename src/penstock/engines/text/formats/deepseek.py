"""DeepSeek. V3 and R1, and V3.1, which has the arguments behind the name::

    <｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>get_weather
    ```json
    {"city": "Ulm"}
    ```<｜tool▁call▁end｜><｜tool▁calls▁end｜>

    <｜tool▁calls▁begin｜><｜tool▁call▁begin｜>get_weather<｜tool▁sep｜>{"city": "Ulm"}<｜tool▁call▁end｜>
    <｜tool▁calls▁end｜>

V3.2 and V4 write tags, with the kind of each value::

    <｜DSML｜function_calls>
    <｜DSML｜invoke name="get_weather">
    <｜DSML｜parameter name="city" string="true">Ulm</｜DSML｜parameter>
    </｜DSML｜invoke>
    </｜DSML｜function_calls>
"""

from __future__ import annotations

from penstock.engines.text.formats.json_calls import close
from penstock.engines.text.formats.source import Reading, Source
from penstock.engines.text.formats.tags import TaggedCalls

BEGIN, END = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
CALL, CALL_END = "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>"
BETWEEN = "<｜tool▁sep｜>"

#: What a model is told whose template shows calls, but no tools (V3, R1).
HOW = f"""
{BEGIN}{CALL}function{BETWEEN}<its name>
```json
<an object with the arguments>
```{CALL_END}{END}"""


class DeepSeekCalls:
    begins = (BEGIN, CALL)
    openings = ""
    marks = (BEGIN, END, CALL, CALL_END, BETWEEN)

    def read(self, source: Source, mark: str) -> Reading[None]:
        if mark == BEGIN:
            yield from source.space()
            yield from source.expect(CALL)
        while True:
            yield from source.space()
            name = yield from source.word()
            yield from source.expect(BETWEEN)
            yield from source.space()
            fenced = (yield from source.peek()) != "{"
            if fenced:  # what stood before was the kind of the tool
                name = yield from source.word()
                yield from source.space()
                yield from source.expect("```json")
                yield from source.space()
            source.named(name)
            yield from source.arguments(name)
            if fenced:
                yield from close(source, ("```",))
            yield from close(source, (CALL_END,))
            yield from source.space()
            if not (yield from source.take(CALL)):
                break
        if mark == BEGIN:
            yield from close(source, (END,))


TOOLS = DeepSeekCalls()

DSML = TaggedCalls(
    ("<｜DSML｜function_calls>", "<｜DSML｜tool_calls>"),
    ("</｜DSML｜function_calls>", "</｜DSML｜tool_calls>"),
    function=('<｜DSML｜invoke name="', '">', "</｜DSML｜invoke>"),
    parameter=('<｜DSML｜parameter name="', '"', "</｜DSML｜parameter>"),
    kinds=(' string="true">', ' string="false">'),
)
