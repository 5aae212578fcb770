"""The state of a training run on disk: whole, checksummed, the last few kept."""

import fcntl
import hashlib
import json
import os
from contextlib import contextmanager
from pathlib import Path

import mlx.core as mx

from ..errors import SnapGenError
from ..files import atomic_write, file_sha256
from ..tensors.safetensors_io import load_arrays, save_arrays

KEEP = 2


@contextmanager
def locked(folder):
    """Raises SnapGenError while another process is in this context with the same folder."""
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        fd = os.open(folder, os.O_RDONLY)
    except OSError as e:
        raise SnapGenError(f"cannot write {folder}: {e.strerror}; choose another place") from e
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as e:
        os.close(fd)
        raise SnapGenError(
            f"another process is training in {folder}; wait for it, or train into another folder"
        ) from e
    except OSError:  # a file system without locks
        pass
    try:
        yield
    finally:
        os.close(fd)


def fingerprint(*folders: Path) -> str:
    """Digest of the contents of all files of a model in some folders."""
    kinds = (".json", ".safetensors", ".txt", ".model")  # the last two are vocabularies
    files = [path for folder in folders for path in sorted(folder.glob("*"))]
    files = [p for p in files if p.suffix in kinds and not p.name.startswith(".")]
    return hashlib.sha256("".join(map(file_sha256, files)).encode()).hexdigest()


def save_state(folder, step: int, arrays: dict[str, mx.array], info: dict) -> None:
    """Write the state after a step, and remove the oldest state if there are more than two.

    The JSON file with the checksum is written last: without it the state does not exist.

    Args:
        folder: of the run.
        step: the number of steps done.
        arrays: {name: array} of the state.
        info: what the JSON file holds besides.

    Raises:
        SnapGenError: the disk is full; the earlier states are still there.
    """
    folder = Path(folder)
    # What a process killed while it was writing left: each as large as a state.
    for file in folder.glob(".state-*"):
        file.unlink()
    weights = folder / f"state-{step:08d}.safetensors"
    digest = save_arrays(weights, arrays)
    with atomic_write(weights.with_suffix(".json")) as tmp:
        tmp.write_text(json.dumps({**info, "step": step, "sha256": digest}))
    # Later ones could not be read: the run went on from before them.
    states = [path.stem for path in _states(folder) if path.stem <= weights.stem]
    for file in folder.glob("state-*"):
        if file.stem not in states[:KEEP]:
            file.unlink()


def load_state(folder) -> tuple[dict[str, mx.array], dict] | None:
    """Newest state that is whole, or None when there is none at all.

    A state cut short on disk is passed over for the one before it, and removed then (by process
    0), lest it be counted among the last two. Raises SnapGenError when states are there but none is
    whole.
    """
    states, damaged = _states(Path(folder)), list[Path]()
    for path in states:
        weights = path.with_suffix(".safetensors")
        try:
            info = json.loads(path.read_text())
            whole = info["sha256"] == file_sha256(weights)
            whole = whole and path.stem == f"state-{info['step']:08d}"
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            whole = False
        except OSError:  # the disk's fault, perhaps for a moment
            continue
        if whole:
            if mx.distributed.init().rank() == 0:
                for other in damaged:
                    other.unlink(missing_ok=True)
            return load_arrays(weights), info
        damaged.append(path)
    if states:
        raise SnapGenError(
            f"no training state in {folder} is whole; remove it to start from the beginning"
        )
    return None


def _states(folder: Path) -> list[Path]:
    return sorted(folder.glob("state-*.json"), reverse=True)
