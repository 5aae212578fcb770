"""What a conversion will do, known and checked before a byte is written."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx

from ..errors import SnapGenError, UsageError, name_keys
from ..files import check_impostor, read_json
from ..layout import COMPONENTS, TINY_DECODER, TOKENIZERS, tokenizer_files
from ..tensors.formats import open_weights
from ..tensors.readers import Info
from ..tensors.safetensors_io import FLOATS
from ..tensors.scaled import ScaledFloat8
from ..tensors.sharded import is_weights
from ..tensors.stream import AffineRow, Component, Row, Step, copy_rows
from .containers import find_model, result_shape
from .rules import taehv_decoder
from .rules.interface import QuantizableRules, Rules
from .rules.registry import kind_of


class Dropped(NamedTuple):
    """A tensor of the source that the output has no use for."""

    source: str
    shape: tuple[int, ...]
    action: str


@dataclass(kw_only=True)
class PlannedComponent(Component):
    """One model of the checkpoint: where it is, what it is, what becomes of it."""

    path: Path  # a folder or a file
    source_config: dict
    config_file: Path
    rules: Rules | None  # None = copied as it is
    tokenizer_files: list[Path] = field(default_factory=list)
    dropped: list[Dropped] = field(default_factory=list)
    wrappers: dict[str, int] = field(default_factory=dict)
    is_ema: bool = False  # its weights are averages over the training
    origin: str = ""  # as the user named it
    root: Path = Path()  # the folder of the checkpoint that it is a part of
    is_named: bool = False  # by itself, not found in a whole checkpoint

    @property
    def beside(self) -> list[str]:
        """Names of weight files in its folder that are not read."""
        if not self.path.is_dir():
            return []
        read = {file.name for file in self.reader.files}
        return sorted(
            f.name for f in self.path.iterdir() if is_weights(f.name) and f.name not in read
        )


def find_components(source, only=None, config=None) -> tuple[dict[str, PlannedComponent], dict]:
    """Find the models in a source.

    Args:
        source: a checkpoint's folder, one model's folder, or a weight file.
        only: names of the models to take.
        config: config.json of a file that has none beside it.

    Returns:
        {name: component}, and ``model_index.json``, or {} if there is none.
    """
    source = Path(source)
    if unknown := set(only or ()) - set(COMPONENTS):
        raise UsageError(f"--only {min(unknown)}: choose among {', '.join(COMPONENTS)}")
    parts = [name for name in COMPONENTS if (source / name).is_dir()]
    index = {}
    if source.is_dir() and parts:
        own = source / "config.json"
        if own.is_file() and read_json(own).get("format") == "snapgen-mlx":
            raise UsageError(
                f"{source} is an MLX model already; `export` converts it back to PyTorch"
            )
        if (source / "model_index.json").is_file():
            index = read_json(source / "model_index.json")
        promised = {n for n in COMPONENTS if isinstance(index.get(n), list) and any(index[n])}
        wanted = [n for n in COMPONENTS if n in {*parts, *promised} and (not only or n in only)]
        for name in wanted:
            needed = [name, TOKENIZERS[name]] if index.get(TOKENIZERS.get(name)) else [name]
            for folder in needed:
                if not (source / folder).is_dir():
                    here = ",".join(n for n in parts if n != name)
                    raise SnapGenError(
                        f"{source} has no folder {folder}, which its model_index.json names; "
                        f"download it again, or convert only the rest with --only {here}"
                    )
        found = {name: _component(source / name, name=name) for name in wanted}
    else:
        component = _component(source, config=config)
        found = {component.name: component}
        found = {k: v for k, v in found.items() if not only or k in only}
    if not found:
        raise SnapGenError(f"{source} contains none of {', '.join(only)}")
    return found, index


def find_part(path: Path, name: str) -> PlannedComponent:
    """One part of a model in a whole checkpoint's folder, in its own, or in a weight file.

    Args:
        path: of the folder or file.
        name: of the part, such as "vae".
    """
    component = _component(path / name if (path / name).is_dir() else path, name)
    usual = kind_of(component.source_config, component.config_file).folder
    if usual != name and component.path.name != name:
        raise SnapGenError(f"{path} holds a {usual}, not a {name}")
    return component


def _component(path: Path, name=None, config=None) -> PlannedComponent:
    folder = path if path.is_dir() else path.parent
    places = [folder / "config.json", folder / "open_clip_config.json"]
    place = Path(config) if config else next((p for p in places if p.is_file()), places[0])
    if name == TINY_DECODER and not place.is_file():
        place = path  # its published files come without
        source_config = taehv_decoder.described(open_weights(path).infos, path)
    elif not place.is_file():
        hint = "" if name else "; give it with --config"
        raise SnapGenError(f"{path} has no config.json, so its type is unknown{hint}")
    else:
        source_config = read_json(place)
    if "quantization" in source_config:
        raise SnapGenError(
            f"{folder} is quantized for MLX already: use it as it is (text encoders with "
            "--text-encoder)"
        )
    usual_name, rules, *_ = kind_of(source_config, place)
    name = name or usual_name
    # Text encoders may stand in either place.
    if name.removesuffix("_2") != usual_name.removesuffix("_2"):
        raise SnapGenError(f"{place} is of a {usual_name}, in the place of a {name}")
    tokenizer: list[Path] = []
    if name in TOKENIZERS and rules:
        beside = folder.parent / TOKENIZERS[name]
        tokenizer = tokenizer_files(beside if beside.is_dir() else folder)
        for file in tokenizer:
            check_impostor(file)
    return PlannedComponent(
        name=name,
        reader=open_weights(path),
        path=path,
        source_config=source_config,
        config_file=place,
        rules=rules,
        tokenizer_files=tokenizer,
    )


def plan(
    component: PlannedComponent,
    dtype: mx.Dtype | None = None,
    quantize: int | None = None,
    ema: bool = False,
) -> None:
    """Fill a component's rows from the headers of its files; no weights are read.

    Args:
        component: of ``find_components``.
        dtype: of the weights; None keeps theirs.
        quantize: bits of the large matrices; None for floats.
        ema: use the EMA weights.

    Raises:
        SnapGenError: a source key is neither used nor dropped for a reason, or a parameter of the
            MLX model is not filled with its shape.
    """
    rules, where = component.rules, component.path
    if rules is None:
        component.config = component.source_config
        component.rows = copy_rows(component.reader)
        return
    try:
        component.config = rules.config(component.source_config)
        shapes = rules.shapes(component.source_config)
    except Exception as e:  # whatever a foreign or damaged config makes of a model's constructor
        why = (str(e) or type(e).__name__).splitlines()[0]
        raise SnapGenError(f"{component.config_file} does not describe {where}: {why}") from e
    scaled = ScaledFloat8(component.reader)
    found = find_model(rules, scaled.infos, shapes, ema, where)
    infos, component.reader = component.reader.infos, scaled
    component.wrappers, component.is_ema = found.copy.wrappers, found.copy.is_ema
    for key, reason in (scaled.dropped | found.dropped).items():
        component.dropped.append(Dropped(key, infos[key].shape, f"dropped: {reason}"))
    for key, targets in found.copy.routes.items():
        info = infos[key]
        for target, step in targets.items():
            row = _row(key, info, target, step, shapes[target], where)
            if dtype is not None:
                row.dtype = dtype
            elif quantize and row.dtype == mx.float32:
                row.dtype = mx.bfloat16  # 32-bit scales would undo the saving
            component.rows.append(row)
    if quantize and isinstance(rules, QuantizableRules):
        _quantize(component, rules, quantize)
    missing = set(shapes) - {row.target for row in component.rows}
    if missing:
        raise SnapGenError(
            f"{where} lacks {name_keys(missing)}; is the file complete, and is its config right?"
        )


def _quantize(component: PlannedComponent, rules: QuantizableRules, quantize: int) -> None:
    """Pack the matrices whose rows are whole groups, and say so in the config."""
    group = rules.group_size(component.source_config)
    how: dict[str, Any] = {"group_size": group, "bits": quantize}
    for i, row in enumerate(component.rows):
        if len(row.shape) == 2 and row.target.endswith(".weight") and row.shape[1] % group == 0:
            layer = row.target.removesuffix(".weight")
            packed = AffineRow(**vars(row), bits=rules.bits(layer, quantize), group=group)
            if packed.bits != quantize:
                how[layer] = {"group_size": group, "bits": packed.bits}
            component.rows[i] = packed
    component.config["quantization"] = how


def _row(key: str, info: Info, target: str, step: Step, shape: tuple[int, ...], where: Path) -> Row:
    if info.dtype not in FLOATS:
        raise SnapGenError(
            f"{where}: {key!r} has the dtype {info.dtype}, which weights cannot have; save it as "
            f"{', '.join(FLOATS)}"
        )
    got = result_shape(info, step)
    if got is None:
        raise SnapGenError(
            f"{where}: {key!r} has the shape {info.shape}, which does not fit {target}"
        )
    if 0 in info.shape and 0 not in shape:
        raise SnapGenError(
            f"{where}: {key!r} is empty, as ZeRO-3 leaves weights that stand in other files; "
            "gather them with DeepSpeed's zero_to_fp32.py"
        )
    if got != tuple(shape):
        raise SnapGenError(
            f"{where}: {key!r} of shape {info.shape} gives {got}, but {target} has {tuple(shape)}"
        )
    return Row(key, tuple(shape), target, FLOATS[info.dtype], step)
