"""How far a command is: a bar on a terminal, and a line every few seconds elsewhere."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Any

import click

from snapgen_mlx.errors import format_bytes

from .training_run import duration

if TYPE_CHECKING:
    from tqdm import tqdm

EVERY = 5.0  # seconds between two lines of a log


class Bar:
    """Progress that appears with the first update.

    Args:
        unit: what is counted, as "step".
        label: what it belongs to.
        quiet: show nothing.
    """

    def __init__(self, unit: str, label: str = "", quiet: bool = False):
        self.unit, self.quiet = unit, quiet
        # A line of its own: a text may hold line ends and what steers a terminal.
        self.label = " ".join("".join(c if c.isprintable() else " " for c in label).split())[:40]
        self._bar: tqdm | None = None
        self._started = self._told = time.monotonic()

    def update(self, done: int, total: int) -> None:
        """``done`` of ``total`` units are done."""
        if self.quiet:
            return
        if sys.stderr is not None and sys.stderr.isatty():
            self._draw(done, total)
        elif time.monotonic() - self._told >= EVERY:
            self._told = time.monotonic()
            left = (self._told - self._started) / max(done, 1) * (total - done)
            name = f"{self.label}: " if self.label else ""
            made, all_of_it = (format_bytes(n) if self.unit == "B" else n for n in (done, total))
            unit = "" if self.unit == "B" else f"{self.unit} "
            click.echo(f"{name}{unit}{made} of {all_of_it}, {duration(left)} left", err=True)
        if done == total:
            self.close()

    def _draw(self, done: int, total: int) -> None:
        from tqdm import tqdm

        if self._bar is None:
            label = self.label or None
            look: dict[str, Any] = {"unit": self.unit, "unit_scale": self.unit == "B"}
            self._bar = tqdm(desc=label, total=total, initial=done, leave=False, **look)
        self._bar.update(done - self._bar.n)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None
        self._started = self._told = time.monotonic()
