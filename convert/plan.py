"""What a conversion will do, known and checked before a byte is written."""

import re
from dataclasses import dataclass, field
from math import prod
from pathlib import Path

import mlx.core as mx

from ..errors import SnapGenError, UsageError
from ..safetensors_io import DTYPES
from ..weights import read_json
from . import autoencoder, clip_text, gemma_text, transformer, vae
from .formats import name_some, open_weights
from .hub import COMPONENTS
from .steps import COPY, Drop, Step

# What a weight may be stored as, and becomes.
FLOATS = {"F32": mx.float32, "BF16": mx.bfloat16, "F16": mx.float16, "F64": mx.float32}
# Wrappers that training loops leave around a model's keys, outside and inside.
PREFIXES = ("module.", "model.", "transformer.", "state_dict.", "model_state_dict.")
EMA_PREFIXES = ("ema.", "ema_model.", "model_ema.", "ema_state_dict.")
INSIDE = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
NO_WEIGHTS = ("optimizer.", "optimizer_states.", "lr_scheduler.", "lr_schedulers.")
COUNTERS = ("n_averaged", "num_updates", "decay", "step", "initted")

TOKENIZER_FILE = re.compile(
    r"(.*token.*|vocab|merges|chat_template|spiece)\.(json|txt|model|jinja)"
)
VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json")
TOKENIZERS = {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2"}


@dataclass
class Row:
    """One tensor of the output (or, dropped, of the source)."""

    source: str
    shape: tuple[int, ...]
    action: str
    target: str | None = None
    dtype: mx.Dtype | None = None
    bits: int | None = None
    step: Step | None = None
    group: int = 64

    def entries(self) -> dict[str, tuple[mx.Dtype, tuple[int, ...]]]:
        """{key: (dtype, shape)} of what is stored: three arrays for a quantized layer."""
        if self.bits is None:
            return {self.target: (self.dtype, self.shape)}
        layer, (rows, n) = self.target.removesuffix(".weight"), self.shape
        return {
            self.target: (mx.uint32, (rows, n * self.bits // 32)),
            f"{layer}.scales": (self.dtype, (rows, n // self.group)),
            f"{layer}.biases": (self.dtype, (rows, n // self.group)),
        }

    @property
    def nbytes(self) -> int:
        return sum(prod(shape) * dtype.size for dtype, shape in self.entries().values())


@dataclass
class Component:
    """One model of the checkpoint: where it is, what it is, what becomes of it."""

    name: str  # its folder in the output
    path: Path  # a folder or a file
    source_config: dict
    rules: object  # one of the rule modules, None = copied as it is
    config_file: Path
    tokenizer_files: list[Path] = field(default_factory=list)
    stem: str = "model"  # of the output's file names
    config: dict = field(default_factory=dict)
    reader: object = None
    rows: list[Row] = field(default_factory=list)
    dropped: list[Row] = field(default_factory=list)
    wrappers: dict[str, int] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        return sum(row.nbytes for row in self.rows)

    @property
    def parameters(self) -> int:
        return sum(prod(row.shape) for row in self.rows)


def kind(config: dict, where) -> tuple[str, object]:
    """The output folder and the rules of a model, by its config."""
    name = config.get("_class_name") or config.get("model_type")
    if name == "SnapGenPPTransformer2DModel":
        return "transformer", transformer
    if name == "AutoencoderKLQwenImage":
        return "vae", vae
    if name in ("SnapGenAutoencoder", "StickerAutoencoder"):
        return "vae", autoencoder
    open_clip = config.get("model_cfg", config)
    if name in ("clip", "clip_text_model") or (
        isinstance(open_clip, dict) and "text_cfg" in open_clip
    ):
        return "text_encoder", clip_text
    if name in ("gemma3", "gemma3_text"):
        return "text_encoder_2", gemma_text
    if name == "static_text":
        return "text_encoder", None
    raise SnapGenError(f"{where} is of {name or 'an unknown model'}, which is no part of SnapGen++")


def find_components(source, only=None, config=None) -> tuple[dict[str, Component], dict]:
    """The models in ``source`` (a whole checkpoint's folder, one model's folder, or a weight file)
    and the ``model_index.json`` ({} when there is none).

    only: names to take; config: a config.json for a file that has none beside it.
    """
    source = Path(source)
    if unknown := set(only or ()) - set(COMPONENTS):
        raise UsageError(f"--only {min(unknown)}: choose among {', '.join(COMPONENTS)}")
    parts = [name for name in COMPONENTS if (source / name).is_dir()]
    index = {}
    if source.is_dir() and parts:
        own = source / "config.json"
        if own.is_file() and read_json(own).get("format") == "snapgen-mlx":
            raise UsageError(f"{source} is an MLX model already; `export` turns it back")
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
        raise SnapGenError(f"{source} holds nothing of {', '.join(only)}")
    return found, index


def _component(path: Path, name=None, config=None) -> Component:
    folder = path if path.is_dir() else path.parent
    places = [folder / "config.json", folder / "open_clip_config.json"]
    place = Path(config) if config else next((p for p in places if p.is_file()), places[0])
    if not place.is_file():
        hint = "" if name else "; give it with --config"
        raise SnapGenError(f"{path} has no config.json to tell what it is{hint}")
    source_config = read_json(place)
    if "quantization" in source_config:
        raise SnapGenError(
            f"{folder} is quantized for MLX already: use it as it is (text encoders with "
            "--text-encoder)"
        )
    usual_name, rules = kind(source_config, place)
    name = name or usual_name
    if name.removesuffix("_2") != usual_name.removesuffix(
        "_2"
    ):  # text encoders may stand in either place
        raise SnapGenError(f"{place} is of a {usual_name}, in the place of a {name}")
    component = Component(name, path, source_config, rules, place)
    if name in TOKENIZERS and rules:
        beside = folder.parent / TOKENIZERS[name]
        component.tokenizer_files = tokenizer_files(beside if beside.is_dir() else folder)
    return component


def tokenizer_files(folder: Path) -> list[Path]:
    """The files of a folder that make up its tokenizer; none without a vocabulary."""
    files = [f for f in sorted(folder.iterdir()) if TOKENIZER_FILE.fullmatch(f.name)]
    return files if any(f.name in VOCABULARIES for f in files) else []


def plan(
    component: Component,
    dtype: mx.Dtype | None = None,
    quantize: int | None = None,
    ema: bool = False,
) -> Component:
    """Fill ``component``'s rows from its files' headers; nothing is read beyond them.

    Strict: raises SnapGenError unless every source key is used or dropped for a reason and every
    parameter of the MLX model is filled with its right shape.
    """
    reader = component.reader = open_weights(component.path)
    rules, where = component.rules, component.path
    if rules is None:
        component.config = component.source_config
        component.rows = as_they_are(reader)
        return component
    try:
        component.config = rules.config(component.source_config)
        shapes = rules.shapes(component.source_config)
    except Exception as e:  # whatever a foreign or damaged config makes of a model's constructor
        why = (str(e) or type(e).__name__).splitlines()[0]
        raise SnapGenError(f"{component.config_file} does not describe {where}: {why}") from e
    used = _used(component, shapes, ema)
    group = rules.group_size(component.source_config) if _quantizes(rules, quantize) else None
    overrides = {}
    for key, (targets, _) in used.items():
        info = reader.infos[key]
        for target, step in targets.items():
            row = _row(key, info, target, step, shapes[target], where)
            if dtype is not None:
                row.dtype = dtype
            elif quantize and row.dtype == mx.float32:
                row.dtype = mx.bfloat16  # 32-bit scales would undo the saving
            is_matrix = len(row.shape) == 2 and target.endswith(".weight")
            if group and is_matrix and row.shape[1] % group == 0:
                layer = target.removesuffix(".weight")
                row.group, row.bits = group, rules.bits(layer, quantize)
                row.action = f"{row.action}, {row.bits} bits"
                if row.bits != quantize:
                    overrides[layer] = {"group_size": group, "bits": row.bits}
            component.rows.append(row)
    if group:
        component.config["quantization"] = {"group_size": group, "bits": quantize, **overrides}
    missing = set(shapes) - {row.target for row in component.rows}
    if missing:
        raise SnapGenError(
            f"{where} lacks {name_some(missing)}; is it whole, and its config right?"
        )
    return component


def as_they_are(reader) -> list[Row]:
    """Rows of a model that is the same on both sides."""
    rows = []
    for key, info in reader.infos.items():
        if info.dtype not in DTYPES:
            raise SnapGenError(f"{reader.files[0]}: {key!r} has the dtype {info.dtype}, unfit here")
        rows.append(Row(key, info.shape, COPY.action, key, DTYPES[info.dtype], step=COPY))
    return rows


def _quantizes(rules, quantize) -> bool:
    return bool(quantize) and hasattr(rules, "group_size")


def _row(key, info, target, step, shape, where) -> Row:
    if info.dtype not in FLOATS:
        raise SnapGenError(
            f"{where}: {key!r} has the dtype {info.dtype}, which is no weight's; save it as "
            f"{', '.join(FLOATS)}"
        )
    try:
        got = step.apply(mx.zeros(info.shape)).shape  # lazy: nothing is allocated
    except (ValueError, IndexError, TypeError, OverflowError) as e:
        raise SnapGenError(
            f"{where}: {key!r} has the shape {info.shape}, unfit for {target}"
        ) from e
    if tuple(got) != tuple(shape):
        raise SnapGenError(
            f"{where}: {key!r} of shape {info.shape} gives {tuple(got)}, but {target} has "
            f"{tuple(shape)}"
        )
    return Row(key, tuple(shape), step.action, target, FLOATS[info.dtype], step=step)


def _used(component, shapes, ema) -> dict[str, tuple[dict[str, Step], bool]]:
    """{source key: (its targets, is EMA)}, after prefixes, drops and the choice of weights."""
    infos, where = component.reader.infos, component.path
    routed, unknown, filled = {}, [], {}
    for key in infos:
        targets, prefix, is_ema = _route(component.rules, key, infos[key], shapes)
        if targets is None:
            unknown.append(key)
            continue
        if isinstance(targets, Drop):
            component.dropped.append(Row(key, infos[key].shape, f"dropped: {targets.reason}"))
            continue
        if prefix:
            component.wrappers[prefix] = component.wrappers.get(prefix, 0) + 1
        routed[key] = targets, is_ema
        for target in targets:
            filled.setdefault((target, is_ema), []).append(key)
    if unknown:
        raise SnapGenError(
            f"{where}: no rule for {name_some(unknown)}; is it this model, and its config right?"
        )
    for (target, _), keys in filled.items():
        if len(keys) > 1:
            raise SnapGenError(f"{where}: {name_some(keys)} all claim to be {target}")
    kinds = {is_ema for _, is_ema in routed.values()}
    if ema and True not in kinds:
        raise SnapGenError(f"{where} holds no EMA weights; convert without --ema")
    if len(kinds) == 2:
        other = "the raw weights (--ema was given)" if ema else "the EMA weights (--ema takes them)"
        for key, (_, is_ema) in list(routed.items()):
            if is_ema != ema:
                component.dropped.append(Row(key, infos[key].shape, f"dropped: {other}"))
                del routed[key]
    return routed


def _route(rules, key, info, shapes):
    """(targets or Drop or None, wrapper prefix, is EMA): the least stripping that is known."""
    prefixes = PREFIXES + EMA_PREFIXES + getattr(rules, "PREFIXES", ())
    parts = key.split(".")
    rest = ".".join(part for part in parts if part not in INSIDE)
    stripped = "".join(f"{part}." for part in INSIDE if part in parts)
    is_ema = False
    while True:
        targets = rules.route(rest)
        if isinstance(targets, Drop) or all(target in shapes for target in targets):
            return targets, stripped, is_ema
        prefix = next((p for p in prefixes if rest.startswith(p)), None)
        if prefix is None:
            break
        is_ema = is_ema or prefix in EMA_PREFIXES
        stripped, rest = stripped + prefix, rest.removeprefix(prefix)
    if rest.startswith(NO_WEIGHTS):
        return Drop("training state, not a weight"), "", False
    if info.shape in ((), (1,)) and rest.rpartition(".")[2] in COUNTERS:
        return Drop("a counter, not a weight"), "", False
    return None, "", False
