"""The packages that the embedded model's drawings and words come from, and how they are read."""

import hashlib
import io
import json
import subprocess
import tarfile
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from snapgen_mlx.errors import SnapGenError

from .concepts import join_key


@dataclass(frozen=True)
class Package:
    """One npm package in one version; ``sha256`` is that of its archive."""

    name: str
    version: str
    licence: str
    sha256: str

    def __str__(self):
        return f"{self.name}@{self.version}"


SOURCES = {
    "3d": Package(
        "@lobehub/fluent-emoji-3d",
        "1.1.0",
        "MIT (Microsoft, Fluent Emoji)",
        "c1bb7eee7de090205a232518a9ab4adb3df458bfbe8a1f78232991194c8b2e58",
    ),
    "gradient": Package(
        "@iconify-json/fluent-emoji",
        "1.2.7",
        "MIT (Microsoft, Fluent Emoji)",
        "8044210dbf11e016d4de85f15d01a243423bd832457e7e2491df1b751c0e272b",
    ),
    "flat": Package(
        "@iconify-json/fluent-emoji-flat",
        "1.2.6",
        "MIT (Microsoft, Fluent Emoji)",
        "7d064769dee690815f823bc5bcc511d957198caf9f5edd8dd9c1aa48a6aeb175",
    ),
    "cartoon": Package(
        "@iconify-json/noto",
        "1.2.9",
        "Apache-2.0 (Google, Noto Emoji)",
        "3e918d88fc945c0bb3d468dbace6f88caef67f01c9f0e7bcae0915a042e8f1ad",
    ),
    "words": Package(
        "emojibase-data",
        "17.0.0",
        "MIT (Miles Johnson)",
        "d01d0e2ca4e22cb402679532155342c71e2e871f25c32223c013b8b166ebdf5a",
    ),
}


def fetch(package: Package, cache: Path) -> Path:
    """The package's archive in ``cache``, fetched with ``npm pack`` when it is not there.

    Raises SnapGenError without npm, when npm fails, and for an archive that is not the pinned one.
    """
    name = f"{package.name.lstrip('@').replace('/', '-')}-{package.version}.tgz"
    archive = cache / name
    if not archive.exists():
        cache.mkdir(parents=True, exist_ok=True)
        command = ["npm", "pack", str(package), "--silent", "--pack-destination", str(cache)]
        try:
            subprocess.run(command, check=True, capture_output=True, text=True)
        except FileNotFoundError:
            raise SnapGenError("npm is needed to fetch the emoji packages; install Node") from None
        except subprocess.CalledProcessError as e:
            raise SnapGenError(f"npm pack {package} failed: {e.stderr.strip()}") from e
    if hashlib.sha256(archive.read_bytes()).hexdigest() != package.sha256:
        raise SnapGenError(f"{archive} is damaged or not {package}; delete it and run this again")
    return archive


def fetch_all(cache: Path) -> dict[str, Path]:
    """Every archive of ``SOURCES`` by its use."""
    return {use: fetch(package, cache) for use, package in SOURCES.items()}


def load_words(archive: Path) -> list[dict]:
    """The English records of emojibase: hexcode, label, tags, group."""
    with tarfile.open(archive) as tar:
        return json.load(tar.extractfile("package/en/data.json"))


def load_drawings(archives: dict[str, Path]) -> dict[str, dict[str, bytes | str]]:
    """{style: {concept key: WebP bytes or SVG text}} of the picture packages in ``archives``."""
    drawings: dict[str, dict[str, bytes | str]] = {"3d": {}}
    with tarfile.open(archives["3d"]) as tar:
        for member in tar:
            if member.name.endswith(".webp"):
                drawings["3d"][join_key(Path(member.name).stem)] = tar.extractfile(member).read()
    fluent = _json(archives["flat"], "chars")  # the gradient package has the same names, no codes
    for style, chars in (("gradient", fluent), ("flat", fluent), ("cartoon", None)):
        if style not in archives:
            continue
        icons = _json(archives[style], "icons")
        drawings[style] = {
            join_key(hexcode): _svg(icons, icons["icons"][name])
            for hexcode, name in (chars or _json(archives[style], "chars")).items()
            if name in icons["icons"]  # others are aliases of another picture
        }
    return drawings


def _json(archive: Path, name: str) -> dict:
    with tarfile.open(archive) as tar:
        return json.load(tar.extractfile(f"package/{name}.json"))


def _svg(icons: dict, icon: dict) -> str:
    w, h = icon.get("width", icons["width"]), icon.get("height", icons["height"])
    box = f"{icon.get('left', 0)} {icon.get('top', 0)} {w} {h}"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{box}" width="{w}" height="{h}">'
        f"{icon['body']}</svg>"
    )


def rasterise(drawing: bytes | str, width: int = 512) -> Image.Image:
    """An RGBA picture of WebP bytes, or of SVG text ``width`` pixels wide."""
    if isinstance(drawing, str):
        import resvg_py

        drawing = bytes(resvg_py.svg_to_bytes(svg_string=drawing, width=width))
    return Image.open(io.BytesIO(drawing)).convert("RGBA")
