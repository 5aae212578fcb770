"""The weights of one component's folder, strictly: every key, shape and length is checked."""

from pathlib import Path
from typing import Any, Protocol, TypeVar, cast

import mlx.core as mx
from mlx.utils import tree_flatten

from ..errors import SnapGenError, name_keys
from .palette import expand
from .safetensors_io import TensorInfo, check_dtypes, load_arrays, read_header, save_arrays
from .sharded import check_shard, read_index, split_shards, write_index

STEM = "model"
SINGLE = f"{STEM}.safetensors"
INDEX = f"{SINGLE}.index.json"


def weight_files(folder) -> dict[str, Path]:
    """{key: file} of a folder's weights after checking every file, the index and its shards."""
    folder = Path(folder)
    index = folder / INDEX
    if not index.is_file():
        return dict.fromkeys(read_header(folder / SINGLE), folder / SINGLE)
    files: dict[str, Path] = {}
    for name, keys in read_index(index).items():
        held = read_header(folder / name)
        check_shard(index, name, keys, held)
        files |= dict.fromkeys(held, folder / name)
    return files


def load_infos(folder) -> dict[str, TensorInfo]:
    """Dtypes and shapes of a component folder's weights, from the headers alone."""
    files = weight_files(folder)
    headers = {file: read_header(file) for file in set(files.values())}
    return {key: headers[file][key] for key, file in files.items()}


def load_tensors(folder) -> dict[str, mx.array]:
    """All weights of a component folder, lazily read; palettes come as the floats they stand for.

    Raises SnapGenError for damaged files and for integers in the place of weights.
    """
    files = weight_files(folder)
    check_dtypes(load_infos(folder), folder)
    loaded = {file: load_arrays(file) for file in set(files.values())}
    return expand({key: loaded[file][key] for key, file in files.items()}, folder)


def save_tensors(folder, tensors: dict[str, mx.array], max_shard_bytes: int = 4 << 30) -> None:
    """Write weights as one file, or as shards with an index, each atomically."""
    folder = Path(folder)
    shards = split_shards({key: a.nbytes for key, a in tensors.items()}, max_shard_bytes, STEM)
    for name, keys in shards.items():
        save_arrays(folder / name, {key: tensors[key] for key in keys})
    (folder / INDEX).unlink(missing_ok=True)  # of weights that stood here before
    if len(shards) > 1:
        weight_map = {key: name for name, keys in shards.items() for key in keys}
        write_index(folder, STEM, weight_map, sum(a.nbytes for a in tensors.values()))


class Network(Protocol):
    """What can be given weights: an ``nn.Module``, or a part of a model by its protocol."""

    def parameters(self) -> Any: ...

    def load_weights(self, file_or_weights: Any, strict: bool = True) -> Any: ...


N = TypeVar("N", bound=Network)


def flat_parameters(module: Network) -> dict[str, mx.array]:
    """A module's parameters by their paths."""
    return dict(cast(list[tuple[str, mx.array]], tree_flatten(module.parameters())))


def parameter_shapes(module: Network) -> dict[str, tuple[int, ...]]:
    return {path: a.shape for path, a in flat_parameters(module).items()}


def assign(module: N, tensors: dict[str, mx.array], where) -> N:
    """Give ``module`` exactly these weights; any missing, extra or misshapen key is an error."""
    expected = parameter_shapes(module)
    for what, keys in (
        ("lacks", expected.keys() - tensors),
        ("has an extra", tensors - expected.keys()),
    ):
        if keys:
            raise SnapGenError(
                f"{where} {what} key {name_keys(keys, most=1)}; is it of another model?"
            )
    for key, shape in expected.items():
        if tuple(tensors[key].shape) != tuple(shape):
            raise SnapGenError(f"{where}: {key!r} has shape {tensors[key].shape}, not {shape}")
    module.load_weights(list(tensors.items()), strict=True)
    return module
