"""Weights in several files: how they are named, split and joined by an index."""

import re
from collections.abc import Iterable
from pathlib import Path

from ..errors import SnapGenError, name_keys
from ..files import read_json, write_json

EXTENSIONS = ("safetensors", "bin", "pt", "pth")
# What diffusers, transformers, open_clip and MLX call the weights, in order of preference.
STEMS = (
    *("diffusion_pytorch_model", "model", "pytorch_model", "open_clip_model"),
    "open_clip_pytorch_model",
)
SHARD = re.compile(r"-\d{5}-of-\d{5}$")


def weight_names(names: list[str]) -> list[str]:
    """The weight files to use of a folder's file names: safetensors before torch, the usual name
    before any other; with their index. Empty when there is none."""
    for extension in EXTENSIONS:
        stems: dict[str, list[str]] = {}
        for name in names:
            if name.endswith(f".{extension}"):
                stem = SHARD.sub("", name.removesuffix(f".{extension}"))
                stems.setdefault(stem, []).append(name)
        usual = [stem for stem in STEMS if stem in stems] or sorted(stems)
        if not usual:
            continue
        if usual[0] not in STEMS and len(usual) > 1:
            raise SnapGenError(f"several weight files: {name_keys(usual)}; give the one to use")
        index = f"{usual[0]}.{extension}.index.json"
        return sorted(stems[usual[0]]) + [index] * (index in names)
    return []


def read_index(index: Path) -> dict[str, set[str]]:
    """{file name: the keys it should hold} of an index whose files are all there."""
    table = read_json(index).get("weight_map")
    if not isinstance(table, dict) or not table:
        raise SnapGenError(f"{index} has no valid weight_map")
    shards: dict[str, set[str]] = {}
    for key, name in table.items():
        if not isinstance(name, str) or Path(name).name != name:
            raise SnapGenError(f"{index} sends {key!r} to {name!r}, which is no file name")
        shards.setdefault(name, set()).add(key)
    missing = [name for name in sorted(shards) if not (index.parent / name).is_file()]
    if missing:
        raise SnapGenError(
            f"{index} names {name_keys(missing)}, which is not there; download it again"
        )
    return dict(sorted(shards.items()))


def check_shard(index: Path, name: str, promised: set[str], held: Iterable[str]) -> None:
    """Raise SnapGenError unless the file ``name`` holds what its index promised, and no more."""
    held = set(held)
    if promised - held:
        raise SnapGenError(f"{index}: {name_keys(promised - held)} should be in {name} and is not")
    if held - promised:
        raise SnapGenError(f"{index} does not name {name_keys(held - promised)} of {name}")


def split_shards(sizes: dict[str, int], most: int, stem: str) -> dict[str, list[str]]:
    """{file name: its keys} of tensors with these bytes, none above ``most`` but for a single
    tensor that is larger."""
    parts: list[list[str]] = [[]]
    size = 0
    for key, nbytes in sizes.items():
        if parts[-1] and size + nbytes > most:
            parts.append([])
            size = 0
        parts[-1].append(key)
        size += nbytes
    total = len(parts)
    if total == 1:
        return {f"{stem}.safetensors": parts[0]}
    return {f"{stem}-{i:05}-of-{total:05}.safetensors": part for i, part in enumerate(parts, 1)}


def write_index(folder: Path, stem: str, weight_map: dict[str, str], total: int) -> None:
    """Write the index of shards: {key: file name}, and the bytes of all tensors together."""
    content = {"metadata": {"total_size": total}, "weight_map": weight_map}
    write_json(folder / f"{stem}.safetensors.index.json", content)
