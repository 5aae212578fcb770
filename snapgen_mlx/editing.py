"""Pictures to start from: the whole of one, a part under a mask, or its surroundings."""

import math
import operator

import mlx.core as mx
import numpy as np
from PIL import Image, ImageFilter, ImageOps

from .errors import UsageError, shown
from .srgb import upright

SEAM = 100  # the longer side divided by the width of the blended seam
SQUEEZE = 0.05  # change of the logarithm of width / height that is seen
MAX_SIDE = 8192  # largest side of an edited picture, in pixels


class Edit:
    """A picture that is drawn anew, wholly or in part.

    Args:
        image: any mode; transparency is kept.
        mask: of the image's size; white, or transparent where it has transparency, is drawn anew
            and the rest stays bit for bit, once the image is 8-bit sRGB. None: everything changes,
            by ``Settings.strength``.
        margins: pixels (left, top, right, bottom) to add around the image, drawn anew.

    Raises:
        UsageError: a mask of another size or with nothing to draw, or sides out of bounds.
    """

    def __init__(
        self,
        image: Image.Image,
        mask: Image.Image | None = None,
        margins: tuple[int, int, int, int] | None = None,
    ):
        for picture in (image,) if mask is None else (image, mask):
            if not isinstance(picture, Image.Image):
                raise UsageError(f"image and mask must be PIL's, not {shown(picture)}")
            _check_sides(picture.size)
        try:
            self.image = upright(image)
        except ValueError as e:
            raise UsageError(f"the picture to start from: {e}") from e
        self.mask = None if mask is None else _to_mask(ImageOps.exif_transpose(mask))
        if self.mask is not None and self.mask.size != self.image.size:
            raise UsageError(
                f"the mask has {_size(self.mask)} pixels and the picture {_size(self.image)}; "
                "they must have the same size"
            )
        if margins is not None:
            self._widen(margins)
        if self.mask is not None and self.mask.getextrema()[1] == 0:
            raise UsageError("the mask is all black; paint white what should be drawn again")

    def _widen(self, margins: tuple[int, int, int, int]) -> None:
        try:
            left, top, right, bottom = map(operator.index, margins)
        except (TypeError, ValueError) as e:
            raise UsageError(f"margins are four whole numbers, not {shown(margins)}") from e
        margins = left, top, right, bottom
        if min(margins) < 0 or sum(margins) == 0 or max(margins) > MAX_SIDE:
            raise UsageError(f"cannot widen a picture by {margins}; give pixels, not all of them 0")
        _check_sides((self.image.width + left + right, self.image.height + top + bottom))
        pads = ((top, bottom), (left, right))
        # The edge goes on outside, so that the first look at the new part is a likely one.
        pixels = np.pad(np.array(self.image), (*pads, (0, 0)), mode="edge")
        old = np.zeros(self.image.size[::-1], np.uint8) if self.mask is None else self.mask
        self.mask = Image.fromarray(np.pad(np.array(old), pads, constant_values=255))
        self.image = Image.fromarray(pixels)

    def fit(self, side: int, multiple: int) -> tuple[int, int]:
        """Width and height in pixels to work at: the picture's shape at the model's own area.

        Args:
            side: the model's own side in pixels; the area is side².
            multiple: each side is rounded to a multiple of it.
        """
        w, h = self.image.size
        scale = side / (w * h) ** 0.5
        width, height = (max(round(n * scale / multiple), 1) * multiple for n in (w, h))
        return width, height

    def changes_shape(self, width: int, height: int) -> bool:
        """Whether the result, drawn with these sides, is visibly wider or narrower than the
        picture. Under a mask it has the picture's own sides again."""
        own = self.image.width / self.image.height
        return self.mask is None and abs(math.log(width / height / own)) > SQUEEZE

    def pixels(self, width: int, height: int, channels: int) -> mx.array:
        """The picture as an autoencoder takes it, (1, height, width, channels) in [-1, 1].

        Args:
            width: in pixels.
            height: in pixels.
            channels: 4 for premultiplied red, green and blue, and alpha; 3 for a picture on white.
        """
        a = np.array(self.image.convert("RGBA"), dtype=np.float32) / 255
        rgb, alpha = a[..., :3], a[..., 3:]
        a = np.concatenate([rgb * alpha, alpha], axis=-1) if channels == 4 else rgb * alpha
        if channels == 3:
            a = a + 1 - alpha
        if self.image.size != (width, height):
            planes = [
                Image.fromarray(a[..., i]).resize((width, height), Image.Resampling.LANCZOS)
                for i in range(channels)
            ]
            a = np.stack([np.array(plane) for plane in planes], axis=-1).clip(0, 1)
        return mx.array(a * 2 - 1)[None]

    def latent_mask(self, h: int, w: int) -> mx.array | None:
        """(1, h, w, 1): 1 where a latent position covers anything to draw; None without a mask."""
        if self.mask is None:
            return None
        # Averages of a cell above nothing; BOX takes every pixel of it into account.
        cells = Image.fromarray(np.array(self.mask, dtype=np.float32))
        drawn = np.array(cells.resize((w, h), Image.Resampling.BOX)) > 0
        return mx.array(drawn.astype(np.float32))[None, ..., None]

    def finish(self, drawn: Image.Image) -> Image.Image:
        """The result: ``drawn`` as it is, or under the mask and blended with what stays."""
        if self.mask is None:
            return drawn
        if drawn.mode == "RGBA" and self.image.mode == "RGB":
            drawn = Image.alpha_composite(Image.new("RGBA", drawn.size, "white"), drawn)
        drawn = drawn.convert(self.image.mode)
        if drawn.size != self.image.size:
            drawn = drawn.resize(self.image.size, Image.Resampling.LANCZOS)
        return Image.composite(drawn, self.image, self._seam())

    def _seam(self) -> Image.Image:
        """The mask, falling off towards its border; exactly 0 wherever the mask is."""
        radius = max(1, round(max(self.image.size) / SEAM))
        assert self.mask is not None
        inner, total = self.mask, np.array(self.mask, dtype=np.float32)
        for _ in range(radius):
            inner = inner.filter(ImageFilter.MinFilter(3))
            total += np.array(inner)
        return Image.fromarray(np.round(total / (radius + 1)).astype(np.uint8))


def read_picture(path) -> Image.Image:
    """A picture file, read whole. Raises UsageError when it is none."""
    try:
        with Image.open(path) as image:
            _check_sides(image.size)
            image.load()
            return image
    except UsageError:
        raise
    except Exception as e:  # decoders raise almost anything on damaged files
        what = "the file" if hasattr(path, "read") else path
        raise UsageError(f"cannot read {what} as a picture: {e}") from e


def _to_mask(mask: Image.Image) -> Image.Image:
    """255 where to draw, 0 elsewhere."""
    if mask.has_transparency_data:
        alpha = mask.convert("RGBA").getchannel("A")
        if np.asarray(alpha).min() < 255:
            return alpha.point(lambda a: 255 if a < 128 else 0)
    return mask.convert("L").point(lambda v: 255 if v >= 128 else 0)


def _check_sides(size: tuple[int, int]) -> None:
    """Before any of so many pixels is made. Raises UsageError."""
    if max(size) > MAX_SIDE:
        raise UsageError(f"a picture of {size[0]}x{size[1]} pixels; {MAX_SIDE} a side at most")


def _size(image: Image.Image) -> str:
    return "{}x{}".format(*image.size)


def parse_margins(text: str) -> tuple[int, int, int, int]:
    """ "32" or "LEFT,TOP,RIGHT,BOTTOM" as margins in pixels. Raises UsageError otherwise."""
    parts = text.split(",")
    try:
        numbers = tuple(int(part) for part in parts)
    except ValueError:
        numbers = ()
    if len(numbers) == 1:
        numbers *= 4
    if len(numbers) != 4:
        raise UsageError(
            f"{text!r} is not a margin; give pixels, such as 32 or LEFT,TOP,RIGHT,BOTTOM"
        )
    return numbers
