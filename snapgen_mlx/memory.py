"""What fits: peak memory predicted from headers and shapes, before any weight is read.

Bytes are those of MLX's own arrays, as ``mx.get_peak_memory`` counts them. The forms below follow
from the architecture; their coefficients were measured on MLX's CPU build. On Metal attention is
fused for usual head sizes and convolutions do not unfold their input: attention counts nothing
there and convolutions half (an estimate).
"""

import os
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from .config import DiTConfig
from .errors import UsageError
from .models.dit import DiT
from .models.tiny_decoder import TinyDecoderConfig
from .models.vae import AutoencoderKLQwenImage, Decoder
from .quantization.palette import SUFFIX as PALETTE
from .safetensors_io import NAMES
from .weights import compute_dtype, load_config, load_dit, load_infos

HEAVY_ENCODERS = 100_000_000  # bytes; lighter ones stay beside the transformer
FUSED_HEADS = (64, 72, 80, 96, 128)  # head_dim of Metal's attention without a score matrix
TEXT_TOKENS = {"clip": 77, "gemma": 256, "static": 32}
TILE, LOW_RAM_TILE = 32, 16  # latent positions a side of what the large VAE decodes at once
SHARE = 0.8  # of a machine's memory may be MLX's where the system names no limit
FOUR_BITS = 0.32  # of bfloat16: 4.5 bits a weight, 8.5 for the sensitive layers


def usable_memory() -> int:
    """Bytes that MLX may take on this machine: Metal's working set, or a share of all memory."""
    limit = mx.device_info().get("max_recommended_working_set_size")
    return limit or int(SHARE * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


@dataclass(frozen=True)
class Request:
    """The largest picture to be made, in pixels, and how."""

    width: int
    height: int
    guided: bool = False
    low_ram: bool = False
    keep_encoders: bool = False

    @property
    def tile(self) -> int:
        return LOW_RAM_TILE if self.low_ram else TILE


@dataclass(frozen=True)
class Prediction:
    """Peak bytes of each phase, with all weights that are in memory then."""

    encode: int
    denoise: int
    decode: int

    @property
    def peak(self) -> int:
        return max(self.encode, self.denoise, self.decode)


def weight_bytes(part, only: tuple[str, ...] = ("",)) -> int:
    """Bytes of a loaded part's weights whose paths start with one of ``only``; none is read."""
    if isinstance(part, nn.Module):
        parameters = tree_flatten(part.parameters())
        return sum(a.nbytes for path, a in parameters if path.startswith(only))
    return sum(a.nbytes for a in vars(part).values() if isinstance(a, mx.array))


class ModelMemory:
    """Memory needs of a model folder with its (unread) autoencoder and text encoders."""

    def __init__(self, folder, vae: nn.Module, encoders: list):
        self.folder = Path(folder)
        transformer = self.folder / "transformer"
        self.config = DiTConfig.from_dict(load_config(transformer))
        self.metal = mx.default_device() == mx.gpu
        self.is_large_vae = isinstance(vae, AutoencoderKLQwenImage)
        self._vae_config = vae.config if self.is_large_vae else vae.decoder.config
        self.decoder = weight_bytes(vae, ("decoder.", "post_quant_conv."))
        self.encoders = sum(map(weight_bytes, encoders))
        self._encoding = sum(map(_encoding_bytes, encoders))
        self._text_tokens = 1 + sum(TEXT_TOKENS.get(e.name, 0) for e in encoders)
        names = {e.name for e in encoders}
        # Weights that no text passes through are never read.
        self._unread = tuple(f"text_embed.{n}." for n in self.config.text_dims if n not in names)
        infos = {k: i for k, i in load_infos(transformer).items() if not k.startswith(self._unread)}
        self.is_quantized = any(key.endswith(".scales") for key in infos)
        self.is_palette = any(key.endswith(PALETTE) for key in infos)
        self._stored = max((info.nbytes for info in infos.values()), default=0)
        self._is_cast = {NAMES[compute_dtype()]} != {info.dtype for info in infos.values()}
        self._tensors = {}

    def weights(self, variant: str) -> int:
        """Bytes of the transformer at one width, as it is computed with on this machine."""
        return sum(self._variant_tensors(variant))

    def parameters(self, variant: str) -> int:
        """Number of parameters of one width."""
        dit = DiT(self.config.variant(self.config.variant_index(variant)))  # never evaluated
        return sum(a.size for _, a in tree_flatten(dit.parameters()))

    def _variant_tensors(self, variant: str) -> list[int]:
        if variant not in self._tensors:
            parameters = tree_flatten(load_dit(self.folder, variant).parameters())
            self._tensors[variant] = [
                a.nbytes for path, a in parameters if not path.startswith(self._unread)
            ]
        return self._tensors[variant]

    def keeps_encoders(self, request: Request) -> bool:
        """Whether the text encoders stay in memory while a picture is made."""
        is_wanted = request.keep_encoders or self.encoders <= HEAVY_ENCODERS
        return is_wanted and not request.low_ram

    def predict(self, variant: str, request: Request, bits: int | None = None) -> Prediction:
        """Peaks for one width; with ``bits`` = 4 as if the model were quantized to them."""
        r, factor = request, FOUR_BITS if bits else 1
        dit, encoders = int(factor * self.weights(variant)), int(factor * self.encoders)
        keep = self.keeps_encoders(r)
        kept = encoders if keep else 0
        beside = 0 if r.low_ram else self.decoder
        h, w = r.height // 8, r.width // 8
        config = self.config.variant(self.config.variant_index(variant))
        denoise = _denoising_bytes(config, h, w, 1 + r.guided, self._text_tokens, self.metal)
        return Prediction(
            encode=encoders and encoders + self._encoding + (dit + beside if keep else 0),
            denoise=dit + kept + beside + max(denoise, self._loading(variant)),
            decode=self.decoder + (0 if r.low_ram else dit + kept) + self._decoding(h, w, r.tile),
        )

    def fits(self, variant: str, request: Request, bits: int | None = None) -> bool:
        return self.predict(variant, request, bits).peak <= usable_memory()

    def choose(self, request: Request) -> str:
        """The widest variant that fits. Raises UsageError when none does."""
        for variant in reversed(self.config.variants):
            if self.fits(variant, request):
                return variant
        raise self._refusal(self.config.variants[0], request)

    def check(self, variant: str, request: Request) -> None:
        """Raise UsageError, saying what would fit, unless the picture does."""
        if not self.fits(variant, request):
            raise self._refusal(variant, request)

    def _refusal(self, variant: str, request: Request) -> UsageError:
        def offer(option, variant, request, bits=None):
            peak = self.predict(variant, request, bits).peak
            return [f"{option} ({format_bytes(peak)})"] if peak <= usable_memory() else []

        narrower = self.config.variants[: self.config.variants.index(variant)]
        fitting = [v for v in narrower if self.fits(v, request)]
        offers = offer(f"--variant {fitting[-1]}", fitting[-1], request) if fitting else []
        if not request.low_ram:
            offers += offer("--low-ram", variant, replace(request, low_ram=True))
        for size in _smaller(request):
            if smaller := offer(f"--width {size.width} --height {size.height}", variant, size):
                offers += smaller
                break
        if self.metal and not self.is_quantized:
            offers += offer("a model converted with --quantize 4", variant, request, bits=4)
        what = f"{variant} at {request.width}x{request.height}"
        need = format_bytes(self.predict(variant, request).peak)
        fit = f"what fits: {', '.join(offers)}" if offers else "no setting of this model fits"
        usable = format_bytes(usable_memory())
        return UsageError(f"{what} needs about {need} of memory, {usable} can be used here; {fit}")

    def _loading(self, variant: str) -> int:
        """What loading holds beside the weights: some stored tensors, until cut or converted."""
        held = 0
        if self._is_cast or variant != self.config.variants[-1]:
            held += 2 * self._stored
        if self.is_quantized and not self.metal:  # unpacked on the way
            held += 3 * max(self._variant_tensors(variant))
        return held

    def _decoding(self, h: int, w: int, tile: int) -> int:
        if self.is_large_vae:
            return _large_vae_bytes(self._vae_config, h, w, tile, self.metal)
        return _small_vae_bytes(self._vae_config, h, w)


def format_bytes(n: int) -> str:
    return f"{n / 1e9:.1f} GB" if n >= 1e9 else f"{n / 1e6:.0f} MB"


def _smaller(request: Request):
    """The same shape at less and less pixels, in multiples of 64 a side."""
    longer = max(request.width, request.height)
    for side in range(longer - 64, 0, -64):
        w, h = (max(round(n * side / longer / 64), 1) * 64 for n in (request.width, request.height))
        yield replace(request, width=w, height=h)


def _encoding_bytes(encoder) -> int:
    """Activations of a text encoder at its longest text."""
    c = getattr(encoder, "args", getattr(encoder, "config", None))
    if c is None:  # a table
        return 0
    tokens = TEXT_TOKENS[encoder.name]
    scores = c.num_attention_heads * tokens**2
    layer = tokens * (12 * c.hidden_size + 4 * c.intermediate_size) + 2 * scores
    return layer * compute_dtype().size


def attention_scores(config: DiTConfig, stage: int, n: int) -> int:
    """Scores per head of self-attention over n tokens, dense or ASSA."""
    if config.attention[stage] == "dense":
        return n * n
    blocks, r = config.bna_blocks, config.bna_radius
    pairs = sum(min(b + r, blocks - 1) - max(b - r, 0) + 1 for b in range(blocks))
    return n * n // 4 + (n // blocks) ** 2 * pairs


def _denoising_bytes(
    config: DiTConfig, h: int, w: int, batch: int, text_tokens: int, metal: bool
) -> int:
    """Activations of one network evaluation on a latent (batch, h, w): 19 vectors a token at the
    peak of a block, the attention scores where they are not fused, the text's keys and values."""
    size, d = compute_dtype().size, config.hidden_size
    tokens = h * w // config.patch_size**2
    stages = []
    for stage, layers in enumerate(config.layers):
        n = tokens // 4 if stage == 1 and config.downsample else tokens
        scores = attention_scores(config, stage, n)
        if metal and config.head_dim in FUSED_HEADS:
            scores = 0
        stages.append(layers and 19 * n * d + config.num_heads * scores)
    text = text_tokens * (2 * sum(config.layers) * d + 2 * config.caption_dim)
    return batch * size * (max(stages) + text)


def _large_vae_bytes(config, h: int, w: int, tile: int, metal: bool) -> int:
    """The Qwen-Image VAE decoding in tiles: its middle block on the whole latent, whose score
    matrix is whole too, then two neighbouring parts of the up blocks on the largest tile."""
    size = compute_dtype().size
    decoder, dims = Decoder(config), [config.base_dim * m for m in config.dim_mult[::-1]]
    tile = tile if tile < max(h, w) else max(h, w)
    parts, scale = [], 1
    for dim, block, halo in zip(dims, decoder.up_blocks, decoder.halos(), strict=True):
        area = 1
        for n in (h, w):
            area *= min(scale * tile + 2 * halo, scale * n)
        parts.append(area * dim * (13 + 13.5 * len(block.resnets)))
        if block.upsamplers:
            parts.append(area * dim * 46)
            scale *= 2
    up = max(map(sum, pairwise(parts)))
    middle = (h * w) ** 2 + 40 * h * w * dims[0]
    pixels = 2 * 3 * h * w * scale**2
    return int(size * (max(middle, up / 2 if metal else up) + h * w * dims[0] + pixels))


def _small_vae_bytes(config: TinyDecoderConfig, h: int, w: int) -> int:
    """A decoder of separable blocks, never tiled, always in float32."""
    stages = [
        4**stage * channels * (18 + 4 * config.expansion)
        for stage, channels in enumerate(config.channels)
    ]
    return 4 * h * w * (max(stages) + 60 * 4 ** (len(stages) - 1))
