"""Words to picture: load, encode the text, denoise, decode."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from importlib import resources
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten
from PIL import Image

from . import __version__
from .config import DiTConfig
from .errors import SnapGenError, UsageError
from .lora import few_step_lora
from .memory import LOW_RAM_TILE, TILE, ModelMemory, Request
from .models.vae import AutoencoderKLQwenImage, VAEConfig
from .sampling import FEW_STEPS, Step, denoise, schedule
from .weights import FORMAT, assign, compute_dtype, load_config, load_dit, load_tensors

PIXEL_MULTIPLE = 64
MAX_PIXELS = 2048  # a side
MAX_PROMPT = 4000  # characters; the encoders read at most 256 tokens


def embedded_model() -> Path:
    """Folder of the model that is shipped with the package."""
    folder = Path(str(resources.files("snapgen_mlx") / "assets" / "embedded"))
    if not (folder / "config.json").is_file():
        raise SnapGenError(f"the embedded model is missing at {folder}; reinstall snapgen-mlx")
    return folder


def resolve_model(source) -> Path:
    """Local folder of a model: None for the embedded one, a folder, or a Hub id."""
    if source is None:
        return embedded_model()
    folder = Path(source).expanduser()
    if not folder.exists():
        from snapgen_mlx.convert.hub import resolve

        folder = resolve(source)
    if not folder.is_dir():
        raise SnapGenError(f"{folder} is not a model folder")
    if (folder / "model_index.json").is_file() and not (folder / "config.json").is_file():
        raise SnapGenError(
            f"{source} holds a PyTorch model; first: snapgen-mlx convert {source} DIR"
        )
    config = load_config(folder)
    if config.get("format") != FORMAT["format"]:
        what = config.get("_class_name") or config.get("model_type") or "something else"
        raise SnapGenError(f"{folder / 'config.json'} is of {what}, not of a snapgen-mlx model")
    return folder


def load_vae(folder):
    """The autoencoder of a model folder, whichever it is."""
    folder = Path(folder) / "vae"
    config = load_config(folder)
    tensors = load_tensors(folder)
    match config.get("_class_name"):
        case "SnapGenAutoencoder" | "StickerAutoencoder":
            from .models.autoencoder import build_autoencoder

            vae = build_autoencoder(config)
            # Its few convolutions cost nothing in float32, and white stays white.
            return assign(vae, {k: a.astype(mx.float32) for k, a in tensors.items()}, folder)
        case "AutoencoderKLQwenImage":
            vae = AutoencoderKLQwenImage(VAEConfig.from_dict(config))
            return assign(vae, {k: a.astype(compute_dtype()) for k, a in tensors.items()}, folder)
        case other:
            raise SnapGenError(f"{folder / 'config.json'}: unknown autoencoder {other!r}")


def load_text_encoders(folder, gemma=None) -> list:
    """The text encoders of a model folder; a folder may lack either or both.

    gemma: a folder or Hub id of another Gemma 3 with its tokenizer, quantized by mlx-lm or not,
    instead of the model's own.
    """
    folder = Path(folder)
    encoders = []
    for name, tokenizer in (("text_encoder", "tokenizer"), ("text_encoder_2", "tokenizer_2")):
        if not (folder / name).is_dir() or (gemma and name == "text_encoder_2"):
            continue
        kind = load_config(folder / name).get("model_type")
        if kind == "static_text":
            from .models.static_text import StaticText

            encoders.append(StaticText.load(folder / name))
        elif kind == "clip_text_model":
            from .models.clip_text import CLIPText

            encoders.append(CLIPText.load(folder / name, folder / tokenizer))
        elif kind in ("gemma3_text", "gemma3"):
            from .models.gemma_text import GemmaText

            encoders.append(GemmaText.load(folder / name, folder / tokenizer))
        else:
            raise SnapGenError(f"{folder / name / 'config.json'}: unknown text encoder {kind!r}")
    return encoders + ([load_gemma(gemma)] if gemma else [])


def load_gemma(source):
    """A Gemma 3 text encoder from a folder (or Hub id) that holds its tokenizer too."""
    from snapgen_mlx.convert.hub import resolve

    from .models.gemma_text import GemmaText

    folder = resolve(source)
    kind = load_config(folder).get("model_type")
    if kind not in ("gemma3_text", "gemma3"):
        raise SnapGenError(f"{source} is a {kind or 'model of unknown type'}, not a Gemma 3")
    return GemmaText.load(folder, folder)


@dataclass
class Settings:
    """Everything a picture depends on beside the model's weights."""

    prompt: str
    seed: int = 0
    steps: int = 4
    guidance: float = 1.0
    shift: float = 3.0
    width: int = 1024  # pixels
    height: int = 1024
    negative: str | None = None

    def __post_init__(self):
        if not self.prompt.strip():
            raise UsageError("the prompt is empty; say what the picture should show")
        for text in (self.prompt, self.negative or ""):
            if len(text) > MAX_PROMPT:
                raise UsageError(f"a prompt of {len(text)} characters; {MAX_PROMPT} is the most")
        for n in (self.width, self.height):
            if n % PIXEL_MULTIPLE or not 0 < n <= MAX_PIXELS:
                raise UsageError(
                    f"size {self.width}x{self.height}: width and height must be multiples of "
                    f"{PIXEL_MULTIPLE} pixels, {MAX_PIXELS} at most"
                )
        if not 1 <= self.steps <= 1000:
            raise UsageError(f"{self.steps} steps; it must be 1 to 1000")
        if not 0 <= self.guidance <= 100:
            raise UsageError(f"guidance {self.guidance}; it must be 0 to 100")
        if not 0 <= self.seed < 2**63:
            raise UsageError(f"seed {self.seed}; it must be 0 to 2^63 - 1")

    @classmethod
    def of(cls, config: dict, prompt: str, few_steps: bool = False, **given) -> "Settings":
        """What is not given (or None) comes from a model's config, or is that of few steps."""
        sampling = config.get("sampling", {}) | (FEW_STEPS if few_steps else {})
        size = sampling.get("size", 1024)
        defaults = {"width": size, "height": size}
        defaults |= {k: sampling[k] for k in ("steps", "guidance", "shift") if k in sampling}
        return cls(prompt, **defaults | {k: v for k, v in given.items() if v is not None})

    @property
    def texts(self) -> list[str]:
        """What is to be encoded."""
        return [text for text in (self.prompt, self.negative) if text and text.strip()]


class Pipeline:
    """A loaded model: ``generate`` for a picture, or ``stream`` and ``decode`` step by step."""

    def __init__(
        self,
        folder,
        variant: str | None = None,
        *,
        width: int | None = None,
        height: int | None = None,
        guidance: float | None = None,
        text_encoder=None,
        loras=(),
        base: bool = False,
        low_ram: bool = False,
        keep_encoders: bool = True,
    ):
        self.folder = Path(folder)
        self.config = load_config(self.folder)
        self.dit_config = DiTConfig.from_dict(load_config(self.folder / "transformer"))
        if text_encoder and "gemma" not in self.dit_config.text_dims:
            raise UsageError("this model reads no Gemma states; leave out the text encoder")
        self.text_encoder, self.loras, self.base = text_encoder, list(loras), base
        self.low_ram, self.keep_encoders = low_ram, keep_encoders
        self._texts = {}
        self.memory = ModelMemory(self.folder, self.vae, self.encoders)
        self.variant = variant
        if variant in (None, "auto"):
            self.variant = self.dit_config.variants[-1]
            largest = self.settings("any", width=width, height=height, guidance=guidance)
            self.variant = self.memory.choose(self._request(largest))
        self.dit  # noqa: B018 (its files are checked now, its weights are read when needed)

    @classmethod
    def load(cls, source=None, variant: str | None = None, **options) -> "Pipeline":
        """Load the embedded model (None), a model folder, or a Hub id at one width.

        Args: variant, a width's name; None or "auto" is the widest that fits into memory for
            pictures of ``width``, ``height`` (pixels) and ``guidance`` (the model's own when not
            given); text_encoder, a folder or Hub id of another Gemma 3; loras, pairs (LoRA file,
            scale); base, draw without the LoRA with which a width needs few steps; low_ram, hold
            the weights of one phase at a time and decode in smaller tiles; keep_encoders, False
            frees heavy text encoders after each use.
        Weights are read when they are first used. Raises UsageError for an unknown variant and
        when nothing fits, SnapGenError for damaged or foreign files.
        """
        return cls(resolve_model(source), variant, **options)

    @property
    def few_step(self) -> Path | None:
        """The LoRA with which this width draws in few steps, if it is to."""
        return None if self.base else few_step_lora(self.folder, self.variant)

    @cached_property
    def dit(self):
        few_step = [(self.few_step, 1.0)] if self.few_step else []
        return load_dit(self.folder, self.variant, loras=[*few_step, *self.loras])

    @cached_property
    def vae(self):
        return load_vae(self.folder)

    @cached_property
    def encoders(self) -> list:
        return load_text_encoders(self.folder, self.text_encoder)

    def free(self, *parts: str) -> None:
        """Drop "dit", "vae" or "encoders" from memory; each is loaded again when needed."""
        for part in parts:
            self.__dict__.pop(part, None)
        mx.clear_cache()

    def _request(self, s: Settings) -> Request:
        guided = s.guidance != 1
        return Request(s.width, s.height, guided, self.low_ram, self.keep_encoders)

    def settings(self, prompt: str, **given) -> Settings:
        """Settings for a picture; what is not given (or None) comes from the model's config."""
        return Settings.of(self.config, prompt, bool(self.few_step), **given)

    def encode(self, texts: list[str]) -> tuple[dict, dict]:
        """States and masks of texts by encoder name, as ``DiT`` takes them."""
        encoded = {encoder.name: encoder.encode(texts) for encoder in self.encoders}
        text, masks = ({k: pair[i] for k, pair in encoded.items()} for i in (0, 1))
        if encoded:
            known = mx.any(mx.concatenate(list(masks.values()), axis=1), axis=1).tolist()
            if not all(known):
                unknown = texts[known.index(False)]
                raise UsageError(f"the prompt {unknown!r} has no word that this model knows")
        dims = {name: states.shape[-1] for name, states in text.items()}
        if not dims.items() <= self.dit_config.text_dims.items():
            raise SnapGenError(
                f"text encoders with states of {dims} do not suit this transformer, which reads "
                f"{self.dit_config.text_dims}"
            )
        return text, masks

    def prepare(self, settings: list[Settings]) -> None:
        """Encode the texts of these pictures, which ``stream`` then finds done.

        Without ``keep_encoders`` text encoders above 100 MB are freed afterwards; what else was
        in memory makes place for them before.
        """
        texts = dict.fromkeys(text for s in settings for text in s.texts)
        keep = self.memory.keeps_encoders(self._request(settings[0]))
        if not keep:
            self.free("dit", "vae")
        self._texts = {text: self.encode([text]) for text in texts}
        mx.eval(self._texts)
        if not keep:
            self.free("encoders")

    def stream(self, settings: Settings) -> Iterator[Step]:
        """Denoise, yielding every step after its evaluation; decode ``step.x`` of the last one.

        Raises UsageError at once when the prompt or the size does not suit the model, or the
        picture does not fit into memory.
        """
        s = settings
        h, w = s.height // 8, s.width // 8
        config = self.dit_config
        tokens = h * w // config.patch_size**2
        if h % config.token_multiple or w % config.token_multiple or tokens % config.bna_blocks:
            raise UsageError(f"this model cannot make {s.width}x{s.height}; try other multiples")
        self.memory.check(self.variant, self._request(s))
        if not self._texts.keys() >= set(s.texts):
            self.prepare([s])
        text, masks = self._texts[s.prompt]
        negative = self._texts.get(s.negative)
        key = mx.random.key(s.seed)
        noise = mx.random.normal((1, h, w, config.in_channels), key=key)
        sigmas = schedule(s.steps, s.shift)
        if self.low_ram:
            self.free("encoders", "vae")

        def evaluated():
            if self.memory.is_palette:  # left to themselves, many would be expanded side by side
                for _, weight in tree_flatten(self.dit.parameters()):
                    mx.eval(weight)
            for step in denoise(self.dit, noise, text, masks, sigmas, s.guidance, negative):
                mx.eval(step.x, step.x0)
                yield step

        return evaluated()

    def decode(self, latents: mx.array) -> Image.Image:
        """Picture of a normalised latent (1, h, w, C)."""
        if self.low_ram:
            self.free("encoders", "dit")
        # The embedded model's autoencoder needs little memory, and knows no tiles.
        is_large = isinstance(self.vae, AutoencoderKLQwenImage)
        tile = {"tile": LOW_RAM_TILE if self.low_ram else TILE} if is_large else {}
        image = self.vae.decode(latents, **tile)
        image = mx.round((image[0].astype(mx.float32) + 1) * 127.5).astype(mx.uint8)
        return Image.fromarray(np.array(image))

    def generate(self, prompt: str, **settings) -> Image.Image:
        """Picture for a prompt. Keywords: seed, steps, guidance, shift, width, height, negative.

        The same settings give the same picture on the same machine. Raises UsageError for
        settings that cannot be met.
        """
        for step in self.stream(self.settings(prompt, **settings)):  # noqa: B007
            pass
        return self.decode(step.x)

    def metadata(self, settings: Settings) -> dict:
        """What reproduces a picture, for its PNG; files by their names."""
        source = self.config.get("source", {})
        encoder = self.text_encoder and Path(self.text_encoder).name
        return {
            **asdict(settings),
            "variant": self.variant,
            **({"few_step": True} if self.few_step else {}),
            "model": source.get("name", self.folder.name),
            **({"text_encoder": encoder} if encoder else {}),
            **({"loras": _named(self.loras)} if self.loras else {}),
            "version": __version__,
        }


def _named(loras) -> list[str]:
    return [f"{Path(path).name}:{scale:g}" for path, scale in loras]
