"""A judge that finds right what it is told to, and keeps what it was shown."""

import numpy as np

from benchmarks import judged
from snapgen_mlx.geneval import Found, Prompt
from snapgen_mlx.judge import Looked, protocol, real_pictures

BOXES = {"left of": (0, 40, 20, 60), "right of": (100, 40, 120, 60)}
BOXES |= {"above": (50, 0, 70, 20), "below": (50, 100, 70, 120)}
MIDDLE = (50, 50, 70, 70)


def things(prompt: Prompt) -> list[Found]:
    """What a right picture of a prompt of single things shows."""
    return [
        Found(w.name, 1.0, BOXES[w.position[0]] if w.position else MIDDLE, w.color or "")
        for w in prompt.include
    ]


class FakeJudge:
    """In place of ``benchmarks.judged``'s for a test.

    Args:
        first: number of the first prompt that is drawn.
        right: how many of the first pictures are right, by call.
    """

    def __init__(self, monkeypatch, first: int, right: list[int]):
        self.prompts, self.right = protocol()[first:], iter(right)
        self.shown: list[list] = []
        self.features: list[np.ndarray] = []
        monkeypatch.setattr(judged.Judge, "load", lambda: self)

    def look(self, pictures) -> list[Looked]:
        right, size = next(self.right), len(real_pictures().mean)
        self.shown.append(pictures)
        rng = np.random.default_rng(len(self.shown))
        self.features.append(rng.standard_normal((len(pictures), size)))
        found = [things(self.prompts[i]) if i < right else [] for i in range(len(pictures))]
        return [Looked(f, own) for f, own in zip(found, self.features[-1], strict=True)]
