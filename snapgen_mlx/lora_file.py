"""LoRA files as the common trainers write them: matrices, strengths, and what they are made for.

Keys are understood by their structure: a layer's name, then a pair of endings for the matrices A
and B. What surrounds the layer's name is found out by comparing all names with the model's.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx

from .device import scalar
from .errors import SnapGenError, name_keys
from .files import expand_user, read_json
from .tensors.formats import open_file
from .tensors.palette import expand
from .tensors.safetensors_io import check_dtypes, header_metadata, save_arrays
from .tensors.sharded import EXTENSIONS

MATRIX = re.compile(
    r"(?P<layer>.+)[._]lora(_linear_layer)?[._](?P<part>A|B|down|up)"
    r"(\.(?!weight$|bias$)(?P<adapter>[^.]+))?(\.weight)?"
)
ALPHA = re.compile(r"(?P<layer>.+?)(\.lora)?[._](lora_|network_)?alpha")
# Segments that wrap a module without being a part of its name.
WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "processor")
TEXT = re.compile(r"(^|[._])(te\d?|text_encoder(_\d)?|text_model|clip_[lg])([._]|$)")
# What other kinds of adapters are called, by a piece of their keys.
OTHERS = {
    "dora_scale": "a DoRA",
    "lora_magnitude_vector": "a DoRA",
    "lokr_": "a LoKr",
    "hada_": "a LoHa",
    "oft_": "an OFT",
    "lora_mid": "a LoCon with a core",
    "ia3_": "an IA3",
    ".diff": "a table of whole differences",
}
PEFT_CONFIG = "adapter_config.json"
ABOUT = "snapgen-mlx"  # key in the header for what this project writes


@dataclass
class Strength:
    """What a file says about alpha beside its tensors."""

    alpha: float | None = None
    patterns: dict[str, float] = field(default_factory=dict)  # by the end of a layer's name
    rank_stabilized: bool = False  # alpha / sqrt(r) instead of alpha / r

    def scale(self, name: str, rank: int, own: float | None) -> float:
        """The factor of a layer; ``own`` is its alpha tensor, which counts first."""
        alpha = self.alpha if own is None else own
        for pattern, value in self.patterns.items():
            if own is None and re.match(rf"(.*\.)?({pattern})$", name):
                alpha = value
                break
        if alpha is None:
            return 1.0
        return alpha / (math.sqrt(rank) if self.rank_stabilized else rank)


@dataclass
class LoRAFile:
    """A file's content, its layers still under their own names."""

    path: Path
    tensors: dict[str, mx.array]
    layers: dict[str, dict[str, str]]  # {name: {"a", "b" or "alpha": key}}
    other: list[str]  # keys that are no part of a LoRA
    strength: Strength
    about: dict[str, Any]  # what this project wrote into the header

    @classmethod
    def read(cls, path) -> "LoRAFile":
        """From a file, or a folder of PEFT.

        Raises:
            SnapGenError: the file is damaged, no LoRA, or one of a kind that cannot be used.
        """
        path = find_file(path)
        tensors = read_tensors(path)
        layers, other = group_keys(tensors)
        return cls(path, tensors, layers, other, _strength(path), read_about(path))

    def save(self, target: Path) -> None:
        """Write it as one safetensors file that says each layer's alpha itself."""
        tensors = dict(self.tensors)
        for name, keys in self.layers.items():
            if "a" not in keys:
                continue
            rank = tensors[keys["a"]].shape[0]
            own = scalar(tensors[keys["alpha"]]) if "alpha" in keys else None
            alpha = self.strength.scale(name, rank, own) * rank
            tensors[keys.get("alpha", f"{name}.alpha")] = mx.array(alpha)
        save_arrays(target, tensors, {ABOUT: json.dumps(self.about)} if self.about else None)

    def resolve(self, paths: Iterable[str]) -> dict[str, str]:
        """{name in the file: the model's path}; names that fit nothing are left out."""
        known = {path.replace(".", "_"): path for path in paths}
        found = {name: _suffix(name, known) for name in self.layers}
        prefixes = Counter(prefix for prefix, path in found.values() if path)
        if not prefixes:
            return {}
        usual = prefixes.most_common(1)[0][0]
        return {name: path for name, (prefix, path) in found.items() if path and prefix == usual}


def is_whole(file: Path) -> bool:
    """Whether a LoRA's file says all of it, and in the form that model folders hold."""
    return file.suffix == ".safetensors" and not file.with_name(PEFT_CONFIG).is_file()


def find_file(path) -> Path:
    """The LoRA's file: ``path``, or the one in the folder ``path``."""
    path = expand_user(path)
    if not path.is_dir():
        if path.suffix[1:] not in EXTENSIONS:
            raise SnapGenError(f"{path} is not a LoRA file (.{', .'.join(EXTENSIONS)})")
        return path
    files = [f for f in path.iterdir() if f.suffix[1:] in EXTENSIONS and not f.name.startswith(".")]
    chosen = [f for f in files if f.stem == "adapter_model"] or files
    if not chosen:
        raise SnapGenError(f"{path} holds no LoRA (.{', .'.join(EXTENSIONS)})")
    if len(chosen) > 1:
        raise SnapGenError(f"{path} holds {name_keys(f.name for f in chosen)}; name the LoRA's")
    return chosen[0]


def read_tensors(path: Path) -> dict[str, mx.array]:
    """All tensors of a LoRA file as floats; palettes come as the floats they stand for.

    Raises:
        SnapGenError: the file is damaged, or holds integers in the place of weights.
    """
    reader = open_file(path)
    strengths = {key for key, info in reader.infos.items() if ALPHA.fullmatch(key)}
    check_dtypes({k: info for k, info in reader.infos.items() if k not in strengths}, path)
    return expand({key: reader.read(key) for key in reader.infos}, path)


def read_about(path: Path) -> dict[str, Any]:
    """What this project wrote into a LoRA's header; {} for a file of another."""
    if path.suffix != ".safetensors":
        return {}
    text = header_metadata(path).get(ABOUT, "{}")
    return _table(text, f"{path}: its header's {ABOUT}")


def group_keys(keys: Iterable[str]) -> tuple[dict[str, dict[str, str]], list[str]]:
    """({layer: {part: key}}, keys that are no part of a LoRA)."""
    layers: dict[str, dict[str, str]] = {}
    other, adapters = [], set()
    for key in keys:
        if match := MATRIX.fullmatch(key):
            part = "a" if match["part"] in ("A", "down") else "b"
            adapters.add(match["adapter"])
        elif match := ALPHA.fullmatch(key):
            part = "alpha"
        else:
            other.append(key)
            continue
        if part in layers.setdefault(match["layer"], {}):
            other.append(key)  # of a second adapter
        else:
            layers[match["layer"]][part] = key
    return layers, other


def kind_of_keys(keys: Iterable[str]) -> str | None:
    """What keys that fit nothing are of: another kind of adapter, a text encoder; or None."""
    for key in sorted(keys):
        for mark, what in OTHERS.items():
            if mark in key:
                return f"is {what}, of which only plain LoRA is supported: {key!r}"
        if TEXT.search(key):
            return f"changes a text encoder too, which is not supported: {key!r}"
    return None


def _suffix(name: str, known: dict[str, str]) -> tuple[str, str | None]:
    """(prefix, path): the longest path of the model that ends the name; dots may be underscores."""
    flat = ".".join(part for part in name.split(".") if part not in WRAPPERS).replace(".", "_")
    if TEXT.search(name):
        return "", None
    starts = [0, *(i + 1 for i, c in enumerate(flat) if c == "_")]
    at = next((i for i in starts if flat[i:] in known), None)
    return ("", None) if at is None else (flat[:at], known[flat[at:]])


# --- strengths


def _strength(path: Path) -> Strength:
    """Of PEFT's config beside the file, or of the file's header."""
    beside = path.with_name(PEFT_CONFIG)
    if beside.is_file():
        config = read_json(beside)
        kind = config.get("peft_type", "LORA")
        if kind != "LORA" or config.get("use_dora"):
            what = "DoRA" if kind == "LORA" else kind
            raise SnapGenError(f"{beside} is of a {what}; only plain LoRA is supported")
        return _read_strength(config.items(), beside)
    if path.suffix != ".safetensors":
        return Strength()
    header = header_metadata(path)
    pairs: list[tuple[str, Any]] = list(header.items())
    if text := header.get("lora_adapter_metadata"):
        pairs += _table(text, f"{path}: its header's lora_adapter_metadata").items()
    return _read_strength([(k, v) for k, v in pairs if not TEXT.search(k)], path)


def _read_strength(pairs: Iterable[tuple[str, Any]], where: Path) -> Strength:
    """Entries by the last part of their names: alpha, lora_alpha, ss_network_alpha, ..."""
    alphas, out = set(), Strength()
    for key, value in pairs:
        name = key.rpartition(".")[2].removeprefix("ss_").removeprefix("network_")
        if name in ("alpha", "lora_alpha") and value not in (None, "None", ""):
            alphas.add(_number(value, key, where))
        elif name == "use_rslora":
            out.rank_stabilized = str(value).lower() in ("true", "1")
        elif name == "alpha_pattern" and value:
            table = _table(value, f"{where}: {key}")
            out.patterns = {k: _number(v, key, where) for k, v in table.items()}
    for pattern in out.patterns:
        try:
            re.compile(pattern)
        except re.error as e:
            raise SnapGenError(f"{where}: alpha_pattern {pattern!r} is not a pattern") from e
    if len(alphas) > 1:
        raise SnapGenError(f"{where} gives several alphas: {', '.join(map(str, sorted(alphas)))}")
    out.alpha = next(iter(alphas), None)
    return out


def _number(value: Any, key: str, where: Path) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise SnapGenError(f"{where}: {key} is {value!r}, which is not a number")
    return number


def _table(value: Any, where: str) -> dict:
    try:
        table = json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError):
        table = None
    if not isinstance(table, dict):
        raise SnapGenError(f"{where} is not a JSON object")
    return table
