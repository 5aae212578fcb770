"""The judge: what pictures show, by a small detector that never saw a generated one.

How it was trained, and how good it is itself: ``benchmarks/judge`` and docs/judge.md.
"""

from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import numpy as np
from PIL import Image

from .files import read_json
from .geneval import THRESHOLD, Found, Prompt, read_prompts
from .models.detector import CROP, GRID, LABELS, MAPS, SIDE, JudgeNetworks
from .tensors.safetensors_io import load_arrays
from .tensors.weights import assign, load_tensors

FOLDER = Path(__file__).parent / "assets" / "judge"
NAMES_FILE, PROMPTS = "labels.json", "prompts.jsonl"
REAL, STATISTICS = "real.json", "real.safetensors"  # figures of real scenes
BATCH = 32
MARGIN = 1.15  # of a crop's side, by the larger side of its box


@dataclass
class Looked:
    """What the judge says of one picture: its things, and features (C,) of the whole."""

    things: list[Found]
    features: np.ndarray


@dataclass
class Place:
    """Where something is: the box in pixels, and how sure that is."""

    sure: float
    box: tuple[float, float, float, float]


class Judge:
    """Both networks, and the names of what they tell apart."""

    def __init__(self, networks: JudgeNetworks, labels: dict[str, list[str]]):
        self.networks, self.labels = networks, labels

    @classmethod
    def load(cls, folder: Path = FOLDER) -> "Judge":
        """The shipped judge. Raises SnapGenError when its files are missing or damaged."""
        tensors = {k: a.astype(mx.float32) for k, a in load_tensors(folder).items()}
        return cls(assign(JudgeNetworks(), tensors, folder), read_json(folder / NAMES_FILE))

    def look(self, pictures: list[Image.Image]) -> list[Looked]:
        """What each picture shows; boxes in pixels of 128 a side."""
        out = []
        for start in range(0, len(pictures), BATCH):
            batch = np.stack([as_input(p) for p in pictures[start : start + BATCH]])
            maps, features = self.networks.detector(mx.array(batch).astype(mx.float32) / 255)
            found = places(np.array(maps))
            crops = [crop(batch[i], p.box) for i, group in enumerate(found) for p in group]
            said = np.array(self.networks.recognizer(mx.array(np.stack(crops)))) if crops else ()
            logits = iter(said)
            for group, own in zip(found, np.array(features), strict=True):
                things = [t for p in group for t in named(p, next(logits), self.labels)]
                out.append(Looked(things, own))
        return out


def protocol() -> list[Prompt]:
    """The shipped prompts: first GenEval's six tasks, each prefix in their proportions."""
    return read_prompts(FOLDER / PROMPTS)


@dataclass
class Real:
    """The judge's figures of real scenes, which ``benchmarks.judge.ceilings`` measured.

    Attributes:
        shares: right pictures by task and "overall", of scenes by what was done to them.
        mean, covariance: of the features of real scenes.
        floors: Frechet distance of other real scenes, by pictures of a prompt less one.
        diversity: of real scenes of one prompt; None where there was one of each.
        prompts: how many prompts they were of.
    """

    shares: dict[str, dict[str, float]]
    mean: np.ndarray
    covariance: np.ndarray
    floors: list[float]
    diversity: float | None
    prompts: int


def real_pictures(folder: Path = FOLDER) -> Real:
    """Raises SnapGenError when the files are missing or damaged."""
    figures = read_json(folder / REAL)
    arrays = load_arrays(folder / STATISTICS)
    mean, covariance = (np.array(arrays[k]) for k in ("mean", "covariance"))
    return Real(mean=mean, covariance=covariance, **figures)


def as_input(picture: Image.Image) -> np.ndarray:
    """A picture on white as the detector takes it, (128, 128, 3) uint8."""
    if picture.mode == "RGBA":
        white = Image.new("RGBA", picture.size, "white")
        picture = Image.alpha_composite(white, picture)
    picture = picture.convert("RGB")
    if picture.size != (SIDE, SIDE):
        picture = picture.resize((SIDE, SIDE), Image.Resampling.BOX)
    return np.asarray(picture)


def places(maps: np.ndarray) -> list[list[Place]]:
    """Where things are in each picture: the peaks of the maps (B, GRID, GRID, 5)."""
    thing, box = np.split(maps.astype(np.float64), [MAPS["thing"]], axis=-1)
    sure = 1 / (1 + np.exp(-thing[..., 0]))
    padded = np.pad(sure, ((0, 0), (1, 1), (1, 1)))
    around = [padded[:, i : i + GRID, j : j + GRID] for i in range(3) for j in range(3)]
    peak = (sure > THRESHOLD) & (sure >= np.max(around, axis=0))
    out: list[list[Place]] = [[] for _ in maps]
    for b, i, j in np.argwhere(peak):
        dx, dy, width, height = box[b, i, j]
        x, y, width, height = j + 0.5 + dx, i + 0.5 + dy, np.exp(width), np.exp(height)
        edges = np.array([x - width / 2, y - height / 2, x + width / 2, y + height / 2])
        left, top, right, bottom = (edges.clip(0, GRID) * SIDE / GRID).tolist()
        out[b].append(Place(float(sure[b, i, j]), (left, top, right, bottom)))
    return out


def crop(picture: np.ndarray, box: tuple[float, float, float, float]) -> np.ndarray:
    """The square around a box, in pixels, of a picture (S, S, 3) uint8: (CROP, CROP, 3) in [0, 1].

    Bilinear; beyond the edge the last pixels go on.
    """
    side = MARGIN * max(box[2] - box[0], box[3] - box[1])
    offsets = side * ((np.arange(CROP) + 0.5) / CROP - 0.5) - 0.5
    out = picture.astype(np.float32) / 255
    for axis, (low, high) in enumerate(((box[1], box[3]), (box[0], box[2]))):
        at = ((low + high) / 2 + offsets).clip(0, len(picture) - 1)
        first = np.floor(at).astype(int)
        second = np.minimum(first + 1, len(picture) - 1)
        part = (at - first).astype(np.float32).reshape((-1, 1, 1) if axis == 0 else (-1, 1))
        out = out.take(first, axis) * (1 - part) + out.take(second, axis) * part
    return out


def named(place: Place, logits: np.ndarray, labels: dict[str, list[str]]) -> list[Found]:
    """The things that a crop's logits (labels,) say; its score is the place's times the name's."""
    ends = np.cumsum(list(LABELS.values()))[:-1]
    name, color, style = np.split(logits.astype(np.float64), ends)
    share = np.exp(name - name.max())
    scores = place.sure * share / share.sum()
    tint = labels["color"][int(color.argmax())]
    look = labels["style"][int(style.argmax())]
    return [
        Found(text, float(score), place.box, tint, look)
        for text, score in zip(labels["name"], scores, strict=False)
        if score > THRESHOLD
    ]


def frechet(features: np.ndarray, mean: np.ndarray, covariance: np.ndarray) -> float:
    """The Frechet distance of features (N, C) to a normal distribution of real ones."""
    own, spread = features.mean(0), np.cov(features, rowvar=False)
    values, vectors = np.linalg.eigh(covariance)
    root = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    common = np.sqrt(np.linalg.eigvalsh(root @ spread @ root).clip(0)).sum()
    return float(((own - mean) ** 2).sum() + np.trace(spread) + np.trace(covariance) - 2 * common)


def diversity(groups: list[np.ndarray]) -> float:
    """The mean distance of two pictures of one prompt; features (seeds, C) of each prompt."""
    means = []
    for features in groups:
        distance = np.linalg.norm(features[:, None] - features[None], axis=-1)
        n = len(features)
        means.append(distance.sum() / (n * (n - 1)))
    return float(np.mean(means))
