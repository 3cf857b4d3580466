"""Tiny random models of many families, made by the reference library's own classes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.support import tiny_models as tiny

#: What most configs call the sizes.
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
}
#: Of the models whose queries all have keys of their own.
PLAIN = {name: value for name, value in SIZES.items() if name != "num_key_value_heads"}


def made(folder: Path, architecture: str, config: dict[str, Any]) -> Any:
    """The reference's model, saved in *folder* with a tokenizer. Its weights are large enough that attention looks at
    single tokens, and no two layers, heads or positions are alike."""
    import torch
    import transformers

    folder.mkdir(parents=True)
    tokenizer = tiny.byte_level()
    tokenizer.save(str(folder / "tokenizer.json"))
    model_class = getattr(transformers, architecture)
    ids = {"vocab_size": tokenizer.get_vocab_size(), "bos_token_id": 0, "eos_token_id": 3, "pad_token_id": 0}
    text = config.get("text_config")
    settings = model_class.config_class(**({**config, "text_config": {**ids, **text}} if text else {**ids, **config}))
    settings._attn_implementation = "eager"
    torch.manual_seed(5)
    model = model_class(settings).eval().float()
    learned = architecture in ("GPT2LMHeadModel", "OPTForCausalLM")
    for name, weight in model.named_parameters():
        with torch.no_grad():
            if weight.dim() == 1 or "norm" in name.rsplit(".", 2)[-2]:
                weight.add_(torch.randn_like(weight) * 0.2)
            elif "embed" in name or "wte" in name or "wpe" in name:
                # Where the head is the same table, and no learned position is added to what is taken from it, a reply
                # would only repeat its prompt's last token. Gemma scales it.
                smaller = 4.0 if settings.tie_word_embeddings and not learned else 1.0
                smaller *= weight.shape[-1] ** 0.5 if architecture.startswith("Gemma") else 1.0
                weight.copy_(torch.randn_like(weight) / smaller)
            else:
                weight.copy_(torch.randn_like(weight) * 1.5 / weight.shape[-1] ** 0.5)
    model.save_pretrained(folder)
    saved = json.loads((folder / "config.json").read_text())
    assert saved["architectures"] == [architecture]
    return model
