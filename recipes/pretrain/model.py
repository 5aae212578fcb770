"""The SnapGen++ diffusion transformer in PyTorch, made for fast training at all widths.

Its state_dict is the PyTorch checkpoint contract (architecture section 4): a supernet whose narrow
widths are leading slices of the shared weights, taken in the forward pass (section 3). Only
`time_embed` and every `scale_shift_table` hold one entry per width.

Latents are (B, h, w, C), channels last, as everywhere else in the library. The residual stream and
the modulation stay float32 under `torch.autocast`; matrices multiply in the autocast's dtype.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from snapgen_mlx.config import DiTConfig

EPS = 1e-6
STAGES = ("down", "mid", "up")


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


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """LayerNorm without affine of x (B, N, d), times 1 + scale, plus shift, each (B, 1, d)."""
    return torch.addcmul(shift, F.layer_norm(x, x.shape[-1:], eps=EPS), 1 + scale)


def rope_table(grid: tuple[int, int], head_dim: int, theta: float, device: torch.device):
    """cos and sin, each (rows·columns, head_dim / 2) float32: half by row, half by column."""
    quarter = head_dim // 4
    frequencies = theta ** (-torch.arange(quarter, dtype=torch.float32) / quarter)
    rows = torch.arange(grid[0]).repeat_interleave(grid[1])[:, None] * frequencies
    columns = torch.arange(grid[1]).repeat(grid[0])[:, None] * frequencies
    angles = torch.cat([rows, columns], dim=-1).to(device)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Turn the pairs (2j, 2j + 1) of x (B, N, heads, D) by the table's angles."""
    cos, sin = (a[:, None] for a in rope)
    even, odd = x[..., 0::2], x[..., 1::2]
    pairs = torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1)
    return pairs.flatten(-2).to(x.dtype)


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


class FeedForward(nn.Module):
    def __init__(self, dim: int, ratio: float):
        super().__init__()
        self.fc1 = Linear(dim, int(ratio * dim))
        self.fc2 = Linear(int(ratio * dim), dim)

    def forward(self, x: Tensor, width: float) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x, width), approximate="tanh"), width)


def bank(config: DiTConfig, rows: int) -> nn.ParameterList:
    """One table (rows, d_W) per width."""
    sizes = [int(config.hidden_size * w) for w in config.widths]
    return nn.ParameterList(torch.randn(rows, d) / d**0.5 for d in sizes)


class Block(nn.Module):
    """Self-attention, cross-attention, feed-forward (paper, figure 2)."""

    def __init__(self, config: DiTConfig, stage: int, skip: bool):
        super().__init__()
        self.attn = SelfAttention(config, config.attention[stage] == "assa")
        self.cross = CrossAttention(config)
        self.ffn = FeedForward(config.hidden_size, config.ffn_ratio[stage])
        self.scale_shift_table = bank(config, 6)
        if skip:
            self.skip_proj = Linear(2 * config.hidden_size, config.hidden_size, groups=(1, 2))

    def forward(self, x, kept, shared, caption, mask, rope, grid, index: int, width: float):
        """x and kept (None without a skip) (B, N, d), shared (B, 6, d): the time's modulation."""
        if kept is not None:
            x = self.skip_proj(torch.cat([x, kept], dim=-1), width).float()
        table = (shared + self.scale_shift_table[index])[:, :, None]
        shift1, scale1, gate1, shift2, scale2, gate2 = table.unbind(1)
        x = x + gate1 * self.attn(modulate(x, shift1, scale1), rope, grid, width)
        x = x + self.cross(x, caption, mask, width)
        return x + gate2 * self.ffn(modulate(x, shift2, scale2), width)


class TimeEmbed(nn.Module):
    """One width's own time network; always float32."""

    def __init__(self, dim: int):
        super().__init__()
        self.fc1 = nn.Linear(256, dim)
        self.fc2 = nn.Linear(dim, dim)
        self.modulation = nn.Linear(dim, 6 * dim)

    def forward(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """t (B,) in [0, 1] -> its embedding (B, d) and the blocks' modulation (B, 6, d)."""
        with torch.autocast(t.device.type, enabled=False):
            steps = torch.arange(128, dtype=torch.float32, device=t.device)
            frequencies = torch.exp(-math.log(10000) * steps / 128)
            angles = (1000 * t.float())[:, None] * frequencies
            embedding = torch.cat([angles.cos(), angles.sin()], dim=-1)
            temb = self.fc2(F.silu(self.fc1(embedding)))
            return temb, self.modulation(F.silu(temb)).unflatten(-1, (6, -1))


class EncoderEmbed(nn.Module):
    """RMSNorm and projection of one text encoder's states."""

    def __init__(self, dim: int, caption_dim: int):
        super().__init__()
        self.norm = nn.RMSNorm(dim, eps=EPS)
        self.proj = nn.Linear(dim, caption_dim)

    def forward(self, states: Tensor) -> Tensor:
        return self.proj(self.norm(states.float()))


class TextEmbed(nn.Module):
    """The encoders' tokens one after another; a sample without any gets the null token."""

    def __init__(self, config: DiTConfig):
        super().__init__()
        self.names = list(config.text_dims)
        for name, dim in config.text_dims.items():
            self.add_module(name, EncoderEmbed(dim, config.caption_dim))
        self.null = nn.Parameter(0.02 * torch.randn(1, config.caption_dim))

    def forward(self, text: dict, masks: dict, batch: int) -> tuple[Tensor, Tensor]:
        """-> caption (B, L + 1, caption_dim), the null token last, and its mask (B, L + 1)."""
        names = [name for name in self.names if name in text]
        tokens = [getattr(self, name)(text[name]) for name in names]
        null = self.null.expand(batch, 1, -1)
        caption = torch.cat([*tokens, null.to(tokens[0].dtype if tokens else null.dtype)], dim=1)
        if not names:
            return caption, torch.ones(batch, 1, dtype=torch.bool, device=caption.device)
        valid = torch.cat([masks[name] for name in names], dim=1)
        return caption, torch.cat([valid, ~valid.any(dim=1, keepdim=True)], dim=1)


class PatchEmbed(nn.Module):
    def __init__(self, config: DiTConfig):
        super().__init__()
        patch = config.patch_size
        self.proj = nn.Conv2d(config.in_channels, config.hidden_size, patch, stride=patch)

    def forward(self, patches: Tensor, width: float) -> Tensor:
        """patches (B, N, patch² C), channel fastest -> (B, N, d): the convolution as a matmul."""
        weight = leading(self.proj.weight, (1,), width).permute(0, 2, 3, 1).flatten(1)
        return F.linear(patches, weight, leading(self.proj.bias, (1,), width))


class Resample(nn.Module):
    def __init__(self, inputs: int, outputs: int, groups: tuple[int, int]):
        super().__init__()
        self.proj = Linear(inputs, outputs, groups=groups)


class Final(nn.Module):
    def __init__(self, config: DiTConfig):
        super().__init__()
        self.scale_shift_table = bank(config, 2)
        outputs = config.patch_size**2 * config.in_channels
        self.proj = Linear(config.hidden_size, outputs, groups=(0, 1))

    def forward(self, x: Tensor, temb: Tensor, index: int, width: float) -> Tensor:
        table = self.scale_shift_table[index] + temb[:, None]
        shift, scale = table[:, :, None].unbind(1)
        return self.proj(modulate(x, shift, scale), width)


def to_windows(x: Tensor, grid: tuple[int, int], size: int) -> Tensor:
    """Raster x (B, N, C) -> (B, N / size², size² C): row-major windows, channel fastest."""
    rows, columns = grid[0] // size, grid[1] // size
    x = x.reshape(len(x), rows, size, columns, size, -1).transpose(2, 3)
    return x.reshape(len(x), rows * columns, -1)


def from_windows(x: Tensor, grid: tuple[int, int], size: int) -> Tensor:
    """The inverse; `grid` is the fine one."""
    rows, columns = grid[0] // size, grid[1] // size
    x = x.reshape(len(x), rows, columns, size, size, -1).transpose(2, 3)
    return x.reshape(len(x), grid[0] * grid[1], -1)


class SnapGenPPTransformer2DModel(nn.Module):
    """The supernet. `config` describes the full width (the keys of transformer/config.json).

    Args:
        config: the geometry; the ablation switches are the reference's alone, not trained here.
        checkpointing: compute the blocks again in the backward pass (less memory).
    """

    def __init__(self, config: DiTConfig, checkpointing: bool = False):
        super().__init__()
        self.config, self.checkpointing = config, checkpointing
        d = config.hidden_size
        self.patch_embed = PatchEmbed(config)
        self.text_embed = TextEmbed(config)
        self.time_embed = nn.ModuleList(TimeEmbed(int(d * w)) for w in config.widths)
        for stage, (name, layers) in enumerate(zip(STAGES, config.layers, strict=True)):
            skips = layers // 2 if name == "mid" else 0
            blocks = [Block(config, stage, i >= layers - skips) for i in range(layers)]
            self.add_module(name, nn.ModuleList(blocks))
        self.downsample = Resample(4 * d, d, (1, 4))
        self.upsample = Resample(d, 4 * d, (4, 1))
        self.final = Final(config)
        self.apply(_initialise)
        nn.init.zeros_(self.final.proj.weight)
        for time in self.time_embed:
            nn.init.normal_(time.modulation.weight, std=0.02)

    def forward(self, x: Tensor, t: Tensor, text: dict, masks: dict, index: int = -1) -> Tensor:
        """The velocity (B, h, w, C) float32 of x (B, h, w, C) at t (B,) in [0, 1].

        Args:
            text: {encoder: states (B, L, dim)}; one left out, or a whole {}, counts as dropped.
            masks: {encoder: (B, L) bool}, true where valid.
            index: the width, into `config.widths`; the full one by default.
        """
        config = self.config
        index %= len(config.widths)
        width, patch = config.widths[index], config.patch_size
        B, *pixels, C = x.shape
        fine = (pixels[0] // patch, pixels[1] // patch)
        coarse = (fine[0] // 2, fine[1] // 2)
        temb, shared = self.time_embed[index](t)
        caption, mask = self.text_embed(text, masks, B)

        ropes = {
            grid: rope_table(grid, config.head_dim, config.rope_theta, x.device)
            for grid in (fine, coarse)
        }

        def run(block, x, grid, kept=None):
            args = x, kept, shared, caption, mask, ropes[grid], grid, index, width
            if self.checkpointing and self.training:
                return checkpoint(block, *args, use_reentrant=False)
            return block(*args)

        x = self.patch_embed(to_windows(x.flatten(1, 2), pixels, patch), width).float()
        for block in self.down:
            x = run(block, x, fine)
        skip = x
        x = self.downsample.proj(to_windows(x, fine, 2), width).float()
        kept = []
        for i, block in enumerate(self.mid):
            n = len(self.mid)
            x = run(block, x, coarse, kept[n - 1 - i] if i >= n - n // 2 else None)
            kept.append(x)
        x = from_windows(self.upsample.proj(x, width), fine, 2) + skip
        for block in self.up:
            x = run(block, x, fine)
        v = from_windows(self.final(x, temb, index, width), pixels, patch)
        return v.float().reshape(B, *pixels, C)

    def sliced(self) -> dict[str, tuple[int, ...]]:
        """Of each parameter that narrower widths use a slice of: the groups of its axes."""
        out = {}
        for path, module in self.named_modules():
            if isinstance(module, Linear):
                out[f"{path}.weight"] = module.groups
                out[f"{path}.bias"] = module.groups[:1]
            elif isinstance(module, Filter | nn.Conv2d):
                out[f"{path}.weight"] = out[f"{path}.bias"] = (1,)
        return out


def _initialise(module: nn.Module) -> None:
    """Weights of standard deviation 0.6 / sqrt(inputs), biases 0."""
    if isinstance(module, nn.Linear | nn.Conv2d):
        nn.init.normal_(module.weight, std=0.6 * module.weight[0].numel() ** -0.5)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
