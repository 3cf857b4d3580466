"""A Llama in plain PyTorch.

The modules are named as in Hugging Face's ``LlamaForCausalLM``, so the state dict is the
published file: no conversion step can go wrong.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

Cache = list[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Config:
    """The shape of the model."""

    vocab_size: int = 4096
    hidden_size: int = 256
    num_layers: int = 6
    num_heads: int = 4
    intermediate_size: int = 704
    max_positions: int = 1024
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-5

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_heads


class RMSNorm(nn.Module):
    """Root mean square normalisation, computed in float32."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.to(x.dtype)


class Attention(nn.Module):
    """Causal self-attention with rotary positions."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        size = config.hidden_size
        self.heads, self.head_dim = config.num_heads, config.head_dim
        self.q_proj = nn.Linear(size, size, bias=False)
        self.k_proj = nn.Linear(size, size, bias=False)
        self.v_proj = nn.Linear(size, size, bias=False)
        self.o_proj = nn.Linear(size, size, bias=False)

    def forward(
        self, x: Tensor, rope: tuple[Tensor, Tensor], mask: Tensor | None, past: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        batch, length, size = x.shape
        split = (batch, length, self.heads, self.head_dim)
        q = rotate(self.q_proj(x).view(split).transpose(1, 2), rope)
        k = rotate(self.k_proj(x).view(split).transpose(1, 2), rope)
        v = self.v_proj(x).view(split).transpose(1, 2)
        if past is not None:
            k, v = torch.cat([past[0], k], dim=2), torch.cat([past[1], v], dim=2)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
        return self.o_proj(out.transpose(1, 2).reshape(batch, length, size)), (k, v)


class MLP(nn.Module):
    """The gated feed-forward part of a layer."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    """One transformer layer."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(
        self, x: Tensor, rope: tuple[Tensor, Tensor], mask: Tensor | None, past: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        attended, kept = self.self_attn(self.input_layernorm(x), rope, mask, past)
        x = x + attended
        return x + self.mlp(self.post_attention_layernorm(x)), kept


class Body(nn.Module):
    """Everything but the output head; it exists for the sake of the tensor names."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class Llama(nn.Module):
    """The language model. The output head shares its weights with the embedding."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.model = Body(config)
        self.apply(self._initialise)
        for layer in self.model.layers:
            # The residual stream should not grow with depth.
            for linear in (layer.self_attn.o_proj, layer.mlp.down_proj):
                nn.init.normal_(linear.weight, std=0.02 / (2 * config.num_layers) ** 0.5)

    @staticmethod
    def _initialise(module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)

    def forward(
        self, ids: Tensor, *, positions: Tensor | None = None, mask: Tensor | None = None, cache: Cache | None = None
    ) -> Tensor:
        """Logits for every position. ``cache`` is filled in place, layer by layer."""
        if positions is None:
            positions = torch.arange(ids.shape[1], device=ids.device)[None]
        x = self.model.embed_tokens(ids)
        rope = rotary(self.config, positions, x.dtype)
        for index, layer in enumerate(self.model.layers):
            past = cache[index] if cache is not None and len(cache) > index else None
            x, kept = layer(x, rope, mask, past)
            if cache is not None:
                cache[index : index + 1] = [kept]
        return F.linear(self.model.norm(x), self.model.embed_tokens.weight)

    @property
    def parameter_count(self) -> int:
        """How many numbers the model has."""
        return sum(p.numel() for p in self.parameters())


def rotary(config: Config, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the rotary embedding, shaped ``(batch, 1, length, head_dim)``."""
    half = torch.arange(0, config.head_dim, 2, device=positions.device).float() / config.head_dim
    angles = positions.float()[..., None] * (config.rope_theta**-half)
    angles = torch.cat([angles, angles], dim=-1)[:, None]
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Applies rotary positions the way Hugging Face lays them out (half and half)."""
    cos, sin = rope
    first, second = x.chunk(2, dim=-1)
    return x * cos.to(x.dtype) + torch.cat([-second, first], dim=-1) * sin.to(x.dtype)


@torch.inference_mode()
def generate(
    model: Llama,
    prompts: Sequence[Sequence[int]],
    *,
    stop: set[int],
    pad: int,
    max_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
) -> list[list[int]]:
    """Continues a batch of prompts until each has said a stop token (which is kept)."""
    device = next(model.parameters()).device
    random = torch.Generator(device=device).manual_seed(seed)
    width = max(map(len, prompts))
    ids = torch.tensor([[pad] * (width - len(p)) + list(p) for p in prompts], device=device)
    real = torch.tensor([[False] * (width - len(p)) + [True] * len(p) for p in prompts], device=device)
    out: list[list[int]] = [[] for _ in prompts]
    open_rows = set(range(len(prompts)))
    cache: Cache = []
    causal = torch.ones(width, width, dtype=torch.bool, device=device).tril()
    # A padding position may look at itself: a row with nothing to look at would be NaN.
    mask = (causal & real[:, None, :]) | torch.eye(width, dtype=torch.bool, device=device)
    positions = (real.cumsum(-1) - 1).clamp(min=0)
    for _ in range(max_tokens):
        logits = model(ids, positions=positions, mask=mask[:, None], cache=cache)[:, -1].float()
        if temperature > 0:
            ids = torch.multinomial((logits / temperature).softmax(-1), 1, generator=random)
        else:
            ids = logits.argmax(-1, keepdim=True)
        for row in list(open_rows):
            token = int(ids[row, 0])
            out[row].append(token)
            if token in stop:
                open_rows.discard(row)
        if not open_rows:
            break
        real = torch.cat([real, torch.ones_like(real[:, :1])], dim=1)
        mask = real[:, None, :]
        positions = positions[:, -1:] + 1
    return out


def save(model: Llama, folder: Path, special: dict[str, int]) -> None:
    """Writes the weights (float16) and the configuration in Hugging Face's format."""
    folder.mkdir(parents=True, exist_ok=True)
    c = model.config
    tensors = {
        name: tensor.detach().to("cpu", torch.float16).contiguous() for name, tensor in model.state_dict().items()
    }
    save_file(tensors, str(folder / "model.safetensors"), metadata={"format": "pt"})
    ends = [special["<|endoftext|>"], special["<|end|>"]]
    ids = {"bos_token_id": special["<|endoftext|>"], "eos_token_id": ends, "pad_token_id": special["<|pad|>"]}
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": False,
        "attention_dropout": 0.0,
        **ids,
        "head_dim": c.head_dim,
        "hidden_act": "silu",
        "hidden_size": c.hidden_size,
        "initializer_range": 0.02,
        "intermediate_size": c.intermediate_size,
        "max_position_embeddings": c.max_positions,
        "mlp_bias": False,
        "num_attention_heads": c.num_heads,
        "num_hidden_layers": c.num_layers,
        "num_key_value_heads": c.num_heads,
        "pretraining_tp": 1,
        "rms_norm_eps": c.rms_norm_eps,
        "rope_parameters": {"rope_theta": c.rope_theta, "rope_type": "default"},
        "rope_scaling": None,
        "rope_theta": c.rope_theta,
        "tie_word_embeddings": True,
        "torch_dtype": "float16",
        "use_cache": True,
        "vocab_size": c.vocab_size,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    generation = {**ids, "do_sample": True, "temperature": 0.7, "top_p": 0.95, "max_new_tokens": 400}
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n", encoding="utf-8")


def load(folder: Path, device: str = "cpu") -> Llama:
    """Reads a saved model back, in float32."""
    c = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    model = Llama(
        Config(
            c["vocab_size"],
            c["hidden_size"],
            c["num_hidden_layers"],
            c["num_attention_heads"],
            c["intermediate_size"],
            c["max_position_embeddings"],
            c["rope_theta"],
            c["rms_norm_eps"],
        )
    )
    model.load_state_dict(
        {name: tensor.float() for name, tensor in load_file(str(folder / "model.safetensors")).items()}
    )
    return model.to(device).eval()
