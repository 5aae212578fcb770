"""What a training run will hold, predicted from shapes before any weight is read.

Bytes are those of MLX's own arrays. The coefficients were measured on MLX's CPU build, where they
hold within about a quarter; the same forms are used on Metal, which has not been measured.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from ..config import DiTConfig
from ..device import on_gpu, training_dtype, usable_memory
from ..errors import UsageError, format_bytes
from ..layout import load_config, picture_size
from ..loading import load_dit_config, load_vae_config
from ..memory import attention_scores
from ..models.elastic import empty_models, random_supernet
from ..models.sizes import parameter_count
from ..tensors.weights import load_infos
from ..text_loading import TEXT_TOKENS
from .lora_training import lora_params
from .optimizer import AdamOptions

Options = TypeVar("Options", bound=AdamOptions)
UPDATE = 0.85  # of all trained weights: what Adam's step holds beside its state and gradients


def flags(options: AdamOptions, other: AdamOptions) -> str:
    """What a command needs besides, to train with ``other`` instead of ``options``."""
    out = []
    if other.lora != options.lora:
        out.append(f"--lora {other.lora}")
    if other.accumulate != options.accumulate:
        out.append(f"--accumulate {other.accumulate}")
    if other.checkpoint != options.checkpoint:
        out.append("--checkpoint")
    return " ".join(out)


@dataclass(frozen=True)
class TrainingMemory:
    """Predicts the peak of ``ElasticTrainer.step``.

    Args: config, of the supernet; size (H, W) of a latent; text_tokens, per picture; frozen,
        bytes of the weights that a LoRA trains beside; beside, bytes of what else is held, such
        as a teacher; trained, how many weights are, when it is neither all nor a LoRA's.
    """

    config: DiTConfig
    size: tuple[int, int]
    text_tokens: int
    frozen: int
    beside: int = 0
    trained: int | None = None

    @classmethod
    def from_model(cls, model, beside: int = 0) -> "TrainingMemory":
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
        return cls(config, (latent, latent), tokens, int(each * weights), beside)

    def state(self, options: AdamOptions) -> int:
        """Bytes of float32 weights, Adam's two moments, the average; what is frozen or beside."""
        kept = (3 + bool(options.ema)) * 4 * self._trained(options)
        return kept + (self.frozen if options.lora else 0) + self.beside

    def peak(self, options: AdamOptions, batch: int) -> int:
        """Peak bytes of a step on ``batch`` pictures (those of one process)."""
        trained = 4 * self._trained(options)
        gradients = trained * (2 if options.accumulate > 1 else 1)
        part = -(-batch // options.accumulate)
        passes = []
        for i, dit in enumerate(empty_models(self.config)):  # never evaluated
            weights = parameter_count(dit)
            frozen = options.lora or self.trained is not None
            own = 0 if frozen else weights * training_dtype().size
            if i < len(self.config.widths) - 1:  # a slice and its gradients
                own += 0 if frozen else 8 * weights
            passes.append(own + part * self.activations(dit.config, options.checkpoint))
        return self.state(options) + gradients + max(*passes, int(UPDATE * trained))

    def activations(self, config: DiTConfig, checkpoint: bool) -> int:
        """Bytes of one width's forward and backward pass on one picture.

        In every block these are 32 vectors for each token and 1.7 times the attention scores, which
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
            blocks += layers * [32 * n * d + 1.7 * config.num_heads * scores + text]
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

    def check(self, options: AdamOptions, batch: int) -> None:
        """Raise UsageError that says what would fit, unless the run does."""
        need, usable = self.peak(options, batch), usable_memory()
        if need <= usable:
            return
        peaks = [(flags, self.peak(o, batch)) for flags, o in self.alternatives(options, batch)]
        offers = [f"{flags} ({format_bytes(peak)})" for flags, peak in peaks if peak <= usable]
        fit = f"what fits: {', '.join(offers[:3])}" if offers else "no setting of this model fits"
        raise UsageError(
            f"this training needs about {format_bytes(need)} of memory, {format_bytes(usable)} can "
            f"be used here; {fit}"
        )

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
        for lora in dict.fromkeys((options.lora, options.lora or 16)):
            for parts in (False, True):
                for checkpoint in dict.fromkeys((options.checkpoint, True)):
                    other = replace(options, lora=lora, checkpoint=checkpoint)
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
