"""Folders that ``torch.distributed.checkpoint`` writes (FSDP), read without torch."""

import io
import math
from pathlib import Path
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from ..errors import SnapGenError
from ..files import check_impostor
from .readers import Info, reading
from .safetensors_io import ITEMSIZE, as_array, numpy_kind
from .torch_file import StoredTensor, TorchZip, is_sizes, unpickle


class _Chunk(NamedTuple):
    offset: tuple[int, ...]
    shape: tuple[int, ...]
    file: Path
    start: int
    length: int


class DCPFolder:
    """A folder of ``.metadata`` and ``*.distcp``: each chunk is a small ``torch.save`` of its own,
    so no torch is needed to put the tensors together."""

    def __init__(self, path):
        folder = Path(path)
        where = folder / ".metadata"
        check_impostor(where)
        with reading(where):
            metadata = unpickle(where.read_bytes(), where).state
            stored = {}
            for index, info in metadata["storage_data"].items():
                index, info = index.state, info.state
                if info.get("transform_descriptors"):
                    raise ValueError("its chunks are compressed or transformed")
                if Path(info["relative_path"]).name != info["relative_path"]:
                    raise ValueError(f"it points outside its folder: {info['relative_path']!r}")
                place = (folder / info["relative_path"], info["offset"], info["length"])
                offset = index["offset"] if index.get("offset") is not None else ()
                stored[index["fqn"], tuple(offset)] = place
            self.infos, self._chunks = {}, {}
            for key, entry in metadata["state_dict_metadata"].items():
                if not isinstance(entry.state, dict) or "chunks" not in entry.state:
                    continue  # bytes: a step count, settings
                shape = entry.state["size"]
                self.infos[key] = Info(entry.state["properties"].state[0], tuple(shape))
                chunks = [c.state for c in entry.state["chunks"]]
                self._chunks[key] = [
                    _Chunk(c["offsets"], c["sizes"], *stored[key, tuple(c["offsets"])])
                    for c in chunks
                ]
                self._check(key)
        files = {c.file for chunks in self._chunks.values() for c in chunks}
        self.files = [where, *sorted(files)]
        for file in sorted(files):
            ends = [
                c.start + c.length for cs in self._chunks.values() for c in cs if c.file == file
            ]
            if not file.is_file() or file.stat().st_size < max(ends):
                raise SnapGenError(f"{file} is missing or cut short; download or save it again")

    def _check(self, key):
        chunks, shape = self._chunks[key], self.infos[key].shape
        if not is_sizes(shape) or self.infos[key].dtype not in ITEMSIZE:
            raise ValueError(f"{key!r} has a malformed shape or dtype")
        for i, a in enumerate(chunks):
            if not (is_sizes(a.offset) and is_sizes(a.shape) and is_sizes(a[3:])):
                raise ValueError(f"{key!r} has a malformed chunk")
            if not len(a.offset) == len(a.shape) == len(shape) or any(
                o + n > full for o, n, full in zip(a.offset, a.shape, shape, strict=True)
            ):
                raise ValueError(f"{key!r} has a chunk outside its shape")
            for b in chunks[:i]:
                spans = zip(a.offset, a.shape, b.offset, b.shape, strict=True)
                if all(o < q + m and q < o + n for o, n, q, m in spans):
                    raise ValueError(f"{key!r} has overlapping chunks")
        if sum(math.prod(c.shape) for c in chunks) != math.prod(shape):
            raise ValueError(f"the chunks of {key!r} do not fill it")

    def read(self, key: str) -> mx.array:
        info = self.infos[key]
        with reading(self.files[0].parent):
            out = np.empty(info.shape, numpy_kind(info.dtype))
            for chunk in self._chunks[key]:
                with open(chunk.file, "rb") as f:
                    f.seek(chunk.start)
                    archive = TorchZip(io.BytesIO(f.read(chunk.length)), chunk.file)
                tensor = archive.content
                if not isinstance(tensor, StoredTensor) or tensor.shape != chunk.shape:
                    raise ValueError(f"a chunk of {key!r} is not the tensor it should be")
                if tensor.storage.dtype != info.dtype:
                    raise ValueError(f"a chunk of {key!r} has another dtype")
                archive.check(tensor)
                slices = (slice(o, o + n) for o, n in zip(chunk.offset, chunk.shape, strict=True))
                out[tuple(slices)] = archive.read(tensor)
            return as_array(out, info.dtype)
