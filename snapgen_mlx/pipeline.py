"""Words to picture: load, encode the text, denoise, decode."""

from collections.abc import Iterator
from dataclasses import asdict

import mlx.core as mx
import numpy as np
from PIL import Image

from . import __version__
from .background import check_background, to_picture
from .config import DiTConfig
from .device import DTYPES, set_limits
from .editing import Edit
from .errors import SnapGenError, UsageError, shown
from .finite import check_finite, check_latent
from .hub import resolve_model
from .ingredients import names_of
from .layout import picture_size
from .loading import Transformer
from .memory import MAY_HAPPEN, ModelMemory, Request, decoding_tile
from .notes import notes
from .parts import Parts
from .sampling import Step, denoise, draw_noise, last_step, schedule
from .settings import Settings
from .tensors.weights import flat_parameters
from .widths import by_step, total_steps


class Pipeline(Parts):
    """A loaded model: ``generate`` for a picture, or ``stream`` and ``decode`` step by step."""

    def __init__(
        self,
        folder,
        variant: str | None = None,
        *,
        width: int | None = None,
        height: int | None = None,
        guidance: float | None = None,
        editing: bool = False,
        text_encoder=None,
        loras=(),
        base: bool = False,
        tiny_decoder: bool = False,
        low_ram: bool = False,
        keep_encoders: bool = True,
        dtype: mx.Dtype | None = None,
        force: bool = False,
    ):
        set_limits()
        super().__init__(folder, text_encoder, loras, base, dtype, tiny_decoder)
        if text_encoder is not None and "gemma" not in self.dit_config.text_dims:
            raise UsageError("this model reads no Gemma states; leave out the text encoder")
        self.low_ram, self.keep_encoders, self.force = low_ram, keep_encoders, force
        self._texts: dict[str, tuple[dict, dict]] = {}
        self.memory = ModelMemory(self.folder, self.vae, self.encoders, self.dtype, self.decoder)
        if variant is None or (isinstance(variant, str) and variant == "auto"):
            variant = self.widest(editing, width=width, height=height, guidance=guidance)
        self.switch(variant)
        for name, _ in self.widths:  # files are checked now, weights are read when needed
            self.width(name)

    @classmethod
    def load(cls, source=None, variant: str | None = None, **options) -> "Pipeline":
        """Load the embedded model (None), a model folder, or a Hub id at one width.

        Args:
            variant: a width's name, or names with counts of steps, as in "tiny:2,full:2"; None or
                "auto" is the widest that fits into memory.
            width, height, guidance, editing: pictures that must fit: pixels (the model's own when
                not given), guidance, and whether they start from others.
            text_encoder: a folder or Hub id of another Gemma 3.
            loras: pairs (LoRA file, scale).
            base: draw without the LoRA with which a width needs few steps.
            tiny_decoder: decode with the folder's tiny decoder: faster, less exact.
            low_ram: hold the weights of one phase at a time and decode in smaller tiles.
            keep_encoders: False frees heavy text encoders after each use.
            dtype: to compute with (default: ``inference_dtype``).
            force: draw also what is predicted not to fit into memory.

        Weights are read when they are first used. Raises UsageError for an unknown variant and
        when nothing fits, SnapGenError for damaged or foreign files.
        """
        return cls(resolve_model(source), variant, **options)

    def widest(self, editing: bool = False, **sizes) -> str:
        """The widest width that fits into memory with pictures of these sizes and guidance."""
        largest = self.settings("any", **sizes, strength=1.0 if editing else None)
        return self.memory.choose(self.request(largest), self.force)

    def request(self, s: Settings) -> Request:
        guided = s.guidance != 1
        editing = s.strength is not None
        return Request(s.width, s.height, guided, self.low_ram, self.keep_encoders, editing)

    def fits(self, settings: Settings) -> bool:
        """Whether a picture of these settings is predicted to fit into memory."""
        return self.memory.fits(self.variant, self.request(settings))

    def settings(self, prompt: str, **given) -> Settings:
        """Settings for a picture; what is not given (or None) comes from the model's config."""
        if steps := total_steps(self.widths):
            if given.get("steps") not in (None, steps):
                asked = f"{steps} steps, not {given['steps']}"
                raise UsageError(f"--variant {self.variant} makes {asked}; leave out --steps")
            given["steps"] = steps
        s = Settings.from_config(self.config, prompt, bool(self.few_steps), **given)
        s.check_size(self.memory.pixel_multiple)
        check_background(s.background, self.memory.vae.image_channels)
        return s

    def latent_size(self, settings: Settings) -> tuple[int, int]:
        """Height and width of the latent of a picture."""
        pixels = self.memory.vae.downsampling
        return settings.height // pixels, settings.width // pixels

    def encode(self, texts: list[str]) -> tuple[dict, dict]:
        """States and masks of texts by encoder name, as ``DiT`` takes them."""
        encoded = {encoder.name: encoder.encode(texts) for encoder in self.encoders}
        for encoder in self.encoders:
            check_finite(encoded[encoder.name][:1], f"the text encoder {encoder.name}", encoder)
        text, masks = ({k: pair[i] for k, pair in encoded.items()} for i in (0, 1))
        if encoded:
            known = np.array(mx.any(mx.concatenate(list(masks.values()), axis=1), axis=1))
            if not known.all():
                unknown = texts[int(known.argmin())]
                raise UsageError(
                    f"the prompt {unknown!r} has no word that this model knows; "
                    "`snapgen-mlx info --words` lists what it draws"
                )
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
        texts = dict.fromkeys(text for s in settings for text in self._needed_texts(s))
        keep = self.memory.keeps_encoders(self.request(settings[0]))
        if not keep:
            self.free("dit", "vae")
        self._texts = {text: self.encode([text]) for text in texts}
        mx.eval(self._texts)
        if not keep:
            self.free("encoders")

    def _negative(self, s: Settings) -> str | None:
        """The text that guidance leads away from; None where that is the model's own token."""
        own = self.dit_config.null_text if s.guidance != 1 else None
        return s.negative if s.negative in s.texts else own

    def _needed_texts(self, s: Settings) -> list[str]:
        negative = self._negative(s)
        return s.texts if negative is None else [s.prompt, negative]

    def edit_settings(self, prompt: str, edit: Edit, **given) -> Settings:
        """``settings`` for a picture that starts from another one.

        The default size is that picture's shape at the model's own area. The default strength is 1
        with a mask and 0.6 without.

        Args:
            prompt: what the result should show.
            edit: the picture and its mask.
            **given: as of ``settings``.
        """
        multiple = self.memory.pixel_multiple
        width, height = edit.fit(picture_size(self.config), multiple)
        defaults = {"width": width, "height": height, "strength": 1.0 if edit.mask else 0.6}
        given = {k: v for k, v in given.items() if v is not None}
        return self.settings(prompt, **defaults | given)

    def stream(self, settings: Settings, edit: Edit | None = None) -> Iterator[Step]:
        """Denoise step by step.

        Args:
            settings: what to draw.
            edit: a picture to start from, as far as ``settings.strength`` says. After each step,
                the parts outside its mask are put back. ``edit.finish`` makes the result from the
                decoded picture.

        Yields:
            Every step, evaluated; decode ``step.x`` of the last one. There is one step even if
            nothing changes.

        Raises:
            UsageError: at once, if the prompt or the size does not fit the model, or the picture
                does not fit into memory.
        """
        s, config = settings, self.dit_config
        if not isinstance(s, Settings):
            raise UsageError(f"steps are of what pipe.settings gives, not of {shown(s)}")
        if edit is None and s.strength is not None:
            raise UsageError(
                "strength has a meaning only for a picture to start from; see pipe.edit"
            )
        s.check_size(self.memory.pixel_multiple)
        h, w = self.latent_size(s)
        if not config.takes(h, w):
            raise UsageError(f"this model cannot make {s.width}x{s.height}; try other multiples")
        if not self.force:
            self.memory.check(self.variant, self.request(s))
        if not self._texts.keys() >= set(self._needed_texts(s)):
            self.prepare([s])
        text, masks = self._texts[s.prompt]
        negative = self._texts.get(self._negative(s) or "")
        start = noise = draw_noise((1, h, w, config.latent_channels), s.seed, s.variation)
        sigmas = schedule(s.steps, s.shift)
        put_back = None
        if edit is not None:
            sigmas = sigmas[s.skipped_steps :]
            pixels = edit.pixels(s.width, s.height, self.memory.vae.image_channels)
            known = self.vae.encode(pixels).astype(mx.float32)
            start = sigmas[0] * noise + (1 - sigmas[0]) * known
            mask = edit.latent_mask(h, w)
            mx.eval(start, known)
            if mask is not None:

                def put_back(x, sigma):
                    return mask * x + (1 - mask) * (sigma * noise + (1 - sigma) * known)

        if self.low_ram:
            self.free("encoders", "vae")

        def evaluated():
            if len(sigmas) == 1:  # nothing is to change
                yield Step(0, 0.0, start, start)
                return
            names = by_step(self.widths, s.steps)[s.skipped_steps :]
            dits = self._in_turn(names)
            steps = denoise(dits, start, text, masks, sigmas, s.guidance, negative, put_back)
            for step in steps:
                mx.eval(step.x, step.x0)
                what = f"step {step.index + 1} of the transformer"
                check_finite([step.x], what, self.width(names[step.index]))
                yield step

        return evaluated()

    def _in_turn(self, names: list[str]) -> Iterator[Transformer]:
        """The transformer of each step; with ``low_ram`` only one is in memory."""
        for i, name in enumerate(names):
            if i == 0 or name != names[i - 1]:
                if self.low_ram and not self._dits.keys() <= {name}:
                    self.free("dit")
                if self.memory.is_palette:  # left to themselves, many would be expanded at once
                    for weight in flat_parameters(self.width(name)).values():
                        mx.eval(weight)
            yield self.width(name)

    def decode(
        self, latents: mx.array, background: str | None = None, preview: bool = False
    ) -> Image.Image:
        """Decode a normalised latent to a picture, RGB or RGBA.

        Args:
            latents: (1, h, w, C).
            background: as of ``Settings``; None keeps the picture's transparency.
            preview: use the tiny decoder, where the model has one.
        """
        if self.low_ram:
            self.free("encoders", "dit")
        check_latent(latents, self.dit_config.latent_channels)
        check_finite([latents], "the latent")
        decoder = self.previewer() if preview else self.decoder
        image = decoder.decode(latents, decoding_tile(self.low_ram))
        check_finite([image], "the autoencoder's picture", decoder)
        return to_picture(image[0], background)

    def generate(self, prompt: str, **settings) -> Image.Image:
        """Picture for a prompt: RGBA from a model of transparent pictures, else RGB.

        Keywords: seed, steps, guidance, shift, width, height, negative, background.
        The same settings give the same picture on the same machine. Raises UsageError for
        settings that cannot be met.
        """
        s = self.settings(prompt, **settings)
        return self.decode(last_step(self.stream(s)).x, s.background)

    def edit(
        self,
        prompt: str,
        image: Image.Image,
        mask: Image.Image | None = None,
        margins: tuple[int, int, int, int] | None = None,
        **settings,
    ) -> Image.Image:
        """A picture made from another one.

        Args:
            prompt: what the result shows, all of it.
            image: the picture to start from.
            mask: of its size; white is drawn anew, the rest stays bit for bit.
            margins: pixels to add at (left, top, right, bottom).
            settings: as of ``generate``, and strength.

        Returns:
            With a mask or margins a picture of the image's size and they; else of the size that
            ``edit_settings`` tells.

        Raises:
            UsageError: settings that cannot be met.
        """
        edit = Edit(image, mask, margins)
        s = self.edit_settings(prompt, edit, **settings)
        return edit.finish(self.decode(last_step(self.stream(s, edit)).x, s.background))

    def notes(self, settings: Settings, edit: Edit | None = None) -> list[str]:
        """What may surprise about a picture of these settings, one line each: words that the model
        does not know, a text that is cut, guidance or a size that it was not made for, a picture to
        start from that is squeezed."""
        # Qwen-Image was trained for many sizes.
        size = picture_size(self.config) if isinstance(self.dit_config, DiTConfig) else None
        found = notes(settings, self.encoders, size, bool(self.few_steps))
        if edit and edit.changes_shape(settings.width, settings.height):
            found.append(
                f"the picture of {edit.image.width}x{edit.image.height} is drawn as "
                f"{settings.width}x{settings.height}, which changes its shape; crop it first"
            )
        excess = self.memory.excess(self.variant, self.request(settings)) if self.force else None
        return [*found, f"--force: {excess}; {MAY_HAPPEN}"] if excess else found

    def metadata(self, settings: Settings) -> dict:
        """What reproduces a picture, for its file; files by their names."""
        source = self.config.get("source", {})
        return {
            **asdict(settings),
            "variant": self.variant,
            "dtype": next(k for k, v in DTYPES.items() if v == self.dtype),
            **({"few_step": True} if self.few_steps else {}),
            **({"tiny_decoder": True} if self.tiny_decoder else {}),
            "model": source.get("name", self.folder.name),
            **names_of(self.loras, self.text_encoder),
            "digests": self.digests,
            "version": __version__,
        }
