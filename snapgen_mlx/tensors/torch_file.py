"""Files that ``torch.save`` writes, read without torch.

A pickle never runs anything: only the opcodes and the handful of names that tensors need are known
here, everything else is refused.
"""

import io
import math
import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from ..errors import SnapGenError
from ..files import check_impostor
from .readers import Info, reading
from .safetensors_io import ITEMSIZE, as_array, numpy_kind

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
_BUILTINS = ("builtins", "__builtin__")  # pickle protocol 2 uses the second name
_PLAIN = ("set", "frozenset", "complex", "slice", "range", "list", "dict", "int", "float", "str")
_NUMPY = ("numpy.core.multiarray", "numpy._core.multiarray")
_PATHS = ("pathlib", "pathlib._local")
_PATH_NAMES = ("PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath")
# Settings and counters that stand beside weights in training files. None of it is ever made: a
# record of what was said is kept in its place.
_SETTINGS = {
    ("argparse", "Namespace"),
    ("types", "SimpleNamespace"),
    ("numpy", "dtype"),
    ("numpy", "ndarray"),
    ("_codecs", "encode"),  # bytes, by protocol 2
    ("torch", "device"),
    ("torch.serialization", "_get_layout"),
    ("torch.torch_version", "TorchVersion"),
    (_DCP + "metadata", "_MEM_FORMAT_ENCODING"),
    *((module, name) for module in _BUILTINS for name in _PLAIN),
    *((module, name) for module in _NUMPY for name in ("scalar", "_reconstruct")),
    *((module, name) for module in _PATHS for name in _PATH_NAMES),
    ("builtins", "getattr"),  # enum members, by Python 3.11.0 to 3.11.3; nothing is looked up
}
_TABLES = {("collections", name) for name in ("OrderedDict", "defaultdict", "Counter")}
_OPCODES = """PROTO FRAME STOP MARK POP NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 BINFLOAT
    BINUNICODE SHORT_BINUNICODE BINUNICODE8 BINBYTES SHORT_BINBYTES EMPTY_TUPLE TUPLE TUPLE1 TUPLE2
    TUPLE3 EMPTY_LIST APPEND APPENDS EMPTY_DICT SETITEM SETITEMS GLOBAL STACK_GLOBAL REDUCE NEWOBJ
    BUILD BINPERSID BINPUT LONG_BINPUT BINGET LONG_BINGET MEMOIZE""".split()  # noqa: SIM905


class _Storage(NamedTuple):
    dtype: str
    key: str
    numel: int


class StoredTensor(NamedTuple):
    """A strided view of a storage; all in elements."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


class _Record:
    """Stands for an object that is never made; holds the state it would have been given."""

    state: Any

    def __new__(cls, *args):
        record = super().__new__(cls)
        record.state = {}
        return record

    def __init__(self, *args):
        pass


def _make_table(*_) -> OrderedDict:
    """Stands for a table with a factory, which is never called."""
    return OrderedDict()


def is_sizes(value) -> bool:
    return isinstance(value, tuple) and all(type(n) is int and n >= 0 for n in value)


def _rebuild_tensor(storage, offset, shape, stride, *rest) -> StoredTensor:
    # rest: requires_grad, backward_hooks, metadata (conjugate and negative bits)
    sizes = is_sizes((offset,)) and is_sizes(shape) and is_sizes(stride)
    if not isinstance(storage, _Storage) or not sizes or len(shape) != len(stride):
        raise ValueError("a tensor's storage, shape or stride is malformed")
    if len(rest) > 2 and rest[2]:
        raise ValueError("a tensor with conjugate or negative bits is not supported")
    last = offset + sum((n - 1) * s for n, s in zip(shape, stride, strict=True))
    if math.prod(shape) and last >= storage.numel:
        raise ValueError(f"a tensor of shape {shape} reaches beyond its storage")
    return StoredTensor(storage, offset, shape, stride)


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
        if (module, name) in _TABLES:
            return OrderedDict if name == "OrderedDict" else _make_table
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
        if (module, name) in _SETTINGS:
            return _Record
        if _DCP_CLASSES.get(name) == module:
            return _Record
        raise SnapGenError(
            f"it asks to run {module}.{name}, which a tensor file does not need, and was refused; "
            "save the plain state_dict, best as safetensors"
        )

    def persistent_load(self, pid):
        kind, dtype, key, _, numel = pid
        if kind != "storage" or dtype not in ITEMSIZE or type(key) is not str:
            raise ValueError("a storage is malformed")
        if not is_sizes((numel,)):
            raise ValueError("a storage has no valid size")
        return _Storage(dtype, key, numel)

    def load_build(self):
        # Keep the state as data: BUILD would otherwise call __setstate__ or set attributes.
        state, target = self.stack.pop(), self.stack[-1]  # type: ignore[attr-defined]
        if isinstance(target, _Record):
            target.state = state
        elif not isinstance(target, OrderedDict):  # a state_dict carries only versions there
            raise ValueError(f"state for {type(target).__name__}")

    dispatch[pickle.BUILD[0]] = load_build  # type: ignore[assignment]


def unpickle(data: bytes, where):
    with reading(where):
        try:
            return _Unpickler(io.BytesIO(data)).load()
        except SnapGenError as e:
            raise SnapGenError(f"{where}: {e}") from e
        except KeyError as e:
            raise ValueError(f"its pickle has the opcode or reference {e}") from e


class TorchZip:
    """One zip archive written by ``torch.save``."""

    def __init__(self, file, where):
        self._where = where
        with reading(where):
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
        self.content = unpickle(data, where)

    def check(self, tensor: StoredTensor) -> None:
        """Raise ValueError unless the archive holds the tensor's storage in the right length."""
        record = self._zip.getinfo(f"{self._prefix}data/{tensor.storage.key}")
        if record.file_size != tensor.storage.numel * ITEMSIZE[tensor.storage.dtype]:
            raise ValueError(f"storage {tensor.storage.key} has a wrong length")

    def read(self, tensor: StoredTensor) -> np.ndarray:
        """The tensor, contiguous; bf16 as its uint16 bits. The record's CRC is checked."""
        storage = tensor.storage
        with reading(self._where):
            data = self._zip.read(f"{self._prefix}data/{storage.key}")
            kind = np.dtype(numpy_kind(storage.dtype))
            flat = np.frombuffer(data, kind)[tensor.offset :]
            strides = [s * kind.itemsize for s in tensor.stride]
            view = np.lib.stride_tricks.as_strided(flat, tensor.shape, strides, writeable=False)
            return np.ascontiguousarray(view).reshape(tensor.shape)


def _flatten(value, prefix="", depth=0):
    if isinstance(value, StoredTensor):
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
        check_impostor(path)
        with reading(path), open(path, "rb") as f:
            magic = f.read(4)
        if magic != b"PK\x03\x04":
            raise SnapGenError(
                f"{path} is not a zip written by torch.save (older than PyTorch 1.6, or no "
                "checkpoint): load it with PyTorch and save it again, best as safetensors"
            )
        self._zip = TorchZip(path, path)
        self._tensors: dict[str, StoredTensor] = {}
        with reading(path):
            for key, tensor in _flatten(self._zip.content):
                if key in self._tensors:
                    raise ValueError(f"the key {key!r} appears twice")
                self._zip.check(tensor)
                self._tensors[key] = tensor
        self.infos = {k: Info(t.storage.dtype, t.shape) for k, t in self._tensors.items()}

    def read(self, key: str) -> mx.array:
        tensor = self._tensors[key]
        return as_array(self._zip.read(tensor), tensor.storage.dtype)
