"""A model's config.json: how it samples, and where each part is from."""

import hashlib
import json
import math
from pathlib import Path
from typing import Any

from ..errors import SnapGenError
from ..files import read_json
from ..layout import FEW_STEP, FORMAT, few_step_loras
from ..lora_file import read_about
from .assembly import origin
from .plan import PlannedComponent

MADE = ("quantize", "dtype", "ema", "loras", "few_step_lora")  # settings of a conversion


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


def existing_model(dest: Path) -> dict | None:
    """The config.json of the model at ``dest``; None where nothing is there.

    Raises SnapGenError for a place that holds something else.
    """
    if not dest.exists() or (dest.is_dir() and not any(dest.iterdir())):
        return None
    config = read_json(dest / "config.json") if (dest / "config.json").is_file() else {}
    if config.get("format") != FORMAT["format"]:
        raise SnapGenError(
            f"{dest} already exists and holds something else; choose another folder or remove it"
        )
    return config


def file_name(component: PlannedComponent, file: Path) -> str:
    """Of a file that a part is made from: PART/FILE, or FILE where it is the whole source."""
    if component.is_named or not file.is_relative_to(component.root):
        return f"{component.name}/{file.name}"
    return file.relative_to(component.root).as_posix()


def make_head(
    index: dict, report: dict, components: dict[str, PlannedComponent], there: dict | None
) -> dict:
    """The model's config.json with these parts.

    Args:
        index: the source's ``model_index.json``.
        report: of the conversion, with the hashes of its ``files``.
        components: that are converted.
        there: config.json of the model that they are added to.
    """
    own = {
        name: _record(report, part)
        for name, part in components.items()
        if part.is_named or there is not None
    }
    files = {name: digest for part in own.values() for name, digest in part["files"].items()}
    head = there
    if head is None:
        made = {key: report[key] for key in ("source", "revision", *MADE) if key in report}
        made["files"] = {k: v for k, v in report["files"].items() if k not in files}
        head = {**FORMAT, "sampling": {}, "source": made}
    if own:
        head = head | {"parts": head.get("parts", {}) | own}
    if there is None or "transformer" in components:
        head |= {"sampling": _sampling(index, components), "base": _base(index, report, components)}
    return head


def _sampling(index: dict, components: dict[str, PlannedComponent]) -> dict[str, Any]:
    part = components.get("transformer")
    steps = getattr(part and part.rules, "STEPS", 28)
    sampling: dict[str, Any] = {"steps": steps, "guidance": 4.0, "shift": 3.0, "size": 1024}
    for root in {c.root for c in (part or next(iter(components.values())),)}:
        scheduler = root / "scheduler" / "scheduler_config.json"
        if scheduler.is_file():
            sampling["shift"] = _shift(scheduler, sampling["size"])
    return sampling | (index["sampling"] if isinstance(index.get("sampling"), dict) else {})


def _base(index: dict, report: dict, components: dict[str, PlannedComponent]) -> str:
    """What LoRAs know the weights by, in whatever form they are written."""
    digests = weight_digests(report, components)
    if not report.get("loras"):
        return unfused_base(index, digests, report["ema"])
    return _digest([digests, report["ema"], report["loras"]])


def weight_digests(report: dict, components: dict[str, PlannedComponent]) -> list[str]:
    """SHA-256 of the transformer's files, sorted."""
    part = components.get("transformer")
    files = part.reader.files if part else []
    return sorted(report["files"][file_name(part, file)] for file in files if part)


def unfused_base(index: dict, digests: list[str], ema: bool) -> str:
    """What LoRAs know a checkpoint's weights by, before others are fused: the digest that an
    exported one has from its model, unless its transformer was changed since.

    Args:
        index: its ``model_index.json``.
        digests: of the transformer's files, sorted.
        ema: whether the EMA weights are taken.
    """
    base, weights = index.get("base"), index.get("weights")
    if isinstance(base, str) and weights in (None, digests):
        return base
    return _digest([digests, ema, None])


def _digest(made: list) -> str:
    return hashlib.sha256(json.dumps(made).encode()).hexdigest()[:16]


def _record(report: dict, component: PlannedComponent) -> dict[str, Any]:
    """What is kept of where a part is from."""
    files = [component.config_file, *component.reader.files]
    names = dict.fromkeys(file_name(component, file) for file in files)
    made = {key: report[key] for key in MADE if key in report}
    return {**origin(component), **made, "files": {name: report["files"][name] for name in names}}


def not_there(
    dest: Path,
    there: dict | None,
    components: dict[str, PlannedComponent],
    head: dict,
    begun: bool,
) -> dict[str, PlannedComponent]:
    """The parts that the model at ``dest`` lacks. Raises SnapGenError where it has another one.

    Args:
        dest: the model's folder.
        there: its config.json.
        components: that are converted.
        head: its config.json with them.
        begun: whether this very conversion was interrupted; what is there may then be its own.
    """
    missing = {}
    gone = "transformer" in components and there is not None and not (dest / "transformer").is_dir()
    bases = [read_about(file).get("base") for file in few_step_loras(dest)] if gone else []
    if not begun and any(base != head["base"] for base in bases):
        raise SnapGenError(
            f"{dest / FEW_STEP} holds LoRAs of the transformer that was removed; remove it too"
        )
    for name, component in components.items():
        if there is None or not (dest / name).is_dir():
            missing[name] = component
        elif not begun and _identity(there, name) != _identity(head, name):
            raise SnapGenError(
                f"{dest} already holds another {name}; choose another folder, or remove "
                f"{dest / name}"
            )
    return missing


def _identity(config: dict, name: str) -> list | None:
    """What a part was made from and how; its source's name does not count."""
    record = config.get("parts", {}).get(name) or config.get("source")
    if not isinstance(record, dict) or not isinstance(record.get("files"), dict):
        return None
    files = {k: v for k, v in record["files"].items() if k.startswith(f"{name}/") or "/" not in k}
    return [sorted(files.values()), *(record.get(key) for key in MADE)]
