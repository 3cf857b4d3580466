"""A model of the library as a `Network`: its modules compute, attention is ours, a GPU's steps are recorded."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from transformers import AttentionInterface

from penstock.engines.child.notices import notify
from penstock.engines.parts.sampling import Floats, Ints
from penstock.engines.transformers import rope
from penstock.engines.transformers.adapters import Adapters

#: Devices whose steps are recorded (`RecordedStep`).
RECORDED = {"cuda"}

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}


class _Unsuited(Exception):
    """The model's attention needs something that `_attend` does not do."""


class TorchNetwork:
    """See `penstock.engines.parts.batching.Network`. A block is a row of the cache and holds a whole sequence."""

    def __init__(self, model: Any, device: torch.device, adapters: Adapters | None = None) -> None:
        self._model = model
        self._adapters = adapters or Adapters({})
        self.device = device
        self._recording = device.type in RECORDED
        self.precision = precision_name(model.dtype)
        self.vocab = 0
        self.recompute_beyond = rope.switch_of(model)
        if self.recompute_beyond is not None:
            rope.choose_by_text(model, self.recompute_beyond, lambda: None if _step is None else _step.is_long)
        self.resize(2, 64)

    def resize(self, blocks: int, block_size: int) -> None:
        """Forget everything; room for *blocks* sequences of *block_size* tokens."""
        self.blocks = blocks
        self.block_size = block_size
        self._cache: dict[int, list[torch.Tensor]] = {}
        self._recorded: dict[tuple[int, int], RecordedStep] = {}
        #: Memory that all recorded steps share, since one runs at a time; it goes with the last of them.
        self.pool: Any = None

    @property
    def token_bytes(self) -> int:
        """Bytes of cache that a token takes, once something was run."""
        return sum(part[0, :, 0].numel() * part.element_size() for pair in self._cache.values() for part in pair)

    def run(self, **inputs: np.ndarray[Any, Any]) -> Floats:
        with torch.inference_mode():
            # What is recorded is a step of one token a sequence, each of which has its logits.
            rows = np.arange(len(inputs["past_lens"]))
            if (
                self._recording
                and not inputs["adapters"].any()
                and len(inputs["input_ids"]) == len(rows)
                and np.array_equal(inputs["sampled_tokens_indices"], rows)
            ):
                try:
                    logits = self._replay(inputs)
                except RuntimeError as error:  # the model does something that cannot be recorded
                    notify("engine.cuda_graphs_off", error=str(error))
                    self._recording = False
                    self._recorded.clear()
                    logits = self._compute(inputs)
            else:
                logits = self._compute(inputs)
        self.vocab = logits.shape[-1]
        return logits

    def _compute(self, inputs: Mapping[str, np.ndarray[Any, Any]]) -> Floats:
        step = Step(self, inputs)
        self._adapters.routes, self._adapters.tokens = self._routes(inputs), step.tokens
        try:
            logits = self.forward(
                step,
                self.tensor(inputs["input_ids"]),
                self.tensor(inputs["position_ids"]),
                self.tensor(inputs["sampled_tokens_indices"]),
            )
        finally:
            self._adapters.routes = None
        result: Floats = logits.cpu().numpy()
        return result

    def _routes(self, inputs: Mapping[str, np.ndarray[Any, Any]]) -> list[tuple[int, torch.Tensor | None]]:
        """Which tokens go through which adapter."""
        adapters = inputs["adapters"]
        if not adapters.any():
            return []
        if (adapters == adapters[0]).all():
            return [(int(adapters[0]), None)]
        by_token = np.repeat(adapters, np.diff(inputs["subsequence_begins"]))
        return [
            (int(number), self.tensor(np.flatnonzero(by_token == number))) for number in np.unique(adapters) if number
        ]

    def _replay(self, inputs: Mapping[str, np.ndarray[Any, Any]]) -> Floats:
        rows, past = inputs["block_indices"], inputs["past_lens"]
        width = min(_rounded(int(rows.max()) + 1), self.blocks)
        length = min(max(_rounded(int(past.max()) + 1), SHORTEST), self.block_size)
        if (recorded := self._recorded.get((width, length))) is None:
            recorded = self._recorded[width, length] = RecordedStep(self, width, length)
        return recorded(inputs["input_ids"], past, rows)

    def forward(
        self, step: Step | RecordedStep, ids: torch.Tensor, positions: torch.Tensor, kept: torch.Tensor
    ) -> torch.Tensor:
        """Logits in float32, [kept, vocabulary]."""
        global _step
        _step = step
        try:
            logits: torch.Tensor = self._model(
                input_ids=ids[None], position_ids=positions[None], use_cache=False, logits_to_keep=kept
            ).logits[0]
        finally:
            _step = None
        return logits.float()

    def tensor(self, values: np.ndarray[Any, Any]) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(values, np.int64)).to(self.device)

    def store(
        self, layer: int, keys: torch.Tensor, values: torch.Tensor, step: Step | RecordedStep
    ) -> list[torch.Tensor]:
        """The cache of *layer*, [blocks + 1, heads, tokens, size] each, with the new tokens' *keys* and *values* in it
        ([1, heads, tokens, size]). What is computed for nobody goes into the last row."""
        if (cache := self._cache.get(layer)) is None:
            cache = self._cache[layer] = [
                _zeros(part, self.blocks + 1, part.shape[1], self.block_size, part.shape[3]) for part in (keys, values)
            ]
        for part, new in zip(cache, (keys, values), strict=True):
            part[step.token_rows, :, step.token_positions] = new[0].transpose(0, 1)
        return cache


def _zeros(like: torch.Tensor, *shape: int) -> torch.Tensor:
    """What is masked must still be a number: nothing times a NaN is a NaN."""
    if like.device.type != "cpu":
        return like.new_zeros(shape)
    # From the system's zero pages: those untouched cost nothing, the memory is taken as sequences grow into it.
    data = np.zeros(math.prod(shape) * like.element_size(), np.uint8)
    return torch.from_numpy(data).view(like.dtype).view(shape)


class Step:
    """Who is where in the row of tokens that goes through the model."""

    def __init__(self, network: TorchNetwork, inputs: Mapping[str, np.ndarray[Any, Any]]) -> None:
        self.network = network
        begins, past, rows = inputs["subsequence_begins"], inputs["past_lens"], inputs["block_indices"]
        counts = np.diff(begins)
        self.tokens = int(begins[-1])
        self.token_rows = network.tensor(np.repeat(rows, counts))
        self.token_positions = network.tensor(inputs["position_ids"])
        #: [tokens]: which are of texts beyond the length at which rotary positions change; None for none.
        self.is_long: torch.Tensor | None = None
        if network.recompute_beyond is not None:
            is_long = inputs["total_lens"] > network.recompute_beyond
            if is_long.any():
                self.is_long = torch.from_numpy(np.repeat(is_long, counts)).to(network.device)
        single = np.flatnonzero(counts == 1)
        self.prefills = [
            (int(rows[i]), int(past[i]), int(begins[i]), int(counts[i])) for i in np.flatnonzero(counts > 1)
        ]
        #: Those that add one token look back together.
        self.singles = len(single)
        if not self.singles:
            return
        self.where = None if self.singles == self.tokens else network.tensor(begins[single])
        self.longest = int(past[single].max()) + 1
        lengths, self.rows = past[single] + 1, None
        rows = rows[single]
        top = int(rows.max()) + 1
        if top <= 2 * len(rows):  # most rows up to the last one: computing idle ones is cheaper than copying the others
            self.extent = top
            if not np.array_equal(rows, np.arange(top)):
                self.rows = network.tensor(rows)
            spread = np.zeros(top, np.int64)
            spread[rows] = lengths
            lengths = spread
            self.gather = None
        else:
            self.gather = network.tensor(rows)
        self._lengths = network.tensor(lengths)[:, None, None, None]
        self._masks: dict[int | None, torch.Tensor | None] = {}
        self._even = bool((lengths == self.longest).all())

    def mask(self, window: int | None) -> torch.Tensor | None:
        """[sequences, 1, 1, tokens]: what each single token may look at; None for everything."""
        if window not in self._masks:
            if self._even and (window is None or window >= self.longest):
                self._masks[window] = None
            else:
                index = torch.arange(self.longest, device=self._lengths.device)
                mask = index < self._lengths
                self._masks[window] = mask if window is None else mask & (index >= self._lengths - window)
        return self._masks[window]


#: The least length that steps are recorded for.
SHORTEST = 64


def _rounded(count: int) -> int:
    """The next power of two."""
    return 1 << (count - 1).bit_length()


class RecordedStep:
    """A step in which sequences in the first *width* rows of the cache, of up to *length* tokens, add one token each;
    rows without one compute something that nobody looks at. Recorded at the first call, replayed at every other."""

    prefills = ()
    where = gather = rows = None

    def __init__(self, network: TorchNetwork, width: int, length: int) -> None:
        self.network = network
        self.tokens = self.singles = self.extent = width
        self.longest = length
        self._inputs = torch.zeros((4, width), dtype=torch.int64, device=network.device)
        self._ids, self.token_positions, self.token_rows, lengths = self._inputs
        self._lengths = lengths[:, None, None, None]
        self.is_long: torch.Tensor | None = None
        self._all = torch.arange(width, device=network.device)
        self._masks: dict[int | None, torch.Tensor] = {}
        self._graph: torch.cuda.CUDAGraph | None = None
        self._logits: torch.Tensor | None = None

    def __call__(self, ids: Ints, past: Ints, rows: Ints) -> Floats:
        """Logits, a row for each of *ids*, the next tokens of the sequences in *rows* that have *past* tokens."""
        inputs = np.zeros((4, self.tokens), np.int64)
        inputs[2] = self.network.blocks
        inputs[3] = 1
        inputs[:, rows] = ids, past, rows, past + 1
        self._inputs.copy_(torch.from_numpy(inputs))
        if self._graph is None:
            self._record()
        else:
            self._graph.replay()
        assert self._logits is not None
        logits: Floats = self._logits.cpu().numpy()
        return logits if np.array_equal(rows, np.arange(self.tokens)) else logits[rows]

    def _record(self) -> None:
        # As torch asks for: first on a stream of its own, so that what libraries set up at first use is not recorded.
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                self.forward()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.network.pool, capture_error_mode="thread_local"):
            self._logits = self.forward()
        graph.replay()
        self._graph, self.network.pool = graph, graph.pool()

    def forward(self) -> torch.Tensor:
        self._masks.clear()
        if (switch := self.network.recompute_beyond) is not None:
            self.is_long = self._lengths.flatten() > switch
        return self.network.forward(self, self._ids, self.token_positions, self._all)

    def mask(self, window: int | None) -> torch.Tensor:
        """As `Step.mask`."""
        if window not in self._masks:
            index = torch.arange(self.longest, device=self._lengths.device)
            mask = index < self._lengths
            self._masks[window] = mask if window is None else mask & (index >= self._lengths - window)
        return self._masks[window]


#: What the model is computing now: the library hands attention functions nothing of ours.
_step: Step | RecordedStep | None = None


def _attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """Attention as the library calls it: [1, heads, tokens, size] each; the result is [1, tokens, heads, size]."""
    step = _step
    if step is None:
        raise _Unsuited("attention outside a step")
    for name in ("softcap", "s_aux", "position_bias", "sinks"):
        if others.get(name) is not None:
            raise _Unsuited(f"attention with {name}")
    keys, values = step.network.store(module.layer_idx, key, value, step)
    heads, size = query.shape[1], values.shape[-1]
    groups = heads // keys.shape[1]
    attention = torch.nn.functional.scaled_dot_product_attention
    result = query.new_empty((step.tokens, heads, size))

    if step.singles:
        ours = query[0].transpose(0, 1)
        if step.where is not None:
            ours = ours[step.where]
        ours = ours.reshape(step.singles, keys.shape[1], groups, -1)
        if step.gather is not None:
            near, far = keys[step.gather, :, : step.longest], values[step.gather, :, : step.longest]
        else:
            near, far = keys[: step.extent, :, : step.longest], values[: step.extent, :, : step.longest]
            if step.rows is not None:
                spread = ours.new_zeros((step.extent, *ours.shape[1:]))
                spread[step.rows] = ours
                ours = spread
        seen = attention(ours, near, far, attn_mask=step.mask(sliding_window), scale=scaling)
        if step.rows is not None:
            seen = seen[step.rows]
        seen = seen.reshape(step.singles, heads, size)
        if step.where is None:
            return seen[None], None
        result[step.where] = seen

    for row, past, begin, count in step.prefills:
        end = past + count
        mask = None
        if past or (sliding_window is not None and sliding_window < end):
            index = torch.arange(end, device=query.device)
            own = torch.arange(past, end, device=query.device)[:, None]
            mask = index <= own
            if sliding_window is not None:
                mask &= index > own - sliding_window
        seen = attention(
            query[:, :, begin : begin + count],
            keys[row : row + 1, :, :end],
            values[row : row + 1, :, :end],
            attn_mask=mask,
            is_causal=mask is None,
            scale=scaling,
            enable_gqa=groups > 1,
        )
        result[begin : begin + count] = seen[0].transpose(0, 1)
    return result[None], None


AttentionInterface.register("penstock", _attend)


def precision_name(dtype: torch.dtype) -> str:
    return next((name for name, known in DTYPES.items() if known == dtype), str(dtype).removeprefix("torch."))
