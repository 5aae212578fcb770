"""The parts of a model folder: each is loaded when it is needed, and dropped when it is not."""

from functools import cached_property
from pathlib import Path

import mlx.core as mx

from .ingredients import ingredients
from .layout import TINY_DECODER, few_step_lora, load_config
from .loading import (
    Transformer,
    given_dtype,
    load_tiny_decoder,
    load_transformer,
    load_transformer_config,
    load_vae,
    lora_pairs,
)
from .models.interfaces import Autoencoder, Decoder, TextEncoder
from .tensors.weights import flat_parameters
from .text_loading import load_text_encoders
from .widths import parse_widths


class Parts:
    """A model folder at one variant, at first the widest width alone.

    Arguments are as of ``Pipeline.load``.
    """

    def __init__(
        self,
        folder,
        text_encoder,
        loras,
        base: bool,
        dtype: mx.Dtype | None,
        tiny_decoder: bool = False,
    ):
        self.folder = Path(folder)
        self.config = load_config(self.folder)
        self.dit_config = load_transformer_config(self.folder)
        self.text_encoder, self.loras, self.base = text_encoder, lora_pairs(loras), base
        self.tiny_decoder, self.dtype = tiny_decoder, given_dtype(dtype)
        self._dits: dict[str, Transformer] = {}
        self.variant = ""
        self.switch(self.dit_config.variants[-1])

    def switch(self, variant: str) -> None:
        """Draw at another variant from now on; what does not depend on it stays in memory."""
        widths = parse_widths(variant, self.dit_config.variants)
        if variant != self.variant:
            self.variant, self.widths = variant, widths
            self.__dict__.pop("digests", None)
            self.free("dit")

    @property
    def few_steps(self) -> dict[str, Path]:
        """By width, the LoRAs with which the variant draws in few steps, if it is to: all of its
        widths have one, or none takes it."""
        names = dict.fromkeys(name for name, _ in self.widths)
        found = {name: few_step_lora(self.folder, name) for name in names}
        loras = {name: path for name, path in found.items() if path}
        return {} if self.base or loras.keys() != names.keys() else loras

    def width(self, name: str) -> Transformer:
        """The transformer at a width of the variant; its weights are read when first used."""
        if name not in self._dits:
            few_step = [(self.few_steps[name], 1.0)] if self.few_steps else []
            loras = [*few_step, *self.loras]
            self._dits[name] = load_transformer(self.folder, name, loras, self.dtype)
        return self._dits[name]

    @property
    def dit(self) -> Transformer:
        """The transformer at the width that makes the last step."""
        return self.width(self.widths[-1][0])

    @dit.setter
    def dit(self, dit: Transformer) -> None:
        self._dits[self.widths[-1][0]] = dit

    @cached_property
    def vae(self) -> Autoencoder:
        return load_vae(self.folder, self.dtype)

    @cached_property
    def tiny(self) -> Decoder:
        return load_tiny_decoder(self.folder, self.dtype)

    @property
    def decoder(self) -> Decoder:
        """What makes pictures of latents."""
        return self.tiny if self.tiny_decoder else self.vae

    def previewer(self) -> Decoder:
        """What makes pictures of steps: the tiny decoder, where the model has one."""
        return self.tiny if (self.folder / TINY_DECODER).is_dir() else self.decoder

    @cached_property
    def encoders(self) -> list[TextEncoder]:
        return load_text_encoders(self.folder, self.text_encoder, self.dtype)

    def holds(self, part: str) -> bool:
        """Whether "dit", "vae" or "encoders" is in memory."""
        return bool(self._dits) if part == "dit" else part in self.__dict__

    def loaded(self) -> dict[int, int]:
        """Bytes of what is in memory, by identity: pipelines of one model share parts."""
        networks = [*self._dits.values(), *(self.__dict__.get(k) for k in ("vae", "tiny"))]
        arrays = [a for n in networks if n is not None for a in flat_parameters(n).values()]
        found = {id(a): a.nbytes for a in arrays}
        return found | {id(e): e.nbytes for e in self.__dict__.get("encoders", ())}

    def free(self, *parts: str) -> None:
        """Drop "dit", "vae" or "encoders" from memory; each is loaded again when needed."""
        for part in parts:
            self.__dict__.pop(part, None)
        if "dit" in parts:
            self._dits.clear()
        mx.clear_cache()

    @cached_property
    def digests(self) -> dict[str, str]:
        """Of each thing that a picture depends on beside its settings."""
        few_steps = list(self.few_steps.values())
        tiny = self.folder / TINY_DECODER if self.tiny_decoder else None
        return ingredients(self.folder, few_steps, self.loras, self.text_encoder, tiny)
