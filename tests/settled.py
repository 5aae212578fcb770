"""Memory of MLX's arrays once what earlier tests left has gone."""

import gc

import mlx.core as mx


def active_memory() -> int:
    """Bytes of arrays in use, without those that only cycles of earlier objects still hold: freed
    later, they would be missing from a peak."""
    gc.collect()
    return mx.get_active_memory()
