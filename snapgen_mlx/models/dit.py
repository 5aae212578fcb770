"""The SnapGen++ diffusion transformer: a plain model of one width (architecture sections 1-2, 5).

Its parameter tree mirrors the PyTorch checkpoint's keys, with convolutions channels-last. Widths
and slicing live in ``elastic``; nothing here knows of them.
"""

import math
from dataclasses import dataclass
from functools import partial

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..config import DiTConfig
from .attention import EPS, CrossAttention, SelfAttention, rope_table

TIME_FREQUENCIES = 128
# On the host: at angles near 1000 one ulp of a device's exp is 6e-5. The exponent is rounded to
# float32 as PyTorch does.
_exponents = np.float32(-math.log(10000) / TIME_FREQUENCIES) * np.arange(128, dtype=np.float32)
FREQUENCIES = np.exp(_exponents.astype(np.float64)).astype(np.float32)


@dataclass
class TimeCondition:
    """adaLN input of S timesteps: the shared six vectors (S, 6, d) and the embedding (S, d)."""

    modulation: mx.array
    embedding: mx.array

    def __getitem__(self, i) -> "TimeCondition":
        return TimeCondition(self.modulation[i], self.embedding[i])


@dataclass
class TextCondition:
    """Cross-attention keys and values of every block, each (B, H, L, D), and the mask."""

    keys_values: dict[str, list[tuple[mx.array, mx.array]]]
    mask: mx.array

    def join(self, other: "TextCondition") -> "TextCondition":
        """Both along the batch; the shorter one is padded with masked tokens."""
        length = max(self.mask.shape[-1], other.mask.shape[-1])

        def cat(a, b, axis):
            pad = [
                [(0, length - x.shape[axis]) if i == axis else (0, 0) for i in range(4)]
                for x in (a, b)
            ]
            return mx.concatenate([mx.pad(a, pad[0]), mx.pad(b, pad[1])])

        kv = {
            stage: [
                (cat(k, k2, 2), cat(v, v2, 2)) for (k, v), (k2, v2) in zip(own, theirs, strict=True)
            ]
            for (stage, own), theirs in zip(
                self.keys_values.items(), other.keys_values.values(), strict=True
            )
        }
        return TextCondition(kv, cat(self.mask, other.mask, 3))


def to_windows(x: mx.array, size: int = 2) -> mx.array:
    """(B, h, w, C) -> (B, h/size, w/size, size²·C): row-major in the window, channel fastest."""
    B, h, w, C = x.shape
    x = x.reshape(B, h // size, size, w // size, size, C).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(B, h // size, w // size, -1)


def from_windows(x: mx.array, size: int = 2) -> mx.array:
    """Inverse of ``to_windows``."""
    B, h, w, _ = x.shape
    x = x.reshape(B, h, w, size, size, -1).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(B, h * size, w * size, -1)


@partial(mx.compile, shapeless=True)
def _scale_shift(x, scale, shift):
    return x * (1 + scale) + shift


@partial(mx.compile, shapeless=True)
def _add_gated(x, gate, branch):
    return x + gate * branch


def modulate(x: mx.array, shift: mx.array, scale: mx.array) -> mx.array:
    return _scale_shift(mx.fast.layer_norm(x, None, None, EPS), scale, shift)


class TextProjection(nn.Module):
    def __init__(self, dim: int, caption_dim: int):
        super().__init__()
        self.norm = nn.RMSNorm(dim, eps=EPS)
        self.proj = nn.Linear(dim, caption_dim)

    def __call__(self, x: mx.array) -> mx.array:
        return self.proj(self.norm(x))


class TextEmbedding(nn.Module):
    """Projects each encoder's states and joins them token-wise, the null token last."""

    def __init__(self, config: DiTConfig):
        super().__init__()
        self.names = list(config.text_dims)
        for name, dim in config.text_dims.items():
            self[name] = TextProjection(dim, config.caption_dim)
        self.null = mx.random.normal((1, config.caption_dim)) * 0.02

    def __call__(self, text: dict, masks: dict | None, batch: int) -> tuple[mx.array, mx.array]:
        """-> tokens (B, L, caption_dim) and mask (B, L) bool.

        The null token is valid only for samples in which no other token is.
        """
        tokens, valid = [], []
        for name in self.names:
            states = text.get(name)
            if states is None:
                continue
            mask = (masks or {}).get(name)
            tokens.append(self[name](states.astype(self.null.dtype)))
            valid.append(mx.ones(states.shape[:2], mx.bool_) if mask is None else mask)
        tokens.append(mx.broadcast_to(self.null, (batch, *self.null.shape)))
        if valid:
            empty = ~mx.any(mx.concatenate(valid, axis=1), axis=1, keepdims=True)
        else:
            empty = mx.ones((batch, 1), mx.bool_)
        return mx.concatenate(tokens, axis=1), mx.concatenate([*valid, empty], axis=1)


class TimeEmbedding(nn.Module):
    def __init__(self, d: int):
        super().__init__()
        self.fc1 = nn.Linear(2 * TIME_FREQUENCIES, d)
        self.fc2 = nn.Linear(d, d)
        self.modulation = nn.Linear(d, 6 * d)

    def __call__(self, t: mx.array) -> TimeCondition:
        angles = 1000 * t.astype(mx.float32)[:, None] * mx.array(FREQUENCIES)
        x = mx.concatenate([mx.cos(angles), mx.sin(angles)], axis=-1)
        dtype = self.fc1.bias.dtype
        temb = self.fc2(nn.silu(self.fc1(x.astype(dtype))))
        return TimeCondition(self.modulation(nn.silu(temb)).reshape(len(t), 6, -1), temb)


@partial(mx.compile, shapeless=True)
def gelu_tanh(x: mx.array) -> mx.array:
    """GELU in its tanh form; (1 + tanh(z)) / 2 = sigmoid(2z), which costs half of tanh on CPU."""
    return x * mx.sigmoid(2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x))


class FeedForward(nn.Module):
    def __init__(self, d: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(d, hidden)
        self.fc2 = nn.Linear(hidden, d)

    def __call__(self, x: mx.array) -> mx.array:
        return self.fc2(gelu_tanh(self.fc1(x)))


class Block(nn.Module):
    """adaLN-single transformer block [paper, fig. 2]."""

    def __init__(self, config: DiTConfig, stage: int, skip: bool = False):
        super().__init__()
        d = config.hidden_size
        self.scale_shift_table = [mx.random.normal((6, d)) / d**0.5]
        self.attn = SelfAttention(config, config.attention[stage])
        self.cross = CrossAttention(config)
        self.ffn = FeedForward(d, int(config.ffn_ratio[stage] * d))
        if skip:
            self.skip_proj = nn.Linear(2 * d, d)
        # With it a backward pass finds only the block's input kept, and computes the rest again.
        self.checkpoint = False

    def __call__(self, x, time: TimeCondition, keys_values, mask, rope, grid) -> mx.array:
        if not self.checkpoint:
            return self._forward(x, time, keys_values, mask, rope, grid)

        def call(parameters, x, modulation, keys_values):
            self.update(parameters)
            condition = TimeCondition(modulation, time.embedding)  # the latter is not used
            return self._forward(x, condition, keys_values, mask, rope, grid)

        run = mx.checkpoint(call)
        return run(self.trainable_parameters(), x, time.modulation, keys_values)

    def _forward(self, x, time: TimeCondition, keys_values, mask, rope, grid) -> mx.array:
        m = (self.scale_shift_table[0] + time.modulation)[:, :, None]
        shift1, scale1, gate1, shift2, scale2, gate2 = (m[:, i] for i in range(6))
        x = _add_gated(x, gate1, self.attn(modulate(x, shift1, scale1), rope, grid))
        x = x + self.cross(x, keys_values, mask)
        return _add_gated(x, gate2, self.ffn(modulate(x, shift2, scale2)))


class Projection(nn.Module):
    def __init__(self, proj: nn.Module):
        super().__init__()
        self.proj = proj


class Final(nn.Module):
    def __init__(self, d: int, out: int):
        super().__init__()
        self.scale_shift_table = [mx.random.normal((2, d)) / d**0.5]
        self.proj = nn.Linear(d, out)

    def __call__(self, x: mx.array, time: TimeCondition) -> mx.array:
        m = (self.scale_shift_table[0] + time.embedding[:, None])[:, :, None]
        return self.proj(modulate(x, m[:, 0], m[:, 1]))


class DiT(nn.Module):
    """Predicts the velocity of a noisy latent from time and text.

    Only one width's banks are held: ``time_embed`` and each ``scale_shift_table`` are lists of
    one. Parameters start as a training run wants them (zero output, averaging KV filters).
    """

    def __init__(self, config: DiTConfig):
        super().__init__()
        self.config = config
        d, p = config.hidden_size, config.patch_size
        n_down, n_mid, n_up = config.layers
        self.patch_embed = Projection(nn.Conv2d(config.in_channels, d, p, p))
        self.text_embed = TextEmbedding(config)
        self.time_embed = [TimeEmbedding(d)]
        self.down = [Block(config, 0) for _ in range(n_down)]
        first_skip = n_mid - n_mid // 2 if config.mid_skips else n_mid
        self.mid = [Block(config, 1, skip=i >= first_skip) for i in range(n_mid)]
        self.up = [Block(config, 2) for _ in range(n_up)]
        if config.downsample:
            self.downsample = Projection(nn.Linear(4 * d, d))
            self.upsample = Projection(nn.Linear(d, 4 * d))
        self.final = Final(d, p * p * config.in_channels)
        self.final.proj.weight = mx.zeros_like(self.final.proj.weight)

    def checkpoint_blocks(self) -> None:
        """Train in less memory and about a third more time: see ``Block.checkpoint``."""
        for block in (*self.down, *self.mid, *self.up):
            block.checkpoint = True

    def condition_time(self, t: mx.array) -> TimeCondition:
        """t (S,) in [0, 1] -> adaLN vectors, computed once for a whole schedule."""
        return self.time_embed[0](t)

    def condition_text(self, text: dict, masks: dict | None, batch: int) -> TextCondition:
        """Keys and values of every cross-attention, computed once for a prompt.

        A sample without any valid token attends only to the learned null token.

        Args:
            text: {encoder: states (B, L, dim)}; an encoder may be absent.
            masks: {encoder: (B, L) bool}.
            batch: B.
        """
        tokens, mask = self.text_embed(text, masks, batch)
        kv = {
            stage: [block.cross.keys_values(tokens) for block in self[stage]]
            for stage in ("down", "mid", "up")
        }
        return TextCondition(kv, mask[:, None, None])

    def __call__(self, x: mx.array, t: mx.array, text: dict, masks: dict | None = None) -> mx.array:
        """Velocity at x_t.

        Args: x (B, H, W, C) noisy latent, H and W multiples of 4·patch_size; t (B,) in [0, 1];
            text {name: (B, L, dim)} encoder states; masks {name: (B, L)} bool, True = valid.
        Returns: v (B, H, W, C). Raises ValueError for a latent whose size does not fit.
        """
        time = self.condition_time(t)
        return self.denoise(x, time, self.condition_text(text, masks, x.shape[0]))

    def denoise(self, x: mx.array, time: TimeCondition, text: TextCondition) -> mx.array:
        """Velocity (B, H, W, C) from precomputed conditions; ``time`` has 1 or B rows."""
        return self.head(self.features(x, time, text), time)

    def features(self, x: mx.array, time: TimeCondition, text: TextCondition) -> mx.array:
        """Tokens (B, h, w, d) after the final transformer layer."""
        c = self.config
        _, H, W, _ = x.shape
        if H % c.token_multiple or W % c.token_multiple:
            raise ValueError(f"latent size {H}x{W} is not a multiple of {c.token_multiple}")
        x = self.patch_embed.proj(x.astype(self.patch_embed.proj.bias.dtype))
        grid = x.shape[1:3]
        if grid[0] * grid[1] % c.bna_blocks:
            raise ValueError(f"{grid[0]}x{grid[1]} tokens do not divide into {c.bna_blocks} blocks")
        x = self._stage("down", x, time, text)
        if c.downsample:
            skip_hi = x
            x = self.downsample.proj(to_windows(x))
        x = self._stage("mid", x, time, text)
        if c.downsample:
            x = from_windows(self.upsample.proj(x)) + skip_hi
        return self._stage("up", x, time, text)

    def head(self, features: mx.array, time: TimeCondition) -> mx.array:
        """Velocity (B, H, W, C) from the final layer's tokens (B, h, w, d)."""
        B, h, w, d = features.shape
        out = self.final(features.reshape(B, h * w, d), time)
        return from_windows(out.reshape(B, h, w, -1), self.config.patch_size)

    def _stage(self, name: str, x: mx.array, time: TimeCondition, text: TextCondition) -> mx.array:
        B, h, w, d = x.shape
        rope = rope_table((h, w), self.config.head_dim, self.config.rope_theta)
        x = x.reshape(B, h * w, d)
        blocks = self[name]
        kept: list[mx.array] = []
        for i, (block, kv) in enumerate(zip(blocks, text.keys_values[name], strict=True)):
            if "skip_proj" in block:
                x = block.skip_proj(mx.concatenate([x, kept.pop()], axis=-1))
            x = block(x, time, kv, text.mask, rope, (h, w))
            if name == "mid" and self.config.mid_skips and i < len(blocks) // 2:
                kept.append(x)
        return x.reshape(B, h, w, d)
