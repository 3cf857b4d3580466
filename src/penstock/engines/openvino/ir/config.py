"""A model's config.json, read so that nothing of it is overlooked."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from penstock.engines.openvino.ir.refusal import unbuildable

_HARMLESS = """
    architectures auto_map model_type name _name_or_path transformers_version torch_dtype dtype license
    vocab_size max_position_embeddings max_sequence_length model_max_length seq_length n_ctx tokenizer_class
    bos_token_id eos_token_id pad_token_id unk_token_id sep_token_id decoder_start_token_id prefix
    use_cache use_return_dict return_dict output_attentions output_hidden_states cache_implementation
    attn_implementation _attn_implementation _attn_implementation_autoset _attn_implementation_internal
    use_flash_attn flash_attn fused_dense fused_bias_fc use_fused_swiglu use_fused_rope use_fused_rms_norm
    torchscript pretraining_tp tensor_parallel gradient_checkpointing task_specific_params problem_type id2label
    label2id finetuning_task is_decoder is_encoder_decoder chunk_size_feed_forward pruned_heads is_llama_config
    use_bfloat16 tf_legacy_loss remove_invalid_values exponential_decay_length_penalty generation_config
    initializer_range init_std initializer_factor mup_init hidden_dropout hidden_dropout_prob attention_dropout dropout
    attention_probs_dropout_prob resid_pdrop embd_pdrop attn_pdrop layerdrop residual_dropout embedding_dropout
    activation_dropout classifier_dropout summary_type summary_use_proj summary_activation summary_proj_to_labels
    summary_first_dropout router_aux_loss_coef output_router_logits router_jitter_noise input_jitter_noise
    attention_bias attention_out_bias mlp_bias use_bias use_qkv_bias bias enable_bias qkv_bias o_bias
    unsloth_version unsloth_fixed transformers.js_config word_embed_proj_dim ffn_dim intermediate_size
"""
#: Keys that change nothing of what a decoder computes: names, files, ends of texts, and what only training has. Biases
#: are among them since they are used where the files have them, and sizes that the tensors have.
HARMLESS = frozenset(_HARMLESS.split())


class Config:
    """*values* of a config.json. Remembers what was asked for: `done` refuses the rest."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self._values = values
        self._seen: set[str] = set()

    @property
    def architecture(self) -> str:
        return str((self._values.get("architectures") or ["unknown"])[0])

    def get(self, name: str, default: Any = None) -> Any:
        """*default* only where the key is absent: null is a value."""
        self._seen.add(name)
        return self._values.get(name, default)

    def number(self, *names: str, default: float | None = None) -> float:
        """Of the first of *names* that has one. Refused where none has, and there is no *default*."""
        found: Any = default
        for name in reversed(names):
            value = self.get(name)
            found = found if value is None else value
        if found is None or isinstance(found, (str, list, dict)):
            raise unbuildable(f"its config has no number {names[0]}")
        return float(found)

    def whole(self, *names: str, default: int | None = None) -> int:
        return int(self.number(*names, default=default))

    def flag(self, name: str, default: bool = False) -> bool:
        value = self.get(name)
        return default if value is None else bool(value)

    def refuse(self, name: str, why: str) -> None:
        """Refuse where *name* is set to anything."""
        if self.get(name):
            raise unbuildable(why)

    def text(self, architecture: str) -> Config:
        """Of the text part of a network that sees or hears too; the rest of it is not built."""
        text = self.get("text_config")
        if not isinstance(text, dict):
            raise unbuildable("its config has no text_config")
        self.ignore(*(name for name in self._values if name != "quantization_config"))
        return Config({"tie_word_embeddings": self.get("tie_word_embeddings"), **text, "architectures": [architecture]})

    def ignore(self, *names: str) -> None:
        """Keys that change nothing in this family."""
        self._seen.update(names)

    def done(self) -> None:
        """Refuse what nobody asked for: it could change the result."""
        strange = sorted(
            name for name, value in self._values.items() if value is not None and name not in self._seen | HARMLESS
        )
        if strange:
            raise unbuildable(f"its config has what is unknown here: {', '.join(strange)}")
