"""Pictures with captions, as latents in memory and captions by step."""

import csv
import hashlib
import io
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import mlx.core as mx
import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from ..errors import SnapGenError
from ..files import atomic_write

HEIC = (".heic", ".heif")
PICTURES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif", *HEIC}
ENCODE_BATCH = 32
LOADING = 1  # part of the cached latents' key; raise it when load_image gives other pixels


@dataclass
class Example:
    file: Path
    captions: list[str]
    digest: str = ""  # SHA-256 of the file
    concept: str = ""  # what it shows


def scan_folder(folder, caption: str | None = None) -> tuple[list[Example], list[str]]:
    """Examples of a folder of pictures, and a line for each picture that cannot be used.

    An ImageFolder: ``metadata.jsonl`` or ``metadata.csv`` with ``file_name`` and ``text``, and in
    the former optionally ``captions``, a list of phrasings; ``concept`` names what is shown, else
    the first caption does. Without either file, each picture directly in the folder has its
    caption in a ``.txt`` of its name. ``caption`` is given to pictures that have none. Every
    picture is decoded once. Raises SnapGenError for a folder without pictures.
    """
    folder = Path(folder)
    examples, bad = [], []
    try:
        for place, row in _rows(folder):
            try:
                example = _example(folder, row, caption)
                place = row["file_name"]
                example.digest = _check(example.file)
                examples.append(example)
            except Exception as e:  # decoders raise almost anything on damaged files
                bad.append(f"{place} ({_reason(e)})")
    except (OSError, UnicodeDecodeError, csv.Error) as e:
        raise SnapGenError(f"cannot read the data in {folder}: {_reason(e)}") from e
    if not examples and not bad:
        raise SnapGenError(f"{folder} holds no picture; PNG, JPEG, WebP and TIFF are read")
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


def _rows(folder: Path) -> Iterator[tuple[str, dict | None]]:
    """(place, row) of each picture; a row has file_name, text and perhaps captions."""
    if (path := folder / "metadata.jsonl").is_file():
        # Not splitlines: JSON strings may hold U+2028 and the like.
        for number, line in enumerate(path.read_text(encoding="utf-8-sig").split("\n"), 1):
            if line.strip():
                try:
                    row = json.loads(line)
                except (ValueError, RecursionError):
                    row = None
                yield f"{path.name}:{number}", row
    elif (path := folder / "metadata.csv").is_file():
        rows = csv.DictReader(io.StringIO(path.read_text(encoding="utf-8-sig"), newline=""))
        for row in rows:
            yield f"{path.name}:{rows.line_num}", row
    else:
        for file in sorted(folder.iterdir()):
            # Hidden files: a Mac leaves ._NAME.jpg beside NAME.jpg on other systems' disks.
            if file.suffix.lower() in PICTURES and not file.name.startswith("."):
                beside = file.with_suffix(".txt")
                text = beside.read_text(encoding="utf-8-sig") if beside.is_file() else ""
                yield file.name, {"file_name": file.name, "text": " ".join(text.split())}


def _example(folder: Path, row, caption: str | None) -> Example:
    """Raises ValueError for a row that is no example."""
    name = row.get("file_name") if isinstance(row, dict) else None
    if not isinstance(name, str) or not name:
        raise ValueError("no file_name")
    # Not by resolved paths: downloaded data sets are folders of links.
    if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
        raise ValueError(f"{name} is outside the folder")
    captions = row.get("captions") or [row.get("text") or caption]
    if captions == [None]:
        raise ValueError("no caption")
    if not isinstance(captions, list) or not all(map(_is_text, captions)):
        raise ValueError("its captions are no texts")
    return Example(folder / name, captions, concept=str(row.get("concept") or captions[0]))


def _is_text(caption) -> bool:
    return isinstance(caption, str) and bool(caption.strip())


def _check(path: Path) -> str:
    """SHA-256 of a picture's file, once it has been decoded."""
    if path.suffix.lower() in HEIC:
        raise ValueError("HEIC is not read; save it as JPEG")
    data = path.read_bytes()
    with Image.open(io.BytesIO(data)) as image:
        image.draft("RGB", (64, 64))  # a JPEG is decoded at a smaller scale: faster
        to_rgb(image)
    return hashlib.sha256(data).hexdigest()


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


def load_image(path, size: tuple[int, int]) -> np.ndarray:
    """RGB float32 (H, W, 3) in [-1, 1], scaled to cover ``size`` (H, W) and cut at the centre."""
    try:
        with Image.open(path) as image:
            image = to_rgb(image)
            if image.size != size[::-1]:
                image = ImageOps.fit(image, size[::-1])
            return np.asarray(image, dtype=np.float32) / 127.5 - 1
    except Exception as e:  # decoders raise almost anything on damaged files
        raise SnapGenError(f"cannot read the picture {path}: {_reason(e)}") from e


def encode_images(
    vae, files: list[Path], size: tuple[int, int], batch: int = ENCODE_BATCH
) -> np.ndarray:
    """Normalised latents (N, H/8, W/8, C) float32 of the pictures."""
    out = []
    for i in range(0, len(files), batch):
        images = np.stack([load_image(f, size) for f in files[i : i + batch]])
        out.append(np.array(vae.encode(mx.array(images)).astype(mx.float32)))
    return np.concatenate(out)


def cached_latents(
    load_vae: Callable, key: str, examples: list[Example], size: tuple[int, int], cache: Path
) -> Iterator[dict]:
    """Latents of ``examples`` from the folder ``cache``, or encoded and, by process 0, kept there.

    A file holds the latents of a batch; its name follows from the pictures' contents, ``size``
    and ``key``, which stands for the encoder's weights. Neither the time of files nor their names
    count. Yields a record after each batch encoded; the generator's value is what
    ``encode_images`` gives.
    """
    out = []
    writes = mx.distributed.init().rank() == 0
    for i in range(0, len(examples), ENCODE_BATCH):
        chunk = examples[i : i + ENCODE_BATCH]
        name = json.dumps([LOADING, key, size, [e.digest for e in chunk]])
        path = cache / f"{hashlib.sha256(name.encode()).hexdigest()[:32]}.npy"
        try:
            latents = np.load(path)
        except (OSError, ValueError, EOFError):  # absent or damaged
            latents = encode_images(load_vae(), [e.file for e in chunk], size)
            if writes:
                with atomic_write(path) as tmp:
                    np.save(tmp, latents)
            yield {"encoded": i + len(chunk), "pictures": len(examples)}
        out.append(latents)
    return np.concatenate(out)


def encode_text(encoders: list, prompts: list[str]) -> tuple[dict, dict]:
    """States and masks by encoder, padded to a multiple of 8 tokens: few shapes."""
    text, masks = {}, {}
    for encoder in encoders:
        states, mask = encoder.encode(prompts)
        pad = -states.shape[1] % 8
        text[encoder.name] = mx.pad(states, [(0, 0), (0, pad), (0, 0)])
        masks[encoder.name] = mx.pad(mask, [(0, 0), (0, pad)])
    return text, masks


class LatentDataset:
    """Latents (N, h, w, C) with captions; a batch depends on (seed, step) alone."""

    def __init__(self, latents: np.ndarray, captions: list[list[str]], encoders: list):
        self.latents, self.captions, self.encoders = latents, captions, encoders

    @property
    def fingerprint(self) -> str:
        """Digest of latents and captions, to refuse resuming on other data."""
        digest = hashlib.sha256(np.ascontiguousarray(self.latents).data)
        digest.update(json.dumps(self.captions).encode())
        return digest.hexdigest()

    def text(self, prompts: list[str]) -> tuple[dict, dict]:
        """States and masks by encoder, as of ``encode_text``."""
        return encode_text(self.encoders, prompts)

    def batch(self, rng: np.random.Generator, size: int, dropout: float = 0.0):
        """-> x0 (B, h, w, C), text, masks; each encoder is dropped with probability ``dropout``."""
        rows = rng.integers(len(self.latents), size=size)
        prompts = [self.captions[i][rng.integers(len(self.captions[i]))] for i in rows]
        text, masks = self.text(prompts)
        for encoder in self.encoders:
            name = encoder.name
            masks[name] = masks[name] & mx.array(rng.random(size) >= dropout)[:, None]
        return mx.array(self.latents[rows]), text, masks
