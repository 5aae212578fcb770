"""What a conversion did: the report, and the card of the model that it made."""

import json

import mlx.core as mx

from ..files import atomic_write
from ..hub import commit_of
from ..tensors.stream import Row
from .plan import Dropped, PlannedComponent


def dtype_name(dtype: mx.Dtype | None) -> str | None:
    """Such as "float16"."""
    return None if dtype is None else str(dtype).removeprefix("mlx.core.")


def make_report(source, settings: dict, components: dict[str, PlannedComponent]) -> dict:
    """What is converted from where, JSON-ready.

    Args:
        source: as the user named it; None where every part has its own.
        settings: of the conversion; they stand in the report as they are.
        components: what was planned, by name.
    """
    places = {c.origin: commit_of(c.root) for c in components.values()}
    return {
        "source": ", ".join(places) if source is None else str(source),
        "revision": places.get(str(source)),
        **settings,
        "bytes": sum(c.nbytes for c in components.values()),
        "components": {
            name: {
                "bytes": c.nbytes,
                "parameters": c.parameters,
                "prefixes": c.wrappers,
                "ema": c.is_ema,
                "not_read": c.beside,
                "tensors": [_tensor(row) for row in c.rows],
                "dropped": [_dropped(row) for row in c.dropped],
            }
            for name, c in components.items()
        },
    }


def _tensor(row: Row) -> dict:
    return {
        "source": row.source,
        "target": row.target,
        "shape": list(row.shape),
        "dtype": dtype_name(row.dtype),
        "action": row.action,
        "bytes": row.nbytes,
    }


def _dropped(row: Dropped) -> dict:
    nothing = {"target": None, "dtype": None}
    return {"source": row.source, "shape": list(row.shape), "action": row.action, **nothing}


def model_card(report: dict) -> str:
    """The README.md of a converted model."""
    made = f"from `{report['source']}`"
    if report["revision"]:
        made += f" at revision `{report['revision']}`"
    if report["quantize"]:
        made += f", quantized to {report['quantize']} bits"
    lines = [
        "---",
        "library_name: mlx",
        "pipeline_tag: text-to-image",
        "tags: [mlx, snapgen]",
        "---",
        "",
        "# SnapGen++ for MLX",
        "",
        f"Converted by snapgen-mlx {made}. The terms of the original weights hold for these.",
        "",
        '    snapgen-mlx generate "a smiling cat" -m THIS_FOLDER',
        "",
        "| component | parameters | MB |",
        "|---|---|---|",
    ]
    for name, part in report["components"].items():
        lines.append(f"| {name} | {part['parameters'] / 1e6:.1f} M | {part['bytes'] / 1e6:.1f} |")
    return "\n".join(lines) + "\n"


def save_report(path, report: dict) -> None:
    """Write a report as JSON, whole or not at all."""
    with atomic_write(path) as tmp:
        tmp.write_text(json.dumps(report, indent=1) + "\n")
