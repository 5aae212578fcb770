"""Pictures that carry the settings which reproduce them."""

import json
from dataclasses import asdict
from pathlib import Path

from PIL import Image, PngImagePlugin

from .errors import SnapGenError
from .files import atomic_write
from .settings import Settings

METADATA_KEY = "snapgen-mlx"


def save_png(image: Image.Image, path, metadata: dict) -> Path:
    """Write a PNG with its settings inside, whole or not at all; never over another file.

    Returns the path used: ``path``, or the first free ``path-2``, ``path-3``, ... beside it.
    """
    path = Path(path)
    free, n = path, 1
    while free.exists():
        n += 1
        free = path.with_stem(f"{path.stem}-{n}")
    info = PngImagePlugin.PngInfo()
    info.add_text(METADATA_KEY, json.dumps(metadata))
    with atomic_write(free) as tmp:
        image.save(tmp, format="PNG", pnginfo=info)
    return free


def read_metadata(path) -> dict:
    """Settings inside a PNG that ``save_png`` wrote. Raises SnapGenError when there are none."""
    try:
        with Image.open(path) as image:
            found = json.loads(image.text[METADATA_KEY])
        settings = {  # older versions did not write all that may be None
            name: found.get(name) if field.default is None else found[name]
            for name, field in Settings.__dataclass_fields__.items()
        }
        settings = asdict(Settings(**settings)) | {"variant": found["variant"]}
        others = ("few_step", "text_encoder", "loras", "image", "mask", "outpaint")
        return settings | {k: found[k] for k in others if k in found}
    except OSError as e:
        raise SnapGenError(f"cannot read the picture {path}: {e}") from e
    except (AttributeError, KeyError, ValueError, TypeError) as e:
        raise SnapGenError(f"{path} holds no settings of snapgen-mlx") from e
