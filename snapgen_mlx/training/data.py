"""Pictures with captions, as latents in memory and captions by step."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import numpy as np
from PIL import Image

from ..errors import SnapGenError


@dataclass
class Example:
    file: Path
    captions: list[str]


def read_folder(folder) -> list[Example]:
    """Examples of an ImageFolder: ``metadata.jsonl`` with ``file_name`` and ``text``.

    An optional ``captions`` list holds more phrasings of the same picture. Raises SnapGenError
    naming the first bad line or all missing pictures.
    """
    folder = Path(folder)
    path = folder / "metadata.jsonl"
    examples = []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as e:
        raise SnapGenError(f"cannot read {path}: {e.strerror}") from e
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            captions = row.get("captions") or [row["text"]]
            examples.append(Example(folder / row["file_name"], captions))
        except (ValueError, KeyError, TypeError, AttributeError) as e:
            raise SnapGenError(f"{path}:{number} needs file_name and text") from e
    missing = [e.file.name for e in examples if not e.file.is_file()]
    if missing:
        raise SnapGenError(f"{folder}: {len(missing)} pictures are missing: {missing[:5]}")
    if not examples:
        raise SnapGenError(f"{path} names no picture")
    return examples


def load_image(path, size: tuple[int, int]) -> np.ndarray:
    """RGB float32 (H, W, 3) in [-1, 1], scaled to cover ``size`` (H, W) and cut at the centre."""
    try:
        with Image.open(path) as image:
            image = image.convert("RGB")
            h, w = size
            if image.size != (w, h):
                scale = max(w / image.width, h / image.height)
                image = image.resize((round(image.width * scale), round(image.height * scale)))
                left, top = (image.width - w) // 2, (image.height - h) // 2
                image = image.crop((left, top, left + w, top + h))
            return np.asarray(image, dtype=np.float32) / 127.5 - 1
    except OSError as e:
        raise SnapGenError(f"cannot read the picture {path}: {e}") from e


def encode_images(vae, files: list[Path], size: tuple[int, int], batch: int = 32) -> np.ndarray:
    """Normalised latents (N, H/8, W/8, C) float32 of the pictures."""
    out = []
    for i in range(0, len(files), batch):
        images = np.stack([load_image(f, size) for f in files[i : i + batch]])
        out.append(np.array(vae.encode(mx.array(images)).astype(mx.float32)))
    return np.concatenate(out)


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
        """States and masks by encoder, padded to a multiple of 8 tokens: few shapes."""
        text, masks = {}, {}
        for encoder in self.encoders:
            states, mask = encoder.encode(prompts)
            pad = -states.shape[1] % 8
            text[encoder.name] = mx.pad(states, [(0, 0), (0, pad), (0, 0)])
            masks[encoder.name] = mx.pad(mask, [(0, 0), (0, pad)])
        return text, masks

    def batch(self, rng: np.random.Generator, size: int, dropout: float = 0.0):
        """-> x0 (B, h, w, C), text, masks; each encoder is dropped with probability ``dropout``."""
        rows = rng.integers(len(self.latents), size=size)
        prompts = [self.captions[i][rng.integers(len(self.captions[i]))] for i in rows]
        text, masks = self.text(prompts)
        for name in masks:
            masks[name] = masks[name] & mx.array(rng.random(size) >= dropout)[:, None]
        return mx.array(self.latents[rows]), text, masks
