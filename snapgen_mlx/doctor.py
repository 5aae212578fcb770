"""Whether a machine is fit to draw: one finding each, with what to do about it."""

import platform
import re
import shutil
import sys
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from .device import device_name, matmul_speed, usable_memory
from .errors import SnapGenError, format_bytes, name_first
from .files import file_sha256
from .pipeline import Pipeline
from .sampling import last_step

SLOW = 15  # float32 GFLOP/s; slower BLAS libraries use no vector instructions
FEW_BYTES = 2_000_000_000  # bytes of memory or disk; with less, only the embedded model works


@dataclass
class Finding:
    """What was looked at, what was found, and what to do unless all is well (None)."""

    name: str
    found: str
    advice: str | None = None


def examine(model=None) -> list[Finding]:
    """Look at Python, device, speed, memory, disk, the Hub's cache, and a model (None: the embedded
    one), which is read whole and draws one step."""
    findings = [
        Finding("python", f"{platform.python_version()} on {platform.platform()}"),
        Finding("mlx", f"{version('mlx')} on {device_name()}"),
        _speed(),
        _room("memory", usable_memory(), "close other programs, or use --low-ram"),
        _disk(),
        _cache(),
    ]
    return [*findings, _model(model)]


def _speed() -> Finding:
    speed, advice = matmul_speed(), None
    if sys.platform == "linux" and speed < SLOW:
        advice = "apt-get install libopenblas0, and preload it with LD_PRELOAD (see README)"
    return Finding("speed", f"{speed:.0f} GFLOP/s, float32 matrices", advice)


def _room(name: str, free: int, advice: str) -> Finding:
    return Finding(name, f"{format_bytes(free)} can be used", None if free > FEW_BYTES else advice)


def _disk() -> Finding:
    try:
        free = shutil.disk_usage(Path.home()).free
    except (OSError, RuntimeError) as e:
        return Finding("disk", f"no home folder: {e}", "set HOME to a folder of yours")
    return _room("disk", free, "make room in your home folder")


def _cache() -> Finding:
    """What was downloaded from the Hub."""
    from huggingface_hub import CacheNotFound, constants, scan_cache_dir

    place = constants.HF_HUB_CACHE
    try:
        cache = scan_cache_dir(place)
    except CacheNotFound:
        return Finding("cache", f"nothing was downloaded yet to {place}")
    except (OSError, ValueError) as e:
        return Finding("cache", f"{place} cannot be read", f"{e}; set HF_HOME to another folder")
    found = f"{len(cache.repos)} repositories, {format_bytes(cache.size_on_disk)} in {place}"
    if cache.warnings:
        first = " ".join(str(cache.warnings[0]).split())
        return Finding("cache", found, f"{len(cache.warnings)} are damaged; delete them: {first}")
    return Finding("cache", found)


def damaged_files(folder) -> list[Path]:
    """Files of a model that are not what was downloaded: in the Hub's cache the weights are stored
    under their SHA-256."""
    return [
        file
        for file in sorted(Path(folder).rglob("*"))
        if re.fullmatch("[0-9a-f]{64}", stored := file.resolve().name)
        and file_sha256(file) != stored
    ]


def _model(model) -> Finding:
    name = model or "embedded model"
    try:
        pipe = Pipeline.load(model)
        if damaged := damaged_files(pipe.folder):
            names = name_first(str(file) for file in damaged)
            return Finding(name, f"not as it was downloaded: {names}", "delete it and run again")
        began = time.perf_counter()
        settings = pipe.settings("a cat", steps=1)
        pipe.decode(last_step(pipe.stream(settings)).x)
    except SnapGenError as e:
        return Finding(name, "does not draw", str(e))
    seconds = time.perf_counter() - began
    found = f"draws: one step at {pipe.variant} {seconds:.1f} s; digest {pipe.digests['model']}"
    return Finding(name, found)
