"""From a network's pictures, with premultiplied alpha or without any, to PIL's."""

import re

import mlx.core as mx
import numpy as np
from PIL import Image

from .errors import UsageError

TRANSPARENT = "transparent"
WHITE = "white"


def check_background(background: str | None, image_channels: int) -> None:
    """Raise UsageError unless pictures of so many channels can have this background.

    Args:
        background: "transparent", "white", "#rrggbb", or None, which is transparent where the
            pictures have alpha and white where they have none.
    """
    if background is None:
        return
    if background not in (TRANSPARENT, WHITE) and not re.fullmatch("#[0-9a-fA-F]{6}", background):
        raise UsageError(
            f"background {background!r}; it must be white, transparent or a colour such as #ffcc00"
        )
    if image_channels == 3 and background != WHITE:
        raise UsageError(
            f"background {background}: this model draws no transparent pictures; leave it out"
        )


def to_picture(image: mx.array, background: str | None = None) -> Image.Image:
    """A network's picture as PIL's: RGBA where it is transparent, else RGB.

    Args:
        image: (H, W, 3), or (H, W, 4) with premultiplied alpha, in [-1, 1].
        background: as of ``check_background``.

    Raises:
        UsageError: when the picture cannot have this background.
    """
    check_background(background, image.shape[-1])
    if image.shape[-1] == 3:
        return _from_array(mx.round((image.astype(mx.float32) + 1) * 127.5))
    color, alpha = _premultiplied(image)
    if background in (None, TRANSPARENT):
        # PNG's colours are straight. Where alpha rounds to 0 there is no colour to know.
        levels = mx.round(255 * alpha)
        straight = mx.where(levels > 0, mx.round(255 * color / mx.maximum(alpha, 1e-6)), 0)
        return _from_array(mx.concatenate([straight, levels], axis=-1))
    hexadecimal = "ffffff" if background == WHITE else background[1:]
    behind = mx.array(list(bytes.fromhex(hexadecimal)), mx.float32)
    return _from_array(mx.round(255 * color + (1 - alpha) * behind))


def on_white(images: mx.array) -> mx.array:
    """A network's pictures (..., 3 or 4) in [-1, 1] as RGB (..., 3) in [0, 1]."""
    if images.shape[-1] == 3:
        return mx.clip((images.astype(mx.float32) + 1) / 2, 0, 1)
    color, alpha = _premultiplied(images)
    return color + 1 - alpha


def _premultiplied(images: mx.array) -> tuple[mx.array, mx.array]:
    """Colours and alpha in [0, 1]; premultiplied colours are never above alpha."""
    images = mx.clip((images.astype(mx.float32) + 1) / 2, 0, 1)
    return mx.minimum(images[..., :3], images[..., 3:]), images[..., 3:]


def _from_array(image: mx.array) -> Image.Image:
    return Image.fromarray(np.array(mx.clip(image, 0, 255).astype(mx.uint8)))
