"""Readers of checkpoint files: safetensors, torch zip files, sharded ones, DCP folders.

A reader has ``infos`` {key: Info}, ``files`` (what it reads from) and ``read(key) -> mx.array``;
tensors come one at a time. torch is never imported and a pickle never runs anything: only the
opcodes and the handful of names that tensors need are known here, everything else is refused.
"""

import io
import math
import pickle
import re
import zipfile
from collections import OrderedDict
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from ..errors import SnapGenError
from ..safetensors_io import DTYPES, ITEMSIZE, as_array, numpy_kind, read_float64, read_header
from ..weights import read_json

EXTENSIONS = ("safetensors", "bin", "pt", "pth")
# What diffusers, transformers, open_clip and MLX call the weights, in order of preference.
STEMS = ("diffusion_pytorch_model", "model", "pytorch_model", "open_clip_model")
STEMS += ("open_clip_pytorch_model",)
SHARD = re.compile(r"-\d{5}-of-\d{5}$")
LISTED = 4  # keys named in a message


class Info(NamedTuple):
    dtype: str  # as in safetensors: "F32", "BF16", ...
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * ITEMSIZE[self.dtype]


def name_some(keys) -> str:
    keys = sorted(keys)
    more = f" and {len(keys) - LISTED} more" if len(keys) > LISTED else ""
    return ", ".join(map(repr, keys[:LISTED])) + more


@contextmanager
def _reading(path):
    """Turn whatever the parsing of a damaged file raises into one line."""
    try:
        yield
    except SnapGenError:
        raise
    except Exception as e:  # the file's bytes decide what zipfile, pickle or numpy trip over
        why = (str(e) or type(e).__name__).splitlines()[0]
        raise SnapGenError(f"{path} cannot be read: {why}; download or save it again") from e


# --- safetensors


class SafetensorsFile:
    def __init__(self, path):
        self.files = [Path(path)]
        self._header = read_header(path)
        self.infos = {key: Info(info.dtype, info.shape) for key, info in self._header.items()}
        self._lazy = {}

    def read(self, key: str) -> mx.array:
        path, info = self.files[0], self._header[key]
        if info.dtype == "F64":
            return read_float64(path, key, info)
        if info.dtype not in DTYPES:
            have = f"{key!r} has the dtype {info.dtype}, which cannot be converted"
            raise SnapGenError(f"{path}: {have}; save it as BF16, F16 or F32")
        with _reading(path):
            if key not in self._lazy:
                self._lazy = mx.load(str(path))
            a = self._lazy.pop(key)  # left there, it would stay in memory once it is read
            mx.eval(a)
        return a


# --- torch zip files

_STORAGES = {
    **{"FloatStorage": "F32", "HalfStorage": "F16", "BFloat16Storage": "BF16"},
    **{"DoubleStorage": "F64", "LongStorage": "I64", "IntStorage": "I32", "ShortStorage": "I16"},
    **{"CharStorage": "I8", "ByteStorage": "U8", "BoolStorage": "BOOL"},
}
_DTYPES = {
    **{"float32": "F32", "float16": "F16", "bfloat16": "BF16", "float64": "F64", "int64": "I64"},
    **{"int32": "I32", "int16": "I16", "int8": "I8", "uint8": "U8", "bool": "BOOL"},
}
_DCP = "torch.distributed.checkpoint."
_DCP_CLASSES = {
    **dict.fromkeys(("Metadata", "MetadataIndex", "StorageMeta"), _DCP + "metadata"),
    **dict.fromkeys(("TensorStorageMetadata", "BytesStorageMetadata"), _DCP + "metadata"),
    **dict.fromkeys(("TensorProperties", "ChunkStorageMetadata"), _DCP + "metadata"),
    "_StorageInfo": _DCP + "filesystem",
}
_OPCODES = """PROTO FRAME STOP MARK POP NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 BINFLOAT
    BINUNICODE SHORT_BINUNICODE BINUNICODE8 BINBYTES SHORT_BINBYTES EMPTY_TUPLE TUPLE TUPLE1 TUPLE2
    TUPLE3 EMPTY_LIST APPEND APPENDS EMPTY_DICT SETITEM SETITEMS GLOBAL STACK_GLOBAL REDUCE NEWOBJ
    BUILD BINPERSID BINPUT LONG_BINPUT BINGET LONG_BINGET MEMOIZE""".split()  # noqa: SIM905


class _Storage(NamedTuple):
    dtype: str
    key: str
    numel: int


class _Tensor(NamedTuple):
    """A strided view of a storage; all in elements."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


class _Record:
    """Stands for an object that is never made; holds the state it would have been given."""

    def __new__(cls, *args):
        record = super().__new__(cls)
        record.state = {}
        return record

    def __init__(self, *args):
        pass


def _is_sizes(value) -> bool:
    return isinstance(value, tuple) and all(type(n) is int and n >= 0 for n in value)


def _rebuild_tensor(storage, offset, shape, stride, *rest) -> _Tensor:
    # rest: requires_grad, backward_hooks, metadata (conjugate and negative bits)
    sizes = _is_sizes((offset,)) and _is_sizes(shape) and _is_sizes(stride)
    if not isinstance(storage, _Storage) or not sizes or len(shape) != len(stride):
        raise ValueError("a tensor's storage, shape or stride is malformed")
    if len(rest) > 2 and rest[2]:
        raise ValueError("a tensor with conjugate or negative bits is not supported")
    last = offset + sum((n - 1) * s for n, s in zip(shape, stride, strict=True))
    if math.prod(shape) and last >= storage.numel:
        raise ValueError(f"a tensor of shape {shape} reaches beyond its storage")
    return _Tensor(storage, offset, shape, stride)


def _rebuild_parameter(data, *_):
    return data


class _Unpickler(pickle._Unpickler):
    """The pure-Python unpickler, whose table of opcodes and whose calls can be cut down.

    Its memo is a table, so that a forged index cannot make it allocate gigabytes either.
    """

    dispatch = {  # noqa: RUF012 (as in the base class)
        getattr(pickle, name)[0]: pickle._Unpickler.dispatch[getattr(pickle, name)[0]]
        for name in _OPCODES
    }

    def find_class(self, module, name):
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if (module, name) == ("torch", "Size"):
            return tuple
        if module == "torch._utils" and name in ("_rebuild_tensor", "_rebuild_tensor_v2"):
            return _rebuild_tensor
        if (module, name) == ("torch._utils", "_rebuild_parameter"):
            return _rebuild_parameter
        if module == "torch" and name in _STORAGES:
            return _STORAGES[name]
        if module == "torch" and name in _DTYPES:
            return _DTYPES[name]
        if (module, name) in {("torch", "device"), ("torch.serialization", "_get_layout")}:
            return _Record
        if module in ("pathlib", "pathlib._local") and name in ("PosixPath", "WindowsPath"):
            return _Record
        if module == _DCP + "metadata" and name == "_MEM_FORMAT_ENCODING":
            return _Record
        if _DCP_CLASSES.get(name) == module:
            return _Record
        if (module, name) == ("builtins", "getattr"):  # enum members, by Python 3.11.0 to 3.11.3
            return _Record  # plain data: nothing is looked up
        raise SnapGenError(
            f"it asks to run {module}.{name}, which a tensor file does not need, and was refused; "
            "save the plain state_dict, best as safetensors"
        )

    def persistent_load(self, pid):
        kind, dtype, key, _, numel = pid
        if kind != "storage" or dtype not in ITEMSIZE or type(key) is not str:
            raise ValueError("a storage is malformed")
        if not _is_sizes((numel,)):
            raise ValueError("a storage has no valid size")
        return _Storage(dtype, key, numel)

    def load_build(self):
        # Keep the state as data: BUILD would otherwise call __setstate__ or set attributes.
        state, target = self.stack.pop(), self.stack[-1]
        if isinstance(target, _Record):
            target.state = state
        elif not isinstance(target, OrderedDict):  # a state_dict carries only versions there
            raise ValueError(f"state for {type(target).__name__}")

    dispatch[pickle.BUILD[0]] = load_build


def _unpickle(data: bytes, where):
    with _reading(where):
        try:
            return _Unpickler(io.BytesIO(data)).load()
        except SnapGenError as e:
            raise SnapGenError(f"{where}: {e}") from e
        except KeyError as e:
            raise ValueError(f"its pickle has the opcode or reference {e}") from e


class _TorchZip:
    """One zip archive written by ``torch.save``."""

    def __init__(self, file, where):
        self._where = where
        with _reading(where):
            self._zip = zipfile.ZipFile(file)
            names = self._zip.namelist()
            pickles = [n for n in names if n.endswith("/data.pkl") and n.count("/") == 1]
            if len(pickles) != 1 or len(set(names)) != len(names):
                raise ValueError("it is not what torch.save writes (one data.pkl)")
            self._prefix = pickles[0].removesuffix("data.pkl")
            if self._prefix + "constants.pkl" in names:
                raise ValueError("it is a TorchScript archive; save its state_dict instead")
            if any(i.compress_type != zipfile.ZIP_STORED for i in self._zip.infolist()):
                raise ValueError("it is compressed, which torch.save never does")
            order = self._prefix + "byteorder"
            if order in names and self._zip.read(order) != b"little":
                raise ValueError("it was written on a big-endian machine")
            data = self._zip.read(pickles[0])
        self.content = _unpickle(data, where)

    def check(self, tensor: _Tensor) -> None:
        """Raise ValueError unless the archive holds the tensor's storage in the right length."""
        record = self._zip.getinfo(f"{self._prefix}data/{tensor.storage.key}")
        if record.file_size != tensor.storage.numel * ITEMSIZE[tensor.storage.dtype]:
            raise ValueError(f"storage {tensor.storage.key} has a wrong length")

    def read(self, tensor: _Tensor) -> np.ndarray:
        """The tensor, contiguous; bf16 as its uint16 bits. The record's CRC is checked."""
        storage = tensor.storage
        with _reading(self._where):
            data = self._zip.read(f"{self._prefix}data/{storage.key}")
            kind = np.dtype(numpy_kind(storage.dtype))
            flat = np.frombuffer(data, kind)[tensor.offset :]
            strides = [s * kind.itemsize for s in tensor.stride]
            view = np.lib.stride_tricks.as_strided(flat, tensor.shape, strides, writeable=False)
            return np.ascontiguousarray(view).reshape(tensor.shape)


def _flatten(value, prefix="", depth=0):
    if isinstance(value, _Tensor):
        yield prefix, value
    elif depth > 8:
        raise ValueError("its tables are nested too deeply")
    elif isinstance(value, dict | list | tuple):
        pairs = value.items() if isinstance(value, dict) else enumerate(value)
        for key, child in pairs:
            name = key if isinstance(key, str | int) else "?"
            yield from _flatten(child, f"{prefix}.{name}" if prefix else str(name), depth + 1)


class TorchFile:
    """A ``.pt``/``.bin``/``.pth``; tables in tables become dotted keys (``state_dict.x.weight``).

    Tied tensors come once per key; what is no tensor (step counts, settings) is left out.
    """

    def __init__(self, path):
        self.files = [Path(path)]
        with _reading(path), open(path, "rb") as f:
            magic = f.read(4)
        if magic != b"PK\x03\x04":
            raise SnapGenError(
                f"{path} is not a zip written by torch.save (older than PyTorch 1.6, or no "
                "checkpoint): load it with PyTorch and save it again, best as safetensors"
            )
        self._zip = _TorchZip(path, path)
        self._tensors = {}
        with _reading(path):
            for key, tensor in _flatten(self._zip.content):
                if key in self._tensors:
                    raise ValueError(f"the key {key!r} appears twice")
                self._zip.check(tensor)
                self._tensors[key] = tensor
        self.infos = {k: Info(t.storage.dtype, t.shape) for k, t in self._tensors.items()}

    def read(self, key: str) -> mx.array:
        tensor = self._tensors[key]
        return as_array(self._zip.read(tensor), tensor.storage.dtype)


# --- torch.distributed.checkpoint folders (FSDP)


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
        with _reading(where):
            metadata = _unpickle(where.read_bytes(), where).state
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
        if not _is_sizes(shape) or self.infos[key].dtype not in ITEMSIZE:
            raise ValueError(f"{key!r} has a malformed shape or dtype")
        for i, a in enumerate(chunks):
            if not (_is_sizes(a.offset) and _is_sizes(a.shape) and _is_sizes(a[3:])):
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
        with _reading(self.files[0].parent):
            out = np.empty(info.shape, numpy_kind(info.dtype))
            for chunk in self._chunks[key]:
                with open(chunk.file, "rb") as f:
                    f.seek(chunk.start)
                    archive = _TorchZip(io.BytesIO(f.read(chunk.length)), chunk.file)
                tensor = archive.content
                if not isinstance(tensor, _Tensor) or tensor.shape != chunk.shape:
                    raise ValueError(f"a chunk of {key!r} is not the tensor it should be")
                if tensor.storage.dtype != info.dtype:
                    raise ValueError(f"a chunk of {key!r} has another dtype")
                archive.check(tensor)
                slices = (slice(o, o + n) for o, n in zip(chunk.offset, chunk.shape, strict=True))
                out[tuple(slices)] = archive.read(tensor)
            return as_array(out, info.dtype)


# --- one file, shards with an index, folders


class Sharded:
    """Several files joined by an index: every key where the index says, and no other key."""

    def __init__(self, index):
        index = Path(index)
        table = read_json(index).get("weight_map")
        if not isinstance(table, dict) or not table:
            raise SnapGenError(f"{index} has no weight_map")
        shards = {}
        for key, name in table.items():
            if not isinstance(name, str) or Path(name).name != name:
                raise SnapGenError(f"{index} sends {key!r} to {name!r}, which is no file name")
            shards.setdefault(name, set()).add(key)
        missing = [name for name in sorted(shards) if not (index.parent / name).is_file()]
        if missing:
            raise SnapGenError(
                f"{index} names {name_some(missing)}, which is not there; download it again"
            )
        self.infos, self._reader, self.files = {}, {}, [index]
        for name, keys in sorted(shards.items()):
            reader = open_file(index.parent / name)
            self.files += reader.files
            if keys - set(reader.infos):
                lost = name_some(keys - set(reader.infos))
                raise SnapGenError(f"{index}: {lost} should be in {name} and is not")
            if set(reader.infos) - keys:
                extra = name_some(set(reader.infos) - keys)
                raise SnapGenError(f"{index} does not name {extra} of {name}")
            self.infos.update(reader.infos)
            self._reader.update(dict.fromkeys(keys, reader))

    def read(self, key: str) -> mx.array:
        return self._reader[key].read(key)


def weight_names(names: list[str]) -> list[str]:
    """The weight files to use of a folder's file names: safetensors before torch, the usual name
    before any other; with their index. Empty when there is none."""
    for extension in EXTENSIONS:
        stems = {}
        for name in names:
            if name.endswith(f".{extension}"):
                stem = SHARD.sub("", name.removesuffix(f".{extension}"))
                stems.setdefault(stem, []).append(name)
        usual = [stem for stem in STEMS if stem in stems] or sorted(stems)
        if not usual:
            continue
        if usual[0] not in STEMS and len(usual) > 1:
            raise SnapGenError(f"several weight files: {name_some(usual)}; give the one to use")
        index = f"{usual[0]}.{extension}.index.json"
        return sorted(stems[usual[0]]) + [index] * (index in names)
    return []


def open_file(path):
    """A reader of one weight file, chosen by its name."""
    path = Path(path)
    if path.suffix == ".safetensors":
        return SafetensorsFile(path)
    if path.suffix[1:] in EXTENSIONS:
        return TorchFile(path)
    raise SnapGenError(f"{path}: unknown kind of file; expected .{', .'.join(EXTENSIONS)}")


def open_weights(path):
    """A reader of the weights in ``path``: a file, an index, or a folder that holds one model's.

    Raises SnapGenError when there is none, it is ambiguous, incomplete or damaged.
    """
    path = Path(path)
    if path.name.endswith(".index.json"):
        return Sharded(path)
    if path.is_file():
        return open_file(path)
    if not path.is_dir():
        raise SnapGenError(f"{path} does not exist")
    if (path / ".metadata").is_file():
        return DCPFolder(path)
    try:
        names = weight_names([p.name for p in path.iterdir()])
    except SnapGenError as e:
        raise SnapGenError(f"{path}: {e}") from e
    if not names:
        raise SnapGenError(f"{path} holds no weights (.{', .'.join(EXTENSIONS)})")
    if names[-1].endswith(".index.json"):
        return Sharded(path / names[-1])
    if len(names) > 1 or SHARD.search(Path(names[0]).stem):
        raise SnapGenError(f"{path} holds shards without their index (.index.json)")
    return open_file(path / names[0])
