"""The SnapGen++ diffusion transformer in plain PyTorch, written to be read and not to be fast.

The state_dict is the PyTorch checkpoint contract: a supernet of all widths, whose parameters are
shared, except one bank entry per width for `time_embed` and every `scale_shift_table`. A forward
pass at one width slices every weight explicitly; masks are dense; heads are expanded.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

EPS = 1e-6
STAGES = ("down", "mid", "up")
DEFAULTS = {
    "bna_blocks": 16,
    "bna_radius": 1,
    "rope_theta": 10000,
    "widths": [1.0],
    "attention": ["assa", "dense", "assa"],
    "mid_skips": True,
    "downsample": True,
}


class Sizes:
    """The dimensions of one width."""

    def __init__(self, config: dict, index: int):
        width = config["widths"][index]
        self.hidden = exact(width * config["hidden_size"])
        self.heads = exact(width * config["num_heads"])
        self.kv_heads = exact(width * config["num_kv_heads"])
        self.head_dim = config["head_dim"]
        self.index = index


def exact(value: float) -> int:
    assert abs(value - round(value)) < 1e-9, f"the width does not divide: {value}"
    return round(value)


def leading(groups: int, size: int, kept: int) -> Tensor:
    """Indices of the first `kept` of `size` entries in each of `groups` consecutive groups."""
    return torch.cat([torch.arange(kept) + g * size for g in range(groups)])


def linear(layer: nn.Linear, x: Tensor, rows: int) -> Tensor:
    """The leading `rows` outputs of a layer, from as many leading inputs as x has."""
    bias = None if layer.bias is None else layer.bias[:rows]
    return F.linear(x, layer.weight[:rows, : x.shape[-1]], bias)


def layer_norm(x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=EPS)


def sinusoid(t: Tensor) -> Tensor:
    """t (B,) in [0, 1] -> (B, 256): cosines, then sines, of 1000 t at 128 frequencies."""
    steps = torch.arange(128, dtype=torch.float32)
    frequencies = torch.exp(-math.log(10000) * steps / 128)
    angles = (1000 * t.float())[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def rope_angles(rows: int, columns: int, head_dim: int, theta: float) -> Tensor:
    """(rows * columns, head_dim / 2) rotation angles, one per pair of dims: row, then column."""
    quarter = head_dim // 4
    frequencies = theta ** (-torch.arange(quarter, dtype=torch.float32) / quarter)
    row = torch.arange(rows).repeat_interleave(columns)
    column = torch.arange(columns).repeat(rows)
    return torch.cat([row[:, None] * frequencies, column[:, None] * frequencies], dim=-1)


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    """Rotates the pairs (2j, 2j + 1) of x (B, N, heads, D) by angles (N, D / 2)."""
    cos, sin = angles.cos()[:, None].to(x.dtype), angles.sin()[:, None].to(x.dtype)
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """q (B, N, H, D); k, v (B, M, H, D); mask, true where seen, broadcasts to (B, H, N, M)."""
    scores = torch.einsum("bnhd,bmhd->bhnm", q, k) / math.sqrt(q.shape[-1])
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return torch.einsum("bhnm,bmhd->bnhd", scores.softmax(dim=-1), v)


def neighbourhood_mask(tokens: int, blocks: int, radius: int) -> Tensor:
    """(N, N), true where the key's block is at most `radius` away from the query's block."""
    assert tokens % blocks == 0, f"{tokens} tokens do not divide into {blocks} blocks"
    block = torch.arange(tokens) // (tokens // blocks)
    return (block[:, None] - block[None, :]).abs() <= radius


def window_concat(h: Tensor, grid: tuple[int, int]) -> Tensor:
    """(B, N, C) -> (B, N / 4, 4 C): windows' tokens (0,0), (0,1), (1,0), (1,1), channel fastest."""
    h = h.unflatten(1, grid)
    window = [h[:, i::2, j::2] for i in (0, 1) for j in (0, 1)]
    return torch.cat(window, dim=-1).flatten(1, 2)


def window_split(h: Tensor, grid: tuple[int, int], size: int = 2) -> Tensor:
    """The inverse, to a map: (B, rows cols, size² C) -> (B, size rows, size cols, C)."""
    (rows, columns), channels = grid, h.shape[-1] // size**2
    out = h.new_zeros(h.shape[0], rows * size, columns * size, channels)
    for n, part in enumerate(h.unflatten(1, grid).split(channels, dim=-1)):
        out[:, n // size :: size, n % size :: size] = part
    return out


class SelfAttention(nn.Module):
    """Grouped-query attention with q/k LayerNorm and axial RoPE; `assa` adds the two branches."""

    def __init__(self, config: dict, assa: bool):
        super().__init__()
        d, D = config["hidden_size"], config["head_dim"]
        H, K = config["num_heads"], config["num_kv_heads"]
        self.config, self.assa = config, assa
        self.to_q = nn.Linear(d, H * D, bias=False)
        self.to_k = nn.Linear(d, K * D, bias=False)
        self.to_v = nn.Linear(d, K * D, bias=False)
        self.norm_q = nn.LayerNorm(D, eps=EPS)
        self.norm_k = nn.LayerNorm(D, eps=EPS)
        self.to_out = nn.Linear(H * D, d)
        if assa:
            self.head_gate = nn.Linear(d, H)
            self.kv_compress = nn.ModuleDict({"k": Filter(K, D), "v": Filter(K, D)})

    def forward(self, x: Tensor, grid: tuple[int, int], size: Sizes) -> Tensor:
        H, K, D = size.heads, size.kv_heads, size.head_dim
        angles = rope_angles(*grid, D, self.config["rope_theta"])
        q = rotate(self.norm_q(linear(self.to_q, x, H * D).unflatten(-1, (H, D))), angles)
        k = rotate(self.norm_k(linear(self.to_k, x, K * D).unflatten(-1, (K, D))), angles)
        v = linear(self.to_v, x, K * D).unflatten(-1, (K, D))
        reads = torch.arange(H) // (H // K)  # the KV head of each query head
        if not self.assa:
            out = attend(q, k[:, :, reads], v[:, :, reads])
        else:
            kc = self.kv_compress["k"](k, grid)
            vc = self.kv_compress["v"](v, grid)
            everywhere = attend(q, kc[:, :, reads], vc[:, :, reads])
            mask = neighbourhood_mask(
                x.shape[1], self.config["bna_blocks"], self.config["bna_radius"]
            )
            nearby = attend(q, k[:, :, reads], v[:, :, reads], mask)
            alpha = torch.sigmoid(linear(self.head_gate, x, H))[..., None]
            out = alpha * everywhere + (1 - alpha) * nearby
        return linear(self.to_out, out.flatten(-2), size.hidden)


class Filter(nn.Module):
    """A 2x2 convolution of stride 2 over the token grid with one filter per KV head."""

    def __init__(self, kv_heads: int, head_dim: int):
        super().__init__()
        mean = torch.eye(head_dim)[:, :, None, None].expand(-1, -1, 2, 2) / 4
        self.weight = nn.Parameter(mean.repeat(kv_heads, 1, 1, 1, 1))

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """(B, N, K, D) -> (B, N / 4, K, D)."""
        K, D = x.shape[2:]
        image = x.flatten(2).transpose(1, 2).unflatten(2, grid)  # (B, K D, rows, columns)
        image = F.conv2d(image, self.weight[:K].flatten(0, 1), stride=2, groups=K)
        return image.flatten(2).transpose(1, 2).unflatten(2, (K, D))


class CrossAttention(nn.Module):
    """Query head h reads KV head h mod cross_kv_heads; keys and values are never sliced."""

    def __init__(self, config: dict):
        super().__init__()
        d, D, H = config["hidden_size"], config["head_dim"], config["num_heads"]
        self.kv_heads = config["cross_kv_heads"]
        self.to_q = nn.Linear(d, H * D, bias=False)
        self.to_k = nn.Linear(config["caption_dim"], self.kv_heads * D, bias=False)
        self.to_v = nn.Linear(config["caption_dim"], self.kv_heads * D, bias=False)
        self.norm_q = nn.LayerNorm(D, eps=EPS)
        self.norm_k = nn.LayerNorm(D, eps=EPS)
        self.to_out = nn.Linear(H * D, d)

    def forward(self, x: Tensor, caption: Tensor, mask: Tensor, size: Sizes) -> Tensor:
        H, D = size.heads, size.head_dim
        q = self.norm_q(linear(self.to_q, x, H * D).unflatten(-1, (H, D)))
        k = self.norm_k(self.to_k(caption).unflatten(-1, (self.kv_heads, D)))
        v = self.to_v(caption).unflatten(-1, (self.kv_heads, D))
        reads = torch.arange(H) % self.kv_heads
        out = attend(q, k[:, :, reads], v[:, :, reads], mask[:, None, None, :])
        return linear(self.to_out, out.flatten(-2), size.hidden)


class FeedForward(nn.Module):
    def __init__(self, config: dict, ratio: float):
        super().__init__()
        self.ratio = ratio
        inner = exact(ratio * config["hidden_size"])
        self.fc1 = nn.Linear(config["hidden_size"], inner)
        self.fc2 = nn.Linear(inner, config["hidden_size"])

    def forward(self, x: Tensor, size: Sizes) -> Tensor:
        x = F.gelu(linear(self.fc1, x, exact(self.ratio * size.hidden)), approximate="tanh")
        return linear(self.fc2, x, size.hidden)


class Block(nn.Module):
    def __init__(self, config: dict, stage: int, skip: bool):
        super().__init__()
        hidden = config["hidden_size"]
        self.hidden_size = hidden
        self.attn = SelfAttention(config, assa=config["attention"][stage] == "assa")
        self.cross = CrossAttention(config)
        self.ffn = FeedForward(config, config["ffn_ratio"][stage])
        self.scale_shift_table = bank(config, 6)
        if skip:
            self.skip_proj = nn.Linear(2 * hidden, hidden)

    def join(self, h: Tensor, kept: Tensor, size: Sizes) -> Tensor:
        columns = leading(2, self.hidden_size, size.hidden)
        weight = self.skip_proj.weight[: size.hidden, columns]
        return F.linear(torch.cat([h, kept], dim=-1), weight, self.skip_proj.bias[: size.hidden])

    def forward(self, h, grid, shared: Tensor, caption, mask, size: Sizes) -> Tensor:
        """shared (B, 6, d): the modulation that all blocks share."""
        modulation = shared + self.scale_shift_table[size.index]
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation[:, :, None].unbind(1)
        h = h + gate1 * self.attn(layer_norm(h) * (1 + scale1) + shift1, grid, size)
        h = h + self.cross(h, caption, mask, size)
        return h + gate2 * self.ffn(layer_norm(h) * (1 + scale2) + shift2, size)


def bank(config: dict, rows: int) -> nn.ParameterList:
    """One table (rows, d_W) per width."""
    sizes = [Sizes(config, index) for index in range(len(config["widths"]))]
    return nn.ParameterList(torch.zeros(rows, size.hidden) for size in sizes)


class TimeEmbed(nn.Module):
    """One width's own time network."""

    def __init__(self, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(256, hidden)
        self.fc2 = nn.Linear(hidden, hidden)
        self.modulation = nn.Linear(hidden, 6 * hidden)

    def forward(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """t (B,) -> temb (B, d) and the shared modulation (B, 6, d)."""
        temb = self.fc2(F.silu(self.fc1(sinusoid(t).to(self.fc1.weight.dtype))))
        return temb, self.modulation(F.silu(temb)).unflatten(-1, (6, -1))


class TextEncoderEmbed(nn.Module):
    def __init__(self, dim: int, caption_dim: int):
        super().__init__()
        self.norm = nn.RMSNorm(dim, eps=EPS)
        self.proj = nn.Linear(dim, caption_dim)

    def forward(self, states: Tensor) -> Tensor:
        return self.proj(self.norm(states))


class TextEmbed(nn.Module):
    """Concatenates the encoders' tokens; a sample without any valid token gets the null token."""

    def __init__(self, config: dict):
        super().__init__()
        self.names = list(config["text_dims"])
        for name, dim in config["text_dims"].items():
            self.add_module(name, TextEncoderEmbed(dim, config["caption_dim"]))
        self.null = nn.Parameter(torch.zeros(1, config["caption_dim"]))

    def forward(self, text: dict, masks: dict, batch: int) -> tuple[Tensor, Tensor]:
        """-> caption (B, L + 1, caption_dim), the null token last, and its mask (B, L + 1)."""
        names = [name for name in self.names if name in text]
        tokens = [getattr(self, name)(text[name]) for name in names]
        valid = [masks[name] for name in names]
        seen = torch.cat([torch.zeros(batch, 1, dtype=torch.bool), *valid], dim=1)
        nothing = ~seen.any(dim=1, keepdim=True)
        caption = torch.cat([*tokens, self.null.expand(batch, 1, -1)], dim=1)
        return caption, torch.cat([*valid, nothing], dim=1)


class Final(nn.Module):
    def __init__(self, config: dict):
        super().__init__()
        self.scale_shift_table = bank(config, 2)
        out = config["patch_size"] ** 2 * config["in_channels"]
        self.proj = nn.Linear(config["hidden_size"], out)

    def forward(self, h: Tensor, temb: Tensor, size: Sizes) -> Tensor:
        shift, scale = (self.scale_shift_table[size.index] + temb[:, None])[:, :, None].unbind(1)
        return linear(self.proj, layer_norm(h) * (1 + scale) + shift, self.proj.out_features)


class PatchEmbed(nn.Module):
    def __init__(self, config: dict):
        super().__init__()
        patch = config["patch_size"]
        self.proj = nn.Conv2d(config["in_channels"], config["hidden_size"], patch, stride=patch)

    def forward(self, x: Tensor, size: Sizes) -> Tensor:
        """(B, C, H, W) -> (B, d, rows, columns)."""
        weight, bias = self.proj.weight[: size.hidden], self.proj.bias[: size.hidden]
        return F.conv2d(x, weight, bias, stride=self.proj.stride)


class Resample(nn.Module):
    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.proj = nn.Linear(inputs, outputs)


class SnapGenPPTransformer2DModel(nn.Module):
    """config: the keys of transformer/config.json."""

    def __init__(self, config: dict):
        super().__init__()
        self.config = config = {**DEFAULTS, **config}
        d = config["hidden_size"]
        self.sizes = [Sizes(config, index) for index in range(len(config["widths"]))]
        self.patch_embed = PatchEmbed(config)
        self.text_embed = TextEmbed(config)
        self.time_embed = nn.ModuleList(TimeEmbed(size.hidden) for size in self.sizes)
        for stage, (name, layers) in enumerate(zip(STAGES, config["layers"], strict=True)):
            skips = layers // 2 if name == "mid" and config["mid_skips"] else 0
            blocks = [Block(config, stage, skip=i >= layers - skips) for i in range(layers)]
            self.add_module(name, nn.ModuleList(blocks))
        if config["downsample"]:
            self.downsample = Resample(4 * d, d)
            self.upsample = Resample(d, 4 * d)
        self.final = Final(config)

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        text: dict[str, Tensor],
        masks: dict[str, Tensor],
        width: int | None = None,
        return_features: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """The velocity (B, C, H, W) of x (B, C, H, W) at t (B,) in [0, 1].

        text {name: (B, L, dim)}, masks {name: (B, L) bool}; `width` indexes config["widths"], the
        last one by default. Features: the last transformer layer's tokens (B, N, d_W).
        """
        size = self.sizes[-1 if width is None else width]
        temb, shared = self.time_embed[size.index](t)
        caption, mask = self.text_embed(text, masks, len(x))
        h = self.patch_embed(x, size)
        fine, h = tuple(h.shape[2:]), h.flatten(2).transpose(1, 2)

        for block in self.down:
            h = block(h, fine, shared, caption, mask, size)
        skip_hi, grid = h, fine
        if self.config["downsample"]:
            h, grid = self.to_coarse(h, fine, size), (fine[0] // 2, fine[1] // 2)

        kept = []
        for i, block in enumerate(self.mid):
            if hasattr(block, "skip_proj"):
                h = block.join(h, kept[len(self.mid) - 1 - i], size)
            h = block(h, grid, shared, caption, mask, size)
            kept.append(h)

        if self.config["downsample"]:
            h = self.to_fine(h, grid, size) + skip_hi
        for block in self.up:
            h = block(h, fine, shared, caption, mask, size)

        out = self.final(h, temb, size)
        v = window_split(out, fine, self.config["patch_size"]).permute(0, 3, 1, 2)
        return (v, h) if return_features else v

    def to_coarse(self, h: Tensor, grid: tuple[int, int], size: Sizes) -> Tensor:
        columns = leading(4, self.config["hidden_size"], size.hidden)
        weight = self.downsample.proj.weight[: size.hidden, columns]
        return F.linear(window_concat(h, grid), weight, self.downsample.proj.bias[: size.hidden])

    def to_fine(self, h: Tensor, grid: tuple[int, int], size: Sizes) -> Tensor:
        rows = leading(4, self.config["hidden_size"], size.hidden)
        weight = self.upsample.proj.weight[rows, : size.hidden]
        return window_split(F.linear(h, weight, self.upsample.proj.bias[rows]), grid).flatten(1, 2)


def slice_state_dict(sd: dict, config: dict, index: int) -> tuple[dict, dict]:
    """The standalone checkpoint (state_dict, config) of one width of a supernet's."""
    config = {**DEFAULTS, **config}
    size, d = Sizes(config, index), config["hidden_size"]
    standalone = {
        **config,
        "hidden_size": size.hidden,
        "num_heads": size.heads,
        "num_kv_heads": size.kv_heads,
        "widths": [1.0],
    }
    names = {0.375: "tiny", 0.5: "small", 1.0: "full"}
    if config["widths"][index] in names:
        standalone["variant"] = names[config["widths"][index]]

    queries, keys = size.heads * size.head_dim, size.kv_heads * size.head_dim
    everything = slice(None)
    hidden = slice(size.hidden)
    out = {}
    for key, value in sd.items():
        parts = key.split(".")
        # A bank keeps this width's entry alone, which is not sliced.
        if "time_embed" in parts or "scale_shift_table" in parts:
            entry = 1 if "time_embed" in parts else -1
            if parts[entry] == str(index):
                parts[entry] = "0"
                out[".".join(parts)] = value.clone()
            continue
        if parts[0] in STAGES:
            ratio = config["ffn_ratio"][STAGES.index(parts[0])]
            rows, columns = {
                "attn.to_q": (slice(queries), hidden),
                "attn.to_k": (slice(keys), hidden),
                "attn.to_v": (slice(keys), hidden),
                "attn.to_out": (hidden, slice(queries)),
                "attn.norm_q": (everything, None),
                "attn.norm_k": (everything, None),
                "attn.head_gate": (slice(size.heads), hidden),
                "attn.kv_compress.k": (slice(size.kv_heads), everything),
                "attn.kv_compress.v": (slice(size.kv_heads), everything),
                "cross.to_q": (slice(queries), hidden),
                "cross.to_k": (everything, everything),
                "cross.to_v": (everything, everything),
                "cross.to_out": (hidden, slice(queries)),
                "cross.norm_q": (everything, None),
                "cross.norm_k": (everything, None),
                "ffn.fc1": (slice(exact(ratio * size.hidden)), hidden),
                "ffn.fc2": (hidden, slice(exact(ratio * size.hidden))),
                "skip_proj": (hidden, leading(2, d, size.hidden)),
            }[".".join(parts[2:-1])]
        else:
            rows, columns = {
                "text_embed": (everything, everything),
                "patch_embed": (hidden, everything),
                "downsample": (hidden, leading(4, d, size.hidden)),
                "upsample": (leading(4, d, size.hidden), hidden),
                "final": (everything, hidden),
            }[parts[0]]
        value = value[rows]
        out[key] = (value if value.ndim == 1 else value[:, columns]).clone()
    return out, standalone
