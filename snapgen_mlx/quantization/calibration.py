"""What quantization is judged by: a few prompts along the schedule that the model is used with."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import mlx.core as mx

from ..device import scalar
from ..loading import load_dit_config
from ..pipeline import Pipeline
from ..sampling import Step, denoise, schedule
from .prompt_sets import CHOOSE

TOKENS = 4096  # tokens that are denoised at once: those of one picture of 1024²


@dataclass
class Calibration:
    """N prompts with their noise (N, h, w, C), text states and masks."""

    prompts: list[str]
    noise: mx.array
    text: dict
    masks: dict

    @classmethod
    def from_model(cls, model, prompts: list[str] = CHOOSE, seed: int = 0) -> "Calibration":
        """For a model folder, in the size that its config names."""
        pipe = load_widths(model)[-1]
        s = pipe.settings("any")
        shape = (len(prompts), *pipe.latent_size(s), pipe.dit_config.latent_channels)
        noise = mx.random.normal(shape, key=mx.random.key(seed))
        text, masks = pipe.encode(prompts)
        mx.eval(noise, text, masks)
        return cls(prompts, noise, text, masks)

    def steps(self, pipe: Pipeline, count: int | None = None) -> Iterator[Iterator[Step]]:
        """The steps of the sampler, not yet evaluated, in batches.

        The model draws as this width is used: with its own number of steps, guidance, shift and
        few-step LoRA.

        Args:
            pipe: the model.
            count: how many of the prompts; None for all.
        """
        s, n = pipe.settings("any"), len(self.prompts)
        count = min(count or n, n)
        tokens = self.noise[0, ..., 0].size // pipe.dit_config.patch_size**2
        size = max(1, TOKENS // tokens)
        for i in range(0, count, size):
            part = slice(i, min(i + size, count))
            text, masks = ({k: a[part] for k, a in d.items()} for d in (self.text, self.masks))
            sigmas = schedule(s.steps, s.shift)
            yield denoise(pipe.dit, self.noise[part], text, masks, sigmas, s.guidance)

    def latents(self, pipe: Pipeline, count: int | None = None) -> tuple[mx.array, mx.array]:
        """Latents (count, h, w, C) after the first step and after the last."""
        first, last = [], []
        for steps in self.steps(pipe, count):
            for step in steps:
                mx.eval(step.x)
                if step.index == 0:
                    first.append(step.x)
            last.append(step.x)
        return mx.concatenate(first), mx.concatenate(last)


def load_widths(model, dtype: mx.Dtype | None = None) -> list[Pipeline]:
    """The pipelines of a model folder's widths, narrowest first; their weights are not yet read."""
    return [
        Pipeline.load(model, variant, dtype=dtype) for variant in load_dit_config(model).variants
    ]


def peak(reference: mx.array) -> float:
    """The largest magnitude in ``reference``."""
    return scalar(mx.abs(reference).max())


def psnr(latents: mx.array, reference: mx.array) -> float:
    """Peak signal-to-noise ratio in dB: of the ``peak`` to the root of the mean squared error.

    It grows with the most extreme value of a set. Compare it within one set only.
    """
    return _decibel(peak(reference), latents, reference)


def snr(latents: mx.array, reference: mx.array) -> float:
    """Signal-to-noise ratio in dB: of the root of the mean square to that of the error."""
    return _decibel(scalar(reference.square().mean().sqrt()), latents, reference)


def _decibel(signal: float, latents: mx.array, reference: mx.array) -> float:
    error = scalar((latents - reference).square().mean().sqrt())
    return 20 * math.log10(signal / error) if error else math.inf
