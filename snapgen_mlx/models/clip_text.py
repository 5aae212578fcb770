"""CLIP's text tower (TinyCLIP's towers are smaller ones) with the tokenizer from its own files."""

from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
from tokenizers import Tokenizer

from ..config import ConfigMixin
from ..errors import SnapGenError
from .sizes import encoding_bytes, weight_bytes

ACTIVATIONS = {
    "gelu": nn.gelu,
    "quick_gelu": nn.gelu_fast_approx,  # x * sigmoid(1.702 x)
    "gelu_new": nn.gelu_approx,
    "gelu_pytorch_tanh": nn.gelu_approx,
}


@dataclass
class CLIPTextConfig(ConfigMixin):
    """The keys of transformers' ``CLIPTextConfig`` that the states depend on."""

    vocab_size: int = 49408
    hidden_size: int = 512
    intermediate_size: int = 2048
    num_hidden_layers: int = 12
    num_attention_heads: int = 8
    max_position_embeddings: int = 77
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    eos_token_id: int = 49407

    def __post_init__(self):
        if self.hidden_act not in ACTIVATIONS:
            raise SnapGenError(
                f"CLIP config: hidden_act {self.hidden_act!r} is none of {', '.join(ACTIVATIONS)}"
            )

    @classmethod
    def from_dict(cls, d: dict) -> "CLIPTextConfig":
        """From config.json; a whole CLIP's keeps the text tower's keys in ``text_config``."""
        return super().from_dict(d.get("text_config", d))


class Attention(nn.Module):
    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.q_proj = nn.Linear(dim, dim)
        self.k_proj = nn.Linear(dim, dim)
        self.v_proj = nn.Linear(dim, dim)
        self.out_proj = nn.Linear(dim, dim)

    def __call__(self, x):
        B, L, D = x.shape
        q, k, v = (
            proj(x).reshape(B, L, self.heads, -1).transpose(0, 2, 1, 3)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        scale = (D // self.heads) ** -0.5
        x = mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask="causal")
        return self.out_proj(x.transpose(0, 2, 1, 3).reshape(B, L, D))


class MLP(nn.Module):
    def __init__(self, config: CLIPTextConfig):
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)
        self._act = ACTIVATIONS[config.hidden_act]

    def __call__(self, x):
        return self.fc2(self._act(self.fc1(x)))


class EncoderLayer(nn.Module):
    def __init__(self, config: CLIPTextConfig):
        super().__init__()
        self.self_attn = Attention(config.hidden_size, config.num_attention_heads)
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = MLP(config)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def __call__(self, x):
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class Embeddings(nn.Module):
    def __init__(self, config: CLIPTextConfig):
        super().__init__()
        self.token_embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_embedding = nn.Embedding(config.max_position_embeddings, config.hidden_size)

    def __call__(self, ids):
        return self.token_embedding(ids) + self.position_embedding.weight[: ids.shape[1]]


class Encoder(nn.Module):
    def __init__(self, config: CLIPTextConfig):
        super().__init__()
        self.layers = [EncoderLayer(config) for _ in range(config.num_hidden_layers)]

    def __call__(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


class CLIPText(nn.Module):
    name = "clip"
    max_tokens = 77

    def __init__(self, config: CLIPTextConfig, tokenizer: Tokenizer | None = None):
        super().__init__()
        self.config = config
        self.max_tokens = min(self.max_tokens, config.max_position_embeddings)
        self.embeddings = Embeddings(config)
        self.encoder = Encoder(config)
        self.final_layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self._tokenizer = tokenizer

    @property
    def nbytes(self) -> int:
        return weight_bytes(self)

    def token_count(self, text: str) -> int:
        assert self._tokenizer is not None
        self._tokenizer.no_truncation()
        return len(self._tokenizer.encode(text).ids)

    def encoding_bytes(self) -> int:
        c = self.config
        return encoding_bytes(
            *(c.num_attention_heads, c.hidden_size, c.intermediate_size, self.max_tokens),
            self.final_layer_norm.weight.dtype.size,
        )

    def __call__(self, ids: mx.array) -> mx.array:
        """Token ids (B, L) -> the last hidden state after the final norm (B, L, hidden_size)."""
        return self.final_layer_norm(self.encoder(self.embeddings(ids)))

    def encode(self, texts: list[str]) -> tuple[mx.array, mx.array]:
        """States (B, L, hidden_size) and mask (B, L), true up to and including the end token.

        Raises SnapGenError when the tokenizer and the config disagree about the end token.
        """
        assert self._tokenizer is not None
        self._tokenizer.enable_truncation(self.max_tokens)
        rows = [e.ids for e in self._tokenizer.encode_batch(texts)]
        longest = max(len(row) for row in rows)
        # Padding stands behind the end token: the causal mask hides it, so any id will do.
        ids = mx.array([row + [row[-1]] * (longest - len(row)) for row in rows])
        return self(ids), self.valid(ids)

    def valid(self, ids: mx.array) -> mx.array:
        """Mask (B, L) of the tokens up to and including the first end token of each row."""
        if self.config.eos_token_id == 2:  # configs of before 2023; the highest id ends the text
            ends = mx.argmax(ids, axis=1)
        else:
            is_end = ids == self.config.eos_token_id
            if not is_end.any(axis=1).all():
                raise SnapGenError(
                    f"the tokenizer does not end a text with id {self.config.eos_token_id}, the "
                    "eos_token_id of the text encoder's config; they belong to different models"
                )
            ends = mx.argmax(is_end, axis=1)
        return mx.arange(ids.shape[1]) <= ends[:, None]
