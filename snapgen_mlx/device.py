"""What MLX computes on here: the type of floats, and the memory that it may use."""

import os
from typing import cast

import mlx.core as mx

SHARE = 0.8  # of a machine's memory may be MLX's where the system names no limit


def on_metal() -> bool:
    return mx.default_device() == mx.gpu


def compute_dtype() -> mx.Dtype:
    """float32 on a CPU, where half-precision matmuls crawl; bfloat16 on Metal."""
    return mx.bfloat16 if on_metal() else mx.float32


def scalar(a: mx.array) -> float:
    """The value of an array of one real number."""
    return cast(float, a.item())


def usable_memory() -> int:
    """Bytes that MLX may take on this machine: Metal's working set, or a share of all memory."""
    limit = mx.device_info().get("max_recommended_working_set_size")
    return cast(int, limit) or int(SHARE * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
