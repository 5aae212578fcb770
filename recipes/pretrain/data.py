"""Latents and captions in shards, of which more may appear while the training runs.

A data folder holds shard-00000.safetensors with `latents` (N, h, w, C), normalised, float16, and
shard-00000.json, the N captions as a list; then shard-00001 and so on. Two pairs of files of the
same form are for validation: heldout.* on what training never shows, such as held-out combinations,
and validation.* on other samples of what it shows. For a model whose text encoders are not trained
along, each file also holds their states, `text.NAME` (N, L, dim), and how many of the L are valid,
`length.NAME` (N,). What a step trains on depends on (seed, step) alone: a run that is cut and
resumed sees the same samples.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from snapgen_mlx.errors import SnapGenError
from snapgen_mlx.models.word_tokens import WordTokens

from .text import NAME, pad

LENGTHS = 16  # texts are padded to a multiple of it: few shapes, few compiled graphs
FIXED = ("validation", "heldout")  # files that are not trained on
GOLDEN = 0.6180339887  # its multiples fill (0, 1) evenly


@dataclass
class Batch:
    """What a step trains on.

    Args:
        latents: clean ones (B, h, w, C) float32.
        noise: of their shape.
        t: (B,) in (0, 1).
        text: {encoder: ids (B, L) or states (B, L, dim)}.
        masks: {encoder: (B, L) bool}.
        subnet: index of the narrower width that is trained.
    """

    latents: Tensor
    noise: Tensor
    t: Tensor
    text: dict[str, Tensor]
    masks: dict[str, Tensor]
    subnet: int

    def to(self, device) -> "Batch":
        text, masks = ({k: a.to(device) for k, a in d.items()} for d in (self.text, self.masks))
        tensors = (a.to(device) for a in (self.latents, self.noise, self.t))
        return Batch(*tensors, text, masks, self.subnet)


class Shard:
    """One open shard: latents and states mapped from disk, captions as rows of the word table.

    Args:
        path: the .safetensors file.
        words: the tokenizer of a text encoder that is trained along, None where none is.
        encoders: names of the text encoders whose states are read.
    """

    def __init__(self, path: Path, words: WordTokens | None, encoders: list[str]):
        try:
            with safe_open(path, "pt") as file:
                self.latents = file.get_tensor("latents")
                self.states = {name: file.get_tensor(f"text.{name}") for name in encoders}
                self.lengths = {name: file.get_tensor(f"length.{name}") for name in encoders}
            captions = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
            self.ids = words.ids(captions) if words else None
        except Exception as e:  # whatever a cut or foreign file gives
            raise SnapGenError(f"cannot read the shard {path}: {e}; make it again") from e
        counts = {len(a) for d in (self.states, self.lengths) for a in d.values()}
        if self.latents.ndim != 4 or counts | {len(captions)} != {len(self.latents)}:
            raise SnapGenError(
                f"{path}: {len(captions)} captions for latents of shape "
                f"{tuple(self.latents.shape)}; make it again"
            )


class Shards:
    """The shards of a folder as a stream of batches.

    Args:
        folder: the data folder.
        words: the tokenizer of a text encoder that is trained along, None where none is.
        encoders: names of the text encoders whose states stand in the shards.
        channels: C that the latents must have.
        seed: of everything drawn.
        first: shards seen at step 0; None for all that are there now.
        every: one more shard is seen after each so many steps; 0 for never.
    """

    def __init__(
        self, folder, words, encoders, channels: int, seed: int, first: int | None, every: int
    ):
        self.folder, self.channels = Path(folder), channels
        self.words, self.encoders = words, encoders
        if not self.folder.is_dir():
            raise SnapGenError(f"there is no data folder {self.folder}")
        if first is None:
            first = len(list(self.folder.glob("shard-*.safetensors")))
            if not first:
                raise SnapGenError(f"{self.folder} holds no shards; make some first")
        self.seed, self.first, self.every = seed, first, every
        self.shards: list[Shard] = []
        self.ends: list[int] = []

    def open(self, name: str) -> Shard:
        shard = Shard(self.folder / f"{name}.safetensors", self.words, self.encoders)
        if shard.latents.shape[-1] != self.channels:
            raise SnapGenError(
                f"{self.folder}/{name}.safetensors holds latents of {shard.latents.shape[-1]} "
                f"channels; the transformer's in_channels is {self.channels}"
            )
        return shard

    def visible(self, step: int) -> int:
        """How many shards a step draws from."""
        return self.first + (step // self.every if self.every else 0)

    def missing(self, step: int) -> str | None:
        """Open what a step draws from; the name of the first shard that is not there yet."""
        while len(self.shards) < self.visible(step):
            name = f"shard-{len(self.shards):05d}"
            if not all(
                (self.folder / f"{name}.{kind}").exists() for kind in ("safetensors", "json")
            ):
                return name
            self.shards.append(self.open(name))
            self.ends = list(np.cumsum([len(shard.latents) for shard in self.shards]))
        return None

    def batch(self, step: int, size: int, rows: slice, subnets: int, drop: float, shift: float):
        """The share `rows` of the batch of one step, none of whose shards is missing.

        Args:
            size: samples of the whole batch, over all processes.
            rows: those of this process.
            subnets: how many narrower widths there are to draw from.
            drop: probability that an encoder's text is dropped, each by itself.
            shift: a of t = a·u / (1 + (a-1)·u), u = sigmoid(N(0, 1)) (training section 1).
        """
        rng = np.random.default_rng([self.seed, step])
        subnet = int(rng.integers(subnets)) if subnets else -1
        chosen = rng.integers(self.ends[self.visible(step) - 1], size=size)
        # One from each of equal parts of the distribution: a batch's loss is then less by chance.
        parts = (rng.permutation(size) + rng.random(size)) / size
        u = 1 / (1 + np.exp(-torch.special.ndtri(torch.from_numpy(parts)).numpy()))
        t = shift * u / (1 + (shift - 1) * u)
        seeds = rng.integers(2**62, size=size)
        dropped = {name: rng.random(size) < drop for name in self.encoders or [NAME]}

        shards = np.searchsorted(self.ends, chosen[rows], side="right")
        starts = np.array([0, *self.ends])[shards]
        picked = [
            (self.shards[s], int(i)) for s, i in zip(shards, chosen[rows] - starts, strict=True)
        ]
        latents, text, masks = self.gather(picked)
        for name, mask in masks.items():
            mask &= ~torch.from_numpy(dropped[name][rows])[:, None]
        t = torch.from_numpy(t[rows]).float()
        return Batch(latents, noise_like(latents, seeds[rows]), t, text, masks, subnet)

    def gather(self, picked: list[tuple[Shard, int]]) -> tuple[Tensor, dict, dict]:
        """Latents, text and masks of samples (shard, place in it)."""
        latents = torch.stack([shard.latents[i] for shard, i in picked]).float()
        if not self.encoders:
            ids, mask = pad([shard.ids[i] for shard, i in picked], LENGTHS)
            return latents, {NAME: ids}, {NAME: mask}
        text, masks = {}, {}
        for name in self.encoders:
            lengths = torch.stack([shard.lengths[name][i] for shard, i in picked])
            longest = -(-max(int(lengths.max()), 1) // LENGTHS) * LENGTHS
            masks[name] = torch.arange(longest) < lengths[:, None]
            text[name] = torch.zeros(len(picked), longest, picked[0][0].states[name].shape[-1])
            for row, (shard, i) in zip(text[name], picked, strict=True):
                states = shard.states[name][i, :longest]
                row[: len(states)] = states
        return latents, text, masks

    def fixed(self, samples: int, batch: int) -> dict[str, list[Batch]]:
        """Fixed batches of the validation files that there are, by name; t spread over (0, 1)."""
        there = [name for name in FIXED if (self.folder / f"{name}.safetensors").exists()]
        return {name: self._fixed(self.open(name), samples, batch) for name in there}

    def _fixed(self, shard: Shard, samples: int, batch: int) -> list[Batch]:
        places = range(min(samples, len(shard.latents)))
        out = []
        for start in range(0, len(places), batch):
            part = places[start : start + batch]
            latents, text, masks = self.gather([(shard, i) for i in part])
            t = torch.tensor([(i * GOLDEN + 0.5) % 1 for i in part])
            out.append(Batch(latents, noise_like(latents, part), t, text, masks, -1))
        return out


def noise_like(latents: Tensor, seeds) -> Tensor:
    """Normal noise, each sample's from its own seed: it does not depend on the batch around it."""
    generator = torch.Generator()
    shape = latents.shape[1:]
    return torch.stack(
        [torch.randn(shape, generator=generator.manual_seed(int(seed))) for seed in seeds]
    )
