"""The flow-matching loss [paper Eq. 4]: noise, timesteps, and its mean over fixed batches."""

import mlx.core as mx

from ..device import scalar
from ..models.dit import DiT


def training_shift(size: int) -> float:
    """Of the timesteps, by a picture's side in pixels: 1 up to 256, 3 at 1024 (training section 1),
    on a line between them."""
    return 1.0 + 2.0 * min(max(size - 256, 0) / 768, 1.0)


def sample_timesteps(key: mx.array, batch: int, shift: float) -> mx.array:
    """t (B,) of u = sigmoid(N(0, 1)), shifted: shift·u / (1 + (shift-1)·u) (training section 1)."""
    u = mx.sigmoid(mx.random.normal((batch,), key=key))
    return shift * u / (1 + (shift - 1) * u)


def add_noise(x0: mx.array, eps: mx.array, t: mx.array) -> tuple[mx.array, mx.array]:
    """x_t = (1-t)·x0 + t·eps and the velocity eps - x0; x0, eps (B, H, W, C), t (B,)."""
    t = t[:, None, None, None]
    return (1 - t) * x0 + t * eps, eps - x0


def validation_loss(model: DiT, batches) -> float:
    """Mean flow loss of one width over ``batches`` of (x0, eps, t, text, masks) (paper, 4)."""
    total, n = 0.0, 0
    for x0, eps, t, text, masks in batches:
        x_t, target = add_noise(x0, eps, t)
        error = model(x_t, t, text, masks).astype(mx.float32) - target
        total += scalar(error.square().mean()) * len(x0)
        n += len(x0)
    return total / n
