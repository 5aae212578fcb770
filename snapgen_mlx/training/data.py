"""Pictures with captions as a model sees them: latents in memory, text states on disk, a batch for
each step."""

import hashlib
import json
import math
import tempfile
from collections.abc import Callable, Generator, Iterable, Sequence
from pathlib import Path

import mlx.core as mx
import numpy as np

from ..config import DiTConfig
from ..errors import SnapGenError
from ..files import atomic_write
from ..models.interfaces import Autoencoder, TextEncoder, TextStates
from ..tensors.safetensors_io import TensorInfo, as_array, numpy_kind, read_header, save_arrays
from .pictures import Example, load_image

BUCKET_AREA = 0.8  # smallest area of a bucket, as a part of the square's
ENCODE_BATCH = 32  # pictures between two records; texts that are encoded at once
ENCODE_PIXELS = 32 * 128 * 128  # pixels that are encoded at once: one picture of 1024²
TEXTS = 256  # texts in a file of text states
LOADING = 1  # part of the cached latents' key; raise it when load_image gives other pixels


def bucket_sizes(base: int, config: DiTConfig, downsampling: int) -> list[tuple[int, int]]:
    """Sizes (H, W) in pixels for pictures: aspects from 1:2 to 2:1, area about base².

    No size is larger than the square. A small base leaves only the square.

    Args:
        base: the model's side in pixels.
        config: of the transformer. Sides are multiples of what it and the autoencoder take; 64
            pixels for the known geometries.
        downsampling: pixels of a latent position's side.
    """
    side = downsampling * config.token_multiple
    sizes = {(base, base)}
    for short in range(side, base, side):
        long = min(base**2 // short, 2 * short) // side * side
        tokens = short * long // (downsampling * config.patch_size) ** 2
        if short * long >= BUCKET_AREA * base**2 and tokens % config.bna_blocks == 0:
            sizes |= {(short, long), (long, short)}
    return sorted(sizes)


def nearest_size(aspect: float, sizes: list[tuple[int, int]]) -> tuple[int, int]:
    """The one of ``sizes`` (H, W) whose aspect is nearest."""
    return min(sizes, key=lambda size: abs(math.log(aspect * size[0] / size[1])))


def encode_images(
    vae: Autoencoder,
    files: list[Path],
    size: tuple[int, int],
    mirror: bool = False,
) -> np.ndarray:
    """Normalised latents (N, h, w, C) float32 of the pictures, scaled to ``size`` (H, W)."""
    out, batch = [], max(1, ENCODE_PIXELS // math.prod(size))
    channels = vae.config.image_channels
    for i in range(0, len(files), batch):
        images = np.stack([load_image(f, size, mirror, channels) for f in files[i : i + batch]])
        out.append(np.array(vae.encode(mx.array(images)).astype(mx.float32)))
    return np.concatenate(out)


def cached_latents(
    load_vae: Callable[[], Autoencoder],
    key: str,
    examples: list[Example],
    sizes: list[tuple[int, int]],
    cache: Path,
    mirror: bool = False,
) -> Generator[dict, None, list[np.ndarray]]:
    """Latents of examples, from a cache or encoded now. Process 0 writes them to the cache.

    Args:
        load_vae: loads the autoencoder when it is needed.
        key: stands for the encoder's weights.
        examples: the pictures. A picture takes the size that is nearest to its aspect.
        sizes: (H, W) in pixels.
        cache: folder with one file for each picture. Its name follows from the picture's contents,
            the size and ``key``, not from file names or times.
        mirror: encode the mirrored pictures.

    Yields:
        A record after each batch encoded.

    Returns:
        Arrays (h, w, C), one for each example.
    """
    buckets: dict[tuple[int, int], list[int]] = {}
    for i, example in enumerate(examples):
        buckets.setdefault(nearest_size(example.aspect, sizes), []).append(i)
    out: dict[int, np.ndarray] = {}
    done = 0
    writes = mx.distributed.init().rank() == 0
    for size, rows in buckets.items():
        paths, missing = {}, []
        for i in rows:
            name = [LOADING, key, size, examples[i].digest, *(["mirror"] if mirror else [])]
            paths[i] = cache / f"{digest(name)}.npy"
            try:
                out[i] = np.load(paths[i])
            except (OSError, ValueError, EOFError):  # absent or damaged
                missing.append(i)
        done += len(rows) - len(missing)
        for start in range(0, len(missing), ENCODE_BATCH):
            batch = missing[start : start + ENCODE_BATCH]
            files = [examples[i].file for i in batch]
            for i, a in zip(batch, encode_images(load_vae(), files, size, mirror), strict=True):
                out[i] = a
                if writes:
                    with atomic_write(paths[i]) as tmp:
                        np.save(tmp, a)
            done += len(batch)
            yield {"encoded": done, "pictures": len(examples)}
    return [out[i] for i in range(len(examples))]


def cached_states(
    encoders: list[TextEncoder], key: str, texts: Iterable[str], cache: Path
) -> Generator[dict, None, "list[CachedText]"]:
    """States of texts by each encoder, in a cache like that of ``cached_latents``.

    Args:
        encoders: may be deleted afterwards.
        key: stands for the encoders' weights and vocabularies.
        texts: the captions.
        cache: folder.

    Yields:
        A record after each file encoded.

    Returns:
        A ``CachedText`` for each encoder.
    """
    texts = list(dict.fromkeys(texts))
    places: dict[str, dict[str, tuple[Path, TensorInfo]]] = {e.name: {} for e in encoders}
    temporary = None
    for start in range(0, len(texts), TEXTS):
        chunk = texts[start : start + TEXTS]
        path = cache / f"{digest([key, chunk])}.safetensors"
        try:
            infos = read_header(path)
        except SnapGenError:  # absent or damaged
            if mx.distributed.init().rank():  # process 0 alone writes there
                temporary = temporary or tempfile.TemporaryDirectory(prefix="snapgen-mlx-")
                path = Path(temporary.name) / path.name
            states = unpadded_states(encoders, chunk)
            save_arrays(path, states)
            infos = read_header(path)
            yield {"encoded": start + len(chunk), "captions": len(texts)}
        for i, text in enumerate(chunk):
            for name in places:
                places[name][text] = path, infos[f"{name}/{i}"]
    return [CachedText(name, found, temporary) for name, found in places.items()]


def unpadded_states(encoders: list[TextEncoder], texts: list[str]) -> dict[str, mx.array]:
    """{"ENCODER/INDEX": states (L, dim)} of each text without its padding."""
    out = {}
    for start in range(0, len(texts), ENCODE_BATCH):
        for encoder in encoders:
            states, mask = encoder.encode(texts[start : start + ENCODE_BATCH])
            mx.eval(states, mask)
            lengths = np.array(mask.sum(axis=1)).tolist()
            for i, length in enumerate(lengths):
                out[f"{encoder.name}/{start + i}"] = states[i, :length]
    return out


def digest(content) -> str:
    """A name for what is kept in a cache, by the JSON of all that it depends on."""
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:32]


class CachedText:
    """Stands in for a text encoder with its states in files, of which only those needed are read.

    places: {text: (file, its tensor)}; temporary: a folder of such files that goes with this.
    """

    def __init__(self, name: str, places: dict[str, tuple[Path, TensorInfo]], temporary=None):
        self.name, self.places, self._temporary = name, places, temporary

    def length(self, text: str) -> int:
        """Tokens of a text; 0 where the encoder knows none of its words."""
        return self.places[text][1].shape[0]

    def encode(self, texts: list[str]) -> tuple[mx.array, mx.array]:
        """States (B, L, dim) and mask (B, L) as the encoder gave them, padded with zeros.

        Raises SnapGenError for a file that is gone.
        """
        places = [self.places[text] for text in texts]
        _, (dtype, (_, dim), *_) = places[0]
        lengths = np.array([info.shape[0] for _, info in places])
        states = np.zeros((len(texts), max(1, *lengths), dim), numpy_kind(dtype))
        for row, length, place in zip(states, lengths, places, strict=True):
            row[:length] = _read(*place)
        mask = np.arange(states.shape[1]) < lengths[:, None]
        return as_array(states, dtype), mx.array(mask)


def _read(path: Path, info: TensorInfo) -> np.ndarray:
    kind, count = numpy_kind(info.dtype), math.prod(info.shape)
    try:
        return np.fromfile(path, kind, count, offset=info.start).reshape(info.shape)
    except (OSError, ValueError) as e:  # gone or cut short
        raise SnapGenError(f"cannot read {path}; run the command again to make it new") from e


PADDED_TO = {"clip": 77, "gemma": 64, "qwen": 64}  # lengths are multiples of these, in tokens


def encode_text(encoders: Sequence[TextStates], prompts: list[str]) -> tuple[dict, dict]:
    """States and masks by encoder, padded to few lengths: each is traced and compiled anew."""
    text, masks = {}, {}
    for encoder in encoders:
        states, mask = encoder.encode(prompts)
        pad = -states.shape[1] % PADDED_TO.get(encoder.name, 8)
        text[encoder.name] = mx.pad(states, [(0, 0), (0, pad), (0, 0)])
        masks[encoder.name] = mx.pad(mask, [(0, 0), (0, pad)])
    return text, masks


class LatentDataset:
    """Latents with captions; a batch is of one bucket and depends on (seed, step) alone.

    latents: N arrays (h, w, C), whose shapes make the buckets; captions: the phrasings of each;
    mirrored: the latents of the mirrored pictures, where these are drawn as often; repeats: how
    often each picture is drawn, beside the others.
    """

    def __init__(
        self,
        latents: Sequence[np.ndarray],
        captions: list[list[str]],
        encoders: Sequence[TextStates],
        mirrored: Sequence[np.ndarray] | None = None,
        repeats: Sequence[int] | None = None,
    ):
        self.latents, self.captions, self.encoders = latents, captions, encoders
        self.mirrored, self.repeats = mirrored, list(repeats or [1] * len(latents))
        buckets: dict[tuple[int, ...], list[int]] = {}
        for i, a in enumerate(latents):
            buckets.setdefault(a.shape, []).extend([i] * self.repeats[i])
        self.buckets = [np.array(rows) for rows in buckets.values()]

    @property
    def fingerprint(self) -> str:
        """Digest of latents and captions, to refuse resuming on other data."""
        digest = hashlib.sha256()
        for latents in (self.latents, self.mirrored):
            for a in () if latents is None else latents:
                digest.update(np.ascontiguousarray(a).data)
        digest.update(json.dumps(self.captions).encode())
        if set(self.repeats) != {1}:
            digest.update(json.dumps(self.repeats).encode())
        return digest.hexdigest()

    def text(self, prompts: list[str]) -> tuple[dict, dict]:
        """States and masks by encoder, as of ``encode_text``."""
        return encode_text(self.encoders, prompts)

    def batch(self, rng: np.random.Generator, size: int, dropout: float = 0.0):
        """Draw a batch from one bucket. Buckets with more pictures are drawn more often; a picture
        counts as often as it is repeated.

        Args:
            rng: source of random numbers.
            size: samples.
            dropout: probability that an encoder's text is left out.

        Returns:
            Latents x0 (B, h, w, C), text states and masks.
        """
        rows = self.buckets[0]
        if len(self.buckets) > 1:
            counts = np.array([len(rows) for rows in self.buckets])
            rows = self.buckets[rng.choice(len(counts), p=counts / counts.sum())]
        rows = rows[rng.integers(len(rows), size=size)]
        prompts = [self.captions[i][rng.integers(len(self.captions[i]))] for i in rows]
        text, masks = self.text(prompts)
        for encoder in self.encoders:
            name = encoder.name
            masks[name] = masks[name] & mx.array(rng.random(size) >= dropout)[:, None]
        x0 = [self.latents[i] for i in rows]
        if self.mirrored is not None:
            turned = rng.integers(2, size=size)
            x0 = [self.mirrored[i] if m else a for i, m, a in zip(rows, turned, x0, strict=True)]
        return mx.array(np.stack(x0)), text, masks


class PromptDataset(LatentDataset):
    """Prompts alone; a batch's latents, all zero, tell their shape (h, w, C) only."""

    def __init__(
        self, shape: tuple[int, int, int], prompts: list[str], encoders: Sequence[TextStates]
    ):
        nothing = np.broadcast_to(np.float32(0), shape)
        super().__init__([nothing] * len(prompts), [[p] for p in prompts], encoders)

    @property
    def fingerprint(self) -> str:
        return digest([self.latents[0].shape, self.captions])
