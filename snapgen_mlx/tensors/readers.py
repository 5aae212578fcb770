"""Readers of checkpoint files: what is in them, and their tensors one at a time."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, Protocol

import mlx.core as mx

from ..errors import SnapGenError
from .safetensors_io import ITEMSIZE, check_dtypes, read_array, read_header
from .sharded import check_shard, read_index
from .weights import INDEX, SINGLE


class Info(NamedTuple):
    dtype: str  # as in safetensors: "F32", "BF16", ...
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * ITEMSIZE[self.dtype]


class Reader(Protocol):
    """Gives the tensors of a checkpoint, each at most once, from ``files``."""

    infos: dict[str, Info]
    files: list[Path]

    def read(self, key: str) -> mx.array: ...


@contextmanager
def reading(path) -> Iterator[None]:
    """Turn whatever the parsing of a damaged file raises into one line."""
    try:
        yield
    except SnapGenError:
        raise
    except Exception as e:  # the file's bytes decide what zipfile, pickle or numpy trip over
        why = (str(e) or type(e).__name__).splitlines()[0]
        raise SnapGenError(f"{path} cannot be read: {why}; download or save it again") from e


class SafetensorsFile:
    def __init__(self, path):
        self.files = [Path(path)]
        self._header = read_header(path)
        self.infos = {key: Info(info.dtype, info.shape) for key, info in self._header.items()}

    def read(self, key: str) -> mx.array:
        return read_array(self.files[0], key, self._header[key])


class Sharded:
    """Several files joined by an index: every key where the index says, and no other key.

    ``open_file`` gives the reader of one of them.
    """

    def __init__(self, index, open_file: Callable[[Path], Reader] = SafetensorsFile):
        index = Path(index)
        self.infos: dict[str, Info] = {}
        self.files = [index]
        self._reader: dict[str, Reader] = {}
        for name, keys in read_index(index).items():
            reader = open_file(index.parent / name)
            self.files += reader.files
            check_shard(index, name, keys, reader.infos)
            self.infos.update(reader.infos)
            self._reader.update(dict.fromkeys(keys, reader))

    def read(self, key: str) -> mx.array:
        return self._reader[key].read(key)


def open_component(folder) -> Reader:
    """A reader of the weights of a component's folder in a model folder.

    Raises SnapGenError for damaged files and for integers in the place of weights.
    """
    index = Path(folder) / INDEX
    reader = Sharded(index) if index.is_file() else SafetensorsFile(Path(folder) / SINGLE)
    check_dtypes(reader.infos, folder)
    return reader
