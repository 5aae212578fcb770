"""Pictures of any mode and colour profile as 8-bit sRGB."""

import io

import numpy as np
from PIL import Image, ImageCms, ImageOps

SRGB = ImageCms.createProfile("sRGB")


def upright(image: Image.Image) -> Image.Image:
    """8-bit sRGB of any mode, with its transparency: turned as EXIF says, 16 bits scaled, colours
    as the profile in the file says."""
    profile = image.info.get("icc_profile")
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # convert() would clip 16 bits at 255
        levels = np.clip(np.asarray(image) / 257, 0, 255).round()
        image = Image.fromarray(levels.astype(np.uint8))
    if image.mode == "F":
        raise ValueError("floating-point pixels are not read; save it with 8 or 16 bits")
    if profile:
        image = _to_srgb(image, profile)
    return image.convert("RGBA" if image.has_transparency_data else "RGB")


def to_rgb(image: Image.Image) -> Image.Image:
    """As of ``upright``, transparency on white."""
    image = upright(image)
    if image.mode == "RGBA":
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _is_srgb(profile: ImageCms.ImageCmsProfile) -> bool:
    """Whether it moves no colour by more than two levels. Names alone do not tell: there is a
    linear "sRGB"."""
    levels = np.arange(0, 256, 51, dtype=np.uint8)
    colours = np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(6, 36, 3)
    moved = ImageCms.profileToProfile(Image.fromarray(colours), profile, SRGB, outputMode="RGB")
    return moved is not None and np.abs(np.array(moved, int) - colours).max() <= 2


def _to_srgb(image: Image.Image, profile: bytes) -> Image.Image:
    """The picture in sRGB; as it is when its profile is damaged or of other channels."""
    transparent = image.has_transparency_data
    if image.mode in ("P", "PA") or (transparent and image.mode != "RGBA"):
        image = image.convert("RGBA" if transparent else "RGB")
    alpha = image.getchannel("A") if transparent else None
    colours = image.convert("RGB") if transparent else image
    try:
        theirs = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if colours.mode == "RGB" and _is_srgb(theirs):  # rounding would change it
            return image
        out = ImageCms.profileToProfile(colours, theirs, SRGB, outputMode="RGB") or colours
    except (ImageCms.PyCMSError, OSError, ValueError):
        return image
    if alpha:
        out.putalpha(alpha)
    return out
