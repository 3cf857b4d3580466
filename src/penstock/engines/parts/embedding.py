"""Vectors of texts: which inputs are computed together, and the text side. The network itself, and whose library
computes it, is the engine's; how its output becomes a vector is in `modules`.

The inputs of all requests are computed in steps of a bounded size. Requests take turns, so that one with thousands of
inputs does not keep others waiting; within a request the longest go first, so that those of a step are of about one
length and little is padding.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from penstock.core.errors import ContextLengthExceeded, InvalidRequest, ModelLoadError, Unsupported
from penstock.core.events import Prefix
from penstock.core.job import Request
from penstock.core.ports import ModelInfo, Output
from penstock.core.tasks import Tokenized, vector_text
from penstock.engines.child.backend import Backend
from penstock.engines.child.choices import Choices
from penstock.engines.options import EmbeddingOptions
from penstock.engines.parts.modules import Modules
from penstock.engines.parts.sampling import Floats, Ints
from penstock.engines.text.model import TextModel, read_json

#: Networks whose positions begin behind that of the padding token.
_OFFSET_POSITIONS = ("roberta", "xlm-roberta", "camembert", "xlm-roberta-xl", "roberta-prelayernorm", "mpnet")


class Encoder(Protocol):
    """Tokens of several texts in, a vector for each out."""

    precision: str
    dimensions: int

    def run(self, ids: Ints, mask: Ints) -> Floats:
        """Vectors, [texts, dimensions], of *ids* ([texts, tokens], padded on the right); *mask* is 1 where there is a
        token and 0 where there is padding."""
        ...


# ------------------------------------------------------------------------------------------ what the files say


@dataclass(frozen=True)
class Recipe:
    """How vectors of a model are made, beside its network.

    ``prompts``: what is put before a text, by its ``input_type``. ``cut``: to how many dimensions a vector may be cut
    (None: to none; empty: to any number). ``truncate``: are texts cut to ``max_length`` tokens, or refused?
    ``lower``: are texts in lower case before they are cut into tokens?
    """

    max_length: int
    prompts: Mapping[str, str]
    normalize: bool = True
    cut: tuple[int, ...] | None = None
    truncate: bool = False
    lower: bool = False


def max_length_of(folder: Path, text: TextModel) -> int:
    """Tokens that a text may have."""
    config = read_json(folder / "config.json")
    most = text.context_length
    if config.get("model_type") in _OFFSET_POSITIONS and (positions := config.get("max_position_embeddings")):
        most = min(most, int(positions) - int(config.get("pad_token_id", 1)) - 1)
    written = read_json(folder / "sentence_bert_config.json").get("max_seq_length")
    return min(most, int(written)) if written else most


def prompts_of(folder: Path) -> dict[str, str]:
    """What sentence-transformers has to put before queries and documents."""
    written = read_json(folder / "config_sentence_transformers.json").get("prompts") or {}
    return {kind: str(written.get(kind) or written.get(f"search_{kind}") or "") for kind in ("query", "document")} | (
        {"document": str(written["passage"])} if written.get("passage") else {}
    )


def cuts_of(folder: Path) -> tuple[int, ...] | None:
    """To how many dimensions the model was trained to be cut (Matryoshka), as `Recipe.cut`."""
    config = read_json(folder / "config.json")
    if sizes := config.get("matryoshka_dimensions"):
        return tuple(int(size) for size in sizes)
    return () if config.get("is_matryoshka") else None


def recipe_of(folder: Path, text: TextModel, options: EmbeddingOptions, modules: Modules | None) -> Recipe:
    """What the files say, and the operator instead: a ``max_length`` of 0, prompts that are empty and a ``matryoshka``
    of "auto" are left to the files. *modules*: where vectors are made of tokens' here. Raises `ModelLoadError`."""
    most = max_length_of(folder, text)
    if options.max_length > text.context_length:
        raise ModelLoadError(f"Option max_length is at most {text.context_length}: the model has no more positions.")
    given = {"query": options.query_instruction, "document": options.passage_instruction}
    prompts = prompts_of(folder) | {kind: prompt for kind, prompt in given.items() if prompt}
    if modules is not None and not modules.include_prompt and any(prompts.values()):
        raise ModelLoadError(
            f"{folder} leaves the prompt out of a text's vector (include_prompt of its pooling): it cannot be served."
        )
    return Recipe(
        max_length=options.max_length or most,
        prompts=prompts,
        normalize=options.normalize,
        cut={"on": (), "off": None}.get(options.matryoshka, cuts_of(folder)),
        truncate=options.truncate,
        lower=bool(read_json(folder / "sentence_bert_config.json").get("do_lower_case")),
    )


# ------------------------------------------------------------------------------------------ the backend


class _Inputs:
    """Of a request, those that have no vector yet."""

    __slots__ = ("choices", "dimensions", "left", "waiting")

    def __init__(self, choices: Choices, dimensions: int | None, waiting: list[tuple[int, list[int]]]) -> None:
        self.choices = choices
        self.dimensions = dimensions
        self.waiting = sorted(waiting, key=lambda each: len(each[1]))
        """(index, ids) of what is not computed yet, the longest last."""
        self.left = len(waiting)


class EmbeddingBackend(Backend):
    """See `penstock.engines.child.backend.Backend`.

    *step_tokens*: of a step, padding included (one text may have more).
    """

    def __init__(
        self, name: str, engine: str, text: TextModel, encoder: Encoder, recipe: Recipe, *, slots: int, step_tokens: int
    ) -> None:
        self.slots = slots
        self.info = ModelInfo(
            name=name,
            engine=engine,
            context_length=recipe.max_length,
            precision=encoder.precision,
            vocab_size=text.vocab_size,
            chat=False,
            tasks=("embed", "tokenize"),
            dimensions=encoder.dimensions,
        )
        self._text = text
        self._encoder = encoder
        self._recipe = recipe
        self._step_tokens = step_tokens
        self._requests: dict[int, _Inputs] = {}
        self._turn: deque[_Inputs] = deque()  # those with inputs that wait
        self._complete: list[Output] = []  # of requests that were complete before they began

    # ---------------------------------------------------------------------------- Backend

    def add(self, key: int, request: Request, prefixes: list[Prefix], attempt: int) -> None:
        assert request.inputs is not None
        self._check_dimensions(request.dimensions)
        logged = set(prefixes[0].ids)
        prompt = self._recipe.prompts.get(request.input_type or "document", "")
        ids = [self._ids(index, each, prompt) for index, each in enumerate(request.inputs)]
        waiting = [(index, each) for index, each in enumerate(ids) if index not in logged]
        choices = Choices(key, 1, sum(map(len, ids)))
        self._requests[key] = inputs = _Inputs(choices, request.dimensions, waiting)
        if inputs.left:
            self._turn.append(inputs)
        elif (last := choices.end(0, "stop")) is not None:
            self._complete.append(last)

    def tokenize(self, request: Request) -> Tokenized:
        return self._text.tokenize(request)

    def abort(self, key: int) -> None:
        self._requests.pop(key, None)
        self._turn = deque(each for each in self._turn if each.choices.key != key)
        self._complete = [output for output in self._complete if output.key != key]

    @property
    def busy(self) -> bool:
        return bool(self._requests)

    def step(self) -> list[Output]:
        outputs = {output.key: output for output in self._complete}
        self._complete.clear()
        batch = self._gather()
        if batch:
            vectors = self._compute([ids for _, _, ids in batch])
            for (inputs, index, _), vector in zip(batch, vectors, strict=True):
                choices = inputs.choices
                output = choices.output(0, [index], [vector_text(self._finished(vector, inputs.dimensions).tolist())])
                outputs.setdefault(choices.key, Output(choices.key)).extend(output)
                inputs.left -= 1
                if not inputs.left and (last := choices.end(0, "stop")) is not None:
                    outputs[choices.key].extend(last)
        for output in outputs.values():
            if output.finish is not None:
                del self._requests[output.key]
        return list(outputs.values())

    # ---------------------------------------------------------------------------- inputs

    def _ids(self, index: int, given: str | tuple[int, ...], prompt: str) -> list[int]:
        """The token ids of an input; given ids are taken as they are."""
        most = self._recipe.max_length
        if isinstance(given, str):
            given = given.lower() if self._recipe.lower else given
            if not self._recipe.truncate:
                self._text.check_size(len(prompt) + len(given), "input")
            ids = self._text.encode(prompt + given)
            if len(ids) > most and self._recipe.truncate:
                tail = self._text.special_tail(ids)
                ids = ids[: most - tail] + ids[len(ids) - tail :]
        else:
            ids = self._text.known(given, "input")
            ids = ids[:most] if self._recipe.truncate else ids
        if not ids:
            raise InvalidRequest(f"Input {index} is empty.", param="input")
        if len(ids) > most:
            raise ContextLengthExceeded.of("input", len(ids), most, index=index)
        return ids

    def _gather(self) -> list[tuple[_Inputs, int, list[int]]]:
        """The inputs of the next step: one of each request in turn, as many as there is room for."""
        batch: list[tuple[_Inputs, int, list[int]]] = []
        longest = 0
        while self._turn:
            inputs = self._turn[0]
            index, ids = inputs.waiting[-1]
            longest = max(longest, len(ids))
            if batch and longest * (len(batch) + 1) > self._step_tokens:
                break
            batch.append((inputs, index, ids))
            inputs.waiting.pop()
            self._turn.popleft()
            if inputs.waiting:
                self._turn.append(inputs)
        return batch

    def _compute(self, batch: Sequence[list[int]]) -> Floats:
        width = max(map(len, batch))
        ids = np.zeros((len(batch), width), np.int64)
        mask = np.zeros_like(ids)
        for row, each in enumerate(batch):
            ids[row, : len(each)] = each
            mask[row, : len(each)] = 1
        return self._encoder.run(ids, mask)

    # ---------------------------------------------------------------------------- vectors

    def _check_dimensions(self, wanted: int | None) -> None:
        whole, allowed = self._encoder.dimensions, self._recipe.cut
        if wanted is None or wanted == whole:
            return
        if allowed is None:
            raise Unsupported(
                f"{self.info.name} has vectors of {whole} dimensions, and was not trained to be cut.",
                param="dimensions",
            )
        if wanted not in allowed if allowed else wanted > whole:
            sizes = ", ".join(map(str, sorted({*allowed, whole}))) if allowed else f"1 to {whole}"
            raise InvalidRequest(f"Vectors of {self.info.name} can have {sizes} dimensions.", param="dimensions")

    def _finished(self, vector: Floats, dimensions: int | None) -> Floats:
        vector = vector[:dimensions]
        if self._recipe.normalize:
            vector = vector / max(float(np.linalg.norm(vector)), 1e-12)
        return vector
