"""Some of the judge's prompts, and how well pipelines draw them."""

import time

import mlx.core as mx
import numpy as np

from snapgen_mlx.bench import machine
from snapgen_mlx.evaluation import draw_latents
from snapgen_mlx.judge import Judge, frechet, protocol, real_pictures
from snapgen_mlx.pipeline import Pipeline
from snapgen_mlx.scoring import summary
from snapgen_mlx.settings import Settings


def without_judged(texts: list[str]) -> list[str]:
    """Those that are none of the judge's prompts: what learns from them can be judged."""
    scored = {prompt.text for prompt in protocol()}
    return [text for text in texts if text not in scored]


class Judged:
    """The judge's figures of pictures of ``count`` prompts, from number ``first`` on."""

    def __init__(self, first: int, count: int):
        self.judge, self.real = Judge.load(), real_pictures()
        self.prompts = protocol()[first : first + count]
        self.about = {"first": first, "prompts": len(self.prompts)}

    def jobs(self, pipe: Pipeline, seed: int = 0, **given) -> list[Settings]:
        """A picture of each prompt, from ``seed`` and the seeds after it, with texts encoded."""
        jobs = [pipe.settings(p.text, seed=seed + i, **given) for i, p in enumerate(self.prompts)]
        pipe.prepare(jobs)
        return jobs

    def figures(self, pipe: Pipeline, latents: np.ndarray) -> dict[str, float]:
        """Of flat latents (N, D): right pictures by task and ``overall``, and ``frechet``.

        The Fréchet distance to real scenes, in the judge's features, falls as pictures get more.
        It compares only equally many pictures of the same prompts.
        """
        grid = pipe.latent_size(pipe.settings("any"))
        z = mx.array(latents.reshape(len(latents), 1, *grid, -1))
        looks = self.judge.look([pipe.decode(each) for each in z])
        features = np.stack([look.features for look in looks])
        distance = frechet(features, self.real.mean, self.real.covariance)
        return summary(self.prompts, looks)["all"] | {"frechet": distance}

    def __call__(self, pipe: Pipeline, **given) -> dict[str, float]:
        """``figures`` of what ``pipe`` draws with the settings ``given``.

        ``seconds`` are those of a picture without encoding the text and decoding.
        """
        jobs = self.jobs(pipe, **given)
        draw_latents(pipe, jobs[:1])  # reads the weights
        started = time.perf_counter()
        latents = draw_latents(pipe, jobs)
        seconds = (time.perf_counter() - started) / len(jobs)
        return self.figures(pipe, latents) | {"seconds": seconds}

    def head(self, pipe: Pipeline) -> dict:
        """What was measured on, and which prompts."""
        return {"machine": machine(pipe.dtype), **self.about}
