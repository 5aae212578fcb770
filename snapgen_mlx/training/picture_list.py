"""Which pictures a folder holds, and what their captions are, before any is decoded."""

import codecs
import csv
import io
import json
import re
import unicodedata
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from PIL import Image

from ..errors import SnapGenError

METADATA = ("metadata.jsonl", "metadata.csv")
SIDECARS = (".txt", ".caption")
LITTER = {".DS_Store", "__MACOSX", "Thumbs.db", "ehthumbs.db", "desktop.ini"}
REPEATED = re.compile(r"(?P<repeats>[1-9]\d{0,3})_(?P<name>.+)")  # a folder of sd-scripts
# Columns by their usual names, the best first.
FILE_NAME, TEXT = ("file_name", "image"), ("text", "caption", "prompt")
# Names under which pictures go around; others are looked into.
PICTURES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif"}
PICTURES |= {".heic", ".heif"}
# Pictures that are not read. What Pillow finds in a raw photo is its thumbnail.
UNREAD = {".jxl", ".svg", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".rw2", ".raf", ".exr"}
# Whole documents and films, which Pillow knows by their first bytes.
NO_PICTURES = {"EPS", "PDF", "MPEG", "WMF", "FITS", "GRIB", "BUFR", "HDF5"}


def rows(folder: Path) -> Iterator[tuple[str, dict | ValueError]]:
    """(place, row) of each picture; a row has file_name, text and perhaps captions, or is what
    made it unreadable."""
    jsonl, table = (folder / name for name in METADATA)
    if jsonl.is_file():
        found = _json_lines(jsonl)
    elif table.is_file():
        found = _table(table)
    else:
        found = _all_sidecars(folder)
    for place, row in found:
        if not _is_litter(row):
            yield place, row


def left_out(folder) -> list[str]:
    """A line for each kind of picture that ``rows`` passes over: how many, and why."""
    folder = Path(folder)
    listed = next((name for name in METADATA if (folder / name).is_file()), None)
    named = {
        _normal(row["file_name"])
        for _, row in rows(folder)
        if isinstance(row, dict) and isinstance(row.get("file_name"), str)
    }
    why: Counter[str] = Counter()
    for file in sorted(folder.rglob("*")):
        name = file.relative_to(folder).as_posix()
        if file.name.endswith(".icloud") and file.name.startswith("."):
            why["are in iCloud and not on this disk; download them"] += 1
        elif _is_hidden(name) or not file.is_file() or _normal(name) in named:
            continue
        elif file.suffix.lower() in UNREAD:
            why[f"are {file.suffix.lower()}, which is not read; save them as PNG or JPEG"] += 1
        elif is_picture(file):
            below = (
                "stand in folders below; name them in metadata.jsonl, or call the folder 1_CAPTION"
            )
            why[f"are not named in {listed}" if listed else below] += 1
    return [f"{n} {reason}" for reason, n in why.items()]


def find_file(folder: Path, name: str) -> Path:
    """The file of this name, which may be stored with its accents apart (as Macs do) or not."""
    file = folder / name
    if file.exists() or not file.parent.is_dir():
        return file
    same = (f for f in file.parent.iterdir() if _normal(f.name) == _normal(file.name))
    return next(same, file)


def is_picture(file: Path) -> bool:
    """By its usual name, or by its first bytes."""
    if file.suffix.lower() in PICTURES:
        return True
    if file.suffix.lower() in {*UNREAD, *SIDECARS, ".json", ".jsonl", ".csv", ".safetensors"}:
        return False
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(file) as image:
                return image.format not in NO_PICTURES
    except Exception:  # whatever a decoder trips over, it is none of its pictures
        return False


def read_text(path: Path) -> str:
    """The text of a file in UTF-8, or in UTF-16 that says so. Raises SnapGenError for others."""
    data = path.read_bytes()
    utf16 = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        return data.decode("utf-16" if utf16 else "utf-8-sig")
    except UnicodeDecodeError as e:
        line = data[: e.start].count(b"\n") + 1
        raise SnapGenError(
            f"{path} is not UTF-8 (line {line}), perhaps in an old Windows code page; save it "
            'as UTF-8 (Excel: "CSV UTF-8")'
        ) from e


def _json_lines(path: Path) -> Iterator[tuple[str, dict | ValueError]]:
    # Not splitlines: JSON strings may hold U+2028 and the like.
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if line.strip():
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                row = None
            if not isinstance(row, dict):
                row = ValueError("not a JSON object")
            yield f"{path.name}:{number}", row if isinstance(row, ValueError) else _usual(row)


def _table(path: Path) -> Iterator[tuple[str, dict | ValueError]]:
    text, skipped = read_text(path), 0
    first, _, rest = text.partition("\n")
    separators = ",;\t"
    if first.strip().lower().startswith("sep=") and len(first.strip("\r\n")) == 5:
        separators, text, skipped = first[4], rest, 1  # for Excel
    for separator in separators:
        table = csv.reader(io.StringIO(text, newline=""), strict=True, delimiter=separator)
        try:
            columns = [name.strip() for name in next(table, [])]
        except csv.Error as e:
            raise SnapGenError(f"{path}, line 1: {_quotes(e)}") from e
        if set(FILE_NAME) & set(columns):
            break
    else:
        raise SnapGenError(f"{path} has no column file_name, separated by commas, but {first!r}")
    there = {_normal(entry.name): entry.is_dir() for entry in path.parent.iterdir()}
    while True:
        number = table.line_num + 1 + skipped
        try:
            fields = next(table, None)
        except csv.Error as e:
            raise SnapGenError(f"{path}, the row from line {number} on: {_quotes(e)}") from e
        if fields is None:
            return
        if not fields:
            continue
        row: dict | ValueError = _usual(dict(zip(columns, fields, strict=False)))
        if len(fields) > len(columns):
            row = ValueError(
                f"{len(fields)} fields for {len(columns)} columns; a caption with {separator!r} in "
                "it needs quotes"
            )
        elif _swallows(fields, separator, there):
            raise SnapGenError(
                f"{path}, the row from line {number} on: a quote is not closed, the next rows are "
                "in its caption"
            )
        yield f"{path.name}:{number}", row


def _quotes(e: csv.Error) -> str:
    return f"a quote is not closed, or not doubled within quotes ({e})"


def _swallows(fields: list[str], separator: str, there: dict[str, bool]) -> bool:
    """Whether a field goes on over lines that begin as rows do: with a picture's name. ``there``:
    what the folder holds, and whether it is a folder; of a path its first part is looked at."""
    lines = [line for field in fields for line in field.split("\n")[1:] if separator in line]
    names = (name.strip().removeprefix("./") for line in lines for name in line.split(separator))
    return any(there.get(_normal(name.partition("/")[0])) == ("/" in name) for name in names)


def _usual(row: dict) -> dict:
    """The row with its file's name and its caption under their usual names."""
    out = dict(row)
    for names in (FILE_NAME, TEXT):
        if name := next((name for name in names if row.get(name)), None):
            out[names[0]] = row[name]
    return out


def _all_sidecars(folder: Path) -> Iterator[tuple[str, dict | ValueError]]:
    """Pictures of the folder and of those below that say how often theirs are repeated."""
    yield from _sidecars(folder)
    for below in sorted(folder.iterdir()):
        match = REPEATED.fullmatch(below.name)
        if not match or not below.is_dir():
            continue
        for place, row in _sidecars(below):
            if isinstance(row, dict):
                row["file_name"] = f"{below.name}/{row['file_name']}"
                row["text"] = row["text"] or match["name"]
                row["repeats"] = int(match["repeats"])
            yield f"{below.name}/{place}", row


def _sidecars(folder: Path) -> Iterator[tuple[str, dict | ValueError]]:
    """Pictures directly in the folder, each with a text of its name."""
    # Hidden files: a Mac leaves ._NAME.jpg beside NAME.jpg on other systems' disks.
    files = [file for file in sorted(folder.iterdir()) if not file.name.startswith(".")]
    texts: dict[str, Path] = {}
    for suffix in reversed(SIDECARS):
        texts |= {_normal(f.stem): f for f in files if f.suffix.lower() == suffix and f.is_file()}
    for file in files:
        if file.is_dir() and file.suffix.lower() not in PICTURES:
            continue
        if not is_picture(file):
            continue
        sidecar = texts.get(_normal(file.stem))
        text = ""
        if sidecar:
            try:
                text = read_text(sidecar)
            except SnapGenError:
                yield file.name, ValueError(f"{sidecar.name} is not UTF-8")
                continue
        yield file.name, {"file_name": file.name, "text": " ".join(text.split())}


def _normal(name: str) -> str:
    return unicodedata.normalize("NFC", name)


def _is_litter(row) -> bool:
    """Whether the row names what systems leave in folders, which lists made by scripts hold."""
    name = row.get("file_name") if isinstance(row, dict) else None
    parts = PurePosixPath(name).parts if isinstance(name, str) else ()
    return any(part in LITTER or part.startswith("._") for part in parts)


def _is_hidden(name: str) -> bool:
    return any(part in LITTER or part.startswith(".") for part in PurePosixPath(name).parts)
