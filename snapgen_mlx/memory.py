"""What fits: peak memory predicted from headers and shapes, before any weight is read.

Bytes are those of MLX's own arrays, as ``mx.get_peak_memory`` counts them. The forms below follow
from the architecture; their coefficients were measured on MLX's CPU build. On Metal attention is
fused for usual head sizes and counts nothing.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import mlx.core as mx

from .config import DiTConfig, QwenImageConfig, TransformerConfig
from .device import inference_dtype, on_gpu, on_metal, usable_memory
from .errors import UsageError, format_bytes
from .loading import load_transformer, load_transformer_config
from .models.dit import DiT
from .models.interfaces import Autoencoder, Decoder, TextEncoder
from .models.qwen_image import GROUP, TOKENS, QwenImage
from .models.sizes import parameter_count
from .tensors.palette import SUFFIX as PALETTE
from .tensors.safetensors_io import NAMES
from .tensors.weights import flat_parameters, load_infos
from .widths import parse_widths

HEAVY_ENCODERS = 100_000_000  # bytes; smaller encoders stay in memory beside the transformer
# Values of head_dim for which Metal's attention needs no score matrix.
FUSED_HEADS = (64, 72, 80, 96, 128)
TILE, LOW_RAM_TILE = 32, 16  # side of a tile of the large VAE, in latent positions
FOUR_BITS = 0.32  # size as a part of bfloat16's: 4.5 bits a weight, 8.5 for sensitive layers
MAY_HAPPEN = (
    "the system may swap and stand still for minutes, or end this program and others: save your "
    "work first"
)


def decoding_tile(low_ram: bool) -> int:
    return LOW_RAM_TILE if low_ram else TILE


@dataclass(frozen=True)
class Request:
    """The largest picture to be made, in pixels, and how."""

    width: int
    height: int
    guided: bool = False
    low_ram: bool = False
    keep_encoders: bool = False
    editing: bool = False  # pictures start from others, which the autoencoder encodes


@dataclass(frozen=True)
class Prediction:
    """Peak bytes of each phase, with all weights that are in memory then."""

    encode: int
    denoise: int
    decode: int
    read: int = 0  # bytes for the picture to start from

    @property
    def peak(self) -> int:
        return max(self.encode, self.read, self.denoise, self.decode)


class ModelMemory:
    """Memory needs of a model folder with its (unread) autoencoder and text encoders."""

    def __init__(
        self,
        folder,
        vae: Autoencoder,
        encoders: list[TextEncoder],
        dtype: mx.Dtype | None = None,
        decoder: Decoder | None = None,  # in place of the autoencoder's
    ):
        self.folder, self.dtype = Path(folder), dtype or inference_dtype()
        self.config = load_transformer_config(self.folder)
        self.metal, self.gpu = on_metal(), on_gpu()
        decodes = vae if decoder is None else decoder
        self.decoder, self.encoder = decodes.decoder_bytes, vae.encoder_bytes
        self.encoders = sum(encoder.nbytes for encoder in encoders)
        self.vae = vae.config  # not the network: it would stay in memory
        self._decodes = decodes.config
        self._encoding = sum(encoder.encoding_bytes() for encoder in encoders)
        self._text_tokens = 1 + sum(encoder.max_tokens for encoder in encoders)
        names = {e.name for e in encoders}
        # Weights that no text passes through are never read.
        self._unread = tuple(f"text_embed.{n}." for n in self.config.text_dims if n not in names)
        infos = load_infos(self.folder / "transformer")
        infos = {k: i for k, i in infos.items() if not k.startswith(self._unread)}
        self.is_quantized = any(key.endswith(".scales") for key in infos)
        self.is_palette = any(key.endswith(PALETTE) for key in infos)
        self._stored = max((info.nbytes for info in infos.values()), default=0)
        self._is_cast = {NAMES[self.dtype]} != {info.dtype for info in infos.values()}
        self._tensors: dict[str, list[int]] = {}

    @property
    def pixel_multiple(self) -> int:
        """A picture's width and height must be multiples of this."""
        return self.vae.downsampling * self.config.token_multiple

    def weights(self, variant: str) -> int:
        """Bytes of the transformer at one width, as it is computed with on this machine."""
        return sum(self._variant_tensors(variant))

    def parameters(self, variant: str) -> int:
        """Number of parameters of one width."""
        config = _width(self.config, variant)
        return parameter_count(DiT(config) if isinstance(config, DiTConfig) else QwenImage(config))

    def _variant_tensors(self, variant: str) -> list[int]:
        if variant not in self._tensors:
            parameters = flat_parameters(load_transformer(self.folder, variant, dtype=self.dtype))
            self._tensors[variant] = [
                a.nbytes for path, a in parameters.items() if not path.startswith(self._unread)
            ]
        return self._tensors[variant]

    def keeps_encoders(self, request: Request) -> bool:
        """Whether the text encoders stay in memory while a picture is made."""
        is_wanted = request.keep_encoders or self.encoders <= HEAVY_ENCODERS
        return is_wanted and not request.low_ram

    def predict(self, variant: str, request: Request, bits: int | None = None) -> Prediction:
        """Peaks for one width; with ``bits`` = 4 as if the model were quantized to them."""
        r, factor = request, FOUR_BITS if bits else 1
        encoders = int(factor * self.encoders)
        widths = {name for name, _ in parse_widths(variant, self.config.variants)}
        weights = {name: int(factor * self.weights(name)) for name in widths}
        dit = sum(weights.values())  # all stay, unless memory is short
        keep = self.keeps_encoders(r)
        kept = encoders if keep else 0
        encoder = self.encoder if r.editing else 0
        # Beside what a phase computes with, unless each part is held alone.
        drawer, painter = (0, 0) if r.low_ram else (dit + kept, self.decoder + encoder)
        h, w = r.height // self.vae.downsampling, r.width // self.vae.downsampling
        denoise = max(
            (weights[name] if r.low_ram else dit) + self._working(name, (h, w), 1 + r.guided)
            for name in widths
        )
        size = self.dtype.size
        decoding = self._decodes.decoding_bytes(h, w, decoding_tile(r.low_ram), size)
        reading = self.vae.encoding_bytes(h, w, size) if r.editing else 0
        return Prediction(
            encode=encoders and encoders + self._encoding + (dit + painter if keep else 0),
            read=reading and drawer + max(painter, encoder) + reading,
            denoise=denoise + kept + painter,
            decode=drawer + max(painter, self.decoder) + decoding,
        )

    def _working(self, name: str, size: tuple[int, int], batch: int) -> int:
        """Bytes beside the weights of one width, in a step or while it is loaded."""
        config = _width(self.config, name)
        floats = denoising_floats(config, size, batch, self._text_tokens, self.metal)
        return max(self.dtype.size * floats, self._loading(name))

    def fits(self, variant: str, request: Request, bits: int | None = None) -> bool:
        return self.predict(variant, request, bits).peak <= usable_memory()

    def choose(self, request: Request, force: bool = False) -> str:
        """The widest width that fits.

        Args:
            request: what to draw.
            force: take the narrowest width if none fits.

        Raises:
            UsageError: none fits.
        """
        for variant in reversed(self.config.variants):
            if self.fits(variant, request):
                return variant
        if force:
            return self.config.variants[0]
        raise self._refusal(self.config.variants[0], request)

    def excess(self, variant: str, request: Request) -> str | None:
        """What a picture needs and what there is, in words, unless it fits."""
        need, usable = self.predict(variant, request).peak, usable_memory()
        if need <= usable:
            return None
        return (
            f"{variant} at {request.width}x{request.height} needs about {format_bytes(need)} of "
            f"memory, but only {format_bytes(usable)} can be used here"
        )

    def check(self, variant: str, request: Request) -> None:
        """Raise UsageError, saying what would fit, unless the picture does."""
        if not self.fits(variant, request):
            raise self._refusal(variant, request)

    def _refusal(self, variant: str, request: Request) -> UsageError:
        def offer(option, variant, request, bits=None):
            peak = self.predict(variant, request, bits).peak
            return [f"{option} ({format_bytes(peak)})"] if peak <= usable_memory() else []

        variants = self.config.variants
        parts = parse_widths(variant, variants)
        # Less than several widths is the widest of them alone.
        stop = max(variants.index(name) for name, _ in parts) + (len(parts) > 1)
        narrower = variants[:stop]
        fitting = [v for v in narrower if self.fits(v, request)]
        offers = offer(f"--variant {fitting[-1]}", fitting[-1], request) if fitting else []
        if not request.low_ram:
            offers += offer("--low-ram", variant, replace(request, low_ram=True))
        for size in _smaller(request, self.pixel_multiple):
            if smaller := offer(f"--width {size.width} --height {size.height}", variant, size):
                offers += smaller
                break
        if self.gpu and not self.is_quantized:
            offers += offer("a model converted with --quantize 4", variant, request, bits=4)
        fit = f"what fits: {', '.join(offers)}" if offers else "no setting of this model fits"
        return UsageError(f"{self.excess(variant, request)}; {fit}")

    def _loading(self, variant: str) -> int:
        """What loading holds beside the weights: some stored tensors, until cut or converted."""
        held = 0
        if self._is_cast or variant != self.config.variants[-1]:
            held += 2 * self._stored
        if self.is_quantized and not self.gpu:  # unpacked on the way
            held += 3 * max(self._variant_tensors(variant))
        return held


def _smaller(request: Request, multiple: int) -> Iterator[Request]:
    """The same shape at less and less pixels, in multiples of so many a side."""
    shape = request.width, request.height
    for side in range(max(shape) - multiple, 0, -multiple):
        scale = side / max(shape) / multiple
        w, h = (max(round(n * scale), 1) * multiple for n in shape)
        yield replace(request, width=w, height=h)


def attention_scores(config: DiTConfig, stage: int, n: int) -> int:
    """Scores per head of self-attention over n tokens, dense or ASSA."""
    if config.attention[stage] == "dense":
        return n * n
    blocks, r = config.bna_blocks, config.bna_radius
    pairs = sum(min(b + r, blocks - 1) - max(b - r, 0) + 1 for b in range(blocks))
    return n * n // 4 + (n // blocks) ** 2 * pairs


def _width(config: TransformerConfig, variant: str) -> TransformerConfig:
    """The configuration of one width."""
    index = config.variant_index(variant)
    return config.variant(index) if isinstance(config, DiTConfig) else config


def denoising_floats(
    config: TransformerConfig, size: tuple[int, int], batch: int, text_tokens: int, metal: bool
) -> int:
    """Numbers that one evaluation of the network holds at its peak.

    These are 19 vectors for each token of a block, the attention scores if they are not fused, and
    the keys and values of the text.

    Args:
        config: of the transformer.
        size: (rows, columns) of the latent.
        batch: latents at once.
        text_tokens: of the text.
        metal: whether attention is fused.
    """
    d = config.hidden_size
    tokens = size[0] * size[1] // config.patch_size**2
    if isinstance(config, QwenImageConfig):
        return _mmdit_floats(config, tokens, batch, text_tokens, metal)
    stages = []
    for stage, layers in enumerate(config.layers):
        n = tokens // 4 if stage == 1 and config.downsample else tokens
        scores = attention_scores(config, stage, n)
        if metal and config.head_dim in FUSED_HEADS:
            scores = 0
        stages.append(layers and 19 * n * d + config.num_heads * scores)
    text = text_tokens * (2 * sum(config.layers) * d + 2 * config.caption_dim)
    return batch * (max(stages) + text)


def streamed_bytes(model: QwenImage) -> int:
    """Bytes of weights that are in memory at once where ``model`` reads each once: of a group of
    blocks, modulation apart from the rest, and of what stands around the blocks."""
    around = 0
    parts: dict[tuple[int, bool], int] = {}
    for path, a in flat_parameters(model).items():
        names = path.split(".")
        if names[0] != "transformer_blocks":
            around += a.nbytes
            continue
        key = int(names[1]) // GROUP, names[2].endswith("_mod")
        parts[key] = parts.get(key, 0) + a.nbytes
    return around + max(parts.values())


def _mmdit_floats(
    config: QwenImageConfig, tokens: int, batch: int, text_tokens: int, metal: bool
) -> int:
    """Numbers that one evaluation of Qwen-Image holds at its peak.

    At the peak of a block, the rows that are evaluated at once need 21 vectors for each token and
    their attention scores. The tokens of the other rows and the modulation of every block are
    added.

    Args:
        config: of the transformer.
        tokens: of the picture.
        batch: rows in all.
        text_tokens: of the text.
        metal: whether attention is fused, without score matrices.
    """
    d, heads, n = config.hidden_size, config.num_attention_heads, tokens + text_tokens
    rows = min(max(1, TOKENS // tokens), batch)
    scores = 0 if metal and config.attention_head_dim in FUSED_HEADS else heads * n * n
    others = 2 * (batch - rows) * n * d
    modulation = 12 * config.num_layers * d * batch
    return rows * (21 * n * d + scores) + others + modulation
