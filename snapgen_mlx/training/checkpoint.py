"""The state of a training run on disk: whole, checksummed, the last few kept."""

import hashlib
import json
from pathlib import Path

import mlx.core as mx

from ..errors import SnapGenError
from ..files import atomic_write

KEEP = 2


def file_sha256(path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        while chunk := f.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()


def save_state(folder, step: int, arrays: dict[str, mx.array], info: dict) -> None:
    """Write ``arrays`` and ``info`` as the state after ``step``; the oldest beyond two go.

    The JSON with the checksum is written last: a state without it does not exist.
    """
    folder = Path(folder)
    weights = folder / f"state-{step:08d}.safetensors"
    with atomic_write(weights) as tmp:
        mx.save_safetensors(str(tmp), arrays)
    with atomic_write(weights.with_suffix(".json")) as tmp:
        tmp.write_text(json.dumps({**info, "step": step, "sha256": file_sha256(weights)}))
    for old in _states(folder)[KEEP:]:
        old.unlink()
        old.with_suffix(".safetensors").unlink(missing_ok=True)


def load_state(folder) -> tuple[dict[str, mx.array], dict] | None:
    """Newest state that is whole, or None when there is none at all.

    A state cut short on disk is passed over for the one before it. Raises SnapGenError when
    states are there but none is whole.
    """
    states = _states(Path(folder))
    for path in states:
        weights = path.with_suffix(".safetensors")
        try:
            info = json.loads(path.read_text())
            if info["sha256"] == file_sha256(weights):
                return mx.load(str(weights)), info
        except (OSError, ValueError, KeyError):
            continue
    if states:
        raise SnapGenError(f"no state in {folder} is whole; start the run again elsewhere")
    return None


def _states(folder: Path) -> list[Path]:
    return sorted(folder.glob("state-*.json"), reverse=True)
