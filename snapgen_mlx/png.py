"""Pictures that carry the settings which reproduce them."""

import json
import re
from dataclasses import asdict
from pathlib import Path
from xml.sax.saxutils import escape

from PIL import Image, PngImagePlugin

from .errors import SnapGenError
from .files import atomic_write
from .settings import Settings

METADATA_KEY = "snapgen-mlx"


# What picture viewers show: macOS's Preview and Photos read this, not texts of our own.
XMP = """<x:xmpmeta xmlns:x="adobe:ns:meta/">
<rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">
<rdf:Description xmlns:dc="http://purl.org/dc/elements/1.1/"
 xmlns:xmp="http://ns.adobe.com/xap/1.0/">
<dc:description><rdf:Alt><rdf:li xml:lang="x-default">{}</rdf:li></rdf:Alt></dc:description>
<xmp:CreatorTool>snapgen-mlx</xmp:CreatorTool>
</rdf:Description></rdf:RDF></x:xmpmeta>"""
NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def _described(metadata: dict) -> str:
    """XMP that says prompt and settings in words."""
    others = ("prompt", "negative", "version", "digests")
    rest = ", ".join(f"{k} {v}" for k, v in metadata.items() if v is not None and k not in others)
    return XMP.format(escape(NOT_XML.sub(" ", f"{metadata['prompt']} ({rest})")))


def save_png(image: Image.Image, path, metadata: dict | None) -> Path:
    """Write a PNG with its settings inside (None: without), whole or not at all; never over
    another file.

    Returns the path used: ``path``, or the first free ``path-2``, ``path-3``, ... beside it.
    """
    path = Path(path)
    free, n = path, 1
    while free.exists():
        n += 1
        free = path.with_stem(f"{path.stem}-{n}")
    info = PngImagePlugin.PngInfo()
    if metadata is not None:
        info.add_text(METADATA_KEY, json.dumps(metadata))
        info.add_itxt("XML:com.adobe.xmp", _described(metadata))
    with atomic_write(free) as tmp:
        image.save(tmp, format="PNG", pnginfo=info)
    return free


def read_metadata(path) -> dict:
    """Settings inside a PNG that ``save_png`` wrote. Raises SnapGenError when there are none."""
    try:
        with Image.open(path) as image:
            if not isinstance(image, PngImagePlugin.PngImageFile):
                raise ValueError("no PNG")
            found = json.loads(image.text[METADATA_KEY])
        settings = {  # older versions did not write all that may be None
            name: found.get(name) if field.default is None else found[name]
            for name, field in Settings.__dataclass_fields__.items()
        }
        settings = asdict(Settings(**settings)) | {"variant": found["variant"]}
        others = ("digests", "few_step", "text_encoder", "loras", "image", "mask", "outpaint")
        if not isinstance(found.get("digests", {}), dict):
            raise TypeError("digests")
        return settings | {k: found[k] for k in others if k in found}
    except OSError as e:
        raise SnapGenError(f"cannot read the picture {path}: {e}") from e
    except (AttributeError, KeyError, ValueError, TypeError) as e:
        raise SnapGenError(f"{path} holds no settings of snapgen-mlx") from e
