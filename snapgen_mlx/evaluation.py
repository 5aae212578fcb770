"""How well a model's widths know a folder of pictures: validation loss and recall.

The loss is the paper's metric, the mean flow loss. Recall of known drawings asks whether a model
draws what it has seen, in the same place: the nearest real picture of what it draws, by squared
distance of autoencoder latents, should be of the prompted concept. Of pictures that compose it
says nothing; ``scoring.py`` judges these.
"""

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from .loading import load_dit
from .pipeline import Pipeline
from .sampling import last_step
from .settings import Settings
from .training.data import encode_images
from .training.encoding import encode_data
from .training.flow_matching import validation_loss
from .training.loop import fixed_batches
from .training.pictures import Example

BATCH_PIXELS = 2**20  # pixels that are validated at once


def evaluate(
    model,
    examples: list[Example],
    variants: list[str] | None = None,
    steps: int | None = None,
    guidance: float | None = None,
    count: int = 100,
) -> Iterator[dict]:
    """Measure widths of a model on examples.

    Args:
        model: folder, Hub id, or None for the embedded model.
        examples: pictures with captions.
        variants: names of the widths; None for all.
        steps: of the sampler; None for the model's own.
        guidance: None for the model's own.
        count: most pictures drawn for each width. They are drawn from the examples' first captions,
            always the same ones from the same noise, and compared with all examples. None are drawn
            when all examples show one concept, or the model draws transparent pictures.

    Yields:
        The records of ``encode_data``. Then ``pictures``, ``concepts``, ``drawn`` and, if pictures
        are drawn, the shares by ``chance``. Then for each width its name as ``variant``, the
        ``loss`` of its base and, if pictures are drawn, its ``shares``, ``steps`` and ``guidance``.

    Raises:
        UsageError: a variant is unknown, or a picture does not fit into memory.
    """
    pipe = Pipeline.load(
        model, variants[0] if variants else None, guidance=guidance, keep_encoders=False
    )
    variants = variants or pipe.dit_config.variants
    for name in variants:
        pipe.dit_config.variant_index(name)
    concepts = [e.concept for e in examples]
    n = len(set(concepts))
    count = min(count, len(examples)) if n > 1 and pipe.memory.vae.image_channels == 3 else 0
    chosen = np.random.default_rng(0).permutation(len(examples))[:count]

    def jobs() -> list[Settings]:
        given = dict(steps=steps, guidance=guidance)
        return [
            pipe.settings(examples[i].captions[0], seed=s, **given) for s, i in enumerate(chosen)
        ]

    s = pipe.settings("any", steps=steps, guidance=guidance)
    if count:
        pipe.prepare(jobs())
    pipe.free("encoders", "dit")
    measured = [replace(e, captions=e.captions[:1]) for e in examples]
    with tempfile.TemporaryDirectory() as cache:
        (data,) = yield from encode_data(pipe.folder, [measured], Path(cache))
        fixed = list(fixed_batches(data, max(1, BATCH_PIXELS // (s.width * s.height))))
        mx.eval(fixed)
    header: dict[str, Any] = {"pictures": len(examples), "concepts": n, "drawn": count}
    yield header | ({"chance": chance(n)} if count else {})
    if count:
        real = _square_latents(pipe, data.latents, examples, s)
    for name in variants:
        pipe.switch(name)
        record: dict[str, Any] = {"variant": name}
        if count:
            own = jobs()
            record |= {"steps": own[0].steps, "guidance": own[0].guidance}
            drawn = draw_latents(pipe, own)
            record |= shares(ranks(drawn, [concepts[i] for i in chosen], real, concepts))
        pipe.free("dit")
        # Distilled into few steps, a width has another aim than the flow loss.
        record["loss"] = validation_loss(load_dit(pipe.folder, name), fixed)
        yield record


def _square_latents(
    pipe: Pipeline, latents: Sequence[np.ndarray], examples: list[Example], s: Settings
):
    """Flat latents of the pictures in the size that is drawn; ``latents`` where they have it."""
    shape = pipe.latent_size(s)
    if any(a.shape[:2] != shape for a in latents):
        latents = list(encode_images(pipe.vae, [e.file for e in examples], (s.height, s.width)))
        pipe.free("vae")
    return np.stack(latents).reshape(len(latents), -1)


def draw_latents(pipe: Pipeline, jobs: list[Settings]) -> np.ndarray:
    """Flat latents (N, D) of the pictures that ``pipe.generate`` would make."""
    out = []
    for job in jobs:
        out.append(np.array(last_step(pipe.stream(job)).x).ravel())
    return np.stack(out)


def ranks(
    latents: np.ndarray, wanted: list[str], real: np.ndarray, concepts: list[str]
) -> np.ndarray:
    """Rank (from 0) of each picture's wanted concept among all concepts.

    Concepts are ordered by their nearest real picture. Args: latents (N, D) and the concept
    wanted of each; real (M, D) and the concept of each.
    """
    names = sorted(set(concepts))
    column = np.array([names.index(c) for c in concepts])
    out = []
    for z, want in zip(latents, wanted, strict=True):
        distance = ((real - z) ** 2).sum(1)
        nearest = np.full(len(names), np.inf)
        np.minimum.at(nearest, column, distance)
        out.append(int((nearest < nearest[names.index(want)]).sum()))
    return np.array(out)


def shares(ranks: np.ndarray) -> dict[str, float]:
    """Share of pictures with the wanted concept first, and among the first five."""
    return {"top1": float((ranks < 1).mean()), "top5": float((ranks < 5).mean())}


def chance(concepts: int) -> dict[str, float]:
    """``shares`` of a model that does not read its prompts."""
    return {"top1": 1 / concepts, "top5": min(5 / concepts, 1.0)}
