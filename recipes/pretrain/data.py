"""Latents and captions in shards, of which more may appear while the training runs.

A data folder holds shard-00000.safetensors with `latents` (N, h, w, C), normalised, float16, and
shard-00000.json, the N captions as a list; then shard-00001 and so on. heldout.safetensors and
heldout.json, of the same form, are for validation. What a step trains on depends on (seed, step)
alone: a run that is cut and resumed sees the same samples.
"""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from snapgen_mlx.errors import SnapGenError

from .text import NAME, pad

LENGTHS = 16  # texts are padded to a multiple of it: few shapes, few compiled graphs
WAIT = 2.0  # seconds between two looks for a shard that is not there yet


@dataclass
class Batch:
    """Clean latents (B, h, w, C) float32, noise of their shape, t (B,), text and masks by encoder,
    and the index of the narrower width that is trained."""

    latents: Tensor
    noise: Tensor
    t: Tensor
    text: dict[str, Tensor]
    masks: dict[str, Tensor]
    subnet: int

    def to(self, device) -> "Batch":
        move = lambda value: (  # noqa: E731
            {k: a.to(device, non_blocking=True) for k, a in value.items()}
            if isinstance(value, dict)
            else value.to(device, non_blocking=True)
            if isinstance(value, Tensor)
            else value
        )
        return Batch(*(move(value) for value in vars(self).values()))


class Shard:
    """One open shard: latents mapped from disk, captions as rows of the word table."""

    def __init__(self, path: Path, words):
        try:
            with safe_open(path, "pt") as file:
                self.latents = file.get_tensor("latents")
            captions = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        except Exception as e:  # whatever a cut or foreign file gives
            raise SnapGenError(f"cannot read the shard {path}: {e}; make it again") from e
        if self.latents.ndim != 4 or len(captions) != len(self.latents):
            raise SnapGenError(
                f"{path}: {len(captions)} captions for latents of shape "
                f"{tuple(self.latents.shape)}; make it again"
            )
        self.ids = words.ids(captions)

    def __len__(self) -> int:
        return len(self.latents)


class Shards:
    """The shards of a folder as a stream of batches.

    Args:
        folder: the data folder.
        words: the tokenizer, `WordTokens`.
        channels: C that the latents must have.
        seed: of everything drawn.
        first: shards seen at step 0.
        every: one more shard is seen after each so many steps; 0 for never.
    """

    def __init__(self, folder, words, channels: int, seed: int, first: int, every: int):
        self.folder, self.words, self.channels = Path(folder), words, channels
        self.seed, self.first, self.every = seed, first, every
        self.shards: list[Shard] = []
        self.ends: list[int] = []
        if not self.folder.is_dir():
            raise SnapGenError(f"there is no data folder {self.folder}")

    def open(self, name: str) -> Shard:
        shard = Shard(self.folder / f"{name}.safetensors", self.words)
        if shard.latents.shape[-1] != self.channels:
            raise SnapGenError(
                f"{self.folder}/{name}.safetensors holds latents of {shard.latents.shape[-1]} "
                f"channels; the transformer's in_channels is {self.channels}"
            )
        return shard

    def visible(self, step: int, waiting: Callable[[str], None]) -> None:
        """Open the shards that this step draws from; waits for one that is not there yet.

        Args:
            waiting: called with the shard's name again and again while it is not there; what it
                raises ends the waiting.
        """
        wanted = self.first + (step // self.every if self.every else 0)
        while len(self.shards) < wanted:
            name = f"shard-{len(self.shards):05d}"
            files = [self.folder / f"{name}{suffix}" for suffix in (".safetensors", ".json")]
            if all(file.exists() for file in files):
                self.shards.append(self.open(name))
                self.ends = list(np.cumsum([len(shard) for shard in self.shards]))
            else:
                waiting(name)
                time.sleep(WAIT)

    def batch(self, step: int, size: int, rows: slice, subnets: int, drop: float, shift: float):
        """The share `rows` of the batch of one step, after `visible`.

        Args:
            size: samples of the whole batch, over all processes.
            rows: those of this process.
            subnets: how many narrower widths there are to draw from.
            drop: probability that a text is dropped.
            shift: a of t = a·u / (1 + (a-1)·u), u = sigmoid(N(0, 1)) (training section 1).
        """
        wanted = self.first + (step // self.every if self.every else 0)
        rng = np.random.default_rng([self.seed, step])
        subnet = int(rng.integers(subnets)) if subnets else -1
        chosen = rng.integers(self.ends[wanted - 1], size=size)
        dropped = rng.random(size) < drop
        u = 1 / (1 + np.exp(-rng.standard_normal(size)))
        t = shift * u / (1 + (shift - 1) * u)
        seeds = rng.integers(2**62, size=size)

        picked = []
        for i in chosen[rows]:
            shard = int(np.searchsorted(self.ends, i, side="right"))
            picked.append((self.shards[shard], int(i - (self.ends[shard - 1] if shard else 0))))
        latents = torch.stack([shard.latents[i] for shard, i in picked]).float()
        ids, mask = pad([shard.ids[i] for shard, i in picked], LENGTHS)
        mask &= ~torch.from_numpy(dropped[rows])[:, None]
        return Batch(
            latents,
            noise_like(latents, seeds[rows]),
            torch.from_numpy(t[rows]).float(),
            {NAME: ids},
            {NAME: mask},
            subnet,
        )

    def heldout(self, samples: int, batch: int) -> list[Batch]:
        """Fixed batches of the held-out latents, t spread over (0, 1); [] where there are none."""
        if not (self.folder / "heldout.safetensors").exists():
            return []
        shard = self.open("heldout")
        out = []
        for start in range(0, min(samples, len(shard)), batch):
            latents = shard.latents[start : min(start + batch, samples)].float()
            n = len(latents)
            ids, mask = pad(shard.ids[start : start + n], LENGTHS)
            places = np.arange(start, start + n)
            t = torch.from_numpy((places * 0.6180339887 + 0.5) % 1).float()
            noise = noise_like(latents, places)
            out.append(Batch(latents, noise, t, {NAME: ids}, {NAME: mask}, -1))
        return out


def noise_like(latents: Tensor, seeds) -> Tensor:
    """Normal noise, each sample's from its own seed: it does not depend on the batch around it."""
    generator = torch.Generator()
    shape = latents.shape[1:]
    return torch.stack(
        [torch.randn(shape, generator=generator.manual_seed(int(seed))) for seed in seeds]
    )
