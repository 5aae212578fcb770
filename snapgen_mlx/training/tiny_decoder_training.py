"""A tiny decoder that learns from a model's own autoencoder (training section 6).

It sees crops of latents, and decodes them as the autoencoder does: the loss is L1, and L1 of
differences between neighbours at three scales, which keeps edges sharp [ours, after SnapGen].
"""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_unflatten

from ..device import scalar, training_dtype
from ..errors import UsageError
from ..files import write_json
from ..layout import TINY_DECODER, load_config, picture_size
from ..loading import load_dit_config, load_vae, load_vae_config
from ..models.interfaces import Autoencoder
from ..models.tiny_decoder import TinyDecoder, TinyDecoderConfig
from ..tensors.weights import flat_parameters, save_tensors
from .checkpoint import fingerprint
from .data import LatentDataset, bucket_sizes, cached_latents
from .loop import Inputs, RunOptions, check_run, train
from .optimizer import AdamOptions, Averaged, add_arrays, mean_over_processes
from .output import check_output
from .pictures import Example

CROP = 32  # latent positions a side
SCALES = 3  # each half of the one before
EDGES = 1.0  # weight of the differences between neighbours


@dataclass
class DecoderOptions(AdamOptions):
    learning_rate: float = 5e-4


def edges(image: mx.array) -> tuple[mx.array, mx.array]:
    """Differences of neighbours down and to the right; image (B, H, W, C)."""
    return image[:, 1:] - image[:, :-1], image[:, :, 1:] - image[:, :, :-1]


def decoding_loss(image: mx.array, target: mx.array) -> mx.array:
    """L1 of pixels and of edges at each scale; both (B, H, W, 3), sides multiples of 4."""
    loss = mx.abs(image - target).mean()
    for _ in range(SCALES):
        pairs = zip(edges(image), edges(target), strict=True)
        loss = loss + EDGES / SCALES * sum(mx.abs(a - b).mean() for a, b in pairs)
        image, target = (
            a.reshape(len(a), a.shape[1] // 2, 2, a.shape[2] // 2, 2, -1).mean(axis=(2, 4))
            for a in (image, target)
        )
    return loss


class DecoderTrainer:
    """Trains ``decoder`` to decode as ``vae`` does; ``base``, what a saved state belongs to."""

    ahead = 1

    def __init__(
        self, decoder: TinyDecoder, vae: Autoencoder, options: DecoderOptions, base: str = ""
    ):
        self.decoder, self.vae, self.options, self.base = decoder, vae, options, base
        self.weights = Averaged(flat_parameters(decoder), options)
        self._grads = mx.compile(self._grads_fn)

    def look_ahead(self, inputs: list[Inputs]) -> list[Inputs]:
        return inputs

    def draw(self, rng, key: mx.array, shape: tuple) -> tuple[dict[str, mx.array], Any]:
        """Where a crop begins: row and column of the latent."""
        return {}, tuple(int(rng.integers(max(1, n - CROP + 1))) for n in shape[1:3])

    def bind(self, params: dict[str, mx.array]) -> TinyDecoder:
        """The decoder with these weights."""
        cast = [(k, a.astype(training_dtype())) for k, a in params.items()]
        self.decoder.update(tree_unflatten(cast))
        return self.decoder

    def _grads_fn(self, params, latents, target):
        def loss(own):
            image = self.bind(own)(latents.astype(training_dtype())).astype(mx.float32)
            return decoding_loss(image, target), mx.abs(image - target).mean()

        (total, l1), grads = mx.value_and_grad(loss)(params)
        return {"loss/all": total, "loss/l1": l1}, grads

    def step(self, x0, text, masks, noise: dict, corner: tuple[int, int]) -> dict[str, mx.array]:
        """One update on a crop of the latents x0 (B, h, w, C) that begins at ``corner``."""
        y, x = corner
        x0 = x0[:, y : y + CROP, x : x + CROP]
        n = len(x0) // self.options.accumulate
        metrics: dict[str, mx.array] = {}
        grads: dict[str, mx.array] = {}
        for i in range(0, len(x0), n):
            latents = x0[i : i + n]
            target = self.vae.decode(latents).astype(mx.float32)
            mx.eval(target)  # frees the autoencoder's activations
            found, new = self._grads(self.weights.params, latents, target)
            metrics = add_arrays(metrics, found) if metrics else found
            grads = add_arrays(grads, new) if grads else new
            mx.eval(metrics, grads)
        metrics, grads = (
            {k: a / self.options.accumulate for k, a in d.items()} for d in (metrics, grads)
        )
        metrics = mean_over_processes(metrics)
        metrics["grad"] = self.weights.update(mean_over_processes(grads))
        mx.eval(self.state(), metrics)
        return metrics

    def validate(self, fixed: list) -> dict[str, float]:
        """Mean distance of pixels, which lie in [-1, 1], to the autoencoder's on whole pictures."""
        decoder, errors = self.bind(self.weights.mean), []
        for x0, *_ in fixed:
            for latent in mx.split(x0, len(x0)):
                error = mx.abs(decoder.decode(latent) - self.vae.decode(latent))
                errors.append(scalar(error.mean()))
        return {"val/l1": sum(errors) / len(errors)}

    def identity(self) -> dict:
        return {"model": asdict(self.decoder.config), "base": self.base}

    def state(self) -> dict[str, mx.array]:
        return self.weights.state()

    def restore(self, arrays: dict[str, mx.array]) -> None:
        self.weights.restore(arrays)


def distill_decoder(
    model,
    examples: list[Example],
    output,
    options: RunOptions,
    decoder_options: DecoderOptions,
    validation: list[Example] | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> Iterator[dict]:
    """Train a tiny decoder for a model on its latents of ``examples``.

    Yields the records of ``loop.train``, after those of pictures encoded. Writes
    ``output/tiny_decoder`` unless ``stop`` ended the run, whose state lies in ``output/run``.
    Raises UsageError for an autoencoder whose latents it cannot decode.
    """
    model, output = Path(model), Path(output)
    check_output(model, output)
    check_run(options, decoder_options)
    of_vae = load_vae_config(model)
    config = TinyDecoderConfig(latent_channels=of_vae.latent_channels)
    if (of_vae.downsampling, of_vae.image_channels) != (config.downsampling, config.image_channels):
        raise UsageError(
            f"a tiny decoder makes RGB pictures {config.downsampling} times as large as a latent; "
            f"the autoencoder of {model} makes {of_vae.image_channels} channels, "
            f"{of_vae.downsampling} times as large"
        )
    sizes = bucket_sizes(picture_size(load_config(model)), load_dit_config(model), 8)
    vae, key = cache(partial(load_vae, model, training_dtype())), fingerprint(model / "vae")
    sets = []
    for part in filter(None, (examples, validation)):
        latents = yield from cached_latents(vae, key, part, sizes, output / "cache")
        sets.append(LatentDataset(latents, [e.captions for e in part], []))
    mx.random.seed(options.seed)
    trainer = DecoderTrainer(TinyDecoder(config), vae(), decoder_options, key)
    options = replace(options, text_dropout=0.0)
    held_out = sets[1] if validation else None
    for record in train(trainer, sets[0], output / "run", options, held_out, stop):
        yield record
    if (record["stopped"] and not record["done"]) or mx.distributed.init().rank():
        return
    save_tensors(output / TINY_DECODER, trainer.weights.mean)
    head = {"_class_name": "TinyDecoder", **asdict(config)}
    write_json(output / TINY_DECODER / "config.json", head)
