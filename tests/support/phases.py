"""Logs of models that think and call tools, drawn by hypothesis."""

from __future__ import annotations

import json
from itertools import pairwise

from hypothesis import strategies as st

from penstock.core.calls import Call, call_text
from penstock.core.events import Ended, Event, Phase, TokenPhase, Tokens
from penstock.core.job import Job, Message, Request, Status, Tool, Usage, new_job_id

#: What one choice says: thoughts, text and calls in any order.
SAID = st.lists(
    st.tuples(st.just(Phase.REASONING), st.text(min_size=1, max_size=12))
    | st.tuples(st.just(Phase.TEXT), st.text(min_size=1, max_size=12))
    | st.builds(
        lambda value, depth: (Phase.TOOL, call_text(Call("look", json.dumps({"where": value, "depth": depth})))),
        st.text(max_size=8),
        st.integers(0, 99),
    ),
    min_size=1,
    max_size=5,
)


def thinking_job(n: int = 1) -> Job:
    """A job whose reply may have thoughts and calls."""
    request = Request(model="m", messages=(Message("user", "?"),), tools=(Tool("look"),), n=n)
    return Job(id=new_job_id(), tenant="t", request=request, created_at=1.0)


@st.composite
def logs(draw: st.DrawFn, n: int = 1) -> list[Event]:
    """A whole log of *n* choices: its tokens cut anywhere, also where a phase ends, in runs of any length."""
    tokens: list[tuple[int, str, TokenPhase]] = []
    for choice in range(n):
        spans = draw(SAID)
        text, phases = "".join(part for _, part in spans), [phase for phase, part in spans for _ in part]
        cuts = draw(st.lists(st.integers(0, len(text)), max_size=10))
        for start, end in pairwise([0, *sorted(cuts), len(text)]):
            parts: list[tuple[Phase, int]] = []
            for phase in phases[start:end]:
                if parts and parts[-1][0] is phase:
                    parts[-1] = (phase, parts[-1][1] + 1)
                else:
                    parts.append((phase, 1))
            one: TokenPhase = parts if len(parts) > 1 else parts[0][0] if parts else draw(st.sampled_from(Phase))
            tokens.append((choice, text[start:end], one))
    if n > 1:
        order = draw(st.permutations(range(len(tokens))))
        queues = [[token for token in tokens if token[0] == choice] for choice in range(n)]
        tokens = [queues[tokens[i][0]].pop(0) for i in order]
    events: list[Event] = []
    position = 1
    while position <= len(tokens):
        part = tokens[position - 1 : position - 1 + draw(st.integers(1, len(tokens)))]
        plain = all(phase is Phase.TEXT for _, _, phase in part)
        events.append(
            Tokens(
                position,
                1,
                [7] * len(part),
                [text for _, text, _ in part],
                [choice for choice, _, _ in part] if n > 1 else None,
                phases=None if plain else [phase for _, _, phase in part],
            )
        )
        position += len(part)
    reasons = ("tool_calls",) * n
    return [*events, Ended(position, 1, Status.COMPLETED, reasons, Usage(9, position - 1, 3, 4))]
