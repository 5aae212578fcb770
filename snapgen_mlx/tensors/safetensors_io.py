"""safetensors files: a header that is believed only after every claim in it has been checked.

``mx.load`` trusts the header; a truncated or lying file then gives garbage or a crash. Read here
first. The writer streams: the header is known beforehand, tensors are written one by one. The
safetensors library does neither: its reader maps files into memory, where one that is cut short
later ends the process, tells no positions, and its writer wants all tensors at once.
"""

import hashlib
import json
import math
import os
from collections.abc import Iterable
from typing import NamedTuple, cast

import mlx.core as mx
import numpy as np

from ..errors import SnapGenError
from ..files import atomic_write, check_impostor

ITEMSIZE = {
    **{"BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1},
    **{"U16": 2, "I16": 2, "F16": 2, "BF16": 2, "U32": 4, "I32": 4, "F32": 4},
    **{"U64": 8, "I64": 8, "F64": 8, "C64": 8},
}
DTYPES = {
    **{"F32": mx.float32, "F16": mx.float16, "BF16": mx.bfloat16, "BOOL": mx.bool_},
    **{"U8": mx.uint8, "U16": mx.uint16, "U32": mx.uint32, "U64": mx.uint64},
    **{"I8": mx.int8, "I16": mx.int16, "I32": mx.int32, "I64": mx.int64},
}
# What a weight may be stored as, and becomes in memory: MLX has no float64 on Metal and no fp8.
FLOATS = {"F32": mx.float32, "BF16": mx.bfloat16, "F16": mx.float16, "F64": mx.float32}
FLOATS |= dict.fromkeys(("F8_E4M3", "F8_E5M2"), mx.bfloat16)
READ_AS = DTYPES | FLOATS  # the dtype of a stored tensor once it is read
NAMES = {dtype: name for name, dtype in DTYPES.items()}
MAX_HEADER = 100_000_000  # bytes; the limit of the safetensors library itself


class TensorInfo(NamedTuple):
    """One tensor of a file; ``start`` and ``stop`` are byte positions in the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def nbytes(self) -> int:
        return self.stop - self.start


def _no_duplicates(pairs: list) -> dict:
    keys = dict(pairs)
    if len(keys) != len(pairs):
        raise ValueError("a key appears twice")
    return keys


def _is_size(n) -> bool:
    return type(n) is int and n >= 0


def read_header(path) -> dict[str, TensorInfo]:
    """Return {key: TensorInfo} after checking the whole file against its header.

    Checked: header length, JSON, dtypes, shape against byte count, and that the tensors tile the
    rest of the file without gap or overlap, so that a truncated or padded file is found. Raises
    SnapGenError that names the file and what is wrong with it.
    """
    return _read_header(path)[0]


def header_metadata(path) -> dict[str, str]:
    """The strings that a file's header holds beside its tensors. Raises as ``read_header``."""
    return _read_header(path)[1]


def _read_header(path) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    bad = f"{path} is not a whole safetensors file"
    check_impostor(path)
    try:
        with open(path, "rb") as f:
            size = os.fstat(f.fileno()).st_size
            length = int.from_bytes(f.read(8), "little")
            if size < 8 or length > min(size - 8, MAX_HEADER):
                claim = f"the header claims {length} bytes, the file has {size}"
                raise SnapGenError(f"{bad}: {claim}; download or save it again")
            text = f.read(length)
    except OSError as e:
        raise SnapGenError(f"cannot read {path}: {e.strerror}") from e
    try:
        header = json.loads(text.decode(), object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as e:
        raise SnapGenError(f"{bad}: its header is not valid JSON ({e})".replace("\n", " ")) from e
    if not isinstance(header, dict):
        raise SnapGenError(f"{bad}: its header is not a JSON object")
    metadata = header.pop("__metadata__", None) or {}  # MLX writes null
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise SnapGenError(f"{bad}: its __metadata__ is not a table of strings")

    data = 8 + length
    infos = {}
    for key, entry in header.items():
        if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
            raise SnapGenError(f"{bad}: the entry of {key!r} is malformed")
        dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not isinstance(dtype, str) or dtype not in ITEMSIZE:
            raise SnapGenError(f"{bad}: {key!r} has the unknown dtype {dtype!r}")
        if not isinstance(shape, list) or not all(map(_is_size, shape)):
            raise SnapGenError(f"{bad}: {key!r} has the shape {shape!r}")
        if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_size, offsets)):
            raise SnapGenError(f"{bad}: {key!r} has the offsets {offsets!r}")
        start, stop = offsets
        if stop - start != math.prod(shape) * ITEMSIZE[dtype]:
            held = f"{stop - start} bytes cannot hold {dtype} of shape {tuple(shape)}"
            raise SnapGenError(f"{bad}: {key!r}: {held}")
        infos[key] = TensorInfo(dtype, tuple(shape), data + start, data + stop)

    position = data
    for key, info in sorted(infos.items(), key=lambda item: item[1][2:]):
        if info.start != position:
            raise SnapGenError(f"{bad}: {key!r} leaves a gap or overlaps its neighbour")
        position = info.stop
    if position != size:
        ends = f"its tensors end at byte {position}, the file at byte {size}"
        raise SnapGenError(f"{bad}: {ends}; download or save it again")
    return infos, metadata


def load_arrays(path) -> dict[str, mx.array]:
    """All tensors of a safetensors file after ``read_header``; read when they are evaluated, where
    MLX knows the dtypes of all of them.

    ``mx.load`` gives fp8 as its codes and refuses a file with float64 in it.
    """
    header = read_header(path)
    if all(info.dtype in DTYPES for info in header.values()):
        return cast(dict[str, mx.array], mx.load(str(path)))
    return {key: read_array(path, key, info) for key, info in header.items()}


def read_array(path, key: str, info: TensorInfo) -> mx.array:
    """Read one tensor. fp8 becomes bfloat16, and float64 becomes float32.

    Args:
        path: of the file.
        key: of the tensor.
        info: its entry in the header.

    Raises:
        SnapGenError: MLX has no such dtype, or the file ends too early.
    """
    if info.dtype not in READ_AS:
        raise SnapGenError(
            f"{path}: {key!r} has the dtype {info.dtype}, which cannot be read here; save it as "
            "BF16, F16 or F32"
        )
    try:
        with open(path, "rb") as f:
            f.seek(info.start)
            kind = numpy_kind(info.dtype)
            data = np.fromfile(f, dtype=kind, count=math.prod(info.shape))
    except OSError as e:
        raise SnapGenError(f"cannot read {path}: {e.strerror}") from e
    if data.nbytes != info.nbytes:
        raise SnapGenError(f"{path} ended inside {key!r}: it was cut while being read")
    return as_array(data.reshape(info.shape), info.dtype)


def numpy_kind(dtype: str) -> str:
    """numpy's code for a safetensors dtype; those unknown to numpy, bf16 and fp8, as their bits."""
    special = {"BF16": "<u2", "BOOL": "?"} | dict.fromkeys(("F8_E4M3", "F8_E5M2"), "u1")
    return special.get(dtype) or f"<{dtype[0].lower()}{ITEMSIZE[dtype]}"


def as_array(data: np.ndarray, dtype: str) -> mx.array:
    """The MLX array of what was read as ``numpy_kind(dtype)``, of ``FLOATS[dtype]`` for floats."""
    array = mx.array(data)
    match dtype:
        case "BF16":
            return array.view(mx.bfloat16)
        case "F8_E4M3":
            magnitude = mx.from_fp8(array, mx.bfloat16)
            return mx.where((array & 0x7F) == 0x7F, mx.array(mx.nan, mx.bfloat16), magnitude)
        case "F8_E5M2":  # the upper half of a float16
            return (array.astype(mx.uint16) << 8).view(mx.float16).astype(mx.bfloat16)
    return array


def check_dtypes(infos: dict, where) -> None:
    """Raise SnapGenError unless all tensors are floats, or integers that a scale gives a meaning.

    Args:
        infos: dtypes and shapes by key.
    """
    for key, info in infos.items():
        if info.dtype not in FLOATS and not _is_packed(key, info.dtype, infos):
            raise SnapGenError(
                f"{where}: {key!r} has the dtype {info.dtype}, which weights cannot have; save it "
                "as BF16, F16 or F32"
            )


def _is_packed(key: str, dtype: str, infos: dict) -> bool:
    """Whether a tensor is part of an affine or MX packing, of a palette or of a word table."""
    layer, _, name = key.rpartition(".")
    match dtype:
        case "U32":
            return f"{layer}.scales" in infos or f"{key}.palette" in infos
        case "U8":  # MLX's mxfp4 and nvfp4
            weight = infos.get(f"{layer}.weight")
            return name == "scales" and weight is not None and weight.dtype == "U32"
        case "I8":
            return key == "table" and "scale" in infos
    return False


def write_tensors(
    path,
    infos: dict[str, tuple[mx.Dtype, tuple]],
    tensors: Iterable,
    form: str = "mlx",
    metadata: dict[str, str] | None = None,
    digest=None,
) -> None:
    """Write a safetensors file, one array in memory at a time.

    Args:
        path: of the file.
        infos: {key: (dtype, shape)} in the order of the file.
        tensors: pairs (key, array) in the same order.
        form: the metadata's "format", which tells libraries whose layouts these are.
        metadata: more strings for the header.
        digest: a hash of ``hashlib`` that is given all that is written.

    Raises:
        SnapGenError: an array does not have the dtype and shape that ``infos`` says.
        OSError: the disk is full.
    """
    header: dict[str, dict] = {"__metadata__": {**(metadata or {}), "format": form}}
    position = 0
    for key, (dtype, shape) in infos.items():
        stop = position + math.prod(shape) * dtype.size
        entry = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [position, stop]}
        header[key], position = entry, stop
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as f:

        def write(data) -> None:
            f.write(data)
            if digest is not None:
                digest.update(data)

        write(len(text).to_bytes(8, "little") + text)
        for (key, array), (expected, promise) in zip(tensors, infos.items(), strict=True):
            if key != expected or (array.dtype, tuple(array.shape)) != (promise[0], promise[1]):
                raise SnapGenError(f"{key}: {array.dtype} {array.shape} instead of {promise}")
            if array.dtype == mx.bfloat16:
                array = array.view(mx.uint16)
            write(np.ascontiguousarray(array).data.cast("B") if array.size else b"")


def save_arrays(path, arrays: dict[str, mx.array], metadata: dict[str, str] | None = None) -> str:
    """Write ``arrays`` to a safetensors file, whole or not at all, one in memory at a time.

    Returns:
        The SHA-256 of the file, which need not be read again for it.
    """
    digest = hashlib.sha256()
    infos = {key: (a.dtype, tuple(a.shape)) for key, a in arrays.items()}
    with atomic_write(path) as tmp:
        write_tensors(tmp, infos, arrays.items(), metadata=metadata, digest=digest)
    return digest.hexdigest()
