"""A small transformer on a frozen word table: a text encoder that is trained with its model."""

from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn

from ..config import ConfigMixin
from .sizes import encoding_bytes, weight_bytes
from .static_text import positions, word_states
from .word_tokens import WordTokens


@dataclass
class WordTransformerConfig(ConfigMixin):
    """config.json of the encoder; ``word_dim`` is the table's, ``dim`` that of the states."""

    vocab_size: int
    word_dim: int = 128
    dim: int = 256
    layers: int = 2
    heads: int = 4
    ffn_ratio: int = 4
    max_length: int = 32

    def __post_init__(self):
        if self.dim % self.heads:
            raise ValueError(f"{self.heads} heads do not divide {self.dim} channels")


class Layer(nn.Module):
    """Pre-norm self-attention over all valid words, then a GELU MLP."""

    def __init__(self, config: WordTransformerConfig):
        super().__init__()
        d = config.dim
        self.heads = config.heads
        self.norm1 = nn.LayerNorm(d)
        self.to_qkv = nn.Linear(d, 3 * d)
        self.to_out = nn.Linear(d, d)
        self.norm2 = nn.LayerNorm(d)
        self.fc1 = nn.Linear(d, config.ffn_ratio * d)
        self.fc2 = nn.Linear(config.ffn_ratio * d, d)

    def __call__(self, x: mx.array, mask: mx.array) -> mx.array:
        """x (B, L, dim), mask (B, 1, 1, L) added to the scores."""
        B, L, _ = x.shape
        qkv = self.to_qkv(self.norm1(x)).reshape(B, L, 3, self.heads, -1)
        q, k, v = qkv.transpose(2, 0, 3, 1, 4)
        scale = q.shape[-1] ** -0.5
        out = mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask=mask)
        x = x + self.to_out(out.swapaxes(1, 2).reshape(B, L, -1))
        return x + self.fc2(nn.gelu_approx(self.fc1(self.norm2(x))))


class WordTransformer(nn.Module):
    """Words of a frozen table, then pre-norm layers; learned in ``recipes.pretrain``.

    Args:
        config: the sizes.
        words: the table's tokenizer; None while only the weights matter.
    """

    name = "words"
    max_tokens = 32

    def __init__(self, config: WordTransformerConfig, words: WordTokens | None = None):
        super().__init__()
        self.config, self.words = config, words
        self.max_tokens = config.max_length
        self._positions = positions(config.max_length, config.word_dim)
        self.table = mx.zeros((config.vocab_size, config.word_dim), dtype=mx.int8)
        self.scale = mx.zeros((config.vocab_size,), dtype=mx.float16)
        self.proj = nn.Linear(config.word_dim, config.dim)
        self.layers = [Layer(config) for _ in range(config.layers)]
        self.norm = nn.LayerNorm(config.dim)

    def __call__(self, ids: mx.array, mask: mx.array) -> mx.array:
        """Rows of the table and mask of valid words (B, L) -> states (B, L, dim) float32."""
        words = word_states(self.table, self.scale, ids)
        x = self.proj(words + self._positions[: ids.shape[1]])
        # A finite value: a text without words must not become NaN.
        bias = mx.where(mask, 0.0, -1e4)[:, None, None]
        for layer in self.layers:
            x = layer(x, bias)
        return mx.where(mask[..., None], self.norm(x), 0)

    @property
    def nbytes(self) -> int:
        return weight_bytes(self)

    def token_count(self, text: str) -> int:
        assert self.words is not None
        return self.words.count(text)

    def encoding_bytes(self) -> int:
        c = self.config
        return encoding_bytes(c.heads, c.dim, c.ffn_ratio * c.dim, self.max_tokens, 4)

    def encode(self, texts: list[str]) -> tuple[mx.array, mx.array]:
        """States (B, L, dim) and mask (B, L) bool, L at most ``max_tokens`` and at least 1.

        Emoji count as their names. A text without any known word gives a row whose mask is False
        throughout.
        """
        assert self.words is not None
        ids, mask = (mx.array(a) for a in self.words.batch(texts))
        return self(ids, mask), mask
