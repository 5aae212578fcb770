"""Weights in several files: how they are named, split and joined by an index."""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from ..errors import SnapGenError, name_keys
from ..files import read_json, write_json

EXTENSIONS = ("safetensors", "bin", "pt", "pth", "ckpt")
# What diffusers, transformers, open_clip and MLX call the weights, in order of preference.
STEMS = (
    *("diffusion_pytorch_model", "model", "pytorch_model", "open_clip_model"),
    "open_clip_pytorch_model",
)
SHARD = re.compile(r"-\d{5}-of-\d{5}(?=\.|$)")
IS_INDEX = re.compile(r".+\.index(\.[^.]+)?\.json")


class _Weights(NamedTuple):
    """One set of weights in a folder: ``model.bf16-00001-of-00002.safetensors`` is of the stem
    model and the variant bf16."""

    stem: str
    variant: str
    extension: str

    @classmethod
    def of(cls, name: str) -> "_Weights | None":
        stem, _, extension = name.rpartition(".")
        if extension not in EXTENSIONS or name.startswith("."):  # a Mac leaves ._NAME
            return None
        stem = SHARD.sub("", stem)  # before the variant in older files, behind it in newer ones
        usual = next((s for s in STEMS if stem.startswith(f"{s}.")), stem)
        return cls(usual, stem[len(usual) + 1 :], extension)

    def indices(self) -> list[str]:
        """Names that its index can have."""
        file, variant = f"{self.stem}.{self.extension}", self.variant
        if not variant:
            return [f"{file}.index.json"]
        return [
            f"{file}.index.{variant}.json",
            f"{self.stem}.{variant}.{self.extension}.index.json",
        ]


def is_weights(name: str) -> bool:
    """Whether a file's name is one of weights."""
    return _Weights.of(name) is not None


def weight_names(names: list[str]) -> list[str]:
    """The weight files to use of a folder's file names: safetensors before torch, a usual name
    before any other, no variant before one; with their index. Empty when there is none.

    Raises SnapGenError when several would do.
    """
    sets: dict[_Weights, list[str]] = {}
    for name in names:
        if found := _Weights.of(name):
            sets.setdefault(found, []).append(name)
    if not sets:
        return []

    def rank(weights: _Weights) -> tuple[int, ...]:
        usual = STEMS.index(weights.stem) if weights.stem in STEMS else len(STEMS)
        kind = EXTENSIONS.index(weights.extension)
        return kind, usual == len(STEMS), bool(weights.variant), usual

    best = min(map(rank, sets))
    chosen = sorted(weights for weights in sets if rank(weights) == best)
    if len(chosen) > 1:
        several = [sorted(sets[weights])[0] for weights in chosen]
        raise SnapGenError(f"several weight files: {name_keys(several)}; give the one to use")
    index = [name for name in chosen[0].indices() if name in names]
    return sorted(sets[chosen[0]]) + index[:1]


def read_index(index: Path) -> dict[str, set[str]]:
    """{file name: the keys it should hold} of an index whose files are all there."""
    table = read_json(index).get("weight_map")
    if not isinstance(table, dict) or not table:
        raise SnapGenError(f"{index} has no valid weight_map")
    shards: dict[str, set[str]] = {}
    for key, name in table.items():
        if not isinstance(name, str) or Path(name).name != name:
            raise SnapGenError(f"{index} sends {key!r} to {name!r}, which is not a file name")
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
    """Distribute tensors over files.

    Args:
        sizes: {key: bytes}.
        most: bytes in a file; only a single larger tensor exceeds it.
        stem: of the file names.

    Returns:
        {file name: its keys}.
    """
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
