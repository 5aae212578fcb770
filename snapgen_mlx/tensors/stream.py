"""Streams tensors into a model folder: one by one into shards, checked before and after.

A component is a list of rows. A row says which tensor of a reader it takes, what happens to it
and how it is stored: as it is, in MLX's affine packing, or as a palette.
"""

import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import NamedTuple

import mlx.core as mx

from ..device import scalar
from ..errors import SnapGenError, name_keys
from ..files import atomic_write, write_json
from . import palette
from .readers import Reader
from .safetensors_io import NAMES, READ_AS, read_header, write_tensors
from .sharded import split_shards, write_index

SHARD_BYTES = 512 << 20  # a stopped run loses at most one shard
MARGIN = 64 << 20  # bytes of disk that stay free besides the weights
Entries = dict[str, tuple[mx.Dtype, tuple[int, ...]]]  # what is stored, by key


class Step(NamedTuple):
    """``apply`` must work on an array that is never evaluated: plans learn shapes that way."""

    action: str
    apply: Callable[[mx.array], mx.array]


COPY = Step("copy", lambda a: a)


@dataclass
class Row:
    """One tensor of the output, stored as it is.

    ``shape`` and ``dtype`` are what it has after ``step``.
    """

    source: str
    shape: tuple[int, ...]
    target: str
    dtype: mx.Dtype
    step: Step = COPY

    @property
    def action(self) -> str:
        return self.step.action

    @property
    def label(self) -> str:
        """How the tensor is stored, for a report."""
        return NAMES[self.dtype]

    def entries(self) -> Entries:
        return {self.target: (self.dtype, self.shape)}

    def encode(self, a: mx.array) -> list[mx.array]:
        """The arrays of ``entries`` for the tensor ``a``, of the row's shape and dtype."""
        return [a]

    @property
    def nbytes(self) -> int:
        return sum(prod(shape) * dtype.size for dtype, shape in self.entries().values())


@dataclass(kw_only=True)
class AffineRow(Row):
    """A matrix in ``bits`` bits with a scale and a bias for every ``group`` of a row."""

    bits: int
    group: int

    @property
    def label(self) -> str:
        return f"{self.bits} bits"

    @property
    def action(self) -> str:
        return self.label if self.step is COPY else f"{self.step.action}, {self.label}"

    def entries(self) -> Entries:
        layer, (rows, n) = self.target.removesuffix(".weight"), self.shape
        return {
            self.target: (mx.uint32, (rows, n * self.bits // 32)),
            f"{layer}.scales": (self.dtype, (rows, n // self.group)),
            f"{layer}.biases": (self.dtype, (rows, n // self.group)),
        }

    def encode(self, a: mx.array) -> list[mx.array]:
        return list(mx.quantize(a, group_size=self.group, bits=self.bits))


@dataclass(kw_only=True)
class PaletteRow(Row):
    """A weight as indices of ``bits`` bits into a table of values."""

    bits: int

    @property
    def label(self) -> str:
        return f"palette of {1 << self.bits}"

    def entries(self) -> Entries:
        *rows, n = self.shape
        return {
            self.target: (mx.uint32, (*rows, n * self.bits // 32)),
            f"{self.target}{palette.SUFFIX}": (self.dtype, (1 << self.bits,)),
        }

    def encode(self, a: mx.array) -> list[mx.array]:
        indices, values = palette.fit(a, self.bits)
        return [mx.array(palette.pack(indices, self.bits)), values]


@dataclass(kw_only=True)
class Component:
    """One model of the output: a folder of weights and its ``config.json``."""

    name: str  # its folder
    config: dict = field(default_factory=dict)
    reader: Reader
    rows: list[Row] = field(default_factory=list)
    stem: str = "model"  # stem of its file names

    @property
    def nbytes(self) -> int:
        return sum(row.nbytes for row in self.rows)

    @property
    def parameters(self) -> int:
        return sum(prod(row.shape) for row in self.rows)

    def shards(self) -> dict[str, list[Row]]:
        """{file name: its rows}."""
        rows = {row.target: row for row in self.rows}
        files = split_shards({k: r.nbytes for k, r in rows.items()}, SHARD_BYTES, self.stem)
        return {name: [rows[key] for key in keys] for name, keys in files.items()}


def copy_rows(reader: Reader) -> list[Row]:
    """Rows of a model that is the same on both sides."""
    rows = []
    for key, info in reader.infos.items():
        if info.dtype not in READ_AS:
            raise SnapGenError(
                f"{reader.files[0]}: {key!r} has the dtype {info.dtype}, which cannot be used here"
            )
        rows.append(Row(key, info.shape, key, READ_AS[info.dtype]))
    return rows


def all_entries(rows: Iterable[Row]) -> Entries:
    return {key: entry for row in rows for key, entry in row.entries().items()}


def check_disk(folder: Path, components: Iterable[Component]) -> None:
    """Raise SnapGenError unless what ``folder`` lacks of the components fits on its disk."""
    files = [p for c in components for p in (folder / c.name).glob("*.safetensors")]
    done = sum(p.stat().st_size for p in files)
    need = sum(c.nbytes for c in components) + MARGIN - done
    free = shutil.disk_usage(folder).free
    if free < need:
        raise SnapGenError(
            f"{folder.parent} has {free / 1e9:.1f} GB free, {need / 1e9:.1f} GB are needed; make "
            "room or choose another disk"
        )


def write_components(
    folder: Path,
    components: Iterable[Component],
    form: str = "mlx",
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Write all shards that a folder does not have yet, with their index and ``config.json``.

    Args:
        folder: of the model.
        components: what to write.
        form: the metadata's "format", "mlx" or "pt".
        progress: called with (bytes done, bytes in all).

    Raises:
        SnapGenError: the disk is too small; or tensors hold NaN or infinity, after all were
            checked.
    """
    components = list(components)
    check_disk(folder, components)
    nonfinite: dict[str, int] = {}
    done, total = 0, sum(c.nbytes for c in components)
    for component in components:
        files = component.shards()
        for name, rows in files.items():
            file = folder / component.name / name
            if not file.is_file():
                bad: dict[str, int] = {}
                with atomic_write(file) as tmp:
                    write_tensors(tmp, all_entries(rows), _arrays(component, rows, bad), form)
                mx.clear_cache()
                if bad:
                    file.unlink()  # lest a resumed run believe it
                    nonfinite |= bad
            done += sum(row.nbytes for row in rows)
            if progress:
                progress(done, total)
        if len(files) > 1:
            table = {key: name for name, rows in files.items() for key in all_entries(rows)}
            write_index(folder / component.name, component.stem, table, component.nbytes)
        write_json(folder / component.name / "config.json", component.config)
    if nonfinite:
        raise SnapGenError(
            f"{sum(nonfinite.values())} values of {name_keys(nonfinite)} are NaN or infinite (as "
            "stored, or beyond the range of --dtype); a model with them would make only noise"
        )


def _arrays(
    component: Component, rows: list[Row], nonfinite: dict[str, int]
) -> Iterator[tuple[str, mx.array]]:
    """Yield (key, array) of a shard, one source tensor in memory at a time."""
    held, source = mx.array(0), None
    for row in rows:
        if source != row.source:
            held, source = component.reader.read(row.source), row.source
        a = row.step.apply(held).astype(row.dtype)
        if bad := _count_nonfinite(a):
            nonfinite[row.source] = nonfinite.get(row.source, 0) + bad
        arrays = row.encode(a)
        mx.eval(arrays)
        yield from zip(row.entries(), arrays, strict=True)


def _count_nonfinite(a: mx.array) -> int:
    if not mx.issubdtype(a.dtype, mx.floating) or not a.size:
        return 0
    extremes = mx.stack([a.max(), a.min()])  # NaN wins both; unlike isfinite they need no memory
    return 0 if mx.isfinite(extremes).all() else int(scalar((~mx.isfinite(a)).sum()))


def verify(folder: Path, components: Iterable[Component]) -> dict[str, dict]:
    """Read back what stands on disk: every tensor as planned; layers, bytes, bits per weight."""
    result = {}
    for component in components:
        layers: dict[str, int] = {}
        size = 0
        for name, rows in component.shards().items():
            file = folder / component.name / name
            header = {key: (info.dtype, info.shape) for key, info in read_header(file).items()}
            planned = {k: (NAMES[dtype], shape) for k, (dtype, shape) in all_entries(rows).items()}
            if header != planned:
                raise SnapGenError(f"{file} does not hold what was planned; convert it again")
            size += file.stat().st_size
            for row in rows:
                layers[row.label] = layers.get(row.label, 0) + 1
        result[component.name] = {
            "layers": layers,
            "bytes_on_disk": size,
            "bits_per_weight": round(8 * size / max(component.parameters, 1), 3),
        }
    return result
