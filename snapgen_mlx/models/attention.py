"""Attention of SnapGen++: self-attention with GQA and 2-D RoPE, ASSA, and cross-attention."""

from functools import lru_cache, partial

import mlx.core as mx
import mlx.nn as nn
import numpy as np

EPS = 1e-6


def rotations(angles: np.ndarray) -> tuple[mx.array, mx.array]:
    """cos and ±sin, each (N, 1, D/2, 2) float32, of the angles (N, D/2) of N tokens, in radians.

    A pair (a, b) turns to (a, b)·cos + (b, a)·(-sin, sin).
    """
    angles = angles.astype(np.float64)[:, None, :, None]
    cos, sin = np.cos(angles), np.sin(angles)
    cos, sin = np.concatenate([cos, cos], axis=-1), np.concatenate([-sin, sin], axis=-1)
    return mx.array(cos.astype(np.float32)), mx.array(sin.astype(np.float32))


@lru_cache(maxsize=8)
def rope_table(grid: tuple[int, int], head_dim: int, theta: float) -> tuple[mx.array, mx.array]:
    """``rotations`` of the tokens of a grid.

    The first D/2 dims of a head turn by the row, the last D/2 by the column. In each half, pair j
    has the frequency theta^(-j/(D/4)).

    Args:
        grid: (rows, columns).
        head_dim: D.
        theta: base of the frequencies.
    """
    h, w = grid
    # On the host: an array of a graph that is being traced must not be kept.
    quarter = np.arange(head_dim // 4, dtype=np.float32) / np.float32(head_dim // 4)
    freqs = np.float32(theta) ** -quarter
    rows, cols = (np.arange(n, dtype=np.float32)[:, None] * freqs for n in grid)
    rows, cols = np.broadcast_arrays(rows[:, None], cols[None])
    return rotations(np.concatenate([rows, cols], axis=-1).reshape(h * w, -1))


@partial(mx.compile, shapeless=True)
def _rotate(pairs, swapped, cos, sin):
    return (pairs * cos + swapped * sin).astype(pairs.dtype)


def apply_rope(x: mx.array, rope: tuple[mx.array, mx.array]) -> mx.array:
    """Rotate the pairs (2j, 2j+1) of x (B, N, heads, D); computed in float32."""
    pairs = x.reshape(*x.shape[:-1], -1, 2)
    return _rotate(pairs, pairs[..., ::-1], *rope).reshape(x.shape)


@partial(mx.compile, shapeless=True)
def _mix(gate, far, near):
    alpha = mx.sigmoid(gate)
    return alpha * far + (1 - alpha) * near


def sdpa(q: mx.array, k: mx.array, v: mx.array, mask: mx.array | None = None) -> mx.array:
    """q (B, H, N, D), k and v (B, K, M, D) with K dividing H; scale D^-1/2."""
    return mx.fast.scaled_dot_product_attention(q, k, v, scale=q.shape[-1] ** -0.5, mask=mask)


def block_neighborhood_attention(
    q: mx.array, k: mx.array, v: mx.array, blocks: int, radius: int
) -> mx.array:
    """Local branch of ASSA: block b of the raster sequence attends to blocks b-radius..b+radius.

    The inner blocks all have 2·radius+1 neighbours and go through one batched call. The outer
    blocks have fewer keys and go one at a time. So nothing is masked and nothing computed in vain.

    Args:
        q: (B, H, N, D), N a multiple of ``blocks``.
        k: (B, K, N, D).
        v: (B, K, N, D).
        blocks: number of equal blocks.
        radius: neighbours on each side.

    Returns:
        (B, H, N, D).
    """
    B, H, N, D = q.shape
    K, size = k.shape[1], N // blocks

    def attend(q, k, v):  # (B, heads, blocks or neighbours, size, D) -> (B, H, size, D)
        k, v = (x.reshape(x.shape[0], K, -1, D) for x in (k, v))
        return sdpa(q.reshape(q.shape[0], H, -1, D), k, v)

    q, k, v = (x.reshape(B, -1, blocks, size, D) for x in (q, k, v))
    first = min(radius, blocks)
    last = max(blocks - radius, first)

    def edge(b):
        near = slice(max(b - radius, 0), b + radius + 1)
        return attend(q[:, :, b], k[:, :, near], v[:, :, near])

    out = [edge(b) for b in range(first)]
    if last > first:
        shifts = range(-radius, radius + 1)
        near = (
            mx.stack([x[:, :, first + s : last + s] for s in shifts], axis=3)
            .transpose(0, 2, 1, 3, 4, 5)
            .reshape(B * (last - first), K, -1, D)
            for x in (k, v)
        )
        inner = q[:, :, first:last].transpose(0, 2, 1, 3, 4).reshape(-1, H, size, D)
        inner = sdpa(inner, *near).reshape(B, last - first, H, size, D)
        out.append(inner.transpose(0, 2, 1, 3, 4).reshape(B, H, -1, D))
    out += [edge(b) for b in range(last, blocks)]
    return mx.concatenate(out, axis=2)


class Filter(nn.Module):
    """A 2x2 stride-2 convolution with one D -> D filter per KV head, as one matmul per head."""

    def __init__(self, heads: int, dim: int):
        super().__init__()
        mean = mx.broadcast_to(mx.eye(dim)[:, None, None] / 4, (dim, 2, 2, dim))
        self.weight = mx.broadcast_to(mean, (heads, dim, 2, 2, dim))

    def __call__(self, x: mx.array, grid: tuple[int, int]) -> mx.array:
        """x (B, K, h·w, D) on the token grid (h, w) -> (B, K, h·w/4, D)."""
        B, K, _, D = x.shape
        h, w = grid
        x = x.reshape(B, K, h // 2, 2, w // 2, 2, D).transpose(1, 0, 2, 4, 3, 5, 6)
        x = x.reshape(K, -1, 4 * D) @ self.weight.reshape(K, D, 4 * D).swapaxes(1, 2)
        return x.reshape(K, B, -1, D).swapaxes(0, 1)


class KVCompress(nn.Module):
    def __init__(self, heads: int, dim: int):
        super().__init__()
        self.k = Filter(heads, dim)
        self.v = Filter(heads, dim)


class SelfAttention(nn.Module):
    """Dense or adaptive sparse (ASSA) self-attention with GQA (architecture section 2)."""

    def __init__(self, config, kind: str):
        super().__init__()
        d, D = config.hidden_size, config.head_dim
        H, K = config.num_heads, config.num_kv_heads
        self.heads, self.kv_heads, self.head_dim = H, K, D
        self.blocks, self.radius = config.bna_blocks, config.bna_radius
        self.sparse = kind == "assa"
        self.to_q = nn.Linear(d, H * D, bias=False)
        self.to_k = nn.Linear(d, K * D, bias=False)
        self.to_v = nn.Linear(d, K * D, bias=False)
        self.to_out = nn.Linear(H * D, d)
        self.norm_q = nn.LayerNorm(D, eps=EPS)
        self.norm_k = nn.LayerNorm(D, eps=EPS)
        if self.sparse:
            self.head_gate = nn.Linear(d, H)
            self.kv_compress = KVCompress(K, D)

    def __call__(self, x: mx.array, rope, grid: tuple[int, int]) -> mx.array:
        B, N, _ = x.shape
        q = apply_rope(self.norm_q(self.to_q(x).reshape(B, N, self.heads, -1)), rope)
        k = apply_rope(self.norm_k(self.to_k(x).reshape(B, N, self.kv_heads, -1)), rope)
        v = self.to_v(x).reshape(B, N, self.kv_heads, -1)
        q, k, v = (a.swapaxes(1, 2) for a in (q, k, v))
        if self.sparse:
            far = sdpa(q, self.kv_compress.k(k, grid), self.kv_compress.v(v, grid))
            near = block_neighborhood_attention(q, k, v, self.blocks, self.radius)
            out = _mix(self.head_gate(x).swapaxes(1, 2)[..., None], far, near)
        else:
            out = sdpa(q, k, v)
        return self.to_out(out.swapaxes(1, 2).reshape(B, N, -1))


class CrossAttention(nn.Module):
    """Attention to the text; its keys and values are the same at every step and width."""

    def __init__(self, config):
        super().__init__()
        d, D = config.hidden_size, config.head_dim
        H, K = config.num_heads, config.cross_kv_heads
        self.heads, self.kv_heads, self.head_dim = H, K, D
        self.to_q = nn.Linear(d, H * D, bias=False)
        self.to_k = nn.Linear(config.caption_dim, K * D, bias=False)
        self.to_v = nn.Linear(config.caption_dim, K * D, bias=False)
        self.to_out = nn.Linear(H * D, d)
        self.norm_q = nn.LayerNorm(D, eps=EPS)
        self.norm_k = nn.LayerNorm(D, eps=EPS)

    def keys_values(self, text: mx.array) -> tuple[mx.array, mx.array]:
        """text (B, L, caption_dim) -> k, v (B, H, L, D): query head h reads KV head h mod K."""
        B, L, _ = text.shape
        k = self.norm_k(self.to_k(text).reshape(B, L, self.kv_heads, -1)).swapaxes(1, 2)
        v = self.to_v(text).reshape(B, L, self.kv_heads, -1).swapaxes(1, 2)
        partner = mx.arange(self.heads) % self.kv_heads
        return k[:, partner], v[:, partner]

    def __call__(self, x: mx.array, keys_values, mask: mx.array) -> mx.array:
        B, N, _ = x.shape
        q = self.norm_q(self.to_q(x).reshape(B, N, self.heads, -1)).swapaxes(1, 2)
        k, v = keys_values
        out = sdpa(q, k, v, mask)
        return self.to_out(out.swapaxes(1, 2).reshape(B, N, -1))
