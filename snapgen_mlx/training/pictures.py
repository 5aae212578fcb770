"""A folder of pictures with captions: found, checked, and read as RGB or with transparency."""

import hashlib
import io
import warnings
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path, PurePosixPath
from types import ModuleType

import numpy as np
from PIL import Image, ImageOps, PngImagePlugin, UnidentifiedImageError

from ..errors import SnapGenError
from ..files import name_impostor
from ..srgb import to_rgb, upright
from .picture_list import METADATA, find_file, rows

pillow_heif: ModuleType | None = None
with suppress(ImportError):
    pillow_heif = import_module("pillow_heif")
    pillow_heif.register_heif_opener()

HEIC = (b"ftyphe", b"ftypmif1", b"ftypmsf1")  # what a HEIC file has after its first four bytes
# Of a PNG's text and colour profile: workflows of several MB are common.
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY = 64 << 20


@dataclass
class Example:
    file: Path
    captions: list[str]
    digest: str = ""  # SHA-256 of the file
    aspect: float = 1.0  # width / height, upright
    concept: str = ""  # what it shows
    repeats: int = 1  # how often it is drawn, beside others


def scan_folder(folder, caption: str | None = None) -> tuple[list[Example], list[str]]:
    """Read a folder of pictures with captions. Every picture is decoded once.

    ``metadata.jsonl`` or ``metadata.csv`` lists the pictures: ``file_name`` (or ``image``) and
    ``text`` (or ``caption``, ``prompt``). In the former, ``captions`` may list several phrasings.
    ``concept`` names what a picture shows; otherwise its first caption does. ``repeats`` says how
    often it is drawn beside others. Without a list, each picture directly in the folder has its
    caption in a ``.txt`` or ``.caption`` file of its name. So has each picture in a subfolder
    ``10_NAME``: it is drawn ten times as often, and NAME is its caption if it has no other.

    Args:
        folder: of the pictures.
        caption: for pictures that have none.

    Returns:
        The examples, and a line for each picture that cannot be used. ``picture_list.left_out``
        says which pictures are left out. Files that systems put beside pictures (.DS_Store,
        ._NAME.jpg) are ignored.

    Raises:
        SnapGenError: the folder holds no pictures.
    """
    folder = Path(folder)
    examples, bad = [], []
    try:
        for place, row in rows(folder):
            try:
                example = _example(folder, row, caption)
                place = row["file_name"] if isinstance(row, dict) else place
                example.digest, example.aspect = _check(example.file)
                examples.append(example)
            except Exception as e:  # decoders raise almost anything on damaged files
                bad.append(f"{place} ({_reason(e)})")
    except OSError as e:
        raise SnapGenError(f"cannot read the data in {folder}: {_reason(e)}") from e
    if not examples and not bad:
        for name in METADATA:
            if (folder / name).is_file():
                raise SnapGenError(f"{folder / name} names no picture")
        raise SnapGenError(
            f"{folder} itself holds no picture; PNG, JPEG, WebP and TIFF are read, and those in "
            "folders below where metadata.jsonl names them"
        )
    return examples, bad


def read_folder(folder, caption: str | None = None) -> list[Example]:
    """``scan_folder`` that raises SnapGenError, naming the bad pictures, when there are any."""
    examples, bad = scan_folder(folder, caption)
    if bad:
        captions = any("(no caption)" in line for line in bad)
        raise SnapGenError(
            f"{folder}: {len(bad)} of {len(bad) + len(examples)} pictures cannot be used: "
            f"{shorten(bad)}; repair them, or leave them out with --skip-bad"
            + (", or give --caption for those without" if captions else "")
        )
    return examples


def shorten(items: list[str], most: int = 10) -> str:
    more = f" and {len(items) - most} more" if len(items) > most else ""
    return ", ".join(items[:most]) + more


def _example(folder: Path, row, caption: str | None) -> Example:
    """Raises ValueError for a row that is no example."""
    if isinstance(row, ValueError):
        raise row
    name = row.get("file_name")
    if not isinstance(name, str) or not name:
        raise ValueError("no file_name")
    # Not by resolved paths: downloaded data sets are folders of links.
    if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
        raise ValueError(f"{name} is outside the folder")
    text = row.get("text")
    if isinstance(text, str) and not text.strip():
        text = None
    captions = row.get("captions") or [text or caption]
    if captions == [None]:
        raise ValueError("no caption")
    if not isinstance(captions, list) or not all(map(_is_text, captions)):
        raise ValueError("its captions are no texts")
    return Example(
        find_file(folder, name),
        captions,
        concept=str(row.get("concept") or captions[0]),
        repeats=_repeats(row.get("repeats", 1)),
    )


def _repeats(value) -> int:
    number = int(value) if isinstance(value, int) or str(value).isdecimal() else 0
    if not 0 < number < 10_000:
        raise ValueError(f"repeats is {value!r}; it must be a whole number from 1 to 9999")
    return number


def _is_text(caption) -> bool:
    # Half a surrogate pair, which JSON can hold and no tokenizer reads, raises a ValueError.
    return isinstance(caption, str) and bool(caption.strip().encode())


def _check(path: Path) -> tuple[str, float]:
    """SHA-256 and aspect of a picture's file, once it has been decoded."""
    data = path.read_bytes()
    try:
        image = _open(io.BytesIO(data))
    except UnidentifiedImageError:
        if pillow_heif is None and data[4:].startswith(HEIC):
            raise ValueError("HEIC, read after: pip install 'snapgen-mlx[heic]'") from None
        if what := name_impostor(data[:64]):
            raise ValueError(what) from None
        raise
    with image:
        if image.format != "HEIF":  # which would give its thumbnail
            image.draft("RGB", (64, 64))  # a JPEG is decoded at a smaller scale: faster
        width, height = to_rgb(image).size
    return hashlib.sha256(data).hexdigest(), width / height


def _open(file) -> Image.Image:
    with warnings.catch_warnings():
        # Of large pictures; Pillow refuses those that are twice as large.
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        return Image.open(file)


def _reason(e: Exception) -> str:
    if isinstance(e, FileNotFoundError):
        return "missing"
    if isinstance(e, UnidentifiedImageError):
        return "not a picture"
    text = getattr(e, "strerror", None) or str(e) or type(e).__name__
    return " ".join(text.split())


def load_image(path, size: tuple[int, int], mirror: bool = False, channels: int = 3) -> np.ndarray:
    """A picture as an autoencoder takes it, scaled to cover ``size`` and cut at the centre.

    Args:
        path: of the file.
        size: (H, W).
        mirror: turn left and right.
        channels: 3 for a picture on white; 4 for premultiplied red, green and blue, and alpha.

    Returns:
        float32 (H, W, channels) in [-1, 1].
    """
    try:
        with _open(path) as image:
            image = to_rgb(image) if channels == 3 else upright(image).convert("RGBA")
            if image.size != size[::-1]:
                image = ImageOps.fit(image, size[::-1])
            if mirror:
                image = ImageOps.mirror(image)
            pixels = np.array(image, dtype=np.float32)
            if channels == 4:
                pixels[..., :3] *= pixels[..., 3:] / 255
            return pixels / 127.5 - 1
    except Exception as e:  # decoders raise almost anything on damaged files
        raise SnapGenError(f"cannot read the picture {path}: {_reason(e)}") from e
