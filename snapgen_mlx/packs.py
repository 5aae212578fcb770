"""Sticker packs: pictures trimmed and padded to the limits of chats, in folders with a manifest."""

import io
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from .errors import UsageError
from .files import write_json
from .sheet import save_sheet

STICKER, STICKER_BYTES = 512, 100_000  # side in pixels and bytes of WebP stickers for messengers
EMOJI = 128  # side in pixels of PNG emoji for chats
ICON_SIZES = (16, 32, 48, 64, 128, 256)
MARGIN = 0.03  # part of the side that stays free around a sticker
BACKGROUND = 12  # largest difference within a border that counts as background, of 255


@dataclass
class Sticker:
    """One picture of a pack."""

    name: str  # of its files, without suffix
    image: Image.Image
    settings: dict


def trimmed(image: Image.Image, side: int) -> Image.Image:
    """The visible part of a picture, centred in a transparent square.

    In a picture without transparency, everything is visible that differs from the border's colour;
    if the border has more than one colour, the whole picture is. The colour itself stays.

    Args:
        image: the picture.
        side: of the square, in pixels.
    """
    image = image.convert("RGBA")
    box = _visible(np.array(image)) or (0, 0, *image.size)
    part = image.crop(box)
    room = side - 2 * round(MARGIN * side)
    scale = room / max(part.size)
    width, height = (max(1, round(n * scale)) for n in part.size)
    size = width, height
    # Colours below no alpha must not shine through at the edges.
    part = part.convert("RGBa").resize(size, Image.Resampling.LANCZOS).convert("RGBA")
    square = Image.new("RGBA", (side, side))
    square.paste(part, ((side - size[0]) // 2, (side - size[1]) // 2))
    return square


def _visible(a: np.ndarray) -> tuple[int, int, int, int] | None:
    """Box of what is visible in RGBA pixels (H, W, 4); None when nothing or all of it is."""
    seen = a[..., 3] > 8
    if seen.all():
        rgb = a[..., :3].astype(int)
        border = np.concatenate([rgb[0], rgb[-1], rgb[:, 0], rgb[:, -1]])
        color = np.median(border, axis=0)
        if np.abs(border - color).max() <= 4 * BACKGROUND:
            seen = np.abs(rgb - color).max(axis=2) > BACKGROUND
    ys, xs = seen.nonzero()
    return (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1) if len(ys) else None


def webp_below(image: Image.Image, limit: int) -> bytes:
    """A picture as WebP: lossless if that is small enough, otherwise at the best quality that is.

    Args:
        image: the picture.
        limit: most bytes.

    Raises:
        UsageError: no quality is small enough.
    """
    tries: list[dict[str, int]] = [{"lossless": True}, *({"quality": q} for q in range(95, 0, -10))]
    for options in tries:
        file = io.BytesIO()
        image.save(file, format="WEBP", method=4, **options)
        if file.tell() <= limit:
            return file.getvalue()
    raise UsageError(f"a picture needs more than {limit} bytes at any quality")


def write_pack(folder, title: str, stickers: Iterable[Sticker]) -> list[dict]:
    """Write a pack into an empty folder (``files.atomic_folder`` makes one).

    ``stickers/`` holds 512 pixel WebP below 100 KB, ``emoji/`` 128 pixel PNG, ``originals/`` the
    pictures as drawn, ``icons/`` .ico and .icns; ``sheet.png`` shows all and ``manifest.json``
    lists files and settings. Each sticker is written as it comes.

    Returns:
        The manifest's entries.
    """
    folder = Path(folder)
    for name in ("stickers", "emoji", "originals", "icons"):
        (folder / name).mkdir()
    entries: list[dict] = []
    rows: dict[str, list] = {}
    for sticker in stickers:
        large, small = (trimmed(sticker.image, side) for side in (STICKER, EMOJI))
        files = {
            "sticker": f"stickers/{sticker.name}.webp",
            "emoji": f"emoji/{sticker.name}.png",
            "original": f"originals/{sticker.name}.png",
            "ico": f"icons/{sticker.name}.ico",
            "icns": f"icons/{sticker.name}.icns",
        }
        (folder / files["sticker"]).write_bytes(webp_below(large, STICKER_BYTES))
        small.save(folder / files["emoji"], optimize=True)
        sticker.image.save(folder / files["original"])
        large.save(folder / files["ico"], sizes=[(n, n) for n in ICON_SIZES])
        large.save(folder / files["icns"])
        entries.append({"name": sticker.name, "files": files, "settings": sticker.settings})
        rows.setdefault(sticker.settings["prompt"], []).append(small)
    save_sheet(folder / "sheet.png", list(rows.values()), list(rows))
    write_json(folder / "manifest.json", {"title": title, "pictures": entries})
    return entries
