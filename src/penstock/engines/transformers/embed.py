"""Vectors of texts by the library's modules: encoders of any kind, and decoders that were trained to embed."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModel

from penstock.core.errors import ModelLoadError
from penstock.engines.parts.modules import embeds, modules_of
from penstock.engines.parts.sampling import Floats, Ints
from penstock.engines.text.model import read_json
from penstock.engines.transformers import checkpoint
from penstock.engines.transformers.check import off, texts, tolerance
from penstock.engines.transformers.network import precision_name
from penstock.engines.transformers.options import TransformersOptions

#: Tensors without which the vectors of tokens are the same: the head of what it was trained by, another pooling.
UNNEEDED = re.compile(r"(^|\.)(pooler|cls|lm_head|vocab_\w+|head|decoder|discriminator_predictions)\.")
#: Architectures of networks that write nothing.
ENCODERS = re.compile(r"((?<!Head)Model|ForMaskedLM|ForPreTraining)$")


def is_encoder(folder: Path, options: TransformersOptions) -> bool:
    """Does the model in *folder* embed, by what its files or the operator say?"""
    architectures = read_json(folder / "config.json").get("architectures") or [""]
    return embeds(folder) or options.pooling != "auto" or bool(ENCODERS.search(architectures[0]))


class TorchEncoder:
    """See `penstock.engines.parts.embedding.Encoder`."""

    def __init__(self, folder: Path, dtype: Any, device: torch.device, options: TransformersOptions) -> None:
        self.modules = modules_of(folder, options.pooling)
        self._device = device
        self._model = checkpoint.read(AutoModel, folder, dtype, device, unneeded=UNNEEDED)
        self.precision = precision_name(self._model.dtype)
        self.dimensions = self.modules.dimensions(int(self._model.config.hidden_size))
        try:
            self._check()
        except Exception as error:  # whatever a stranger's module raises when it is called in a way it does not know
            raise ModelLoadError(f"A {type(self._model).__name__} cannot embed here: {error}") from error

    def run(self, ids: Ints, mask: Ints) -> Floats:
        return self.modules(self._hidden(ids, mask), mask)

    def _hidden(self, ids: Ints, mask: Ints) -> Floats:
        """The vectors of tokens, [texts, tokens, size]."""
        with torch.inference_mode():
            hidden = self._model(
                input_ids=torch.from_numpy(ids).to(self._device), attention_mask=torch.from_numpy(mask).to(self._device)
            ).last_hidden_state
        result: Floats = hidden.float().cpu().numpy()
        return result

    def _check(self) -> None:
        """Raise `ValueError` where a text's vectors depend on the padding that longer ones beside it bring."""
        longer, shorter = texts(int(self._model.config.vocab_size), 29, 21)
        ids, mask = np.zeros((2, len(longer)), np.int64), np.zeros((2, len(longer)), np.int64)
        for row, text in enumerate((longer, shorter)):
            ids[row, : len(text)], mask[row, : len(text)] = text, 1
        together = torch.from_numpy(self._hidden(ids, mask))
        for row, text in enumerate((longer, shorter)):
            alone = torch.from_numpy(self._hidden(text[None], np.ones((1, len(text)), np.int64)))
            if not (far := off(together[row, : len(text)], alone[0])) <= tolerance(self._model):
                raise ValueError(f"beside a longer text, a text's vectors are {far:.2g} standard deviations off")
