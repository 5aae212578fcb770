"""Attention of the fast model, and the layers that take a leading slice of their weights."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from snapgen_mlx.config import DiTConfig

EPS = 1e-6


def leading(a: Tensor | None, groups: tuple[int, ...], width: float) -> Tensor | None:
    """The leading share `width` of each axis of `a`, within each of the axis's groups (0: all)."""
    if a is None or width == 1:
        return a
    for axis, n in enumerate(groups):
        if n == 1:
            a = a.narrow(axis, 0, round(a.shape[axis] * width))
        elif n:
            size = a.shape[axis] // n
            a = a.unflatten(axis, (n, size)).narrow(axis + 1, 0, round(size * width))
            a = a.flatten(axis, axis + 1)
    return a


class Linear(nn.Linear):
    """A linear layer that is used at any width.

    Args:
        groups: groups along (output, input), each sliced by itself; 0 = that axis is never sliced.
    """

    def __init__(self, inputs: int, outputs: int, bias: bool = True, groups=(1, 1)):
        super().__init__(inputs, outputs, bias=bias)
        self.groups = groups

    def forward(self, x: Tensor, width: float) -> Tensor:
        weight = leading(self.weight, self.groups, width)
        return F.linear(x, weight, leading(self.bias, self.groups[:1], width))


class HeadNorm(nn.LayerNorm):
    """LayerNorm over a head's channels; its result has the dtype of its input."""

    def __init__(self, dim: int):
        super().__init__(dim, eps=EPS)

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x.float(), x.shape[-1:], self.weight, self.bias, EPS).to(x.dtype)


def rope_table(grid: tuple[int, int], head_dim: int, theta: float, device: torch.device):
    """Turns, (rows·columns, head_dim / 2) complex64: half by row, half by column."""
    quarter = head_dim // 4
    frequencies = theta ** (-torch.arange(quarter, dtype=torch.float32) / quarter)
    rows = torch.arange(grid[0]).repeat_interleave(grid[1])[:, None] * frequencies
    columns = torch.arange(grid[1]).repeat(grid[0])[:, None] * frequencies
    angles = torch.cat([rows, columns], dim=-1).to(device)
    return torch.polar(torch.ones_like(angles), angles)


def rotate(x: Tensor, rope: Tensor) -> Tensor:
    """Turn the pairs (2j, 2j + 1) of x (B, N, heads, D), seen as complex numbers, by the table."""
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * rope[:, None]).flatten(-2).to(x.dtype)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Attention of q (B, H, N, D) to k, v (B, K, M, D), query head h to KV head h // (H / K).

    Args:
        mask: bool, true where seen, broadcasts to (B, H, N, M); only for K = H.
    """
    if q.is_cuda:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
    # On CPUs the backward pass of the fused call is slow for short sequences.
    B, H, N, D = q.shape
    scores = (q * D**-0.5).reshape(B, k.shape[1], -1, D) @ k.mT
    if mask is not None:
        scores = scores.masked_fill(~mask, -1e4)
    return (scores.softmax(-1) @ v).reshape(B, H, N, D)


def attend_near(q: Tensor, k: Tensor, v: Tensor, blocks: int, radius: int) -> Tensor:
    """Blockwise Neighborhood Attention: block b of the raster sequence sees b-radius..b+radius.

    Nothing is masked: blocks at the ends go one by one and have fewer keys; those between go
    together.
    """
    B, _, N, _ = q.shape
    size = N // blocks
    first = min(radius, blocks)
    last = max(blocks - radius, first)

    def end(b: int) -> Tensor:
        keys = slice(max(b - radius, 0) * size, (b + radius + 1) * size)
        return attend(q[:, :, b * size : (b + 1) * size], k[:, :, keys], v[:, :, keys])

    out = [end(b) for b in range(first)]
    if last > first:
        # (B, K, blocks, D, keys) -> (B blocks, K, keys, D)
        near = (
            a[:, :, (first - radius) * size : (last + radius) * size]
            .unfold(2, (2 * radius + 1) * size, size)
            .permute(0, 2, 1, 4, 3)
            .flatten(0, 1)
            for a in (k, v)
        )
        inner = q[:, :, first * size : last * size].unflatten(2, (-1, size))
        inner = attend(inner.transpose(1, 2).flatten(0, 1), *near)
        inner = inner.unflatten(0, (B, -1)).transpose(1, 2).flatten(2, 3)
        out.append(inner)
    out += [end(b) for b in range(last, blocks)]
    return torch.cat(out, dim=2)


class Filter(nn.Module):
    """A 2x2 convolution of stride 2 over the token grid, one filter per KV head."""

    def __init__(self, heads: int, dim: int):
        super().__init__()
        mean = torch.eye(dim)[:, :, None, None].expand(-1, -1, 2, 2) / 4
        self.weight = nn.Parameter(mean.repeat(heads, 1, 1, 1, 1))

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """x (B, K, N, D) -> (B, K, N / 4, D)."""
        B, K, _, D = x.shape
        x = x.reshape(B, K, grid[0] // 2, 2, grid[1] // 2, 2, D).permute(1, 0, 2, 4, 3, 5, 6)
        weight = self.weight[:K].permute(0, 3, 4, 2, 1).reshape(K, 4 * D, D)
        return (x.reshape(K, -1, 4 * D) @ weight).unflatten(1, (B, -1)).transpose(0, 1)


class SelfAttention(nn.Module):
    """GQA with 2-D RoPE, dense or ASSA (global to compressed keys, local to near blocks)."""

    def __init__(self, config: DiTConfig, sparse: bool):
        super().__init__()
        d, D, H, K = config.hidden_size, config.head_dim, config.num_heads, config.num_kv_heads
        self.head_dim, self.blocks, self.radius = D, config.bna_blocks, config.bna_radius
        self.sparse = sparse
        self.to_q = Linear(d, H * D, bias=False)
        self.to_k = Linear(d, K * D, bias=False)
        self.to_v = Linear(d, K * D, bias=False)
        self.norm_q = HeadNorm(D)
        self.norm_k = HeadNorm(D)
        self.to_out = Linear(H * D, d)
        if sparse:
            self.head_gate = Linear(d, H)
            self.kv_compress = nn.ModuleDict({"k": Filter(K, D), "v": Filter(K, D)})

    def forward(self, x: Tensor, rope, grid: tuple[int, int], width: float) -> Tensor:
        """x (B, N, d) -> (B, N, d)."""
        heads = (-1, self.head_dim)
        q = rotate(self.norm_q(self.to_q(x, width).unflatten(-1, heads)), rope).transpose(1, 2)
        k = rotate(self.norm_k(self.to_k(x, width).unflatten(-1, heads)), rope).transpose(1, 2)
        v = self.to_v(x, width).unflatten(-1, heads).transpose(1, 2)
        if self.sparse:
            far = attend(q, self.kv_compress["k"](k, grid), self.kv_compress["v"](v, grid))
            near = attend_near(q, k, v, self.blocks, self.radius)
            alpha = torch.sigmoid(self.head_gate(x, width)).transpose(1, 2)[..., None]
            out = torch.lerp(near, far, alpha.to(near.dtype).expand_as(near))
        else:
            out = attend(q, k, v)
        return self.to_out(out.transpose(1, 2).flatten(2), width)


class CrossAttention(nn.Module):
    """Query head h reads KV head h mod `cross_kv_heads`; keys and values are never sliced."""

    def __init__(self, config: DiTConfig):
        super().__init__()
        d, D, K = config.hidden_size, config.head_dim, config.cross_kv_heads
        self.head_dim, self.kv_heads = D, K
        self.to_q = Linear(d, config.num_heads * D, bias=False)
        self.to_k = nn.Linear(config.caption_dim, K * D, bias=False)
        self.to_v = nn.Linear(config.caption_dim, K * D, bias=False)
        self.norm_q = HeadNorm(D)
        self.norm_k = HeadNorm(D)
        self.to_out = Linear(config.num_heads * D, d)

    def forward(self, x: Tensor, caption: Tensor, mask: Tensor, width: float) -> Tensor:
        """x (B, N, d), caption (B, L, caption_dim), mask (B, L) -> (B, N, d)."""
        heads = (-1, self.head_dim)
        q = self.norm_q(self.to_q(x, width).unflatten(-1, heads)).transpose(1, 2)
        k = self.norm_k(self.to_k(caption).unflatten(-1, heads)).transpose(1, 2)
        v = self.to_v(caption).unflatten(-1, heads).transpose(1, 2)
        H = q.shape[1]
        k, v = (a.repeat(1, -(-H // self.kv_heads), 1, 1)[:, :H] for a in (k, v))
        out = attend(q, k, v, mask[:, None, None])
        return self.to_out(out.transpose(1, 2).flatten(2), width)
