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

from .attention import EPS, CrossAttention, Filter, Linear, SelfAttention, leading, rope_table

STAGES = ("down", "mid", "up")


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """LayerNorm without affine of x (B, N, d), times 1 + scale, plus shift, each (B, 1, d)."""
    return torch.addcmul(shift, F.layer_norm(x, x.shape[-1:], eps=EPS), 1 + scale)


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
        x = torch.addcmul(x, gate1, self.attn(modulate(x, shift1, scale1), rope, grid, width))
        x = x + self.cross(x, caption, mask, width)
        return torch.addcmul(x, gate2, self.ffn(modulate(x, shift2, scale2), width))


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
        _let_noise_pass(self.patch_embed.proj.weight, self.final.proj.weight)
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


@torch.no_grad()
def _let_noise_pass(first: Tensor, last: Tensor) -> None:
    """Start a convolution (d, C, p, p) as a rotation for every width, and `last` as its inverse.

    The velocity holds the noise, all p² C numbers of a patch. A width that is hardly wider than
    that loses some of them between Gaussian weights, and takes long to learn not to.

    Args:
        last: (p² C, d), channel fastest; 0.8 times the inverse: at t = .75, the median of training
            with shift 3, .8 x_t is what is best known of the velocity of normal latents.
    """
    d, channels, patch, _ = first.shape
    size = patch * patch * channels
    blocks = [nn.init.orthogonal_(first.new_empty(size, size)) for _ in range(-(-d // size))]
    rows = torch.cat(blocks)[:d]  # (d, p² C): each width's slice begins with whole rotations
    first.copy_(rows.unflatten(1, (patch, patch, channels)).permute(0, 3, 1, 2))
    last.copy_(0.8 * size / d * rows.T)


def _initialise(module: nn.Module) -> None:
    """Weights of standard deviation 0.6 / sqrt(inputs), biases 0."""
    if isinstance(module, nn.Linear | nn.Conv2d):
        nn.init.normal_(module.weight, std=0.6 * module.weight[0].numel() ** -0.5)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
