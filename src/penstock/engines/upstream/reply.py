"""Chunks into tokens of the log: one choice's reply, over all the calls that it takes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from penstock.core.events import (
    Logprob,
    Phase,
    Prefix,
    Span,
    TokenPhase,
    TopLogprob,
    joined_spans,
    phase_of,
    segments,
    token_phase,
)
from penstock.core.foreign import Malformed, whole
from penstock.core.job import Request
from penstock.core.ports import Output
from penstock.engines.upstream.calls import UpstreamCalls
from penstock.engines.upstream.stream import (
    FAILURES,
    NEVER,
    REASONS,
    UNKNOWN_ID,
    Choice,
    Chunk,
    StreamError,
    Token,
    TokenCounts,
    read_chunk,
    read_logprobs,
)

#: A token of the log: its id, text and phase.
LogToken = tuple[int, str, TokenPhase]
#: What stands between a thought that broke off and the next one.
BREAK = "\n\n"


class Diverged(Exception):
    """A server that was asked for a reply again says something else than the log has."""


class Repeat:
    """What is new of a reply that is asked for again, of which the log has a beginning.

    As far as the server says what is logged, nothing is. Where it says something else, a thought begins anew, behind
    what is logged of it, as long as nothing but thoughts is logged. Raises `Diverged` where there is more.
    """

    def __init__(self, logged: Prefix) -> None:
        self._left = len(logged.ids)
        self._expected = joined_spans(_cut(zip(logged.texts, logged.phases or [], strict=True)))
        self._may_change = all(phase is Phase.REASONING for phase, _ in self._expected)
        self._held: list[LogToken] = []  # that came again
        self.over = False
        """From here on everything is new."""

    def take(self, token: LogToken) -> list[LogToken]:
        """What is new with *token*."""
        id, text, phase = token
        rest: list[Span] = []
        for part, piece in segments(text, phase):
            if rest or not piece or not self._expected:
                rest += [(part, piece)] if piece else []
                continue
            known, wanted = self._expected[0]
            if part is not known or not (wanted.startswith(piece) or piece.startswith(wanted)):
                return self._changed(token)
            if len(piece) < len(wanted):
                self._expected[0] = (known, wanted[len(piece) :])
                continue
            self._expected.pop(0)
            rest += [(part, piece[len(wanted) :])] if len(piece) > len(wanted) else []
        if rest and self._expected:  # its next part is longer than the log has it, and something else comes behind
            return self._changed(token)
        self._left -= 1
        if not self._expected and (rest or self._left < 0):
            self.over = True
            return [(id, *_one(rest, phase_of(phase)))]
        self._held.append(token)
        return []

    def _changed(self, token: LogToken) -> list[LogToken]:
        if not self._may_change:
            raise Diverged
        self.over = True
        new = [*self._held, token]
        for i, (id, text, phase) in enumerate(new):
            if text and phase_of(phase) is Phase.REASONING:
                thought, *behind = segments(text, phase)
                new[i] = (id, *_one([(Phase.REASONING, BREAK + thought[1]), *behind], Phase.REASONING))
            if text:
                break
        return new

    def end(self) -> None:
        """The reply ends here."""
        if self._expected and not self._may_change:
            raise Diverged


class UpstreamReply:
    """One choice of a request.

    ``logged`` is what the log has of it: the tokens of an earlier attempt (*prefix*), and all that `take` gave.
    ``finish`` is None until it has ended.
    """

    def __init__(self, key: int, choice: int | None, prefix: Prefix, request: Request) -> None:
        self.key = key
        self.choice = choice
        """None where it is the only one."""
        phases = [Phase.TEXT] * len(prefix.ids) if prefix.phases is None else prefix.phases
        self.logged = Prefix(list(prefix.ids), list(prefix.texts), list(phases))
        self.limit = request.sampling.max_tokens
        self.prompt_ids: list[int] | None = None
        """Where a server told them."""
        self.prompt_tokens: int | None = None
        self.finish: str | None = None
        if len(self.ids) >= self.limit:
            self.finish = "length"
        elif self.logged.text_of(Phase.TOOL):  # calls come with the reply's end
            self.finish = "tool_calls"
        self.stop: str | None = None
        """The stop string that ended it, where one did and the server told which."""
        self._request = request
        self._logprobs = request.sampling.logprobs
        self.begin()

    @property
    def ids(self) -> list[int]:
        return self.logged.ids

    @property
    def texts(self) -> list[str]:
        return self.logged.texts

    @property
    def thought(self) -> str:
        return self.logged.text_of(Phase.REASONING)

    @property
    def text(self) -> str:
        return self.logged.text_of(Phase.TEXT)

    def begin(self, *, again: bool = False, prompt: bool = False) -> None:
        """Another call begins: behind what is logged, which is in its *prompt*, or *again* from the beginning."""
        self._repeat = Repeat(self.logged) if again else None
        self._came = 0  # tokens, with this call
        self._sent = len(self.ids) if prompt else 0  # tokens of the reply in its prompt
        self._thoughts = 0  # tokens among them that are thoughts
        self._pending: list[Span] = []  # that came without a token
        self._half = (Phase.TEXT, "")  # of a character, whose other half comes with the next chunk
        self._calls = UpstreamCalls()
        self._phase = phase_of(self.logged.phases[-1]) if self.logged.phases and not again else Phase.TEXT
        self._reason: str | None = None
        self._usage: TokenCounts | None = None

    @property
    def has_unknown_ids(self) -> bool:
        """Is there a token of which only the text is known?"""
        return UNKNOWN_ID in self.ids

    def take(self, payloads: list[bytes]) -> tuple[Output, Any, bool]:
        """What these events bring: an output (perhaps empty), an error behind it (a `StreamError`, or one that the
        server told), and: was it the end?

        Where several tokens came with one text, it is the last one's. Raises `Diverged`.
        """
        output = Output(self.key, [], [], phases=[])
        entries: list[Logprob | None] = []
        for payload in payloads:
            if payload.strip() == b"[DONE]":
                return self._output(output, entries), None, True
            try:
                chunk = read_chunk(payload)
                failure = self._take(chunk, output, entries)
            except Malformed as error:
                failure = StreamError(f"a chunk that cannot be read ({error})")
            except StreamError as error:
                failure = error
            if failure is not None and not self.ended:  # else it is complete, whatever comes behind
                return self._output(output, entries), failure, False
            if len(self.ids) + len(output.ids) > self.limit:  # a thought that began anew had less room
                self._reason = "length"
                return self._output(output, entries), None, True
        return self._output(output, entries), None, False

    def _take(self, chunk: Chunk, output: Output, entries: list[Logprob | None]) -> Any:
        """Add what *chunk* brings to *output* and *entries*; the failure that it tells, if it does."""
        if chunk.error:
            return chunk.error
        if chunk.usage is not None:
            self._usage = chunk.usage
        if self.prompt_ids is None and chunk.prompt_token_ids:
            self._learn_prompt(chunk.prompt_token_ids)
        for choice in chunk.choices:
            if choice.prompt_token_ids and self.prompt_ids is None:
                self._learn_prompt(choice.prompt_token_ids)
            written = self._written(choice)
            if (ids := choice.token_ids) is None:
                if (timings := chunk.timings) is not None:
                    new = timings.predicted_n - self._came
                    if self._repeat is None:
                        new = min(new, self.limit - len(self.ids) - len(output.ids))
                    if self.prompt_tokens is None:
                        self.prompt_tokens = timings.prompt_n + timings.cache_n - self._sent
                        output.prompt_tokens = self.prompt_tokens
                        output.cached_tokens = min(timings.cache_n, self.prompt_tokens)
                else:
                    new = 1 if written or _calls(choice) else 0
                ids = [UNKNOWN_ID] * new
            written = self._whole(written)
            reason = (choice.finish_reason or "").lower()
            if reason and reason not in FAILURES:
                if calls := self._calls.text(self._request):
                    written.append((Phase.TOOL, calls))
                self._reason = REASONS.get(reason, "stop")
                stop = choice.stop_reason or choice.matched_stop
                self.stop = whole(stop) if isinstance(stop, str) else None
            self._add(choice, ids, written, output, entries)
            if reason in FAILURES:
                return f"it gave the reply up (finish_reason {reason!r})"
        return None

    def _written(self, choice: Choice) -> list[Span]:
        """The thoughts and the text of a chunk; what it says of calls is kept."""
        if (delta := choice.delta or choice.message) is None:
            return [(Phase.TEXT, choice.text)] if choice.text else []
        written: list[Span] = []
        if thought := delta.reasoning_content or delta.reasoning:
            written.append((Phase.REASONING, thought))
        if delta.content:
            written.append((Phase.TEXT, delta.content))
        if _calls(choice):
            self._calls.hear(delta)
            if not written:
                self._phase = Phase.TOOL
        return written

    def _whole(self, written: list[Span]) -> list[Span]:
        """*written* in whole characters: half a surrogate at its end waits for the other half."""
        result = []
        for phase, text in written:
            kept, half = self._half
            if half and kept is not phase:
                result.append((kept, whole(half)))
                half = ""
            text, half = half + text, ""
            if "\ud800" <= text[-1] <= "\udbff":
                text, half = text[:-1], text[-1]
            self._half = (phase, half)
            if text:
                result.append((phase, whole(text)))
        return result

    def _add(
        self, choice: Choice, ids: list[int], written: list[Span], output: Output, entries: list[Logprob | None]
    ) -> None:
        """Tokens to *output*: the last of *ids* has what is *written*, and what came before without a token."""
        tokens: list[Token] = []
        if self._logprobs is not None:
            tokens = read_logprobs(choice.logprobs)
            if len(tokens) > len(ids) or UNKNOWN_ID in ids:
                ids = [token.id for token in tokens] or ids
        if not ids:
            self._pending += written
            return
        self._came += len(ids)
        if self._pending:
            written, self._pending = self._pending + written, []
        text, phase = _one(written, self._phase)
        texts = [""] * (len(ids) - 1) + [text]
        if len(tokens) == len(ids) and len(written) < 2 and "".join(token.token for token in tokens) == text:
            texts = [token.token for token in tokens]
        first = phase_of(phase)
        phases: list[TokenPhase] = [*[first] * (len(ids) - 1), phase]
        self._phase = written[-1][0] if written else self._phase
        self._thoughts += len(ids) if first is Phase.REASONING else 0
        logprobs: list[Logprob | None] = [None] * (len(ids) - len(tokens))
        logprobs += [self._entry(id, token) for id, token in zip(ids[len(logprobs) :], tokens, strict=True)]
        if self._repeat is not None:
            self._add_new(zip(ids, texts, phases, strict=True), logprobs, output, entries)
            return
        output.ids += ids
        output.texts += texts
        assert output.phases is not None
        output.phases += phases
        entries += logprobs

    def _add_new(
        self, tokens: Iterable[LogToken], logprobs: list[Logprob | None], output: Output, entries: list[Logprob | None]
    ) -> None:
        """Of *tokens* those that are not logged yet."""
        assert output.phases is not None
        for token, logprob in zip(tokens, logprobs, strict=True):
            repeat = self._repeat
            new = [token] if repeat is None or repeat.over else repeat.take(token)
            for id, text, phase in new:
                output.ids.append(id)
                output.texts.append(text)
                output.phases.append(phase)
            entries += [None] * (len(new) - 1) + [logprob] * bool(new)

    def _output(self, output: Output, entries: list[Logprob | None]) -> Output:
        phases = output.phases or []
        if (room := self.limit - len(self.ids)) < len(output.ids):
            del output.ids[room:], output.texts[room:], phases[room:], entries[room:]
        self.logged.ids += output.ids
        self.logged.texts += output.texts
        assert self.logged.phases is not None
        self.logged.phases += phases
        output.phases = phases if any(phase is not Phase.TEXT for phase in phases) else None
        if self._logprobs is not None:
            output.logprobs = entries
        if self.choice is not None:
            output.choices = [self.choice] * len(output.ids)
        if self.prompt_ids is not None and self.prompt_tokens is None:
            self.prompt_tokens = output.prompt_tokens = len(self.prompt_ids)
        return output

    def _learn_prompt(self, ids: list[int]) -> None:
        if not self._sent:  # else it has the reply's beginning behind it
            self.prompt_ids = ids

    @property
    def ended(self) -> bool:
        """Did the server say how it ended?"""
        return self._reason is not None

    def end(self) -> Output:
        """The last output: tokens that were counted but never came by themselves, and why it ended. Raises
        `Diverged`."""
        output = Output(self.key, [], [], phases=[])
        ids: list[int] = []
        thoughts = 0
        if (usage := self._usage) is not None:
            missing = min((usage.completion_tokens or 0) - self._came, self.limit - len(self.ids))
            ids = [UNKNOWN_ID] * missing
            thoughts = max(0, min(usage.reasoning_tokens - self._thoughts, missing))  # that were never shown
            if self.prompt_tokens is None and usage.prompt_tokens is not None:
                self.prompt_tokens = output.prompt_tokens = max(0, usage.prompt_tokens - self._sent)
                output.cached_tokens = min(usage.cached_tokens, output.prompt_tokens)
        phase, half = self._half
        written = self._pending + ([(phase, whole(half))] if half else [])
        if written and not ids:
            ids = [UNKNOWN_ID]
        tokens: list[LogToken] = [(id, "", Phase.TEXT) for id in ids]
        if written:
            tokens[0] = (UNKNOWN_ID, *_one(written, self._phase))
        for i in range(max(len(ids) - thoughts, bool(written)), len(ids)):
            tokens[i] = (UNKNOWN_ID, "", Phase.REASONING)
        entries: list[Logprob | None] = []
        self._add_new(tokens, [None] * len(tokens), output, entries)
        if self._repeat is not None and not self._repeat.over:
            self._repeat.end()
        last = self._output(output, entries)
        # By the log, which is all that anybody sees: some say "stop" after a call, or tell of calls without any.
        reason = self._reason or "stop"
        if reason in ("stop", "tool_calls"):
            reason = "tool_calls" if self.logged.text_of(Phase.TOOL) else "stop"
        self.finish = reason
        return last

    def _entry(self, id: int, token: Token) -> Logprob:
        """What the server told of a token, whose *id* is known where those of the alternatives are not."""
        chosen = TopLogprob(id, token.token, token.logprob or 0.0, token.data)
        top = []
        for each in token.top_logprobs:
            other = TopLogprob(each.id, each.token, NEVER if each.logprob is None else each.logprob, each.data)
            same = (other.text, other.logprob, other.data) == (chosen.text, chosen.logprob, chosen.data)
            top.append(chosen if same and each.id in (UNKNOWN_ID, id) and chosen not in top else other)
        if self._logprobs and chosen not in top:
            top.append(chosen)
        return Logprob(chosen.logprob, tuple(top), chosen.text, chosen.data)


def _calls(choice: Choice) -> bool:
    delta = choice.delta or choice.message
    return delta is not None and bool(delta.tool_calls or delta.function_call)


def _cut(tokens: Iterable[tuple[str, TokenPhase]]) -> Iterable[Span]:
    for text, phase in tokens:
        yield from segments(text, phase)


def _one(parts: list[Span], phase: Phase) -> tuple[str, TokenPhase]:
    """The text and phase of a token that has *parts*; one that has none is of the *phase*."""
    if len(parts) > 1:
        parts = joined_spans(parts)
    return "".join(text for _, text in parts), token_phase(parts, phase)
