"""Picture files that carry the settings which reproduce them."""

import io
import json
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape, unescape

from PIL import Image, PngImagePlugin

from .errors import SnapGenError, UsageError
from .files import write_new
from .names import FORMATS
from .settings import Settings

METADATA_KEY = "snapgen-mlx"  # key of the text in the PNG
JPEG_QUALITY = 95

# What picture viewers show: macOS's Preview and Photos read the description. The settings are for
# JPEG and WebP, which have no texts of our own.
XMP = """<x:xmpmeta xmlns:x="adobe:ns:meta/">
<rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">
<rdf:Description xmlns:dc="http://purl.org/dc/elements/1.1/"
 xmlns:xmp="http://ns.adobe.com/xap/1.0/" xmlns:snapgen="https://snapgen-mlx/settings/">
<dc:description><rdf:Alt><rdf:li xml:lang="x-default">{}</rdf:li></rdf:Alt></dc:description>
<xmp:CreatorTool>snapgen-mlx</xmp:CreatorTool>
{}</rdf:Description></rdf:RDF></x:xmpmeta>"""
SETTINGS = re.compile(b"<snapgen:settings>(.*?)</snapgen:settings>", re.DOTALL)
NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
# Beside Settings and the variant: what a picture depends on, and from what it was made.
OTHERS: dict[str, tuple[type, ...]] = {
    "digests": (dict,),
    "dtype": (str,),
    "few_step": (bool,),
    "tiny_decoder": (bool,),
    "model": (str,),
    "text_encoder": (str,),
    "loras": (list,),
    "image": (str,),
    "mask": (str,),
    "outpaint": (str,),
    "version": (str,),
}


def _xmp(metadata: dict, with_settings: bool) -> str:
    """Prompt and settings in words, and as JSON where the file has no other place for it."""
    left_out = ("prompt", "negative", "version", "digests")
    shown = {k: v for k, v in metadata.items() if v is not None and k not in left_out}
    rest = ", ".join(f"{k} {v}" for k, v in shown.items())
    words = escape(NOT_XML.sub(" ", f"{metadata['prompt']} ({rest})"))
    settings = ""
    if with_settings:
        text = json.dumps(metadata, ensure_ascii=False)
        text = NOT_XML.sub(lambda match: f"\\u{ord(match[0]):04x}", text)
        settings = f"<snapgen:settings>{escape(text)}</snapgen:settings>\n"
    return XMP.format(words, settings)


def check_format(suffix: str, background: str | None) -> None:
    """Raise UsageError when a kind of file cannot have this background."""
    if FORMATS[suffix.lower()] == "JPEG" and background == "transparent":
        raise UsageError("JPEG has no transparency; write .png or .webp")


def picture_bytes(image: Image.Image, suffix: str, metadata: dict | None) -> bytes:
    """Encode a picture as a file.

    JPEG has quality 95 and puts transparent pictures on white. WebP is lossless.

    Args:
        image: the picture.
        suffix: of the file name, which decides the format.
        metadata: the settings to write into it; None for none.
    """
    kind = FORMATS[suffix.lower()]
    options: dict[str, Any] = {}
    if kind == "PNG":
        info = options["pnginfo"] = PngImagePlugin.PngInfo()
        if metadata is not None:
            info.add_text(METADATA_KEY, json.dumps(metadata))
            info.add_itxt("XML:com.adobe.xmp", _xmp(metadata, with_settings=False))
    elif metadata is not None:
        options["xmp"] = _xmp(metadata, with_settings=True).encode()
    if kind == "JPEG":
        if image.mode == "RGBA":
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        image, options["quality"] = image.convert("RGB"), JPEG_QUALITY
    elif kind == "WEBP":
        options["lossless"] = True
    file = io.BytesIO()
    image.save(file, format=kind, **options)
    return file.getvalue()


def save_picture(image: Image.Image, path, metadata: dict | None) -> Path:
    """Write ``picture_bytes`` to a file, completely or not at all.

    Args:
        image: the picture.
        path: its suffix decides the format.
        metadata: the settings to write into it; None for none.

    Returns:
        The path used: ``path``, or the first free one of ``path-2``, ``path-3``, ...
    """
    path = Path(path)
    return write_new(path, picture_bytes(image, path.suffix, metadata))


def read_metadata(path) -> dict:
    """Settings inside a file that ``save_picture`` wrote. Raises SnapGenError when there are none,
    or none that can be used."""
    try:
        with Image.open(path) as image:
            if isinstance(image, PngImagePlugin.PngImageFile):
                text = image.text[METADATA_KEY]
            else:
                text = unescape(SETTINGS.findall(image.info["xmp"])[0].decode())
            found = json.loads(text)
        fields = Settings.__dataclass_fields__
        settings = {  # older versions did not write all that may be None
            name: found.get(name) if field.default is None else found[name]
            for name, field in fields.items()
        }
        if not isinstance(found["variant"], str):
            raise TypeError("variant")
        others = {k: found[k] for k in OTHERS if k in found}
        if not all(isinstance(value, OTHERS[k]) for k, value in others.items()):
            raise TypeError("settings")
        if not all(isinstance(name, str) for name in others.get("loras", [])):
            raise TypeError("loras")
    except OSError as e:
        raise SnapGenError(f"cannot read the picture {path}: {e}") from e
    except Exception as e:  # a damaged file fails in many ways in Pillow
        raise SnapGenError(f"{path} holds no settings of snapgen-mlx") from e
    try:
        return asdict(Settings(**settings)) | {"variant": found["variant"]} | others
    except UsageError as e:
        raise SnapGenError(f"{path} holds settings that cannot be used: {e}") from e
