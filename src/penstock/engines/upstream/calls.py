"""Calls of tools as servers report them: in any of the forms that are about, piece by piece."""

from __future__ import annotations

import msgspec

from penstock.core.calls import Call, call_text
from penstock.core.foreign import Malformed, decode, whole
from penstock.core.job import Request
from penstock.engines.upstream.stream import Delta, Function, StreamError, ToolDelta


class _CallInPieces:
    """A call as it comes, piece by piece."""

    def __init__(self, index: int | None, id: str | None) -> None:
        self.index = index
        self.id = id
        self.name = ""
        self.arguments = ""

    @property
    def complete(self) -> bool:
        return _is_object(self.arguments)


class UpstreamCalls:
    """The calls of one reply. They are held until it has ended: one that breaks off can be made anew."""

    def __init__(self) -> None:
        self._calls: list[_CallInPieces] = []

    def hear(self, delta: Delta) -> None:
        """Calls, or pieces of them."""
        deltas = delta.tool_calls or []
        if delta.function_call is not None:
            deltas = [ToolDelta(0, None, delta.function_call)]
        for place, each in enumerate(deltas):
            index = each.index if each.index is not None or len(deltas) == 1 else place
            function = each.function or Function(each.name, each.arguments)
            call = self._call(index, each.id, function)
            call.name += function.name if function.name and function.name != call.name else ""
            call.arguments += function.arguments or ""

    def _call(self, index: int | None, id: str | None, function: Function) -> _CallInPieces:
        """Which call a piece is of: that with its *index*, or the last one; but not if it is another by its *id*, or
        has a name where one is complete."""
        found = next((call for call in reversed(self._calls) if index in (None, call.index)), None)
        if found is not None:
            if id and found.id:
                other = id != found.id
            else:
                other = (
                    bool(function.name) and found.complete and bool(function.arguments or function.name != found.name)
                )
            if not other:
                found.id = found.id or id
                return found
        self._calls.append(_CallInPieces(index, id))
        return self._calls[-1]

    def text(self, request: Request) -> str:
        """All of them, as the log has them (`penstock.core.calls`). Raises `StreamError`."""
        tools = request.callable_tools
        if not tools:
            return ""  # nobody asked for any
        written = []
        for call in self._calls if request.parallel_tool_calls else self._calls[:1]:
            name, arguments = whole(call.name), whole(call.arguments) or "{}"
            if not name and len(tools) == 1:
                name = tools[0].name
            if not name:
                raise StreamError("a call that names no tool")
            if not (_is_object(arguments) and any(tool.name == name for tool in tools)):
                arguments = msgspec.json.encode(arguments).decode()
            written.append(call_text(Call(name, arguments)))
        return "".join(written)


def _is_object(text: str) -> bool:
    try:
        return isinstance(decode(text, dict), dict)
    except Malformed:
        return False
