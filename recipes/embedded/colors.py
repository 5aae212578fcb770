"""Recolouring drawings in OKLab, a space in which lightness, hue and chroma are perceptual.

OKLab: B. Ottosson, "A perceptual color space for image processing" (2020).
"""

import numpy as np

# Lightness, chroma and hue (degrees) of GenEval's ten colours.
COLORS = {
    "red": (0.60, 0.22, 27),
    "orange": (0.74, 0.17, 58),
    "yellow": (0.89, 0.17, 98),
    "green": (0.66, 0.18, 142),
    "blue": (0.58, 0.18, 258),
    "purple": (0.52, 0.19, 303),
    "pink": (0.79, 0.13, 353),
    "brown": (0.45, 0.08, 52),
    "black": (0.23, 0.0, 0),
    "white": (0.95, 0.0, 0),
}
# Contrast that is kept: shading shows less on what is nearly black or white.
CONTRAST = {"black": 0.35, "white": 0.3}
KEPT_CONTRAST = 0.7

_TO_LMS = np.array(
    [
        [0.4122214708, 0.5363325363, 0.0514459929],
        [0.2119034982, 0.6806995451, 0.1073969566],
        [0.0883024619, 0.2817188376, 0.6299787005],
    ],
    np.float32,
)
_TO_LAB = np.array(
    [
        [0.2104542553, 0.7936177850, -0.0040720468],
        [1.9779984951, -2.4285922050, 0.4505937099],
        [0.0259040371, 0.7827717662, -0.8086757660],
    ],
    np.float32,
)
_FROM_LMS, _FROM_LAB = np.linalg.inv(_TO_LMS), np.linalg.inv(_TO_LAB)
_LINEAR = (np.arange(256) / 255).astype(np.float32)
_LINEAR = np.where(_LINEAR <= 0.04045, _LINEAR / 12.92, ((_LINEAR + 0.055) / 1.055) ** 2.4)


def to_oklab(rgb: np.ndarray) -> np.ndarray:
    """sRGB (..., 3) uint8 -> lightness, a, b (..., 3) float32."""
    return np.cbrt(_LINEAR[rgb].astype(np.float32) @ _TO_LMS.T) @ _TO_LAB.T


def from_oklab(lab: np.ndarray) -> np.ndarray:
    """The inverse; colours outside sRGB are clipped."""
    linear = np.clip((lab @ _FROM_LAB.T) ** 3 @ _FROM_LMS.T, 0, 1)
    curved = np.where(linear <= 0.0031308, linear * 12.92, 1.055 * linear ** (1 / 2.4) - 0.055)
    return np.rint(curved * 255).astype(np.uint8)


def recolor(sprite: np.ndarray, color: str) -> np.ndarray:
    """A drawing in another colour.

    What has colour of its own takes hue and chroma of ``color``, and its lightness moves to that of
    ``color`` with part of its contrast. Grey details (eyes, windows, outlines) stay, unless all of
    the drawing is grey.

    Args:
        sprite: straight RGBA (H, W, 4) uint8.
        color: a name of ``COLORS``.

    Returns:
        A new array of the same shape.
    """
    L0, C0, hue = COLORS[color]
    seen = sprite[..., 3] > 0
    lab = to_oklab(sprite[..., :3][seen])
    L, chroma = lab[:, 0], np.hypot(lab[:, 1], lab[:, 2])
    weight = sprite[..., 3][seen].astype(np.float32) / 255
    total = weight.sum() + 1e-6
    typical = float((chroma * weight).sum() / total)
    if typical > 0.035:
        part = np.clip(chroma / (0.6 * typical), 0, 1)  # how much of a pixel is recoloured
    else:
        part = np.clip((L - 0.15) / 0.2, 0, 1)  # a grey drawing: all but its black details
    middle = float((L * weight * part).sum() / ((weight * part).sum() + 1e-6))
    L1 = L0 + (L - middle) * CONTRAST.get(color, KEPT_CONTRAST)
    C1 = C0 * np.clip(chroma / max(typical, 0.035), 0.75, 1.15)
    angle = np.deg2rad(hue)
    target = np.stack([np.clip(L1, 0.05, 0.99), C1 * np.cos(angle), C1 * np.sin(angle)], -1)
    out = sprite.copy()
    mixed = lab + part[:, None] * (target.astype(np.float32) - lab)
    out[..., :3][seen] = from_oklab(mixed)
    return out
