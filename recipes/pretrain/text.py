"""The text encoder that is trained together with the transformer: words of a frozen table, then a
small pre-norm transformer, so that word order and binding reach the cross-attention.

Its folder is that of the MLX class `WordTransformer`: config.json, weights, vocab.txt, emoji.json.
"""

from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from snapgen_mlx.errors import SnapGenError
from snapgen_mlx.models.word_tokens import WordTokens
from snapgen_mlx.tokenizer_files import load_word_tokens

NAME = "words"  # the encoder's key in the transformer's `text_dims`
POSITION_RMS, POSITION_BASE = 0.3, 100  # of the table's own states (`StaticText`)


@dataclass
class TextConfig:
    """config.json of the encoder; `word_dim` is the table's, `dim` that of the states."""

    vocab_size: int
    word_dim: int = 128
    dim: int = 256
    layers: int = 2
    heads: int = 4
    ffn_ratio: int = 4
    max_length: int = 32

    def to_dict(self) -> dict:
        return {"model_type": "word_transformer", **asdict(self)}


class Layer(nn.Module):
    """Pre-norm self-attention over all valid words, then a GELU MLP."""

    def __init__(self, config: TextConfig):
        super().__init__()
        d = config.dim
        self.heads = config.heads
        self.norm1 = nn.LayerNorm(d)
        self.to_qkv = nn.Linear(d, 3 * d)
        self.to_out = nn.Linear(d, d)
        self.norm2 = nn.LayerNorm(d)
        self.fc1 = nn.Linear(d, config.ffn_ratio * d)
        self.fc2 = nn.Linear(config.ffn_ratio * d, d)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        """x (B, L, dim), bias (B, 1, 1, L) added to the scores."""
        heads = (3, self.heads, -1)
        q, k, v = self.to_qkv(self.norm1(x)).unflatten(-1, heads).permute(2, 0, 3, 1, 4)
        scores = (q * q.shape[-1] ** -0.5) @ k.mT + bias
        out = scores.softmax(-1).to(v.dtype) @ v
        x = x + self.to_out(out.transpose(1, 2).flatten(2))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x)), approximate="tanh"))


class WordTransformer(nn.Module):
    """ids (B, L) of `WordTokens` and their mask -> states (B, L, dim), zero where masked."""

    def __init__(self, config: TextConfig):
        super().__init__()
        self.config = config
        shape = (config.vocab_size, config.word_dim)
        self.register_buffer("table", torch.zeros(shape, dtype=torch.int8))
        self.register_buffer("scale", torch.zeros(config.vocab_size, dtype=torch.float16))
        self.register_buffer(
            "positions", sinusoids(config.max_length, config.word_dim), persistent=False
        )
        self.proj = nn.Linear(config.word_dim, config.dim)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.dim)

    @classmethod
    def from_table(cls, folder, **sizes) -> "WordTransformer":
        """A fresh encoder on the word table (a `static_text` folder) in `folder`.

        Raises:
            SnapGenError: the folder holds no whole word table.
        """
        table, _ = read_table(folder)
        model = cls(TextConfig(vocab_size=len(table), word_dim=table.shape[1], **sizes))
        model.read_table(folder)
        return model

    def read_table(self, folder) -> None:
        """Fill the table from that in `folder`, of the same size."""
        for buffer, values in zip((self.table, self.scale), read_table(folder), strict=True):
            buffer.copy_(values)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        words = self.table[ids].float() * self.scale[ids].float()[..., None]
        x = words * self.config.word_dim**0.5 + self.positions[: ids.shape[1]]
        # A finite value: a text without words must not become NaN.
        bias = torch.where(mask, 0.0, -1e4)[:, None, None]
        x = self.proj(x).float()
        for layer in self.layers:
            x = layer(x, bias)
        return torch.where(mask[..., None], self.norm(x), 0)


def read_table(folder) -> tuple[Tensor, Tensor]:
    """Rows (V, word_dim) int8 and their scales (V,) of a word table's folder."""
    file = Path(folder) / "model.safetensors"
    try:
        tensors = load_file(file)
        return tensors["table"], tensors["scale"]
    except Exception as e:  # the many ways in which a file is missing or damaged
        raise SnapGenError(f"cannot read the word table {file}: {e}") from e


def sinusoids(length: int, dim: int) -> Tensor:
    frequencies = POSITION_BASE ** (-torch.arange(0, dim, 2) / dim)
    angles = torch.arange(length)[:, None] * frequencies
    waves = torch.cat([angles.sin(), angles.cos()], dim=1)
    return waves * (POSITION_RMS * 2**0.5)


def pad(rows: list[list[int]], multiple: int = 1) -> tuple[Tensor, Tensor]:
    """Ids (B, L), padded with 0, and mask (B, L) bool; L >= 1, a multiple of `multiple`."""
    longest = max([1, *map(len, rows)])
    longest = -(-longest // multiple) * multiple
    ids = torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows])
    mask = torch.arange(longest) < torch.tensor([len(row) for row in rows])[:, None]
    return ids, mask


def load_words(folder, config: TextConfig) -> WordTokens:
    """The tokenizer that belongs to an encoder's folder."""
    return load_word_tokens(folder, config.max_length)
