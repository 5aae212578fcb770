"""Data sets of a model folder: pictures and captions encoded by it, and pictures it draws."""

import functools
from collections.abc import Generator
from pathlib import Path

import mlx.core as mx
import numpy as np

from ..errors import SnapGenError
from ..files import atomic_write
from ..layout import FEW_STEP, TEXT_FOLDERS, load_config, picture_size
from ..loading import load_dit_config, load_vae, load_vae_config
from ..models.interfaces import TextEncoder
from ..pipeline import Pipeline
from ..sampling import last_step
from ..text_loading import load_text_encoders
from .checkpoint import fingerprint
from .data import (
    CachedText,
    LatentDataset,
    PromptDataset,
    bucket_sizes,
    cached_latents,
    cached_states,
    digest,
)
from .pictures import Example


def draw_prior(
    model: Path, prompts: list[str], cache: Path
) -> Generator[dict, None, list[np.ndarray]]:
    """Latents of pictures that a model draws, from a cache or drawn now.

    A model that learns them beside new pictures keeps more of what it knows (prior preservation
    [Ruiz et al. 2023, 4.2]).

    Args:
        model: folder; its widest variant draws.
        prompts: what to draw.
        cache: folder.

    Yields:
        A record after each picture.

    Returns:
        Arrays (h, w, C).
    """
    pipe = Pipeline(model, load_dit_config(model).variants[-1], keep_encoders=False)
    key = fingerprint(model / "transformer", model / FEW_STEP)
    out: dict[int, np.ndarray] = {}
    missing: dict[int, Path] = {}
    for i, prompt in enumerate(prompts):
        name = digest([key, prompt, i])
        path = cache / f"prior-{name}.npy"
        try:
            out[i] = np.load(path)
        except (OSError, ValueError, EOFError):  # absent or damaged
            missing[i] = path
    jobs = {i: pipe.settings(prompts[i], seed=i) for i in missing}
    if jobs:
        pipe.prepare(list(jobs.values()))
    for i, path in missing.items():
        out[i] = np.array(last_step(pipe.stream(jobs[i])).x.astype(mx.float32))[0]
        if mx.distributed.init().rank() == 0:
            with atomic_write(path) as tmp:
                np.save(tmp, out[i])
        yield {"drawn": i + 1, "prompts": len(prompts)}
    return [out[i] for i in range(len(prompts))]


def encode_data(
    model: Path,
    parts: list[list[Example]],
    cache: Path,
    flip: bool = False,
    prior: list[str] | None = None,
) -> Generator[dict, None, list[LatentDataset]]:
    """Encode pictures and captions, as far as the cache does not hold them.

    The autoencoder and the text encoders are in memory one after the other, and only then.

    Args:
        model: folder.
        parts: lists of examples. Only the first part is flipped, repeated, and gets the prior.
        cache: folder.
        flip: also encode the mirrored pictures.
        prior: prompts for ``draw_prior``.

    Yields:
        A record after each batch encoded.

    Returns:
        A ``LatentDataset`` for each part.

    Raises:
        SnapGenError: the model has no text encoder.
    """
    text_encoders = own_encoders(model)
    size, pixels = picture_size(load_config(model)), load_vae_config(model).downsampling
    sizes = bucket_sizes(size, load_dit_config(model), pixels)
    vae, key = functools.cache(functools.partial(load_vae, model)), fingerprint(model / "vae")
    latents: list[list[np.ndarray]] = []
    mirrored: list[list[np.ndarray] | None] = [None] * len(parts)
    for part in parts:
        latents.append((yield from cached_latents(vae, key, part, sizes, cache)))
    if flip:
        mirrored[0] = yield from cached_latents(vae, key, parts[0], sizes, cache, mirror=True)
    del vae
    prior = prior or []
    if prior:
        drawn = yield from draw_prior(model, prior, cache)
        latents[0] = [*latents[0], *drawn]
        if mirrored[0]:
            mirrored[0] = [*mirrored[0], *drawn]
    mx.clear_cache()

    captions = [[e.captions for e in part] for part in parts]
    captions[0] += [[prompt] for prompt in prior]
    texts = [text for part in captions for of_picture in part for text in of_picture]
    encoders = yield from encode_texts(model, text_encoders, texts, cache)
    repeats: list[list[int] | None] = [None] * len(parts)
    repeats[0] = [e.repeats for e in parts[0]] + [1] * len(prior)
    return [
        LatentDataset(x0, texts, encoders, turned, counts)
        for x0, texts, turned, counts in zip(latents, captions, mirrored, repeats, strict=True)
    ]


def encode_prompts(
    model: Path, prompts: list[str], cache: Path
) -> Generator[dict, None, PromptDataset]:
    """A data set of prompts alone, for pictures of the model's own size; see ``encode_data``."""
    encoders = yield from encode_texts(model, own_encoders(model), prompts, cache)
    side = picture_size(load_config(model)) // load_vae_config(model).downsampling
    return PromptDataset((side, side, load_dit_config(model).in_channels), prompts, encoders)


def own_encoders(model: Path) -> list[TextEncoder]:
    encoders = load_text_encoders(model)
    if not encoders:
        raise SnapGenError(f"{model} has no text encoder, so captions cannot be learned")
    return encoders


def encode_texts(
    model: Path, encoders: list[TextEncoder], texts: list[str], cache: Path
) -> Generator[dict, None, list[CachedText]]:
    """States of ``texts`` by the model's ``encoders``, which are let go of."""
    key = fingerprint(*(model / name for name in TEXT_FOLDERS))
    found = yield from cached_states(encoders, key, texts, cache)
    encoders.clear()
    mx.clear_cache()
    if not any(encoder.length(text) for encoder in found for text in texts):
        raise SnapGenError(f"the captions have no word that {model} knows; write other ones")
    return found
