"""Widths and steps for a picture in a given time, by step times measured on this machine."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache

from .errors import UsageError
from .pipeline import Pipeline
from .settings import Settings

WARM = 2  # steps that are timed, after one that loads and compiles


@dataclass(frozen=True)
class StepTimes:
    """Seconds of a step by width, narrowest first, and of decoding."""

    steps: dict[str, float]
    decoding: float

    def picture(self, parts: list[tuple[str, int]]) -> float:
        """Seconds of a picture, without encoding its text."""
        return sum(count * self.steps[name] for name, count in parts) + self.decoding

    def choose(
        self,
        seconds: float,
        steps: int,
        fits: Callable[[list[tuple[str, int]]], bool] = lambda parts: True,
    ) -> list[tuple[str, int]]:
        """Choose the width of each step within a time.

        As many steps as possible go to the widest width, the others to the next ones. A narrower
        width comes first, because the first steps decide what a picture shows and the last ones its
        details.

        Args:
            seconds: for the whole picture.
            steps: that the model wants. If the narrowest width cannot make them in time, it makes
                fewer.
            fits: whether widths that are used together fit into memory.

        Returns:
            Pairs (width, steps).

        Raises:
            UsageError: there is no time for a single step.
        """
        names = list(self.steps)
        fitting = [p for p in _splits(names, steps) if self.picture(p) <= seconds and fits(p)]
        if fitting:
            return max(fitting, key=lambda p: [dict(p).get(name, 0) for name in reversed(names)])
        each = self.steps[names[0]]
        count = int((seconds - self.decoding) / each)
        if count < 1:
            raise UsageError(
                f"{seconds:g} s are too short: one step of {names[0]} takes {each:.3g} s and "
                f"decoding {self.decoding:.3g} s here; give more time, or a smaller picture"
            )
        return [(names[0], min(count, steps))]


def _splits(names: list[str], steps: int) -> Iterator[list[tuple[str, int]]]:
    """All ways to share out so many steps among widths, in their order."""
    if len(names) == 1:
        yield [(names[0], steps)] if steps else []
        return
    for count in range(steps + 1):
        own = [(names[0], count)] if count else []
        for rest in _splits(names[1:], steps - count):
            yield own + rest


def measure(pipe: Pipeline, settings: Settings) -> StepTimes:
    """Time the widths of a model on a picture of these settings.

    Only widths that fit into memory are timed, and only those that use few-step LoRAs if this
    variant of ``pipe`` does.

    Args:
        pipe: the model; it ends at another variant.
        settings: of the picture.
    """
    is_few = bool(pipe.few_steps)
    steps: dict[str, float] = {}
    few = replace(settings, steps=1 + WARM, strength=None)
    for name in pipe.dit_config.variants:
        pipe.switch(name)
        if bool(pipe.few_steps) != is_few or not (pipe.force or pipe.fits(settings)):
            continue
        marks = []
        for step in pipe.stream(few):  # noqa: B007
            marks.append(time.perf_counter())
        steps[name] = (marks[-1] - marks[0]) / WARM
        latent = step.x
    pipe.decode(latent)
    started = time.perf_counter()
    pipe.decode(latent)
    return StepTimes(steps, time.perf_counter() - started)


def variant_within(pipe: Pipeline, settings: Settings, seconds: float) -> tuple[str, str]:
    """The variant that draws a picture within a time, and the measurement in words.

    Args:
        pipe: the model; it ends at that variant.
        settings: of the picture; ``settings.steps`` is the largest number of steps.
        seconds: for the picture.
    """
    times = measure(pipe, settings)

    def named(parts: list[tuple[str, int]]) -> str:
        return ",".join(f"{name}:{count}" for name, count in parts)

    @cache
    def together(variant: str) -> bool:
        return pipe.force or pipe.memory.fits(variant, pipe.request(settings))

    def fits(parts: list[tuple[str, int]]) -> bool:
        return together(named([(name, 1) for name, _ in parts]))  # counts do not matter

    parts = times.choose(seconds, settings.steps, fits)
    variant = named(parts)
    pipe.switch(variant)
    measured = ", ".join(f"{name} {each:.3g}" for name, each in times.steps.items())
    return variant, (
        f"{variant} takes about {times.picture(parts):.3g} s a picture here (a step of {measured} "
        f"s, decoding {times.decoding:.3g} s; a new text comes on top)"
    )
