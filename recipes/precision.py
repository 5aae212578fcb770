"""Which number format matrix products run in."""

from contextlib import AbstractContextManager, nullcontext

import torch


def has_fast_bf16(device: str) -> bool:
    """Whether the device multiplies bfloat16 in hardware.

    A CPU without such instructions emulates them, about a hundred times slower than float32.
    """
    return device != "cpu" or torch.ops.mkldnn._is_mkldnn_bf16_supported()


def autocast(device: str = "cpu") -> AbstractContextManager:
    """Autocast to bfloat16 where it is fast; elsewhere float32, which changes only rounding."""
    return torch.autocast(device, torch.bfloat16) if has_fast_bf16(device) else nullcontext()
