"""The state of a pretraining run: one file, whole or not at all, checked when it is read."""

import os
import zipfile
from pathlib import Path

import torch

from snapgen_mlx.errors import SnapGenError
from snapgen_mlx.files import atomic_write

NAME, PREVIOUS = "state.pt", "state-previous.pt"


def save(folder: Path, state: dict) -> None:
    """Write `state`; the one before stays as state-previous.pt."""
    path, previous = folder / NAME, folder / PREVIOUS
    with atomic_write(path) as temporary:
        torch.save(state, temporary)
        if path.exists():
            previous.unlink(missing_ok=True)
            os.link(path, previous)


def load(folder: Path) -> dict | None:
    """The run's state on the CPU, None when there is none yet.

    Raises:
        SnapGenError: the file is cut, damaged, or no state.
    """
    path = folder / NAME
    if not path.exists():
        return None
    try:
        with zipfile.ZipFile(path) as archive:  # torch itself does not look at the checksums
            whole = archive.testzip() is None
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True) if whole else {}
    except Exception:  # whatever a damaged file gives
        state = {}
    if "optimizers" not in state:
        raise SnapGenError(
            f"{path} is damaged; put {PREVIOUS} in its place, or remove both to start again"
        )
    return state
