"""A folder's weights in a module of the library, all of them and nothing made up."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from penstock.core.errors import ModelLoadError

#: Tensors of checkpoints that a model may leave unread and be the same: tables that it computes by itself, masks, and
#: parts beside the text model (eyes, ears, heads for training, layers that guess further tokens).
HARMLESS = re.compile(
    r"inv_freq|(attn|attention)\.(masked_)?bias$|position_ids$|"
    r"(^|\.)(vision|visual|audio|mtp|multi_modal_projector|vision_tower|vision_model|audio_tower|embed_vision|"
    r"embed_audio|pooler|cls|nsp|qa_outputs|score|classifier)[._]"
)
#: How many names a refusal gives.
NAMED = 3


def read(kind: Any, folder: Path, dtype: Any, device: torch.device, unneeded: re.Pattern[str] | None = None) -> Any:
    """The model in *folder* as *kind* (one of the library's ``AutoModel…``) makes it, ready to compute.

    *unneeded*: tensors that what is wanted of the model does not depend on. Raises `ModelLoadError` for what the
    library cannot read, and where it would fill in random numbers for tensors that the files lack, or leave out some
    that the model was trained with.
    """
    try:
        model, told = kind.from_pretrained(
            folder,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
            output_loading_info=True,
        )
        model = model.to(device).eval()
    except Exception as error:  # the library's checks raise whatever they like
        raise ModelLoadError(f"transformers cannot load {folder}: {error}") from error
    missing, unused = (
        [name for name in told[keys] if not (unneeded is not None and unneeded.search(name))]
        for keys in ("missing_keys", "unexpected_keys")
    )
    unused = [name for name in unused if not HARMLESS.search(name)]
    for names, problem in (
        (missing, "are not in its files, and would be random"),
        (unused, f"of its files have no place in a {type(model).__name__}, which would go on without them"),
    ):
        if names:
            raise ModelLoadError(
                f"{folder} cannot be served: the tensors {_listed(names)} {problem}. Is the download complete, and "
                "does config.json name the architecture that the weights are of?"
            )
    return model


def _listed(names: Iterable[str]) -> str:
    first, *rest = sorted(names)
    shown = [first, *rest[: NAMED - 1]]
    more = len(rest) + 1 - len(shown)
    return ", ".join(shown) + (f" and {more} more" if more else "")
