"""What a training leaves in its output folder."""

import shutil
from pathlib import Path

from ..config import DiTConfig
from ..errors import SnapGenError, UsageError
from ..files import write_json
from ..layout import FEW_STEP, load_config
from ..tensors.weights import save_tensors

LORA = "lora.safetensors"
# A model's card, recipe and LoRAs are of the weights that it had.
NOT_COPIED = ("transformer", FEW_STEP, "run", "cache", "README.md", "recipe.json", LORA)


def check_output(model: Path, output: Path) -> None:
    """Raises UsageError for a folder that is not to be trained into."""
    if output.resolve().is_relative_to(model.resolve()):
        raise UsageError(f"{output} lies in the model that is to be trained; choose another folder")
    for name, what in (("config.json", "model"), (LORA, "LoRA")):
        if (output / name).exists() and not (output / "run").is_dir():
            raise UsageError(f"{output} holds another {what}; choose another folder")


def nothing_changed(what: str, record: dict) -> SnapGenError:
    """For a run that ended with ``record`` and changed none of ``what``."""
    line = f"no {what} had changed after step {record['step']}, so nothing was written; "
    if not record["done"]:
        return SnapGenError(line + "the same command goes on from there")
    return SnapGenError(line + "train into another folder, longer or with a higher learning rate")


def write_model(
    model: Path, output: Path, config: DiTConfig, weights: dict, sampling: dict | None = None
) -> None:
    """Write a copy of a model folder with another transformer.

    Few-step LoRAs are left out, because they belong to the old weights. config.json, which makes it
    a model folder, is written last.

    Args:
        model: folder to copy.
        output: folder to write.
        config: of the transformer.
        weights: of the transformer.
        sampling: replaces the model's own; None keeps it.
    """
    try:
        # Of an earlier result: half of it and half of this one would pass as a model.
        (output / "config.json").unlink(missing_ok=True)
        for part in model.iterdir():
            if part.is_dir() and part.name not in NOT_COPIED:
                shutil.copytree(part, output / part.name, dirs_exist_ok=True)
            elif part.is_file() and part.name not in (*NOT_COPIED, "config.json"):
                shutil.copy(part, output / part.name)
    except OSError as e:
        raise SnapGenError(f"cannot write {output}: {e.strerror or e}") from e
    save_tensors(output / "transformer", weights)
    write_json(output / "transformer" / "config.json", config.to_dict())
    head = {k: v for k, v in load_config(model).items() if k != "base"}  # other weights now
    write_json(
        output / "config.json", head | {"sampling": head.get("sampling", {}) | (sampling or {})}
    )
