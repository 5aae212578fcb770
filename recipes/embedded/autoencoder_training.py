"""Training the embedded model's autoencoder: reconstruction through noisy latents (our choice)."""

import copy
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from snapgen_mlx.errors import SnapGenError
from snapgen_mlx.files import atomic_write
from snapgen_mlx.training.checkpoint import load_state, locked, save_state

from ..precision import autocast
from .autoencoder import Autoencoder, save_autoencoder


@dataclass
class Options:
    steps: int = 3200
    batch: int = 12
    crop: int = 96  # pixels; the networks are convolutional
    learning_rate: float = 1.5e-3
    warmup: int = 100
    noise: float = 0.1  # on latents of unit deviation: smooth latents, a robust decoder
    alpha_weight: float = 2.0  # of the fourth channel's errors against a colour's
    ema: float = 0.998
    seed: int = 0
    decoder_only: bool = False  # latents stay as they are: models trained on them stay valid
    save_every: float = 120  # seconds


STATISTICS = 2**31  # numbers no step has: the crops whose latents are measured
JOINT = Options()
DECODER = Options(steps=1500, batch=4, crop=256, learning_rate=1e-3, decoder_only=True)


def scene_pool(world: Path, split: str, number: int, file: Path) -> np.ndarray:
    """``number`` scenes of the world, premultiplied uint8 (N, 256, 256, 4), kept in ``file``."""
    if not file.exists():
        from .scenes import VARIED, World

        world = World.load(world, VARIED)
        rng = random.Random(f"autoencoder {split}")
        file.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(file) as tmp:
            shape = (number, 256, 256, 4)
            pool = np.lib.format.open_memmap(tmp, "w+", np.uint8, shape)
            for i in range(number):
                pool[i] = world.scene(rng, split).image
            pool.flush()
    try:
        return np.load(file, mmap_mode="r")
    except (OSError, ValueError) as e:
        raise SnapGenError(f"{file} is damaged; remove it, it is made again") from e


def batch_of(images: np.ndarray, step: int, o: Options) -> tuple[Tensor, torch.Generator]:
    """Crops (B, crop, crop, 4) in [-1, 1] for a step, and the generator of its noise.

    A step's randomness depends on the seed and its number alone, so that a resumed run goes the
    same way. Of two random crops the one with more in it is taken; some are mirrored, and in some
    the colours change places.
    """
    rng = np.random.default_rng([o.seed, step])
    crops = []
    for index in rng.integers(len(images), size=o.batch):
        limit = images.shape[1] - o.crop + 1
        places = rng.integers(0, limit, size=(2 if limit > 1 else 1, 2))
        some = [images[index, y : y + o.crop, x : x + o.crop] for y, x in places]
        crop = max(some, key=lambda a: a[::4, ::4].std())
        if rng.random() < 0.5:
            crop = crop[:, ::-1]
        if rng.random() < 0.3:
            crop = crop[..., [*rng.permutation(3), 3]]
        crops.append(crop)
    batch = torch.from_numpy(np.stack(crops)).float() / 127.5 - 1
    return batch, torch.Generator().manual_seed(o.seed * 2**32 + step)


def normalised(z: Tensor) -> Tensor:
    """Latents (B, h, w, C) with the batch's mean 0 and deviation 1 in every channel."""
    return (z - z.mean((0, 1, 2))) / (z.std((0, 1, 2)) + 1e-4)


def image_loss(image: Tensor, target: Tensor, alpha_weight: float) -> Tensor:
    """L1 + 5 MSE + half the L1 of finite differences at three scales; images (B, H, W, 4)."""
    weights = torch.tensor([1, 1, 1, alpha_weight])
    error = (image.float() - target) * (weights / weights.mean())
    loss = error.abs().mean() + 5 * error.square().mean()
    for _ in range(3):
        dx = error[:, :, 1:] - error[:, :, :-1]
        dy = error[:, 1:] - error[:, :-1]
        loss = loss + 0.5 * (dx.abs().mean() + dy.abs().mean())
        B, H, W, C = error.shape
        error = error.reshape(B, H // 2, 2, W // 2, 2, C).mean((2, 4))
    return loss


def rate_at(step: int, o: Options) -> float:
    """Linear warm-up, then a cosine to 2 %."""
    if step < o.warmup:
        return o.learning_rate * (step + 1) / o.warmup
    done = (step - o.warmup) / max(o.steps - o.warmup, 1)
    return o.learning_rate * (0.02 + 0.98 * 0.5 * (1 + np.cos(np.pi * min(done, 1))))


def train(
    model: Autoencoder, images: np.ndarray, out, options: Options, steps: int | None = None
) -> Iterator[dict]:
    """Train on ``images`` (N, H, W, 4) uint8, premultiplied; yields a log record every 50 steps.

    Goes on from the newest state in ``out/run`` (``out/run-decoder``), and writes the averaged
    weights to ``out`` with every state. When done, ``model`` holds these.

    Raises:
        SnapGenError: when no state is whole, or the newest one is of another network.
    """
    o = replace(options, steps=steps or options.steps)
    run = Path(out) / ("run-decoder" if o.decoder_only else "run")
    with locked(run):
        yield from _train(model, images, Path(out), run, o)


def _train(model: Autoencoder, images: np.ndarray, out: Path, run: Path, o: Options):
    model.train()
    averaged = copy.deepcopy(model)  # ends as what is written
    if o.decoder_only:
        model.encoder.requires_grad_(False)
    parameters = {k: p for k, p in model.named_parameters() if p.requires_grad}
    means = dict(averaged.named_parameters())
    optimizer = torch.optim.AdamW(
        parameters.values(), lr=0.0, betas=(0.9, 0.99), weight_decay=0.0, fused=True
    )
    for p in parameters.values():
        optimizer.state[p] = {
            "step": torch.tensor(0.0),
            "exp_avg": torch.zeros_like(p),
            "exp_avg_sq": torch.zeros_like(p),
        }

    def state() -> dict[str, Tensor]:
        tensors = {}
        for key, p in parameters.items():
            tensors |= {f"model/{key}": p.detach(), f"ema/{key}": means[key].detach()}
            tensors |= {f"opt/{name}/{key}": t for name, t in optimizer.state[p].items()}
        return tensors

    step = 0
    if found := load_state(run):
        arrays, info = found
        ours = state()
        if {k: tuple(t.shape) for k, t in ours.items()} != {k: a.shape for k, a in arrays.items()}:
            raise SnapGenError(f"{run} is of another network; train into another folder")
        for key, tensor in ours.items():
            tensor.copy_(torch.from_numpy(np.array(arrays[key])))
        step = info["step"]

    def exported() -> Autoencoder:
        result = copy.deepcopy(averaged)
        if not o.decoder_only:
            fold_statistics(result, [batch_of(images, STATISTICS + i, o)[0] for i in range(16)])
            result.config = with_statistics(result, images)
        return result

    def save() -> None:
        arrays = {k: mx.array(t.numpy()) for k, t in state().items()}
        save_state(run, step, arrays, {})
        save_autoencoder(exported(), out)

    saved, errors, since = time.monotonic(), [], time.monotonic()
    while step < o.steps:
        optimizer.param_groups[0]["lr"] = rate_at(step, o)
        batch, generator = batch_of(images, step, o)
        with autocast():
            z = raw = model.encoder(batch).float()
            if not o.decoder_only:
                z = normalised(z)
            noise = torch.randn(z.shape, generator=generator)
            reconstruction = model.decoder(z + o.noise * noise)
        loss = image_loss(reconstruction, batch, o.alpha_weight)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters.values(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            errors.append(F.mse_loss(reconstruction.float().clamp(-1, 1), batch).item())
            # Early averages forget the random start faster.
            kept = min(o.ema, (1 + step) / (10 + step))
            torch._foreach_lerp_(
                [means[k] for k in parameters], list(parameters.values()), 1 - kept
            )
        step += 1
        if step % 50 == 0 or step == o.steps:
            psnr = -10 * np.log10(np.mean(errors) / 4)
            seconds = (time.monotonic() - since) / len(errors)
            yield {"step": step, "psnr": psnr, "latent": raw.std().item(), "seconds": seconds}
            errors, since = [], time.monotonic()
        if time.monotonic() - saved > o.save_every or step == o.steps:
            save()
            saved = time.monotonic()
    result = exported()
    model.load_state_dict(result.state_dict())
    model.config = result.config
    model.eval()


def in_batches(images: np.ndarray) -> Iterator[Tensor]:
    """Pictures as tensors (16, 4, H, W) in [-1, 1]."""
    for i in range(0, len(images), 16):
        yield torch.from_numpy(np.array(images[i : i + 16])).permute(0, 3, 1, 2) / 127.5 - 1


@torch.no_grad()
def fold_statistics(model: Autoencoder, batches: list[Tensor]) -> None:
    """Give the encoder's output itself the mean 0 and the deviation 1 that training gave it."""
    with autocast():
        z = torch.cat([model.encoder(x).float().flatten(0, 2) for x in batches])
    last, std = model.encoder.conv_out, z.std(0) + 1e-4
    last.weight /= std[:, None, None, None]
    last.bias.sub_(z.mean(0)).div_(std)


@torch.inference_mode()
def with_statistics(model: Autoencoder, images: np.ndarray, number: int = 256):
    """The model's config with each channel's mean and deviation over whole pictures' latents."""
    plain = replace(model.config, latents_mean=[], latents_std=[])
    model.config = plain
    order = np.random.default_rng(0).permutation(len(images))[:number]
    with autocast():
        z = torch.cat([model.encode(x) for x in in_batches(images[np.sort(order)])])
    z = z.transpose(0, 1).flatten(1)
    return replace(plain, latents_mean=z.mean(1).tolist(), latents_std=z.std(1).tolist())


@torch.inference_mode()
def measure(model: Autoencoder, images: np.ndarray) -> dict[str, float]:
    """Reconstruction of pictures (N, H, W, 4): PSNR in dB, and the overlap of their outlines.

    ``iou`` is the mean over pictures that are partly transparent, of alpha above one half.
    """
    errors, overlaps = [], []
    for x in in_batches(images):
        y = model.decode(model.encode(x))
        errors += ((y - x) / 2).square().mean((1, 2, 3)).tolist()
        a, b = x[:, 3] > 0, y[:, 3] > 0
        both, either = (a & b).sum((1, 2)), (a | b).sum((1, 2))
        partly = (~a).any(1).any(1)
        overlaps += (both / either.clamp(min=1))[partly].tolist()
    return {
        "psnr": -10 * np.log10(np.mean(errors)),
        "psnr_mean": float(np.mean(-10 * np.log10(errors))),
        "iou": float(np.mean(overlaps)),
    }
