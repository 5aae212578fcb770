"""What a run shows of itself: a plot of its losses, and the same pictures again and again."""

import importlib.util
import json
import textwrap
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from ..errors import UsageError
from ..files import atomic_write
from ..pipeline import Pipeline
from .elastic_trainer import ElasticTrainer
from .loop import LOG, RunOptions

PROMPTS = 8
CELL = 256  # largest side of a picture in a grid, in pixels
FONT = 12
PLOT_SECONDS = 60  # seconds between plots without a validation


class Report:
    """Draws in the folder ``run`` the losses, as ``loss.png``, and samples of every width.

    Samples are pictures of the same few prompts from seed 0, as ``generate`` makes them with the
    averaged weights: ``samples/step-NNNNNN.png``. Args: model, the folder that is trained;
    captions, from which at most ``PROMPTS`` prompts are taken, evenly spread. Their texts are
    encoded here; one that the model cannot read is left out.
    """

    def __init__(self, run: Path, model: Path, captions: list[str], options: RunOptions):
        self.run, self.options = run, options
        self.pipe = Pipeline(model, base=True, keep_encoders=False)
        captions = list(dict.fromkeys(captions))
        n = min(PROMPTS, len(captions))
        jobs = []
        for caption in (captions[i * len(captions) // n] for i in range(n)):
            with suppress(UsageError):
                job = self.pipe.settings(caption)
                self.pipe.encode(job.texts)
                jobs.append(job)
        if jobs:
            self.pipe.prepare(jobs)
        self.prompts = [job.prompt for job in jobs]
        self.pipe.free("encoders", "dit", "vae")
        self.plotted, self.step = 0.0, None

    def update(self, record: dict, trainer: ElasticTrainer) -> None:
        """Draw what is due after a record of ``loop.train``: samples wait for the next one."""
        step, last = record["step"], "done" in record
        validated = any(name.startswith("val/") for name in record)
        due = last or validated or time.monotonic() - self.plotted > PLOT_SECONDS
        if due and can_plot():
            plot_losses(self.run / LOG, self.run / "loss.png")
            self.plotted = time.monotonic()
        every, before = self.options.sample_every, self.step
        self.step = step
        if before is None:
            before = max(0, step - self.options.log_every)
        if every and self.prompts and not last and step // every > before // every:
            self._write(self._draw(trainer, trainer.weights.mean), f"step-{step:06d}.png")

    def picture_change(self, trainer: ElasticTrainer, before: dict) -> dict[str, float]:
        """Compare each width's sample pictures with those of earlier parameters.

        Writes both as ``samples/before-after.png``.

        Args:
            trainer: draws with its averaged weights.
            before: flat parameters.

        Returns:
            {width: mean difference in levels of 255}; empty without a prompt.
        """
        if not self.prompts:
            return {}
        sets = [self._draw(trainer, params) for params in (before, trainer.weights.mean)]
        rows: dict[str, list[Image.Image]] = {}
        change: dict[str, float] = {}
        for name in trainer.config.variants:
            rows |= {f"{name} before": sets[0][name], f"{name} after": sets[1][name]}
            a, b = (np.stack([np.asarray(p, np.float32) for p in s[name]]) for s in sets)
            change[name] = float(np.abs(a - b).mean())
        self._write(rows, "before-after.png")
        return change

    def _draw(self, trainer: ElasticTrainer, params: dict) -> dict[str, list[Image.Image]]:
        """Pictures by width; parameters and decoder are let go of afterwards."""
        rows = {}
        for i, name in enumerate(trainer.config.variants):
            self.pipe.dit = trainer.bind(i, params)
            rows[name] = [self.pipe.generate(prompt) for prompt in self.prompts]
        self.pipe.free("dit", "vae")
        trainer.release()
        return rows

    def _write(self, rows: dict[str, list[Image.Image]], name: str) -> None:
        with atomic_write(self.run / "samples" / name) as tmp:
            picture_grid(rows, self.prompts).save(tmp, format="PNG")


def picture_grid(rows: dict[str, list[Image.Image]], columns: list[str]) -> Image.Image:
    """Rows of pictures of one size, on white, with their labels; the columns' are cut at three
    lines."""
    w, h = (min(CELL, side) for side in next(iter(rows.values()))[0].size)
    lines = [textwrap.wrap(text, max(8, w // (FONT // 2)))[:3] for text in columns]
    top = (FONT + 4) * max(map(len, lines)) + 4
    left = 8 + FONT * 2 // 3 * max(map(len, rows))
    grid = Image.new("RGB", (left + len(columns) * w, top + len(rows) * h), "white")
    draw = ImageDraw.Draw(grid)
    for x, text in enumerate(lines):
        draw.text((left + x * w + 2, 2), "\n".join(text), "black", font_size=FONT)
    for y, (label, pictures) in enumerate(rows.items()):
        draw.text((4, top + y * h + h // 2), label, "black", font_size=FONT, anchor="lm")
        for x, picture in enumerate(pictures):
            small = picture.resize((w, h), Image.Resampling.LANCZOS)
            mask = small if small.has_transparency_data else None
            grid.paste(small, (left + x * w, top + y * h), mask)
    return grid


def can_plot() -> bool:
    return importlib.util.find_spec("matplotlib") is not None


def plot_losses(log, path) -> None:
    """Draw the losses and validation losses of each width to a PNG. Needs matplotlib.

    Args:
        log: log.jsonl; without a loss in it, nothing is drawn.
        path: of the PNG.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    log = Path(log)
    if not log.exists():
        return
    curves: dict[str, list[tuple[int, float]]] = {}
    for line in log.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        for name, value in record.items():
            if name.startswith(("loss/", "val/")):
                curves.setdefault(name, []).append((record["step"], value))
    if not curves:
        return
    widths = sorted({name.partition("/")[2] for name in curves})
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot(xlabel="step", ylabel="loss")
    for name, points in sorted(curves.items()):
        kind, _, width = name.partition("/")
        style: dict[str, Any] = {"alpha": 0.4, "markersize": 2} if kind == "loss" else {}
        style |= {"label": width if kind == "loss" else f"{width}, validation"}
        steps, losses = zip(*points, strict=True)
        axes.plot(steps, losses, f"C{widths.index(width)}.-", **style)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.legend()
    with atomic_write(path) as tmp:
        figure.savefig(tmp, format="png", dpi=120)
