"""Training the small autoencoder: reconstruction of images through noisy latents (our choice)."""

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten, tree_map, tree_unflatten

from snapgen_mlx.models.autoencoder import SnapGenAutoencoder
from snapgen_mlx.training.checkpoint import load_state, save_state


@dataclass
class AutoencoderTraining:
    steps: int = 4000
    batch: int = 16
    crop: int = 64  # pixels; the networks are convolutional
    learning_rate: float = 2e-3
    warmup: int = 100
    noise: float = 0.15  # std of the noise on raw latents: smooth latents, a robust decoder
    latent_penalty: float = 1e-3  # weight of mean(z²), which keeps latents near unit scale
    ema: float = 0.998
    seed: int = 0
    decoder_only: bool = False  # latents stay as they are: models trained on them stay valid
    save_every: float = 120  # seconds


def image_loss(image: mx.array, target: mx.array) -> mx.array:
    """L1 + MSE + L1 of finite differences at three scales; images (B, H, W, 3)."""
    error = image - target
    loss = mx.abs(error).mean() + error.square().mean()
    for _ in range(3):
        dx = error[:, :, 1:] - error[:, :, :-1]
        dy = error[:, 1:] - error[:, :-1]
        loss = loss + 0.5 * (mx.abs(dx).mean() + mx.abs(dy).mean())
        B, H, W, C = error.shape
        error = error.reshape(B, H // 2, 2, W // 2, 2, C).mean(axis=(2, 4))
    return loss


def train_autoencoder(
    model: SnapGenAutoencoder, images: np.ndarray, run, options: AutoencoderTraining
) -> Iterator[dict]:
    """Train on ``images`` (N, H, W, 3) uint8, yielding a log record every 50 steps.

    Resumes from the newest state in the folder ``run``. When done, ``model`` holds the EMA
    weights and ``model.config`` the latents' per-channel mean and standard deviation.
    """
    o = options
    if o.decoder_only:
        model.encoder.freeze()
    schedule = optim.join_schedules(
        [
            optim.linear_schedule(0, o.learning_rate, o.warmup),
            optim.cosine_decay(o.learning_rate, o.steps - o.warmup, o.learning_rate * 0.02),
        ],
        [o.warmup],
    )
    optimizer = optim.AdamW(learning_rate=schedule, betas=[0.9, 0.99], weight_decay=0.0)
    optimizer.init(model.trainable_parameters())
    ema = tree_map(lambda a: a, model.parameters())
    step = 0
    if state := load_state(run):
        arrays, info = state
        step = info["step"]
        groups = {"model": [], "opt": [], "ema": []}
        for key, a in arrays.items():
            group, _, path = key.partition("/")
            groups[group].append((path, a))
        model.load_weights(groups["model"], strict=True)
        optimizer.state = tree_unflatten(groups["opt"])
        ema = tree_unflatten(groups["ema"])

    def loss_fn(images, noise):
        z = model.encoder(images)
        recon = model.decoder(z + o.noise * noise)
        mse = (mx.clip(recon, -1, 1) - images).square().mean()
        return image_loss(recon, images) + o.latent_penalty * z.square().mean(), mse

    grad_fn = nn.value_and_grad(model, loss_fn)
    captured = [model.state, optimizer.state]

    @partial(mx.compile, inputs=captured, outputs=captured)
    def update(images, noise):
        (loss, mse), grads = grad_fn(images, noise)
        grads, _ = optim.clip_grad_norm(grads, 1.0)
        optimizer.update(model, grads)
        return loss, mse

    @mx.compile
    def average(ema, params):
        return tree_map(lambda e, p: o.ema * e + (1 - o.ema) * p, ema, params)

    def save():
        arrays = {f"model/{k}": a for k, a in tree_flatten(model.parameters())}
        arrays |= {f"opt/{k}": a for k, a in tree_flatten(optimizer.state)}
        arrays |= {f"ema/{k}": a for k, a in tree_flatten(ema)}
        save_state(run, step, arrays, {})

    saved, mses, since = time.monotonic(), [], time.monotonic()
    while step < o.steps:
        rng = np.random.default_rng([o.seed, step])  # a step's randomness depends on it alone
        where = rng.integers(0, images.shape[1] - o.crop + 1, size=(o.batch, 2))
        batch = [
            images[i, y : y + o.crop, x : x + o.crop]
            for i, (y, x) in zip(rng.integers(len(images), size=o.batch), where, strict=True)
        ]
        batch = mx.array(np.stack(batch)).astype(mx.float32) / 127.5 - 1
        latent = [n // model.config.downsampling for n in batch.shape[1:3]]
        shape = (o.batch, *latent, model.config.latent_channels)
        noise = mx.random.normal(shape, key=mx.random.key(o.seed * 2**32 + step))
        _, mse = update(batch, noise)
        ema = average(ema, model.parameters())
        mx.eval(mse, ema, captured)
        mses.append(mse.item())
        step += 1
        if step % 50 == 0 or step == o.steps:
            psnr = -10 * np.log10(np.mean(mses) / 4)
            seconds = (time.monotonic() - since) / len(mses)
            yield {"step": step, "psnr": psnr, "seconds": seconds}
            mses, since = [], time.monotonic()
        if time.monotonic() - saved > o.save_every or step == o.steps:
            save()
            saved = time.monotonic()

    if o.decoder_only:
        model.decoder.update(ema["decoder"])  # averaging rounds, and latents must stay the same
        return
    model.update(ema)
    samples = images[np.random.default_rng(o.seed).permutation(len(images))[:512]]
    z = [model.encoder(mx.array(s).astype(mx.float32) / 127.5 - 1) for s in np.split(samples, 16)]
    z = mx.concatenate(z).reshape(-1, model.config.latent_channels)
    model.config = replace(
        model.config,
        latents_mean=z.mean(0).tolist(),
        latents_std=z.std(0).tolist(),
    )
