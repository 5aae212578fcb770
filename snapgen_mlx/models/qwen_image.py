"""Qwen-Image's MMDiT: two streams of tokens, text and image, that meet in every attention.

Its parameter tree has the keys of diffusers' ``QwenImageTransformer2DModel``. It is asked as
``dit.DiT`` is: conditions of time and text first, then tokens, then the velocity.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_map

from ..config import QWEN_TEXT, QwenImageConfig
from ..errors import SnapGenError
from .attention import EPS, apply_rope, rotations, sdpa
from .dit import FREQUENCIES, gelu_tanh, modulate

THETA = 10000.0
MAX_POSITIONS = 4096  # positions of a text after the picture's; the size of the original's table
# Blocks, and image tokens, that are evaluated at once. It bounds what is in flight, and weights
# that are read lazily are read group by group, once for a whole batch. So the model cannot be
# differentiated or compiled: it only teaches.
GROUP = 4
TOKENS = 8192


@dataclass
class TimeCondition:
    """Of S timesteps: the time embedding (S, d), and per block the vectors that modulate image
    and text, (S, 6, d) each."""

    embedding: mx.array
    blocks: list[tuple[mx.array, mx.array]]

    def __getitem__(self, i) -> "TimeCondition":
        return TimeCondition(self.embedding[i], [(a[i], b[i]) for a, b in self.blocks])

    def expand(self, batch: int) -> "TimeCondition":
        """One row for all of a batch as a row for each."""
        return self if len(self.embedding) == batch else self[mx.zeros(batch, mx.int32)]


@dataclass
class TextCondition:
    """Text tokens (B, L, d) and their mask (B, L)."""

    tokens: mx.array
    mask: mx.array

    def join(self, other: "TextCondition") -> "TextCondition":
        """Both along the batch; the shorter one is padded with masked tokens."""
        length = max(self.mask.shape[1], other.mask.shape[1])
        pair = [
            (
                mx.pad(c.tokens, [(0, 0), (0, length - c.mask.shape[1]), (0, 0)]),
                mx.pad(c.mask, [(0, 0), (0, length - c.mask.shape[1])]),
            )
            for c in (self, other)
        ]
        return TextCondition(*(mx.concatenate(list(c)) for c in zip(*pair, strict=True)))


def pack(x: mx.array, patch: int) -> mx.array:
    """(B, H, W, C) -> (B, H/p, W/p, C·p·p): a patch's rows and columns are fastest."""
    B, H, W, C = x.shape
    x = x.reshape(B, H // patch, patch, W // patch, patch, C).transpose(0, 1, 3, 5, 2, 4)
    return x.reshape(B, H // patch, W // patch, C * patch * patch)


def unpack(x: mx.array, patch: int) -> mx.array:
    """Inverse of ``pack``."""
    B, h, w, _ = x.shape
    x = x.reshape(B, h, w, -1, patch, patch).transpose(0, 1, 4, 2, 5, 3)
    return x.reshape(B, h * patch, w * patch, -1)


def rope_table(
    grid: tuple[int, int], length: int, axes: tuple[int, int, int]
) -> tuple[mx.array, mx.array]:
    """``rotations`` of the text's tokens and then of the picture's.

    The dims of a head turn by frame, row and column. The picture's frame is 0; its rows and columns
    are counted from its centre. A text token has the same position on all three axes; the text
    starts where the longer side of the picture ends.

    Args:
        grid: (rows, columns) of the picture's tokens.
        length: text tokens.
        axes: dims of a head for frame, row and column.
    """
    h, w = grid
    start = max(h // 2, w // 2)
    if start + length > MAX_POSITIONS:
        raise SnapGenError(f"a text of {length} tokens is too long for {h}x{w} image tokens")
    text = np.arange(start, start + length)
    rows, columns = np.arange(h) - (h - h // 2), np.arange(w) - (w - w // 2)
    image = [np.zeros(h * w, int), np.repeat(rows, w), np.tile(columns, h)]
    angles = []
    for dim, positions in zip(axes, image, strict=True):
        powers = np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)
        freqs = 1 / np.power(np.float32(THETA), powers)
        angles.append(np.concatenate([text, positions]).astype(np.float32)[:, None] * freqs)
    return rotations(np.concatenate(angles, axis=1))


class Attention(nn.Module):
    """Joint attention: each stream has its own projections, all tokens attend to all."""

    def __init__(self, config: QwenImageConfig):
        super().__init__()
        d = config.hidden_size
        self.heads = config.num_attention_heads
        self.to_q, self.to_k, self.to_v = (nn.Linear(d, d) for _ in range(3))
        self.add_q_proj, self.add_k_proj, self.add_v_proj = (nn.Linear(d, d) for _ in range(3))
        self.to_out, self.to_add_out = [nn.Linear(d, d)], nn.Linear(d, d)
        norms = (nn.RMSNorm(config.attention_head_dim, eps=EPS) for _ in range(4))
        self.norm_q, self.norm_k, self.norm_added_q, self.norm_added_k = norms

    def __call__(self, image, text, mask, rope) -> tuple[mx.array, mx.array]:
        """image (B, N, d), text (B, L, d), mask (B, 1, 1, L + N) -> both streams' updates."""
        B, L, d = text.shape

        def joint(of_text, of_image):
            return mx.concatenate([of_text, of_image], axis=1)

        def heads(x):
            return x.reshape(B, x.shape[1], self.heads, -1)

        q = joint(
            self.norm_added_q(heads(self.add_q_proj(text))), self.norm_q(heads(self.to_q(image)))
        )
        k = joint(
            self.norm_added_k(heads(self.add_k_proj(text))), self.norm_k(heads(self.to_k(image)))
        )
        v = joint(heads(self.add_v_proj(text)), heads(self.to_v(image)))
        q, k, v = (a.swapaxes(1, 2) for a in (apply_rope(q, rope), apply_rope(k, rope), v))
        out = sdpa(q, k, v, mask).swapaxes(1, 2).reshape(B, -1, d)
        return self.to_out[0](out[:, L:]), self.to_add_out(out[:, :L])


class Gelu(nn.Module):
    def __init__(self, d: int, hidden: int):
        super().__init__()
        self.proj = nn.Linear(d, hidden)

    def __call__(self, x: mx.array) -> mx.array:
        return gelu_tanh(self.proj(x))


class FeedForward(nn.Module):
    def __init__(self, d: int):
        super().__init__()
        self.net = [Gelu(d, 4 * d), nn.Identity(), nn.Linear(4 * d, d)]

    def __call__(self, x: mx.array) -> mx.array:
        return self.net[2](self.net[0](x))


class Block(nn.Module):
    def __init__(self, config: QwenImageConfig):
        super().__init__()
        d = config.hidden_size
        self.img_mod = [nn.SiLU(), nn.Linear(d, 6 * d)]
        self.txt_mod = [nn.SiLU(), nn.Linear(d, 6 * d)]
        self.attn = Attention(config)
        self.img_mlp, self.txt_mlp = FeedForward(d), FeedForward(d)

    def modulation(self, embedding: mx.array) -> tuple[mx.array, mx.array]:
        """Time embeddings (S, d) -> of image and text (S, 6, d): shift, scale, gate, twice."""
        hidden = nn.silu(embedding)
        return tuple(m[1](hidden).reshape(len(hidden), 6, -1) for m in (self.img_mod, self.txt_mod))

    def __call__(self, image, text, modulation, mask, rope) -> tuple[mx.array, mx.array]:
        (shift1, scale1, gate1, shift2, scale2, gate2), of_text = (
            [m[:, None, i] for i in range(6)] for m in modulation
        )
        by_image, by_text = self.attn(
            modulate(image, shift1, scale1), modulate(text, of_text[0], of_text[1]), mask, rope
        )
        image, text = image + gate1 * by_image, text + of_text[2] * by_text
        image = image + gate2 * self.img_mlp(modulate(image, shift2, scale2))
        text = text + of_text[5] * self.txt_mlp(modulate(text, of_text[3], of_text[4]))
        return image, text


class TimestepEmbedder(nn.Module):
    def __init__(self, d: int):
        super().__init__()
        self.linear_1 = nn.Linear(2 * len(FREQUENCIES), d)
        self.linear_2 = nn.Linear(d, d)

    def __call__(self, t: mx.array) -> mx.array:
        angles = 1000 * (t.astype(mx.float32)[:, None] * mx.array(FREQUENCIES))
        x = mx.concatenate([mx.cos(angles), mx.sin(angles)], axis=-1)
        return self.linear_2(nn.silu(self.linear_1(x.astype(self.linear_1.bias.dtype))))


class TimeEmbedding(nn.Module):
    def __init__(self, d: int):
        super().__init__()
        self.timestep_embedder = TimestepEmbedder(d)


class Final(nn.Module):
    """The last norm's modulation: scale, then shift."""

    def __init__(self, d: int):
        super().__init__()
        self.linear = nn.Linear(d, 2 * d)

    def __call__(self, x: mx.array, embedding: mx.array) -> mx.array:
        scale, shift = mx.split(self.linear(nn.silu(embedding))[:, None], 2, axis=-1)
        return modulate(x, shift, scale)


def groups(items: Sequence) -> list[Sequence]:
    return [items[i : i + GROUP] for i in range(0, len(items), GROUP)]


def drop_weights(module: nn.Module) -> None:
    module.update(tree_map(lambda _: mx.array(0.0), module.parameters()))


class QwenImage(nn.Module):
    """Predicts the velocity of a noisy latent from time and text.

    read_once: weights are let go of when they have been used, so that those of a group of blocks
    are in memory at most, where they are read lazily. The model then serves one condition of time
    and one ``features`` with its ``head``.
    """

    def __init__(self, config: QwenImageConfig, read_once: bool = False):
        super().__init__()
        self.config, self.read_once = config, read_once
        d = config.hidden_size
        self.time_text_embed = TimeEmbedding(d)
        self.txt_norm = nn.RMSNorm(config.joint_attention_dim, eps=EPS)
        self.img_in = nn.Linear(config.in_channels, d)
        self.txt_in = nn.Linear(config.joint_attention_dim, d)
        self.transformer_blocks = [Block(config) for _ in range(config.num_layers)]
        self.norm_out = Final(d)
        self.proj_out = nn.Linear(d, config.in_channels)

    def condition_time(self, t: mx.array) -> TimeCondition:
        """t (S,) in [0, 1] -> the modulation of every block, computed once for a schedule.

        A third of the model's weights are used here alone.
        """
        embedding, vectors = self.time_text_embed.timestep_embedder(t), []
        for group in groups(self.transformer_blocks):
            vectors += [block.modulation(embedding) for block in group]
            mx.eval(vectors)
            if self.read_once:
                for block in group:
                    drop_weights(block.img_mod[1])
                    drop_weights(block.txt_mod[1])
        return TimeCondition(embedding, vectors)

    def condition_text(self, text: dict, masks: dict | None, batch: int) -> TextCondition:
        """The text of a batch. Without text, the picture's tokens attend only to each other.

        Args:
            text: {"qwen": (B, L, dim)}.
            masks: {"qwen": (B, L) bool}.
            batch: B.
        """
        states, mask = text.get(QWEN_TEXT), (masks or {}).get(QWEN_TEXT)
        dtype, d = self.txt_in.bias.dtype, self.config.hidden_size
        if states is None:
            return TextCondition(mx.zeros((batch, 1, d), dtype), mx.zeros((batch, 1), mx.bool_))
        mask = mx.ones(states.shape[:2], mx.bool_) if mask is None else mask
        return TextCondition(self.txt_in(self.txt_norm(states.astype(dtype))), mask)

    def __call__(self, x: mx.array, t: mx.array, text: dict, masks: dict | None = None) -> mx.array:
        """Velocity at x_t.

        Args: x (B, H, W, C) noisy latent, H and W multiples of patch_size; t (B,) in [0, 1];
            text {"qwen": (B, L, dim)}; masks {"qwen": (B, L)} bool, True = valid.
        Returns: v (B, H, W, C).
        """
        time = self.condition_time(t)
        return self.denoise(x, time, self.condition_text(text, masks, len(x)))

    def denoise(self, x: mx.array, time: TimeCondition, text: TextCondition) -> mx.array:
        """Velocity (B, H, W, C) from precomputed conditions; ``time`` has 1 or B rows."""
        return self.head(self.features(x, time, text), time)

    def features(self, x: mx.array, time: TimeCondition, text: TextCondition) -> mx.array:
        """Image tokens (B, h, w, d) after the last block, evaluated."""
        x = self.img_in(pack(x, self.config.patch_size).astype(self.img_in.bias.dtype))
        B, h, w, d = x.shape
        image, tokens, time = x.reshape(B, h * w, d), text.tokens, time.expand(B)
        rope = rope_table((h, w), tokens.shape[1], self.config.axes_dims_rope)
        seen = mx.ones((B, h * w), mx.bool_)
        mask = mx.concatenate([text.mask, seen], axis=1)[:, None, None]
        rows = max(1, TOKENS // (h * w))
        parts = [
            (image[i : i + rows], tokens[i : i + rows], time[i : i + rows], mask[i : i + rows])
            for i in range(0, B, rows)
        ]
        for group in groups(range(len(self.transformer_blocks))):
            for n, (image, tokens, part_time, part_mask) in enumerate(parts):
                for i in group:
                    block = self.transformer_blocks[i]
                    image, tokens = block(image, tokens, part_time.blocks[i], part_mask, rope)
                mx.eval(image, tokens)
                parts[n] = image, tokens, part_time, part_mask
            if self.read_once:
                for i in group:
                    drop_weights(self.transformer_blocks[i])
        return mx.concatenate([part[0] for part in parts]).reshape(B, h, w, d)

    def head(self, features: mx.array, time: TimeCondition) -> mx.array:
        """Velocity (B, H, W, C) from the last block's tokens (B, h, w, d)."""
        B, h, w, d = features.shape
        out = self.proj_out(self.norm_out(features.reshape(B, h * w, d), time.embedding))
        return unpack(out.reshape(B, h, w, -1), self.config.patch_size)
