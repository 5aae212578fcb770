"""What a training run will hold, predicted from shapes before any weight is read.

Bytes are those of MLX's own arrays. The coefficients were measured on MLX's CPU build, where they
hold within 15 %; the same forms are used on Metal, which has not been measured.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import TypeVar

import mlx.core as mx

from ..config import DiTConfig, TransformerConfig
from ..device import on_gpu, on_metal, training_dtype, usable_memory
from ..errors import UsageError, format_bytes
from ..layout import load_config, picture_size
from ..loading import Transformer, load_dit_config, load_vae_config
from ..memory import MAY_HAPPEN, attention_scores, denoising_floats, streamed_bytes
from ..models.elastic import empty_models, random_supernet
from ..models.qwen_image import TOKENS, QwenImage
from ..models.sizes import parameter_count, weight_bytes
from ..tensors.weights import load_infos
from ..text_loading import TEXT_TOKENS
from .lora_training import lora_params
from .optimizer import AdamOptions

Options = TypeVar("Options", bound=AdamOptions)
ANSWERS = 512 << 20  # bytes of an offloaded teacher's outputs that are kept at once
UPDATE = 0.5  # part of the trained weights that Adam's step needs beside its state and gradients


def flags(options: AdamOptions, other: AdamOptions) -> str:
    """What a command needs besides, to train with ``other`` instead of ``options``."""
    out = []
    if other.lora != options.lora:
        out.append(f"--lora {other.lora}")
    if other.accumulate != options.accumulate:
        out.append(f"--accumulate {other.accumulate}")
    if other.checkpoint != options.checkpoint:
        out.append("--checkpoint")
    if other.offload != options.offload:
        out.append("--offload")
    return " ".join(out)


@dataclass(frozen=True)
class TeacherMemory:
    """What a teacher needs.

    Args: config, of its width; weights, bytes of all; streamed, bytes of those in memory at once
        when they are read as they are needed; text_tokens, of a text.
    """

    config: TransformerConfig
    weights: int
    streamed: int
    text_tokens: int

    @classmethod
    def of(cls, model: Transformer) -> "TeacherMemory":
        """Of a model whose weights are not read."""
        tokens = 1 + sum(TEXT_TOKENS.get(name, 0) for name in model.config.text_dims)
        weights = weight_bytes(model)
        streamed = streamed_bytes(model) if isinstance(model, QwenImage) else weights
        return cls(model.config, weights, streamed, tokens)

    def asked(self, size: tuple[int, int], batch: int, guided: bool) -> int:
        """Bytes of activations while it is asked about ``batch`` latents (h, w)."""
        tokens = size[0] * size[1] // self.config.patch_size**2
        if isinstance(self.config, DiTConfig):  # which is asked about some of them after the other
            batch = min(batch, max(1, TOKENS // tokens))
        rows = batch * (2 if guided else 1)
        floats = denoising_floats(self.config, size, rows, self.text_tokens, on_metal())
        return training_dtype().size * floats

    def answer(self, size: tuple[int, int]) -> int:
        """Bytes of its velocities and tokens for one latent (h, w)."""
        h, w = size
        tokens = h * w // self.config.patch_size**2
        return 4 * h * w * self.config.latent_channels + 2 * tokens * self.config.hidden_size


@dataclass(frozen=True)
class TrainingMemory:
    """Predicts the peak of ``ElasticTrainer.step``.

    Args: config, of the supernet; size (H, W) of a latent; text_tokens, per picture; frozen,
        bytes of the weights that a LoRA trains beside; beside, bytes of what else is held;
        trained, how many weights are, when it is neither all nor a LoRA's; teacher, if there is
        one; guided, whether it is; watched, bytes of decoding a picture to watch the run by.
    """

    config: DiTConfig
    size: tuple[int, int]
    text_tokens: int
    frozen: int
    beside: int = 0
    trained: int | None = None
    teacher: TeacherMemory | None = None
    guided: bool = False
    watched: int = 0

    @classmethod
    def from_model(cls, model, teacher: TeacherMemory | None = None) -> "TrainingMemory":
        """Of training a model folder at its own picture size."""
        config = load_dit_config(model)
        latent = picture_size(load_config(model)) // load_vae_config(model).downsampling
        tokens = 1 + sum(TEXT_TOKENS.get(name, 0) for name in config.text_dims)
        weights = sum(map(parameter_count, empty_models(config)))
        infos = load_infos(Path(model) / "transformer")
        each: float = training_dtype().size
        if on_gpu() and any(key.endswith(".scales") for key in infos):
            full = sum(a.size for a in random_supernet(config).values())
            each = sum(info.nbytes for info in infos.values()) / full  # packed ones stay packed
        return cls(config, (latent, latent), tokens, int(each * weights), teacher=teacher)

    def state(self, options: AdamOptions) -> int:
        """Bytes of float32 weights, Adam's two moments, the average; what is frozen or beside."""
        kept = (3 + bool(options.ema)) * 4 * self._trained(options)
        if self.teacher and not options.offload:
            kept += self.teacher.weights
        return kept + (self.frozen if options.lora else 0) + self.beside

    def ahead(self, options: AdamOptions, batch: int) -> int:
        """Steps for which an offloaded teacher computes its outputs at once.

        This needs outputs that do not depend on the student.

        Args:
            options: of the training.
            batch: pictures in a step.
        """
        if not (self.teacher and options.offload) or self.guided:
            return 1
        most = min(ANSWERS, self.teacher.weights)  # which have made place for them
        return max(1, most // (batch * self.teacher.answer(self.size)))

    def peak(self, options: AdamOptions, batch: int) -> int:
        """Peak bytes of a step on ``batch`` pictures (those of one process)."""
        trained = 4 * self._trained(options)
        gradients = trained * (2 if options.accumulate > 1 else 1)
        if getattr(options, "subnets", "one") == "all" and len(self.config.widths) > 2:
            gradients += trained  # the full width's own, to which each narrower one is compared
        part = -(-batch // options.accumulate)
        passes = []
        for i, (config, weights) in enumerate(self._widths):
            frozen = options.lora or self.trained is not None
            copied = training_dtype() != mx.float32  # float32 weights are computed with as they are
            own = 0 if frozen or not copied else weights * training_dtype().size
            if i < len(self.config.widths) - 1:  # a slice and its gradients
                own += 0 if frozen else 8 * weights
            passes.append(own + part * self.activations(config, options.checkpoint))
        student = gradients + max(*passes, int(UPDATE * trained))
        return (
            self.state(options)
            + max(student, self._asked(options, batch), self.watched)
            + self._kept(options, batch)
        )

    @cached_property
    def _widths(self) -> list[tuple[DiTConfig, int]]:
        """Each width's configuration and number of weights."""
        models = empty_models(self.config)  # never evaluated
        return [(dit.config, parameter_count(dit)) for dit in models]

    def _asked(self, options: AdamOptions, batch: int) -> int:
        """Bytes while the teacher is asked, before the student's step."""
        if not self.teacher:
            return 0
        rows = batch * self.ahead(options, batch)
        asked = self.teacher.asked(self.size, rows, self.guided)
        return asked + (self.teacher.streamed if options.offload else 0)

    def _kept(self, options: AdamOptions, batch: int) -> int:
        """Bytes of the teacher's answers."""
        if not self.teacher:
            return 0
        return batch * self.ahead(options, batch) * self.teacher.answer(self.size)

    def activations(self, config: DiTConfig, checkpoint: bool) -> int:
        """Bytes of one width's forward and backward pass on one picture.

        In every block these are 32 vectors for each token and 1.2 times the attention scores, which
        are not fused under gradients.

        Args:
            config: of the width.
            checkpoint: whether blocks are computed twice.
        """
        h, w = self.size
        tokens, d = h * w // config.patch_size**2, config.hidden_size
        blocks, inputs = [], 0
        for stage, layers in enumerate(config.layers):
            n = tokens // 4 if stage == 1 and config.downsample else tokens
            scores = attention_scores(config, stage, n) + n * self.text_tokens
            text = 2 * self.text_tokens * d
            blocks += layers * [32 * n * d + 1.2 * config.num_heads * scores + text]
            inputs += layers * n * d
        kept = 2 * inputs + 2 * max(blocks) if checkpoint else sum(blocks) + 1.3 * max(blocks)
        return int(training_dtype().size * kept)

    def _trained(self, options: AdamOptions) -> int:
        if self.trained is not None:
            return self.trained
        params = (
            lora_params(self.config, options.lora) if options.lora else random_supernet(self.config)
        )
        return sum(a.size for a in params.values())  # never evaluated

    def excess(self, options: AdamOptions, batch: int) -> str | None:
        """What the training needs and what there is, in words, unless it fits."""
        need, usable = self.peak(options, batch), usable_memory()
        if need <= usable:
            return None
        return (
            f"this training needs about {format_bytes(need)} of memory, {format_bytes(usable)} can "
            "be used here"
        )

    def check(self, options: AdamOptions, batch: int, force: bool = False) -> str | None:
        """Check that the training fits into memory.

        Args:
            options: of the training.
            batch: pictures in a step.
            force: do not raise.

        Returns:
            None if it fits. With ``force``, otherwise, what it needs and what may happen, in words.

        Raises:
            UsageError: it does not fit; says what would.
        """
        excess = self.excess(options, batch)
        if excess is None:
            return None
        if force:
            return f"--force: {excess}; {MAY_HAPPEN}"
        usable = usable_memory()
        peaks = [(flags, self.peak(o, batch)) for flags, o in self.alternatives(options, batch)]
        offers = [f"{flags} ({format_bytes(peak)})" for flags, peak in peaks if peak <= usable]
        fit = f"what fits: {', '.join(offers[:3])}" if offers else "no setting of this model fits"
        raise UsageError(f"{excess}; {fit}")

    def alternatives(self, options: Options, batch: int) -> Iterator[tuple[str, Options]]:
        """The same training in less memory, with the smallest change first.

        A batch is computed in as few parts as fit into memory, or one picture at a time.

        Args:
            options: of the training.
            batch: pictures in a step.

        Yields:
            (flags of the command, options).
        """
        usable = usable_memory()
        for lora, offload, parts, checkpoint in product(
            dict.fromkeys((options.lora, options.lora or 16)),
            dict.fromkeys((options.offload, self.teacher is not None)),
            (False, True),
            dict.fromkeys((options.checkpoint, True)),
        ):
            other = replace(options, lora=lora, checkpoint=checkpoint, offload=offload)
            if parts:
                more = range(options.accumulate + 1, batch + 1)
                counts = [n for n in more if batch % n == 0]
                if not counts:
                    continue
                each = [replace(other, accumulate=n) for n in counts]
                fitting = (o for o in each if self.peak(o, batch) <= usable)
                other = next(fitting, each[-1])
            if other != options:
                yield flags(options, other), other
