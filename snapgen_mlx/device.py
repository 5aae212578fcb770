"""What MLX computes on here: the type of floats, and the memory that it may use."""

import os
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import cast

import mlx.core as mx

SHARE = 0.8  # part of a machine's memory that MLX may use if the system names no limit
CONTAINER_LIMITS = [
    Path("/sys/fs/cgroup", name) for name in ("memory.max", "memory/memory.limit_in_bytes")
]
CACHE = 8  # this memory divided by the part that may be kept for reuse
DTYPES = {"float16": mx.float16, "bfloat16": mx.bfloat16, "float32": mx.float32}


def on_gpu() -> bool:
    """Whether MLX computes on a GPU: Metal's, or one of CUDA."""
    return mx.default_device() == mx.gpu


def on_metal() -> bool:
    return on_gpu() and mx.metal.is_available()


def device_name() -> str:
    if on_metal():
        return "Metal"
    return "CUDA" if on_gpu() else "the CPU"


def inference_dtype() -> mx.Dtype:
    """float32 on a CPU, where half-precision matmuls crawl; float16 on a GPU.

    A picture keeps 66 to 68 dB of its float32 values in float16, 48 to 49 in bfloat16, which the
    GPUs of M1 and M2 have to emulate as well (docs/performance.md).
    """
    return mx.float16 if on_gpu() else mx.float32


def training_dtype() -> mx.Dtype:
    """Of the copies that a step computes with: gradients need bfloat16's range."""
    return mx.bfloat16 if on_gpu() else mx.float32


def wide(dtype: mx.Dtype | None) -> mx.Dtype:
    """The type for a network whose values leave float16's range: bfloat16 in its place."""
    dtype = dtype or inference_dtype()
    return mx.bfloat16 if dtype == mx.float16 else dtype


def scalar(a: mx.array) -> float:
    """The value of an array of one real number."""
    return cast(float, a.item())


def matmul_speed(n: int = 1024, dtype: mx.Dtype = mx.float32) -> float:
    """GFLOP/s of the product of two matrices of n rows and columns, the best of three."""
    a = mx.random.normal((n, n)).astype(dtype)
    mx.eval(a @ a)
    best = float("inf")
    for _ in range(3):
        began = time.perf_counter()
        mx.eval(a @ a)
        best = min(best, time.perf_counter() - began)
    return 2 * n**3 / best / 1e9


def usable_memory() -> int:
    """Bytes that MLX may take on this machine: a GPU's working set, or a share of all memory."""
    if limit := _working_set():
        return limit
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return int(SHARE * min([memory, *_container_limits()]))


def _container_limits() -> Iterator[int]:
    """What the container on Linux may take at most; a huge number stands for no limit."""
    for file in CONTAINER_LIMITS:
        with suppress(OSError, ValueError):  # not there, or "max"
            yield int(file.read_text())


def set_limits() -> None:
    """Keep weights from being paged out on a GPU, and little of what is free again.

    Near the limit a Mac would page weights out between two steps. Buffers that are free again
    stay with the process up to the cache's limit, which an idle one has no use for.
    """
    if on_gpu() and (limit := _working_set()):
        mx.set_wired_limit(limit)
        mx.set_cache_limit(limit // CACHE)


def _working_set() -> int | None:
    return cast(int | None, mx.device_info().get("max_recommended_working_set_size"))
