"""Checkpoint in, MLX model folder out: streamed, whole or not at all, resumable."""

import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..config import QWEN_IMAGE, DiTConfig
from ..errors import SnapGenError, UsageError
from ..files import atomic_write, file_sha256, read_json, write_json
from ..hub import resolve
from ..layout import FEW_STEP, FORMAT, TOKENIZERS, few_step_loras
from ..loading import layer_shapes
from ..lora import Update, copy_few_step_loras, fuse_lora, load_lora, load_updates
from ..lora_file import find_file
from ..tensors.stream import Step, verify, write_components
from ..tokenizer_files import copy_word_files
from ..vocabulary import copy_words
from .conversion_report import dtype_name, make_report, model_card
from .plan import PlannedComponent, find_components, plan

JOURNAL = "journal.json"


def convert(
    source,
    dest,
    *,
    revision: str | None = None,
    token: str | None = None,
    only: list[str] | None = None,
    dtype: mx.Dtype | None = None,
    quantize: int | None = None,
    ema: bool = False,
    config=None,
    loras=(),
    few_step_lora=None,
    dry_run: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> dict:
    """Convert a PyTorch checkpoint into an MLX model folder.

    Args: source, a Hub id, a folder or a weight file; dest, the folder to make; only, component
        names; dtype of the floating weights (default: the source's); quantize, 4 or 8 bits for the
        matrices of the transformer and of Gemma (float32 sources then become bfloat16); ema, take
        the EMA weights; config, the config.json of a single file; loras, pairs (LoRA file, scale)
        to fuse into the transformer; few_step_lora, a LoRA with which the transformer draws in few
        steps, to stand beside its weights; dry_run, only plan; progress(bytes done, bytes in all).
    Returns a report (JSON-ready) with a row per tensor. ``report["status"]`` is "planned",
    "converted", "resumed" or "complete" (``dest`` held the same conversion already).

    Nothing stands at ``dest`` before everything is there. An error leaves nothing behind; an
    interruption leaves ``.DEST.partial``, from which the same call goes on. Raises SnapGenError,
    UsageError for options that do not fit together.
    """
    dest = Path(dest).expanduser().absolute()
    path = resolve(source, revision, token)
    components, index = find_components(path, only, config)
    for component in components.values():
        plan(component, dtype, quantize, ema)
    settings: dict[str, Any] = {"quantize": quantize, "dtype": dtype_name(dtype), "ema": ema}
    if loras:
        settings["loras"] = _fuse(components, loras)
    if few_step_lora:
        settings["few_step_lora"] = _check_few_step_lora(components, few_step_lora)
    report = make_report(source, path, settings, components)
    if dry_run:
        return report | {"status": "planned"}
    report["files"] = _hash(path, components)
    head = _head(path, index, report, _steps(components))
    if _is_complete(dest, components, head):
        return report | {"status": "complete", "written": verify(dest, components.values())}

    partial = dest.parent / f".{dest.name}.partial"
    resumed = _open_partial(partial, head)
    try:
        write_components(partial, components.values(), progress=progress)
        for component in components.values():
            _copy_tokenizer(component, partial)
        if "transformer" in components:
            copy_few_step_loras(path, partial)
            copy_words(path, partial)
        if few_step_lora:
            _copy_few_step_lora(few_step_lora, components["transformer"], partial)
        write_json(partial / "config.json", head)
        with atomic_write(partial / "README.md") as tmp:
            tmp.write_text(model_card(report))
        report["written"] = verify(partial, components.values())
        (partial / JOURNAL).unlink()
        os.replace(partial, dest)
    except SnapGenError:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    except OSError as e:
        shutil.rmtree(partial, ignore_errors=True)
        raise SnapGenError(f"cannot write {dest}: {e.strerror or e}") from e
    return report | {"status": "resumed" if resumed else "converted"}


# --- before writing


def _fuse(components: dict[str, PlannedComponent], loras) -> list[dict]:
    """Let the transformer's rows add the LoRAs before they are quantized; says what was added."""
    if "transformer" not in components:
        raise UsageError("a LoRA changes the transformer; add transformer to --only")
    part = components["transformer"]
    rows = {row.target: row for row in part.rows}
    added = []
    for path, scale in loras:
        for layer, update in _updates(part, path, scale).items():
            row = rows[f"{layer}.weight"]
            row.step = _with_update(row.step, update)
        added.append(_lora_entry(path) | {"scale": scale})
    return added


def _updates(transformer: PlannedComponent, path, scale: float = 1.0) -> dict[str, Update]:
    """Of a LoRA file for this transformer, whichever it is, uncut."""
    if transformer.config.get("_class_name") == QWEN_IMAGE:
        shapes = layer_shapes({row.target: row.shape for row in transformer.rows})
        return load_updates(path, shapes, scale)
    return load_lora(path, DiTConfig.from_dict(transformer.config), None, scale)


def _lora_entry(path) -> dict:
    file = find_file(path)
    return {"name": file.name, "sha256": file_sha256(file)}


def _check_few_step_lora(components: dict[str, PlannedComponent], path) -> dict:
    """Raises UsageError unless the LoRA is for the transformer that is converted."""
    part = components.get("transformer")
    if part is None:
        raise UsageError("a LoRA changes the transformer; add transformer to --only")
    if part.config.get("_class_name") != QWEN_IMAGE and len(part.config["widths"]) > 1:
        raise UsageError(
            "a few-step LoRA is of one width; put it as few_step/VARIANT.safetensors into the "
            "folder that is written"
        )
    _updates(part, path)
    return _lora_entry(path)


def _copy_few_step_lora(path, transformer: PlannedComponent, partial: Path) -> None:
    """The LoRA's file as it is, under the name of the only width."""
    file = find_file(path)
    if file.suffix != ".safetensors":
        raise UsageError(f"{file} is not a safetensors file; a few-step LoRA must be one")
    name = transformer.config.get("variant", "full")
    (partial / FEW_STEP).mkdir(exist_ok=True)
    shutil.copyfile(file, partial / FEW_STEP / f"{name}.safetensors")


def _with_update(step: Step, update: Update) -> Step:
    def apply(a: mx.array) -> mx.array:
        return fuse_lora({"layer.weight": step.apply(a)}, {"layer": update})["layer.weight"]

    return Step(f"{step.action}, LoRA", apply)


def _hash(path: Path, components: dict[str, PlannedComponent]) -> dict[str, str]:
    """{file: sha256} of all that is read. Raises SnapGenError where a download is damaged."""
    root = path if path.is_dir() else path.parent
    hashes = {}
    for name, component in components.items():
        loras = few_step_loras(root) if name == "transformer" else ()
        for file in [component.config_file, *component.reader.files, *loras]:
            try:
                digest = file_sha256(file)
            except OSError as e:
                raise SnapGenError(f"cannot read {file}: {e.strerror}") from e
            # The Hub's cache names large files by their checksum.
            blob = file.resolve().name
            if file.is_symlink() and len(blob) == 64 and blob != digest:
                raise SnapGenError(
                    f"{file} does not have its checksum; delete {file.resolve()} and run again"
                )
            hashes[os.path.relpath(file, root)] = digest
    return hashes


def _shift(file: Path, size: int) -> float:
    """The shift of a scheduler_config.json for pictures of ``size`` pixels a side.

    A dynamic one grows with the tokens: log(shift) lies on a line between two numbers of them.
    """
    config = read_json(file)
    try:
        if not config.get("use_dynamic_shifting"):
            shift = float(config.get("shift", 3.0))
        else:
            tokens = (size // 16) ** 2
            least, most = (config[f"{name}_image_seq_len"] for name in ("base", "max"))
            low, high = (config[f"{name}_shift"] for name in ("base", "max"))
            mu = low + (high - low) * (tokens - least) / (most - least)
            shift = math.exp(mu) if config.get("time_shift_type") != "linear" else mu
    except (KeyError, TypeError, ValueError, ZeroDivisionError, OverflowError) as e:
        raise SnapGenError(f"{file} does not describe a shift; download it again") from e
    if not 0 < shift < math.inf:
        raise SnapGenError(f"{file}: shift is {shift!r}; it must be a positive number")
    return shift


def _head(path: Path, index: dict, report: dict, steps: int = 28) -> dict:
    """The model's config.json; ``steps``: that its transformer needs by default."""
    sampling: dict[str, Any] = {"steps": steps, "guidance": 4.0, "shift": 3.0, "size": 1024}
    scheduler = path / "scheduler" / "scheduler_config.json"
    if scheduler.is_file():
        sampling["shift"] = _shift(scheduler, sampling["size"])
    if isinstance(index.get("sampling"), dict):
        sampling |= index["sampling"]
    keys = ("source", "revision", "quantize", "dtype", "ema", "loras", "few_step_lora", "files")
    made = {key: report[key] for key in keys if key in report}
    return {**FORMAT, "sampling": sampling, "source": made, "base": _base(index, report)}


def _steps(components: dict[str, PlannedComponent]) -> int:
    part = components.get("transformer")
    return getattr(part and part.rules, "STEPS", 28)


def _base(index: dict, report: dict) -> str:
    """What LoRAs know the weights by, in whatever form they are written."""
    files = [
        digest
        for name, digest in report["files"].items()
        if not name.endswith(".json") and (name.startswith("transformer") or "/" not in name)
    ]
    made = [sorted(files), report["ema"], report.get("loras")]
    own = hashlib.sha256(json.dumps(made).encode()).hexdigest()[:16]
    inherited = index.get("base")
    return inherited if isinstance(inherited, str) and not report.get("loras") else own


def _is_complete(dest: Path, components, head: dict) -> bool:
    if not dest.exists() or (dest.is_dir() and not any(dest.iterdir())):
        return False
    here = [name for name in components if (dest / name).is_dir()]
    if (dest / "config.json").is_file() and len(here) == len(components):
        there = read_json(dest / "config.json").get("source")
        if isinstance(there, dict) and _identity(there) == _identity(head["source"]):
            return True
    raise SnapGenError(
        f"{dest} already exists and holds something else; choose another folder or remove it"
    )


def _identity(source: dict) -> dict:
    return {k: v for k, v in source.items() if k not in ("source", "revision")}


def _open_partial(partial: Path, head: dict) -> bool:
    """Make or re-open the working folder; True when it holds this very conversion's beginning."""
    journal = partial / JOURNAL
    if journal.is_file() and read_json(journal) == head:
        for unfinished in partial.rglob(".*.safetensors"):  # left by a process that was killed
            unfinished.unlink()
        return True
    try:
        if partial.exists():
            shutil.rmtree(partial)
        partial.mkdir(parents=True)
    except OSError as e:
        raise SnapGenError(f"cannot write {partial}: {e.strerror}; choose another place") from e
    write_json(journal, head)
    return False


# --- after writing


def _copy_tokenizer(component: PlannedComponent, partial: Path) -> None:
    if component.rules is None and component.path.is_dir():  # its vocabulary stands beside it
        copy_word_files(component.path, partial / component.name)
    for file in component.tokenizer_files:
        target = partial / TOKENIZERS[component.name]
        target.mkdir(exist_ok=True)
        shutil.copyfile(file, target / file.name)
