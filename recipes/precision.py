"""Which number format matrix products run in."""

import functools
import time
from contextlib import AbstractContextManager, nullcontext

import torch

SIDE = 1024  # of the square matrices that are timed


def seconds(dtype: torch.dtype) -> float:
    """The shortest of three square products on the CPU, after one that is not counted."""
    a = torch.ones(SIDE, SIDE, dtype=dtype)
    times = []
    for _ in range(4):
        start = time.perf_counter()
        a @ a
        times.append(time.perf_counter() - start)
    return min(times[1:])


@functools.cache
def has_fast_bf16(device: str) -> bool:
    """Whether the device multiplies bfloat16 faster than float32; a CPU is timed once.

    A CPU without such instructions emulates them, about a hundred times slower than float32. One
    with AVX512-BF16 alone is, according to its kind, twice as fast or half as fast.
    """
    if device != "cpu":
        return True
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return False
    return seconds(torch.bfloat16) < seconds(torch.float32)


def autocast(device: str = "cpu") -> AbstractContextManager:
    """Autocast to bfloat16 where it is fast; elsewhere float32, which changes only rounding."""
    return torch.autocast(device, torch.bfloat16) if has_fast_bf16(device) else nullcontext()
