"""Pictures by which a run of K-DMD is watched, and the signs that it has failed."""

import hashlib
import json
from functools import partial
from itertools import pairwise
from pathlib import Path

import mlx.core as mx
import numpy as np
from PIL import Image

from ..background import on_white
from ..device import scalar
from ..errors import SnapGenError
from ..files import atomic_write
from ..memory import TILE
from ..models.interfaces import Autoencoder
from ..sampling import schedule
from .dmd import SHIFT
from .kdmd import KDMDTrainer

SEEDS = 4  # pictures of each caption that a run is watched by
REFERENCE_STEPS = 16  # steps of the guided teacher, which draws the pictures to compare with
# Beyond these, against the teacher's pictures, a run has failed, unless it began beyond them.
MOST_STD, MOST_COLOUR, LEAST_SPREAD = 1.3, 1.5, 0.4


class Watch:
    """Pictures of a run in four steps beside the guided teacher's from the same noise.

    Writes them to FOLDER/STEP.png, a caption's seeds in a row, the teacher's on the right, and
    raises SnapGenError for a run that saturates or collapses.
    """

    def __init__(self, vae: Autoencoder, folder):
        self.vae, self.folder = vae, Path(folder)
        self._theirs: tuple[np.ndarray, np.ndarray] | None = None
        self._start: dict[str, float] = {}

    def __call__(self, trainer: KDMDTrainer, fixed: list) -> dict[str, float]:
        """Monitors; ``fixed`` batches hold each caption SEEDS times in a row.

        All are relative to the teacher's pictures: "std" of latents, "colour" (the mean range of
        RGB), "spread" (distance between the seeds of a caption), and "error", the squared distance
        to the teacher's picture of the same noise, where two of its seeds have 1.
        """
        batches = [(eps, text, masks) for _, eps, _, text, masks in fixed]
        if self._theirs is None:
            self._theirs = self._draw(partial(self._guided, trainer), batches)
            nothing = {k: mx.zeros_like(a) for k, a in trainer.student.mean.items()}
            start = self._draw(partial(trainer.generate, lora=nothing), batches)
            self._start = self._compare(*start, *self._theirs)
        latents, pictures = self._draw(trainer.generate, batches)
        found = self._compare(latents, pictures, *self._theirs)
        self._write(int(scalar(trainer.steps)), pictures, self._theirs[1])
        check_monitors(found, self._start)
        return {f"val/{k}": a for k, a in found.items()}

    def _guided(self, trainer: KDMDTrainer, noise, text, masks) -> mx.array:
        """``guided``, kept beside the grids: of a large teacher it takes hours."""
        parts = [trainer.fingerprints.get("teacher"), trainer.options.guidance]
        name = hashlib.sha256(json.dumps(parts).encode())
        for a in (noise, *text.values(), *masks.values()):
            name.update(np.array(a.astype(mx.float32)).tobytes())
        path = self.folder / f"teacher-{name.hexdigest()[:16]}.npy"
        try:
            return mx.array(np.load(path))
        except (OSError, ValueError, EOFError):  # absent or damaged
            z = guided(trainer, noise, text, masks)
        if mx.distributed.init().rank() == 0:
            with atomic_write(path) as tmp:
                np.save(tmp, np.array(z))
        return z

    def _compare(self, z, pictures, z_teacher, pictures_teacher) -> dict[str, float]:
        """The monitors of latents and pictures, as of ``_draw``, against the teacher's."""
        found = {
            "std": z.std() / z_teacher.std(),
            "colour": colour(pictures) / colour(pictures_teacher),
            "spread": (spread(z) / spread(z_teacher)) ** 0.5,
            "error": ((z - z_teacher) ** 2).mean() / spread(z_teacher),
        }
        return {k: float(a) for k, a in found.items()}

    def _draw(self, draw, batches: list) -> tuple[np.ndarray, np.ndarray]:
        """Latents (N, h, w, C) and pictures (N, H, W, 3) in [0, 1]."""
        latents = np.concatenate([np.array(draw(*batch)) for batch in batches])
        # One at a time, in tiles: decoding a batch of 1024² takes tens of gigabytes.
        pictures = [np.array(on_white(self.vae.decode(z[None], TILE))) for z in mx.array(latents)]
        return latents, np.concatenate(pictures)

    def _write(self, step: int, pictures: np.ndarray, theirs: np.ndarray) -> None:
        if mx.distributed.init().rank():
            return
        rows = [a.reshape(-1, SEEDS, *a.shape[1:]) for a in (pictures, theirs)]
        grid = np.concatenate(rows, axis=1)  # (captions, 2·SEEDS, H, W, 3)
        n, m, h, w, _ = grid.shape
        grid = grid.transpose(0, 2, 1, 3, 4).reshape(n * h, m * w, 3)
        with atomic_write(self.folder / f"{step:08d}.png") as tmp:
            Image.fromarray((grid * 255).round().astype(np.uint8)).save(tmp)


def check_monitors(monitors: dict[str, float], start: dict[str, float]) -> None:
    """Raises SnapGenError when they say that a run, which began with ``start``, has failed."""
    m = {k: f"{a:.2g} times" for k, a in monitors.items()}
    most_std, most_colour = MOST_STD * max(1, start["std"]), MOST_COLOUR * max(1, start["colour"])
    if not monitors["spread"] >= LEAST_SPREAD * min(1, start["spread"]):  # or no number
        what = f"collapse: the seeds of a caption differ {m['spread']} as much as the teacher's"
    elif not (monitors["std"] <= most_std and monitors["colour"] <= most_colour):
        what = (
            f"saturate: {m['std']} the contrast of the teacher's latents, {m['colour']} its colour"
        )
    else:
        return
    raise SnapGenError(f"the pictures {what}; start in another folder with a lower learning rate")


def guided(trainer: KDMDTrainer, noise, text, masks) -> mx.array:
    """Latents (B, H, W, C) of the guided teacher's many steps."""
    x = noise
    for now, to in pairwise(schedule(REFERENCE_STEPS, SHIFT)):
        t = mx.full(len(x), now)
        x = x + (to - now) * trainer.teacher.velocity(x, t, text, masks, trainer.options.guidance)
        mx.eval(x)
    return x


def colour(pictures: np.ndarray) -> float:
    return np.ptp(pictures, axis=-1).mean()


def spread(latents: np.ndarray) -> float:
    """Mean squared difference of two seeds of a caption: twice their variance."""
    return 2 * latents.reshape(-1, SEEDS, latents[0].size).var(axis=1, ddof=1).mean()
