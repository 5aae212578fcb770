"""Reading and writing model folders, strictly: every key, shape and length is checked."""

import json
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from .config import DiTConfig
from .errors import SnapGenError
from .files import atomic_write
from .quantization.palette import expand
from .safetensors_io import TensorInfo, read_header, write_tensors

FORMAT = {"format": "snapgen-mlx", "version": 1}
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"


def compute_dtype() -> mx.Dtype:
    """float32 on a CPU, where half-precision matmuls crawl; bfloat16 on Metal."""
    return mx.bfloat16 if mx.default_device() == mx.gpu else mx.float32


def read_json(path: Path) -> dict:
    try:
        d = json.loads(path.read_text(encoding="utf-8"))
    except OSError as e:
        raise SnapGenError(f"cannot read {path}: {e.strerror}; is this a model folder?") from e
    except (ValueError, RecursionError) as e:
        raise SnapGenError(f"{path} is not valid JSON; download or convert it again") from e
    if not isinstance(d, dict):
        raise SnapGenError(f"{path} does not hold a JSON object")
    return d


def write_json(path, d: dict) -> None:
    with atomic_write(path) as tmp:
        tmp.write_text(json.dumps(d, indent=2) + "\n", encoding="utf-8")


def load_config(folder) -> dict:
    """The folder's ``config.json``. Raises SnapGenError when missing or not JSON."""
    return read_json(Path(folder) / "config.json")


def weight_files(folder) -> dict[str, Path]:
    """{key: file} of a folder's weights after checking every file, the index and its shards."""
    folder = Path(folder)
    if not (folder / INDEX).is_file():
        return dict.fromkeys(read_header(folder / SINGLE), folder / SINGLE)
    names = read_json(folder / INDEX).get("weight_map")
    if not isinstance(names, dict) or not all(
        isinstance(n, str) and Path(n).name == n for n in names.values()
    ):
        raise SnapGenError(f"{folder / INDEX} has no valid weight_map")
    for name in sorted(set(names.values())):
        if not (folder / name).is_file():
            raise SnapGenError(f"{folder / name} is missing, though the index names it")
        held = set(read_header(folder / name))
        promised = {key for key, n in names.items() if n == name}
        if odd := held ^ promised:
            raise SnapGenError(f"{folder / name} and {INDEX} disagree about {min(odd)!r}")
    return {key: folder / name for key, name in names.items()}


def load_infos(folder) -> dict[str, TensorInfo]:
    """Dtypes and shapes of a component folder's weights, from the headers alone."""
    files = weight_files(folder)
    headers = {file: read_header(file) for file in set(files.values())}
    return {key: headers[file][key] for key, file in files.items()}


def load_tensors(folder) -> dict[str, mx.array]:
    """All weights of a component folder, lazily read; palettes come as the floats they stand for.

    Raises SnapGenError for damaged files.
    """
    files = weight_files(folder)
    loaded = {file: mx.load(str(file)) for file in set(files.values())}
    return expand({key: loaded[file][key] for key, file in files.items()}, folder)


def save_tensors(folder, tensors: dict[str, mx.array], max_shard_bytes: int = 4 << 30) -> None:
    """Write weights as one file, or as shards with an index, each atomically."""
    folder = Path(folder)
    shards, size = [{}], 0
    for key, a in tensors.items():
        if shards[-1] and size + a.nbytes > max_shard_bytes:
            shards.append({})
            size = 0
        shards[-1][key] = a
        size += a.nbytes
    names = [SINGLE]
    if len(shards) > 1:
        names = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    for name, shard in zip(names, shards, strict=True):
        with atomic_write(folder / name) as tmp:
            infos = {key: (a.dtype, tuple(a.shape)) for key, a in shard.items()}
            write_tensors(tmp, infos, shard.items())
    (folder / INDEX).unlink(missing_ok=True)  # of weights that stood here before
    if len(shards) > 1:
        weight_map = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
        total = sum(a.nbytes for a in tensors.values())
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def assign(module: nn.Module, tensors: dict[str, mx.array], where) -> nn.Module:
    """Give ``module`` exactly these weights; any missing, extra or misshapen key is an error."""
    expected = {k: a.shape for k, a in tree_flatten(module.parameters())}
    for kind, keys in (
        ("lacks", expected.keys() - tensors),
        ("has an extra", tensors - expected.keys()),
    ):
        if keys:
            more = f" and {len(keys) - 1} more" if len(keys) > 1 else ""
            raise SnapGenError(f"{where} {kind} key {min(keys)!r}{more}; is it of another model?")
    for key, shape in expected.items():
        if tuple(tensors[key].shape) != tuple(shape):
            raise SnapGenError(f"{where}: {key!r} has shape {tensors[key].shape}, not {shape}")
    module.load_weights(list(tensors.items()), strict=True)
    return module


def dequantize(tensors: dict[str, mx.array], shapes: dict[str, tuple]) -> dict[str, mx.array]:
    """Replace packed affine weights by floats; ``shapes`` gives each weight's float shape.

    Bits and group size follow from the shapes: a row of n weights packs into n·bits/32 words and
    has n/group scales.
    """
    out = {k: a for k, a in tensors.items() if not k.endswith((".scales", ".biases"))}
    for key, scales in tensors.items():
        if not key.endswith(".scales"):
            continue
        layer = key.removesuffix(".scales")
        try:
            packed, n = tensors[f"{layer}.weight"], shapes[f"{layer}.weight"][-1]
            out[f"{layer}.weight"] = mx.dequantize(
                packed,
                scales,
                tensors[f"{layer}.biases"],
                group_size=n // scales.shape[-1],
                bits=packed.shape[-1] * 32 // n,
            )
        except (KeyError, ValueError, ZeroDivisionError) as e:
            raise SnapGenError(f"{layer} is not an affine-quantized layer of this model") from e
    return out


def quantize_like(module: nn.Module, tensors: dict[str, mx.array]) -> None:
    """Make those layers quantized whose weights are packed in ``tensors`` (affine)."""

    def how(path: str, layer: nn.Module):
        if f"{path}.scales" not in tensors:
            return False
        n, packed = layer.weight.shape[-1], tensors[f"{path}.weight"].shape[-1]
        return {"group_size": n // tensors[f"{path}.scales"].shape[-1], "bits": packed * 32 // n}

    nn.quantize(module, class_predicate=how)


def load_supernet(folder) -> tuple[DiTConfig, dict[str, mx.array]]:
    """Configuration and flat parameters of a transformer folder, unsliced and as stored."""
    folder = Path(folder)
    if (folder / "transformer").is_dir():
        folder = folder / "transformer"
    return DiTConfig.from_dict(load_config(folder)), load_tensors(folder)


def load_dit(folder, variant: str | None = None, dtype: mx.Dtype | None = None, loras=()):
    """Load one width of a transformer.

    Args: folder, a model folder or its ``transformer/``; variant, a name of ``config.variants``
        (the widest when None); dtype of the weights (default: see ``compute_dtype``); loras, pairs
        (LoRA file, scale).
    Returns a ``DiT`` with its ``config``; nothing but headers is read before it is evaluated.
    Raises UsageError for an unknown variant, SnapGenError for damaged or foreign files.
    """
    from .lora import add_lora, load_lora
    from .models.dit import DiT
    from .models.elastic import slice_flat

    config, tensors = load_supernet(folder)
    index = config.variant_index(variant or config.variants[-1])
    dit = DiT(config.variant(index) if len(config.widths) > 1 else config)
    tensors = slice_flat(tensors, config, index)
    dtype = dtype or compute_dtype()
    if mx.default_device() == mx.gpu:
        quantize_like(dit, tensors)
    else:  # quantized matmuls crawl on a CPU
        tensors = dequantize(tensors, {k: a.shape for k, a in tree_flatten(dit.parameters())})
    # Packed weights are integers and stay as they are.
    tensors = {k: a if a.dtype == mx.uint32 else a.astype(dtype) for k, a in tensors.items()}
    assign(dit, tensors, folder)
    for path, scale in loras:
        add_lora(dit, load_lora(path, config, index, scale))
    return dit
