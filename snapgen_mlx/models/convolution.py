"""A convolution that needs less time and memory on a CPU."""

import mlx.core as mx
import mlx.nn as nn

from ..device import on_gpu

# Numbers of an unfolded input that stay in a CPU's cache: 8 MB in float32.
UNFOLDED = 1 << 21


class Conv3x3(nn.Conv2d):
    """A 3x3 convolution with padding. A CPU computes some rows at a time, with the same result.

    On a CPU MLX unfolds the input to nine times its size. Where this fits into the cache, the
    convolution takes about half of the time.
    """

    def __init__(self, in_dim: int, out_dim: int):
        super().__init__(in_dim, out_dim, 3, padding=1)

    def __call__(self, x):
        """x (B, H, W, C) -> (B, H, W, out_dim)."""
        B, H, W, C = x.shape
        rows = max(UNFOLDED // (9 * B * W * C), 1)
        if rows >= H or on_gpu():
            return super().__call__(x)
        padded = mx.pad(x, [(0, 0), (1, 1), (1, 1), (0, 0)])
        parts = [padded[:, top : top + rows + 2] for top in range(0, H, rows)]
        return mx.concatenate([mx.conv2d(a, self.weight) for a in parts], axis=1) + self.bias
