"""What ``generate`` is to draw and where it goes; the drawing itself."""

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import click

from snapgen_mlx.editing import Edit, parse_margins, read_picture
from snapgen_mlx.errors import UsageError
from snapgen_mlx.files import file_sha256
from snapgen_mlx.names import STDOUT, check_place, fill_in, output_pattern
from snapgen_mlx.picture_file import check_format, picture_bytes, save_picture
from snapgen_mlx.pipeline import Pipeline
from snapgen_mlx.sampling import Step
from snapgen_mlx.settings import Settings
from snapgen_mlx.sheet import contact_sheet

from .progress import Bar

# Pictures whose prompts are encoded together; a heavy text encoder is loaded once for them.
ENCODED_AT_ONCE = 64


class Place:
    """Where pictures go: files by a pattern, or standard output. Args: as of ``output_pattern``;
    number, of the pictures; background, of ``Settings``.

    Raises:
        UsageError: the pictures cannot go there.
    """

    def __init__(self, output: str | None, number: int, widths: bool, background: str | None):
        self.pattern = output_pattern(output, widths)
        self.stdout = self.pattern == STDOUT
        fields = ("{prompt}", "{seed}", "{variant}")
        if number > 1 and not any(field in self.pattern for field in fields):
            raise UsageError(f"{number} pictures need {{prompt}} or {{seed}} in -o {output}")
        if not self.stdout:
            check_format(Path(self.pattern).suffix, background)
        elif sys.stdout is None or sys.stdout.isatty():
            raise UsageError("-o - writes a picture to standard output: redirect it to a file")

    def path(self, job: "Job") -> Path:
        s = job.settings
        return fill_in(self.pattern, s.prompt, s.seed, job.variant)


@dataclass
class Job:
    """One picture: its settings, the width, and its row and column in a sheet of all."""

    settings: Settings
    variant: str
    row: int
    column: str


def given_edit(image, mask, outpaint: str | None) -> tuple[Edit | None, dict]:
    """The picture to start from, if one is given, and what the metadata say of it."""
    if image is None:
        return None, {}
    margins = parse_margins(outpaint) if outpaint else None
    edit = Edit(read_picture(image), mask and read_picture(mask), margins)
    files = {k: Path(v) for k, v in (("image", image), ("mask", mask)) if v}
    said: dict = {k: path.name for k, path in files.items()}
    said |= {"outpaint": outpaint} if outpaint else {}
    return edit, said | {"digests": {k: file_sha256(path)[:16] for k, path in files.items()}}


def plan(
    pipe: Pipeline,
    variants: Sequence[str],
    prompts: Sequence[str],
    seeds: Sequence[int],
    edit: Edit | None,
    given: dict,
) -> list[Job]:
    """Pictures of all prompts with all seeds at all widths. Raises UsageError for settings that
    cannot be met."""
    jobs = []
    for variant in variants:
        if variant == "auto":
            sizes = {k: given[k] for k in ("width", "height", "guidance")}
            variant = pipe.widest(edit is not None, **sizes)
        pipe.switch(variant)
        for row, prompt in enumerate(prompts):
            for seed in seeds:
                if edit is None:
                    settings = pipe.settings(prompt, seed=seed, **given)
                else:
                    settings = pipe.edit_settings(prompt, edit, seed=seed, **given)
                seed_column = f"seed {seed}" if len(variants) == 1 or len(seeds) > 1 else ""
                width_column = pipe.variant if len(variants) > 1 else ""
                column = ", ".join(filter(None, (width_column, seed_column)))
                jobs.append(Job(settings, pipe.variant, row, column))
    return jobs


@dataclass
class Drawing:
    """Draws ``jobs`` with ``pipe``.

    Args: place, for the pictures; edit, what they start from, and files, what their metadata say
        of it; preview, a folder for every step; grid, a file for a sheet of all; with_metadata;
        quiet, whether only notes are printed.
    Raises SnapGenError or UsageError for a place that cannot be written.
    """

    pipe: Pipeline
    jobs: list[Job]
    place: Place
    edit: Edit | None
    files: dict
    preview: str | None
    grid: str | None
    with_metadata: bool
    quiet: bool

    def __post_init__(self):
        paths = [] if self.place.stdout else [self.place.path(job) for job in self.jobs]
        if self.preview:
            paths += [self._preview_path(job, 0) for job in self.jobs]
        if self.grid:
            name = output_pattern(self.grid)
            if name == STDOUT or "{" in name:
                raise UsageError(f"--grid {self.grid}: give the name of one file")
            self.grid = name
            paths.append(Path(self.grid))
        for path in paths:
            check_place(path)

    def metadata(self, job: Job) -> dict:
        """What reproduces a picture."""
        self.pipe.switch(job.variant)
        found = self.pipe.metadata(job.settings)
        digests = found["digests"] | self.files.get("digests", {})
        return found | self.files | {"digests": digests}

    def run(self) -> None:
        """Draw, write and print all."""
        if not self.pipe.encoders:
            note("this model has no text encoder; the prompt has no effect")
        notes: dict[str, None] = {}
        for job in self.jobs:
            self.pipe.switch(job.variant)
            notes |= dict.fromkeys(self.pipe.notes(job.settings, self.edit))
        rows: dict[int, list] = {}
        for i, job in enumerate(self.jobs):
            self.pipe.switch(job.variant)
            if i % ENCODED_AT_ONCE == 0:
                self.pipe.prepare([job.settings for job in self.jobs[i : i + ENCODED_AT_ONCE]])
                for line in notes:  # now that nothing was refused
                    note(line)
                notes = {}
            picture = self._draw(job)
            if self.grid:
                rows.setdefault(job.row, []).append(picture)
        if self.grid:
            names = {job.row: job.settings.prompt for job in self.jobs}
            columns = list(dict.fromkeys(job.column for job in self.jobs))
            sheet = contact_sheet(list(rows.values()), list(names.values()), columns)
            self._say(click.format_filename(save_picture(sheet, self.grid, None)))

    def _draw(self, job: Job):
        s, started = job.settings, time.perf_counter()
        total = max(1, s.steps - s.skipped_steps)
        bar = Bar("step", s.prompt, self.quiet)
        try:
            for step in self.pipe.stream(s, self.edit):
                bar.update(step.index + 1, total)
                if self.preview:
                    self._write_preview(job, step)
        finally:
            bar.close()
        picture = self.pipe.decode(step.x, s.background)
        picture = self.edit.finish(picture) if self.edit else picture
        metadata = self.metadata(job) if self.with_metadata else None
        if self.place.stdout:
            sys.stdout.buffer.write(picture_bytes(picture, ".png", metadata))
            sys.stdout.buffer.flush()
            name = "standard output"
        else:
            path = save_picture(picture, self.place.path(job), metadata)
            name = click.format_filename(path)  # a name may hold bytes that are no text
        self._say(f"{name}  {time.perf_counter() - started:.1f} s")
        return picture

    def _write_preview(self, job: Job, step: Step) -> None:
        shown = self.pipe.decode(step.x0, job.settings.background, preview=True)
        save_picture(shown, self._preview_path(job, step.index), None)

    def _preview_path(self, job: Job, index: int) -> Path:
        stem = "picture" if self.place.stdout else self.place.path(job).stem
        return Path(self.preview or "") / f"{stem}-step-{index + 1:02d}.png"

    def _say(self, line: str) -> None:
        if not self.quiet:
            click.echo(line, err=self.place.stdout)


def note(line: str) -> None:
    """What may be wrong."""
    click.echo(f"note: {line}", err=True)
