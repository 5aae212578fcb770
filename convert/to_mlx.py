"""Checkpoint in, MLX model folder out: streamed, whole or not at all, resumable."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..config import QWEN_IMAGE, DiTConfig
from ..errors import SnapGenError, UsageError
from ..files import atomic_write, expand_user, file_sha256, read_json, write_json
from ..layout import FEW_STEP, TOKENIZERS, few_step_loras
from ..loading import layer_shapes
from ..lora import Update, copy_few_step_loras, fuse_lora, header_for, load_lora, load_updates
from ..lora_file import LoRAFile, find_file, is_whole, read_about, read_tensors
from ..tensors.safetensors_io import save_arrays
from ..tensors.stream import Step, verify, write_components
from ..tokenizer_files import copy_word_files
from ..vocabulary import FILE as WORDS
from ..vocabulary import copy_words
from .assembly import check_fit, gather
from .conversion_report import dtype_name, make_report, model_card
from .head import (
    existing_model,
    file_name,
    make_head,
    not_there,
    unfused_base,
    weight_digests,
)
from .plan import PlannedComponent, plan

JOURNAL = "journal.json"


def convert(
    source,
    dest,
    *,
    parts: dict[str, str] | None = None,
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

    Args:
        source: a Hub id, a folder or a weight file; None for ``parts`` alone.
        dest: the folder to make, or a model's folder, to which parts that it lacks are added.
        parts: {component: Hub id, folder or weight file}, in place of the source's.
        revision: of the source on the Hub.
        token: for the Hub.
        only: names of the source's components; None for all.
        dtype: of the floating weights; None for the source's.
        quantize: 4 or 8 bits for the matrices of the transformer and of language models; float32
            sources then become bfloat16.
        ema: take the EMA weights.
        config: the config.json of a source that is a single file.
        loras: pairs (LoRA file, scale) to fuse into the transformer.
        few_step_lora: a LoRA with which the transformer draws in few steps, to stand beside it.
        dry_run: only plan.
        progress: called with (bytes done, bytes in all).

    Returns:
        A report (JSON-ready) with a row per tensor. ``report["status"]`` is "planned", "converted",
        "resumed" or "complete" (``dest`` held the same conversion already).

    Nothing stands at ``dest`` before everything is there. An error leaves nothing behind; an
    interruption leaves ``.DEST.partial``, from which the same call goes on. Raises SnapGenError,
    UsageError for options that do not fit together.
    """
    dest = expand_user(dest).absolute()
    components, index = gather(source, parts or {}, only, config, revision, token)
    for component in components.values():
        plan(component, dtype, quantize, ema)
    check_fit(components, dest)
    settings: dict[str, Any] = {"quantize": quantize, "dtype": dtype_name(dtype), "ema": ema}
    if loras:
        settings["loras"] = _fuse(components, loras)
    if few_step_lora:
        settings["few_step_lora"] = _check_few_step_lora(components, few_step_lora)
    for path in (*(path for path, _ in loras), *([few_step_lora] if few_step_lora else [])):
        _check_base(path, index, components["transformer"], ema)
    report = make_report(source, settings, components)
    if dry_run:
        return report | {"status": "planned"}
    report["files"] = _hash(components)
    partial = dest.parent / f".{dest.name}.partial"
    there = existing_model(dest)
    head = make_head(index, report, components, there)
    begun = _is_begun(partial, head)
    missing = not_there(dest, there, components, head, begun)
    # Few-step LoRAs stand beside fused ones as at run time, and are for the sum from now on.
    base = unfused_base(index, weight_digests(report, components), ema)
    fused = (base, head["base"]) if loras else None
    if not missing and not begun:
        return report | {"status": "complete", "written": verify(dest, components.values())}

    resumed = _open_partial(partial, head)
    try:
        write_components(partial, missing.values(), progress=progress)
        for component in missing.values():
            _copy_tokenizer(component, partial)
        if "transformer" in missing:
            root = missing["transformer"].root
            copy_few_step_loras(root, partial, base=fused)
            copy_words(root, partial)
        if few_step_lora:
            _copy_few_step_lora(few_step_lora, components["transformer"], partial, fused)
        if there is None:
            write_json(partial / "config.json", head)
            with atomic_write(partial / "README.md") as tmp:
                tmp.write_text(model_card(report))
        report["written"] = verify(partial, missing.values())
        if there is None:
            (partial / JOURNAL).unlink()
            os.replace(partial, dest)
        else:
            _move_into(partial, dest, head)
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


def _check_base(path, index: dict, transformer: PlannedComponent, ema: bool) -> None:
    """Raises SnapGenError for a LoRA that says it was trained on other weights, where the
    checkpoint says which ones it holds."""
    file = find_file(path)
    trained = read_about(file).get("base")
    if trained is None or "base" not in index:
        return
    digests = sorted(map(file_sha256, transformer.reader.files))
    if trained != unfused_base(index, digests, ema):
        raise SnapGenError(
            f"{file} was trained on other weights than those of {transformer.origin}; use it with "
            "the model that it was trained on"
        )


def _copy_few_step_lora(
    path, transformer: PlannedComponent, partial: Path, base: tuple[str, str] | None
) -> None:
    """The LoRA under the name of the only width: its file as it is, if it says all of it."""
    file = find_file(path)
    target = partial / FEW_STEP / f"{transformer.config.get('variant', 'full')}.safetensors"
    target.parent.mkdir(exist_ok=True)
    if not is_whole(file):
        LoRAFile.read(file).save(target)
    elif base:
        save_arrays(target, read_tensors(file), header_for(file, base))
    else:
        shutil.copyfile(file, target)


def _with_update(step: Step, update: Update) -> Step:
    def apply(a: mx.array) -> mx.array:
        return fuse_lora({"layer.weight": step.apply(a)}, {"layer": update})["layer.weight"]

    return Step(f"{step.action}, LoRA", apply)


def _hash(components: dict[str, PlannedComponent]) -> dict[str, str]:
    """{file: sha256} of all that is read. Raises SnapGenError where a download is damaged."""
    hashes = {}
    for name, component in components.items():
        loras = few_step_loras(component.root) if name == "transformer" else ()
        for file in dict.fromkeys([component.config_file, *component.reader.files, *loras]):
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
            hashes[file_name(component, file)] = digest
    return hashes


def _is_begun(partial: Path, head: dict) -> bool:
    journal = partial / JOURNAL
    return journal.is_file() and read_json(journal) == head


def _open_partial(partial: Path, head: dict) -> bool:
    """Make or re-open the working folder; True when it holds this very conversion's beginning."""
    if _is_begun(partial, head):
        for unfinished in partial.rglob(".*.safetensors"):  # left by a process that was killed
            unfinished.unlink()
        return True
    try:
        if partial.exists():
            shutil.rmtree(partial)
        partial.mkdir(parents=True)
    except OSError as e:
        raise SnapGenError(f"cannot write {partial}: {e.strerror}; choose another place") from e
    write_json(partial / JOURNAL, head)
    return False


def _move_into(partial: Path, dest: Path, head: dict) -> None:
    """Add what was written to a model. Its config.json, which names the parts, comes last."""
    if (partial / "transformer").is_dir():
        (dest / WORDS).unlink(missing_ok=True)  # what another one drew
    for part in sorted(p for p in partial.iterdir() if p.name != JOURNAL):
        target = dest / part.name
        if target.is_dir() and part.name == FEW_STEP:  # of the same weights
            for file in part.iterdir():
                os.replace(file, target / file.name)
            continue
        if target.is_dir() and part.name in TOKENIZERS.values():
            shutil.rmtree(target)  # of no text encoder
        os.replace(part, target)
    write_json(dest / "config.json", head)
    shutil.rmtree(partial)


# --- after writing


def _copy_tokenizer(component: PlannedComponent, partial: Path) -> None:
    if component.rules is None and component.path.is_dir():  # its vocabulary stands beside it
        copy_word_files(component.path, partial / component.name)
    for file in component.tokenizer_files:
        target = partial / TOKENIZERS[component.name]
        target.mkdir(exist_ok=True)
        shutil.copyfile(file, target / file.name)
