"""A folder of pictures with captions: found, checked, and read as RGB."""

import csv
import hashlib
import io
import json
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from ..errors import SnapGenError

try:
    import pillow_heif
except ImportError:
    pillow_heif = None
else:
    pillow_heif.register_heif_opener()

PICTURES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif"}
PICTURES |= {".heic", ".heif"}
HEIC = (b"ftyphe", b"ftypmif1", b"ftypmsf1")  # what such a file has after four bytes
METADATA = ("metadata.jsonl", "metadata.csv")
LITTER = {".DS_Store", "__MACOSX", "Thumbs.db", "ehthumbs.db", "desktop.ini"}


@dataclass
class Example:
    file: Path
    captions: list[str]
    digest: str = ""  # SHA-256 of the file
    aspect: float = 1.0  # width / height, upright
    concept: str = ""  # what it shows


def scan_folder(folder, caption: str | None = None) -> tuple[list[Example], list[str]]:
    """Examples of a folder of pictures, and a line for each picture that cannot be used.

    An ImageFolder: ``metadata.jsonl`` or ``metadata.csv`` with ``file_name`` and ``text`` (or
    ``caption``), and in the former optionally ``captions``, a list of phrasings; ``concept`` names
    what is shown, else the first caption does. Without either file, each picture directly in the
    folder has its caption in a ``.txt`` of its name. ``caption`` is given to pictures that have
    none. What systems leave beside pictures (.DS_Store, ._NAME.jpg) is passed over. Every picture
    is decoded once.
    Raises SnapGenError for a folder without pictures.
    """
    folder = Path(folder)
    examples, bad = [], []
    try:
        for place, row in _rows(folder):
            if _is_litter(row):
                continue
            try:
                example = _example(folder, row, caption)
                place = row["file_name"]
                example.digest, example.aspect = _check(example.file)
                examples.append(example)
            except Exception as e:  # decoders raise almost anything on damaged files
                bad.append(f"{place} ({_reason(e)})")
    except (OSError, UnicodeDecodeError, csv.Error) as e:
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


def _rows(folder: Path) -> Iterator[tuple[str, dict | ValueError]]:
    """(place, row) of each picture; a row has file_name, text and perhaps captions, or is what
    made it unreadable."""
    jsonl, table = (folder / name for name in METADATA)
    if (path := jsonl).is_file():
        # Not splitlines: JSON strings may hold U+2028 and the like.
        for number, line in enumerate(path.read_text(encoding="utf-8-sig").split("\n"), 1):
            if line.strip():
                try:
                    row = json.loads(line)
                except (ValueError, RecursionError):
                    row = None
                if not isinstance(row, dict):
                    row = ValueError("not a JSON object")
                yield f"{path.name}:{number}", row
    elif (path := table).is_file():
        rows = csv.DictReader(io.StringIO(path.read_text(encoding="utf-8-sig"), newline=""))
        rows.fieldnames = [name.strip() for name in rows.fieldnames or []]
        if "file_name" not in rows.fieldnames:
            found = ", ".join(map(repr, rows.fieldnames)) or "none"
            raise SnapGenError(f"{path} has no column file_name, separated by commas, but {found}")
        for row in rows:
            yield f"{path.name}:{rows.line_num}", row
    else:
        # Hidden files: a Mac leaves ._NAME.jpg beside NAME.jpg on other systems' disks.
        files = [file for file in sorted(folder.iterdir()) if not file.name.startswith(".")]
        texts = {f.stem: f for f in files if f.suffix.lower() == ".txt" and f.is_file()}
        for file in files:
            if file.suffix.lower() in PICTURES:
                try:
                    text = texts[file.stem].read_text(encoding="utf-8-sig")
                except KeyError:
                    text = ""
                except UnicodeDecodeError:
                    yield file.name, ValueError(f"{texts[file.stem].name} is not UTF-8")
                    continue
                yield file.name, {"file_name": file.name, "text": " ".join(text.split())}


def _is_litter(row) -> bool:
    """Whether the row names what systems leave in folders, which lists made by scripts hold."""
    name = row.get("file_name") if isinstance(row, dict) else None
    parts = PurePosixPath(name).parts if isinstance(name, str) else ()
    return any(part in LITTER or part.startswith("._") for part in parts)


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
    text = row.get("text") or row.get("caption")
    if isinstance(text, str) and not text.strip():
        text = None
    captions = row.get("captions") or [text or caption]
    if captions == [None]:
        raise ValueError("no caption")
    if not isinstance(captions, list) or not all(map(_is_text, captions)):
        raise ValueError("its captions are no texts")
    return Example(folder / name, captions, concept=str(row.get("concept") or captions[0]))


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


def to_rgb(image: Image.Image) -> Image.Image:
    """8-bit RGB of any mode: turned as EXIF says, 16 bits scaled, transparency on white."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # convert() would clip 16 bits at 255
        levels = np.clip(np.asarray(image) / 257, 0, 255).round()
        image = Image.fromarray(levels.astype(np.uint8))
    if image.mode == "F":
        raise ValueError("floating-point pixels are not read; save it with 8 or 16 bits")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def load_image(path, size: tuple[int, int], mirror: bool = False) -> np.ndarray:
    """RGB float32 (H, W, 3) in [-1, 1], scaled to cover ``size`` (H, W) and cut at the centre."""
    try:
        with _open(path) as image:
            image = to_rgb(image)
            if image.size != size[::-1]:
                image = ImageOps.fit(image, size[::-1])
            if mirror:
                image = ImageOps.mirror(image)
            return np.asarray(image, dtype=np.float32) / 127.5 - 1
    except Exception as e:  # decoders raise almost anything on damaged files
        raise SnapGenError(f"cannot read the picture {path}: {_reason(e)}") from e
