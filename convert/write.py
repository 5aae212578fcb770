"""Writing components: tensor by tensor into shards, checked against the disk before and after."""

import shutil
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx

from ..errors import SnapGenError
from ..files import atomic_write
from ..lora import FEW_STEP, read_lora
from ..safetensors_io import NAMES, read_header, write_tensors
from ..weights import write_json
from .formats import name_some
from .plan import Component, Row

SHARD_BYTES = 512 << 20  # an interrupted run loses at most one
MARGIN = 64 << 20  # disk left free beside the weights


def copy_few_steps(
    source: Path, target: Path, change: Callable[[dict], dict] = lambda tensors: tensors
) -> None:
    """The LoRAs with which a model needs few steps, where it has them; palettes become floats.

    change: what becomes of a LoRA's tensors.
    """
    for file in sorted((source / FEW_STEP).glob("*.safetensors")):
        tensors = change(read_lora(file))
        infos = {key: (a.dtype, tuple(a.shape)) for key, a in tensors.items()}
        with atomic_write(target / FEW_STEP / file.name) as tmp:
            write_tensors(tmp, infos, tensors.items())


def check_disk(folder: Path, components: dict[str, Component]) -> None:
    """Raise SnapGenError unless what ``folder`` lacks of the components fits on its disk."""
    files = [p for name in components for p in (folder / name).glob("*.safetensors")]
    done = sum(p.stat().st_size for p in files)
    need = sum(c.nbytes for c in components.values()) + MARGIN - done
    free = shutil.disk_usage(folder).free
    if free < need:
        raise SnapGenError(
            f"{folder.parent} has {free / 1e9:.1f} GB free, {need / 1e9:.1f} GB are needed; make "
            "room or choose another disk"
        )


def shards(component: Component) -> dict[str, list[Row]]:
    """{file name: its rows}; a tensor larger than a shard has one for itself."""
    parts, size = [[]], 0
    for row in component.rows:
        if parts[-1] and size + row.nbytes > SHARD_BYTES:
            parts.append([])
            size = 0
        parts[-1].append(row)
        size += row.nbytes
    if len(parts) == 1:
        return {f"{component.stem}.safetensors": component.rows}
    total = len(parts)
    return {f"{component.stem}-{i:05}-of-{total:05}.safetensors": p for i, p in enumerate(parts, 1)}


def _entries(rows: list[Row]) -> dict[str, tuple[mx.Dtype, tuple]]:
    return {key: entry for row in rows for key, entry in row.entries().items()}


def write_components(
    folder: Path,
    components: dict[str, Component],
    form: str,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Write all shards that ``folder`` does not have yet, with their index.

    form: the metadata's "format", "mlx" or "pt". Raises SnapGenError when a tensor holds NaN or
    infinity, after all have been looked at.
    """
    nonfinite = {}
    done, total = 0, sum(c.nbytes for c in components.values())
    for component in components.values():
        files = shards(component)
        for name, rows in files.items():
            file = folder / component.name / name
            if not file.is_file():
                bad = {}
                with atomic_write(file) as tmp:
                    write_tensors(tmp, _entries(rows), _tensors(component, rows, bad), form)
                mx.clear_cache()
                if bad:
                    file.unlink()  # lest a resumed run believe it
                    nonfinite |= bad
            done += sum(row.nbytes for row in rows)
            if progress:
                progress(done, total)
        if len(files) > 1:
            table = {key: name for name, rows in files.items() for key in _entries(rows)}
            content = {"metadata": {"total_size": component.nbytes}, "weight_map": table}
            write_json(
                folder / component.name / f"{component.stem}.safetensors.index.json", content
            )
    if nonfinite:
        raise SnapGenError(
            f"{sum(nonfinite.values())} values of {name_some(nonfinite)} are NaN or infinite (as "
            "stored, or beyond the range of --dtype); a model with them would make only noise"
        )


def _tensors(component: Component, rows: list[Row], nonfinite: dict):
    """Yield (key, array) of a shard, one source tensor in memory at a time."""
    held = None
    for row in rows:
        if held is None or held[0] != row.source:
            held = row.source, component.reader.read(row.source)
        a = row.step.apply(held[1]).astype(row.dtype)
        if bad := _count_nonfinite(a):
            nonfinite[row.source] = nonfinite.get(row.source, 0) + bad
        arrays = [a] if row.bits is None else mx.quantize(a, group_size=row.group, bits=row.bits)
        mx.eval(arrays)
        yield from zip(row.entries(), arrays, strict=True)


def _count_nonfinite(a: mx.array) -> int:
    if not mx.issubdtype(a.dtype, mx.floating) or not a.size:
        return 0
    extremes = mx.stack([a.max(), a.min()])  # NaN wins both; unlike isfinite they need no memory
    return 0 if mx.isfinite(extremes).all() else (~mx.isfinite(a)).sum().item()


def verify(folder: Path, components: dict[str, Component]) -> dict:
    """Read back what stands on disk: every tensor as planned; layers, bytes, bits per weight."""
    result = {}
    for component in components.values():
        layers, size = {}, 0
        for name, rows in shards(component).items():
            file = folder / component.name / name
            header = {key: (info.dtype, info.shape) for key, info in read_header(file).items()}
            if header != {k: (NAMES[dtype], shape) for k, (dtype, shape) in _entries(rows).items()}:
                raise SnapGenError(f"{file} does not hold what was planned; convert it again")
            size += file.stat().st_size
            for row in rows:
                label = f"{row.bits} bits" if row.bits else NAMES[row.dtype]
                layers[label] = layers.get(label, 0) + 1
        result[component.name] = {
            "layers": layers,
            "bytes_on_disk": size,
            "bits_per_weight": round(8 * size / max(component.parameters, 1), 3),
        }
    return result
