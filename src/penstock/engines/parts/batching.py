"""Continuous batching over a network with a key/value cache in blocks: what runs next, where its cache is, how its
tokens are drawn and what text they make. The network itself, and whose library computes it, is the engine's.

Sequences join and leave at any step; prompts are prefilled in chunks beside those that run; equal prompt beginnings may
share blocks, and then are computed once, also where they come together; when the cache is full the youngest sequence
waits and is computed again later.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from penstock.core.events import Logprob, Prefix
from penstock.core.job import Request
from penstock.core.ports import ModelInfo, Output
from penstock.core.tasks import Tokenized
from penstock.engines.child.backend import Backend
from penstock.engines.child.choices import Choices
from penstock.engines.parts.guide import Guides, followed
from penstock.engines.parts.kvcache import ROOT, BlockPool
from penstock.engines.parts.sampling import Floats, Ints, Sampler, alternatives, stream_key
from penstock.engines.text.model import TextModel
from penstock.engines.text.reply import Reply

#: Tokens that one step computes at most: running sequences first, the rest of it goes to new prompts. Larger steps
#: prefill little faster, but make everybody else wait longer for a token.
STEP_TOKENS = 512
#: Tokens of a prompt to score in one step, over all such prompts: each of them needs a row of logits.
STEP_SCORES = 64


class Network(Protocol):
    """Tokens of several sequences in, logits of some of them out; keeps keys and values in numbered blocks."""

    vocab: int
    precision: str
    blocks: int
    block_size: int
    """Tokens that a block holds."""
    recompute_beyond: int | None
    """What a sequence of up to so many tokens has in the cache is of no use to it once it is longer: it is computed
    anew. None: there is no such length."""

    def run(self, **inputs: np.ndarray[Any, Any]) -> Floats:
        """Logits, one row per entry of ``sampled_tokens_indices``; valid (and writable) until the next call.

        The tokens of all sequences follow each other in ``input_ids`` and ``position_ids``; sequence *i* has those from
        ``subsequence_begins[i]`` on, has ``past_lens[i]`` tokens in the cache, and its blocks are in ``block_indices``
        from ``block_indices_begins[i]`` on. ``max_context_len``: tokens of the longest, these ones included.
        ``total_lens``: tokens of each, with those that are not computed yet. ``adapters``: the LoRA adapter of each,
        from 1 on, 0 for none.
        """
        ...


# ------------------------------------------------------------------------------------------ sequences

#: A place in the cache's tree of prefixes: the node above it, and the tokens of a block.
_Place = tuple[int, tuple[int, ...]]


class _Sequence:
    """One choice. The first ``published`` of its blocks are findable by others, at ``node`` of the prefix tree."""

    __slots__ = (
        "blocks",
        "choice",
        "choices",
        "node",
        "prompt",
        "published",
        "reply",
        "request",
        "rng",
        "scores",
        "slot",
    )

    def __init__(self, choices: Choices, choice: int, request: Request, prompt: list[int], reply: Reply) -> None:
        self.choices = choices
        self.choice = choice
        self.request = request
        self.prompt = prompt
        self.reply = reply
        self.rng = stream_key(request.sampling.seed, choice)
        self.slot = -1
        self.blocks: list[int] = []
        self.published = 0
        self.node = ROOT
        self.scores: _Scores | None = None

    @property
    def length(self) -> int:
        return len(self.prompt) + len(self.reply.ids)

    @property
    def shareable(self) -> list[int]:
        """The tokens of which the cache may know: all but those whose logits are wanted, which have to be computed."""
        ids = self.prompt + self.reply.ids if self.reply.ids else self.prompt
        return ids if self.scores is None else ids[: max(0, self.scores.logged - 1)]


@dataclass(frozen=True, slots=True)
class _Computed:
    """What a run of the network gave: the sequences that draw a token and their slots, one row of logits each; behind
    those, the rows of prompts that are scored, so many of each."""

    drawing: list[_Sequence]
    slots: Ints
    logits: Floats
    scored: list[tuple[_Sequence, int]]


class _Scores:
    """Makes the log of a *prompt* that is scored; *logged*: how many of its tokens are in it from an earlier attempt.
    *count*: of alternatives."""

    __slots__ = ("_count", "_prompt", "_text", "_write", "logged")

    def __init__(self, text: TextModel, prompt: list[int], logged: int, count: int) -> None:
        self._text = text
        self._prompt = prompt
        self._count = count
        self._write = text.detokenizer(continuing=True)
        self.logged = logged
        for token in prompt[:logged]:
            self._write.push(token)

    @property
    def over(self) -> bool:
        return self.logged == len(self._prompt)

    def rows(self, past: int, count: int) -> range:
        """Which of the *count* tokens from *past* on have logits for the log: those of the token behind it."""
        return range(max(past, self.logged - 1), min(past + count, len(self._prompt) - 1))

    def take(self, logits: Floats) -> tuple[list[int], list[str], list[Logprob | None]]:
        """What *logits* say of the next tokens: ids, texts, log-probabilities. Before them comes the first of all, of
        which nothing is known."""
        tokens = self._prompt[self.logged : (self.logged or 1) + len(logits)]
        texts = [self._write.push(token) for token in tokens]
        logprobs: list[Logprob | None] = [None] * (len(tokens) - len(logits))
        for row, token in zip(logits, tokens[len(tokens) - len(logits) :], strict=True):
            logprobs.append(self._text.logprob(token, *alternatives(row, token, self._count)))
        self.logged += len(tokens)
        if self.over and tokens:
            texts[-1] += self._write.flush()
        return tokens, texts, logprobs


class ContinuousBatching(Backend):
    """See `penstock.engines.child.backend.Backend`.

    A step is three calls: who computes what (`_schedule`), the network (`_compute`), and what comes of it (`_deliver`).
    """

    def __init__(
        self,
        name: str,
        engine: str,
        text: TextModel,
        network: Network,
        *,
        slots: int,
        step_tokens: int = STEP_TOKENS,
        deterministic: bool = False,
        prefix_caching: bool = False,
        adapters: tuple[str, ...] = (),
    ) -> None:
        """*adapters*: the models that a request may name beside this one, by their numbers from 1 on."""
        text.vocab_size = min(text.vocab_size, network.vocab)
        self.slots = slots
        self._step_tokens = step_tokens
        self.info = ModelInfo(
            name=name,
            engine=engine,
            context_length=text.context_length,
            precision=network.precision,
            deterministic=deterministic,
            vocab_size=text.vocab_size,
            chat=text.has_chat_template,
            no_chat=text.no_chat,
            tool_format=text.formats.tools,
            reasoning_format=text.formats.thoughts,
            unsupported=() if text.has_token_bytes else ("response_format",),
            tasks=("generate", "tokenize", "score"),
        )
        self._adapter_numbers = {name: number for number, name in enumerate(adapters, 1)}
        self._text = text
        self._guides = Guides(text) if text.has_token_bytes else None
        self._network = network
        self._pool = BlockPool(network.blocks, network.block_size, caching=prefix_caching)
        self._sampler = Sampler(slots, network.vocab)
        self._requests: dict[int, list[_Sequence]] = {}
        self._complete: list[Output] = []  # of requests that were complete before they began
        self._waiting: deque[_Sequence] = deque()
        self._prefilling: list[_Sequence] = []  # some of their prompt is not in the cache yet
        self._decoding: list[_Sequence] = []  # all but their last token is
        self._free_slots = list(range(slots - 1, -1, -1))
        # By slot, so that a step over running sequences is a handful of array operations: cache blocks, tokens in the
        # cache, the token to compute next, tokens drawn.
        self._table = np.zeros((slots, -(-text.context_length // network.block_size)), np.int32)
        self._past = np.zeros(slots, np.int32)
        self._next = np.zeros(slots, np.int64)
        self._drawn = np.zeros(slots, np.int64)
        self._adapter = np.zeros(slots, np.int64)
        self._decoding_slots: Ints | None = None  # those of _decoding; None when it has changed

    # ---------------------------------------------------------------------------- Backend

    def add(self, key: int, request: Request, prefixes: list[Prefix], attempt: int) -> None:
        text, sampling = self._text, request.sampling
        prompt = text.encode_request(request)
        text.check_ids(sampling)
        limit = min(sampling.max_tokens, text.context_length - len(prompt))
        choices = Choices(key, len(prefixes), len(prompt))
        sequences = []
        for choice, prefix in enumerate(prefixes):
            if request.task == "score":
                sequence = _Sequence(choices, choice, request, prompt, text.reply(request, 1))
                sequence.scores = _Scores(text, prompt, len(prefix.ids), sampling.logprobs or 0)
                if sequence.scores.over:
                    sequence.reply.end("stop")
            else:
                guide = self._guides.begin(request) if self._guides else None
                sequence = _Sequence(
                    choices, choice, request, prompt, text.reply(request, limit, prefix.ids, guide, prompt=prompt)
                )
            sequences.append(sequence)
        self._requests[key] = sequences
        for sequence in sequences:
            if sequence.reply.finish is None:
                self._waiting.append(sequence)
            elif (last := self._end(sequence)) is not None:
                self._complete.append(last)

    def tokenize(self, request: Request) -> Tokenized:
        return self._text.tokenize(request)

    def abort(self, key: int) -> None:
        if (sequences := self._requests.pop(key, None)) is None:
            return
        for sequence in sequences:
            if sequence.slot >= 0:
                self._leave(sequence)
        self._waiting = deque(sequence for sequence in self._waiting if sequence.choices.key != key)
        self._complete = [output for output in self._complete if output.key != key]

    @property
    def busy(self) -> bool:
        return bool(self._requests)

    def step(self) -> list[Output]:
        outputs, self._complete = self._complete, []
        prefills = self._schedule()
        if prefills or self._decoding:
            outputs += self._deliver(self._compute(prefills))
        for output in outputs:
            if output.finish is not None:
                del self._requests[output.key]
        return outputs

    # ---------------------------------------------------------------------------- who computes what

    def _schedule(self) -> list[tuple[_Sequence, int]]:
        """Make room for what the running sequences compute next; which prompts go on, and by how many tokens."""
        self._recompute_grown()
        slots = self._slots_of_decoding()
        full = np.flatnonzero(self._past[slots] % self._pool.block_size == 0)
        for sequence in [self._decoding[i] for i in full.tolist()]:
            while sequence.slot >= 0 and not self._grow(sequence, 1):
                self._preempt()

        budget = self._step_tokens - len(self._decoding)
        prefills: list[tuple[_Sequence, int]] = []
        while self._waiting and self._free_slots and self._fits(self._waiting[0]):
            self._enter(self._waiting.popleft())
        scores = STEP_SCORES
        begun: set[_Place] = set()  # blocks that this step computes: who needs the same next takes them over later
        for sequence in self._prefilling:
            if budget <= 0:
                break
            self._share(sequence)
            if (place := self._next_place(sequence)) in begun:
                continue
            count = min(budget, sequence.length - int(self._past[sequence.slot]))
            if sequence.scores is not None:
                count = min(count, scores)
                scores -= count
                if not count:
                    continue
            if place is not None:
                begun.add(place)
            if sequence.choices.cached_tokens is None:
                sequence.choices.cached_tokens = int(self._past[sequence.slot])
            prefills.append((sequence, count))
            budget -= count
        return prefills

    def _recompute_grown(self) -> None:
        """Send sequences that have just outgrown what they have in the cache back to wait."""
        if (most := self._network.recompute_beyond) is None:
            return
        for sequence in [each for each in self._decoding if self._past[each.slot] == most]:
            self._leave(sequence)
            self._waiting.appendleft(sequence)

    def _slots_of_decoding(self) -> Ints:
        if self._decoding_slots is None:
            self._decoding_slots = np.array([sequence.slot for sequence in self._decoding], np.int64)
        return self._decoding_slots

    def _fits(self, sequence: _Sequence) -> bool:
        running = len(self._decoding) + len(self._prefilling)
        # One block of headroom for everyone who runs: who gets in must not push others out at once.
        headroom = running if self._pool.block_size < self.info.context_length else 0
        missing = -(-sequence.length // self._pool.block_size) + headroom - self._pool.available
        return not running or missing <= 0 or missing <= self._pool.in_use(sequence.shareable, self._root(sequence))

    def _enter(self, sequence: _Sequence) -> None:
        """Give *sequence* a slot, what the cache already knows of its tokens, and blocks for the rest of them."""
        slot = sequence.slot = self._free_slots.pop()
        sequence.node, sequence.published = self._root(sequence), 0
        self._past[slot] = 0
        self._share(sequence)
        self._grow(sequence, sequence.length - int(self._past[slot]))
        self._drawn[slot] = len(sequence.reply.ids)
        self._adapter[slot] = self._adapter_numbers.get(sequence.request.model, 0)
        reply = sequence.reply
        self._sampler.occupy(
            slot, sequence.request.sampling, sequence.rng, sequence.prompt, reply.ids, guide=reply.mask
        )
        self._prefilling.append(sequence)

    def _share(self, sequence: _Sequence) -> None:
        """Give *sequence* what the cache knows of its next tokens, in the place of blocks of its own."""
        slot, size, begin = sequence.slot, self._pool.block_size, sequence.published
        if self._past[slot] != begin * size:
            return  # in the middle of a block of its own
        found, sequence.node = self._pool.find(sequence.shareable, begin * size, sequence.node)
        end = sequence.published = begin + len(found)
        self._pool.release(sequence.blocks[begin:end])
        sequence.blocks[begin:end] = found
        self._table[slot, begin:end] = found
        self._past[slot] = end * size

    def _next_place(self, sequence: _Sequence) -> _Place | None:
        """Where in the tree of prefixes the block will be that *sequence* computes next; None where none is shared."""
        size = self._pool.block_size
        start = sequence.published * size
        if not self._pool.caching or start + size >= len(sequence.shareable):
            return None
        return sequence.node, tuple(sequence.shareable[start : start + size])

    def _root(self, sequence: _Sequence) -> int:
        """Whose cache blocks *sequence* may share: those of sequences that compute the same of the same tokens."""
        most = self._network.recompute_beyond
        long = most is not None and sequence.length > most
        return -(2 * self._adapter_numbers.get(sequence.request.model, 0) + long)

    def _leave(self, sequence: _Sequence) -> None:
        """Take slot and blocks from *sequence*."""
        self._publish(sequence)
        self._pool.release(sequence.blocks)
        self._sampler.vacate(sequence.slot)
        self._free_slots.append(sequence.slot)
        sequence.slot = -1
        sequence.blocks = []
        if sequence in self._prefilling:
            self._prefilling.remove(sequence)
        else:
            self._decoding.remove(sequence)
            self._decoding_slots = None

    def _preempt(self) -> None:
        """The cache is full: send the youngest sequence back to wait. Its tokens are computed again later."""
        victim = (self._prefilling or self._decoding)[-1]
        self._leave(victim)
        self._waiting.appendleft(victim)

    def _grow(self, sequence: _Sequence, count: int) -> bool:
        """Blocks for *count* more tokens in the cache; False when there are too few."""
        self._publish(sequence)
        past = int(self._past[sequence.slot])
        missing = -(-(past + count) // self._pool.block_size) - len(sequence.blocks)
        if missing > self._pool.available:
            return False
        for _ in range(missing):
            block = self._pool.allocate()
            assert block is not None
            self._table[sequence.slot, len(sequence.blocks)] = block
            sequence.blocks.append(block)
        return True

    def _publish(self, sequence: _Sequence) -> None:
        """Let others find the blocks of *sequence* that are full by now."""
        size = self._pool.block_size
        full = int(self._past[sequence.slot]) // size
        if full == sequence.published:
            return
        ids = sequence.prompt + sequence.reply.ids
        for index in range(sequence.published, full):
            block, tokens = sequence.blocks[index], ids[index * size : (index + 1) * size]
            sequence.node = self._pool.publish(sequence.node, tokens, block)
        sequence.published = full

    # ---------------------------------------------------------------------------- the network

    def _compute(self, prefills: list[tuple[_Sequence, int]]) -> _Computed:
        """Run the network once."""
        drawing, drawing_slots = self._decoding, self._slots_of_decoding()
        slots, ids = drawing_slots, self._next[drawing_slots]
        counts = np.ones(len(slots), np.int32)
        if prefills:
            slots = np.concatenate([slots, [sequence.slot for sequence, _ in prefills]]).astype(np.int64)
            counts = np.concatenate([counts, [count for _, count in prefills]]).astype(np.int32)
            parts = [ids]
            for sequence, count in prefills:
                past = int(self._past[sequence.slot])
                parts.append(np.array((sequence.prompt + sequence.reply.ids)[past : past + count], np.int64))
            ids = np.concatenate(parts)

        before = self._past[slots]
        after = before + counts
        total = after.copy()
        total[len(drawing) :] = [sequence.length for sequence, _ in prefills]
        begins = np.zeros(len(slots) + 1, np.int32)
        np.cumsum(counts, out=begins[1:])
        positions = np.arange(len(ids)) - np.repeat(begins[:-1] - before, counts)
        used = -(-after // self._pool.block_size)
        table_begins = np.zeros(len(slots) + 1, np.int32)
        np.cumsum(used, out=table_begins[1:])
        most = int(used.max())

        sampled = begins[1:].astype(np.int64) - 1
        scored: list[tuple[_Sequence, int]] = []
        if prefills:
            draws = np.ones(len(slots), np.bool_)  # whose tokens are all in the cache after this
            scores = [sampled[:0]]
            for row, (sequence, count) in enumerate(prefills, start=len(drawing)):
                if sequence.scores is None:
                    draws[row] = after[row] == sequence.length
                else:
                    draws[row] = False
                    past = int(before[row])
                    wanted = sequence.scores.rows(past, count)
                    scores.append(begins[row] - past + np.arange(wanted.start, wanted.stop))
                    scored.append((sequence, len(wanted)))
            drawing = drawing + [sequence for row, (sequence, _) in enumerate(prefills, len(drawing)) if draws[row]]
            drawing_slots, sampled = slots[draws], np.concatenate([sampled[draws], *scores])

        logits = self._network.run(
            input_ids=ids,
            position_ids=positions,
            past_lens=before,
            total_lens=total,
            adapters=self._adapter[slots],
            subsequence_begins=begins,
            block_indices=self._table[slots, :most][np.arange(most) < used[:, None]],
            block_indices_begins=table_begins,
            max_context_len=np.array(after.max(), np.int32),
            sampled_tokens_indices=sampled,
        )
        self._past[slots] = after
        for sequence, _ in prefills:
            self._publish(sequence)
        return _Computed(drawing, drawing_slots, logits, scored)

    # ---------------------------------------------------------------------------- what comes of it

    def _deliver(self, computed: _Computed) -> list[Output]:
        scored = self._deliver_scores(computed)  # first: drawing may change the logits
        return (self._deliver_tokens(computed) if computed.drawing else []) + scored

    def _deliver_scores(self, computed: _Computed) -> list[Output]:
        outputs = []
        row = len(computed.drawing)
        for sequence, count in computed.scored:
            scores = sequence.scores
            assert scores is not None
            output = sequence.choices.output(sequence.choice, *scores.take(computed.logits[row : row + count]))
            row += count
            if scores.over:
                sequence.reply.end("stop")
                self._leave(sequence)
                if (last := self._end(sequence)) is not None:
                    output.extend(last)
            outputs.append(output)
        return outputs

    def _deliver_tokens(self, computed: _Computed) -> list[Output]:
        drawing, slots = computed.drawing, computed.slots
        self._drawn[slots] += 1
        tokens, logprobs = self._sampler.draw(computed.logits[: len(drawing)], slots, self._drawn[slots])
        self._next[slots] = tokens

        outputs: dict[int, Output] = {}
        ended: list[_Sequence] = []
        for row, (sequence, token) in enumerate(zip(drawing, tokens, strict=True)):
            reply, choices = sequence.reply, sequence.choices
            logprob: list[Logprob | None] | None = None
            if row in logprobs:
                logprob = [self._text.logprob(token, *logprobs[row])]
            text = reply.push(token)
            output = choices.output(sequence.choice, [token], [text], logprob, reply.phases)
            if (earlier := outputs.get(choices.key)) is None:
                outputs[choices.key] = output
            else:  # another choice of the same request
                earlier.extend(output)
            if reply.finish is not None:
                ended.append(sequence)

        if len(drawing) > len(self._decoding):  # these have their prompt in the cache now
            begun = drawing[len(self._decoding) :]
            self._prefilling = [sequence for sequence in self._prefilling if sequence not in begun]
            self._decoding = drawing
            self._decoding_slots = slots
        for sequence in ended:
            self._leave(sequence)
            if (last := self._end(sequence)) is not None:
                outputs[last.key].extend(last)
        return list(outputs.values())

    def _end(self, sequence: _Sequence) -> Output | None:
        """How the request ends with this *sequence*, if it does."""
        reply = sequence.reply
        return sequence.choices.end(sequence.choice, reply.finish or "stop", reply.stop, followed(reply.guide))

    def warm_up(self, seconds: float) -> Iterator[None]:
        """Compile kernels for the batch sizes to come, the likeliest first, one at each step of the iterator, for about
        *seconds* of work.

        The runtime compiles one per number of tokens in a step, on first use; that would be a stall in a reply. But a
        model that is wanted must not wait for it: so it is done while there is nothing else to do.
        """
        spent = 0.0
        for size in (1, self.slots, *range(2, self.slots)):
            if spent > seconds or (block := self._pool.allocate()) is None:
                return
            begun = time.monotonic()
            zeros = np.zeros(size, np.int32)
            self._network.run(
                input_ids=np.zeros(size, np.int64),
                position_ids=np.zeros(size, np.int64),
                past_lens=zeros,
                total_lens=zeros + 1,
                adapters=zeros,
                subsequence_begins=np.arange(size + 1, dtype=np.int32),
                block_indices=np.full(size, block, np.int32),
                block_indices_begins=np.arange(size + 1, dtype=np.int32),
                max_context_len=np.array(1, np.int32),
                sampled_tokens_indices=np.arange(size),
            )
            self._pool.release([block])
            spent += time.monotonic() - begun
            yield
