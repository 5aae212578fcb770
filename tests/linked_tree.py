"""The packages as an installation has them, for tools that read files: folders of links."""

import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def link_tree(target: Path) -> None:
    """Fill ``target`` with ``snapgen_mlx/``, which has ``convert/`` and ``cli/`` inside it."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    for package in settings["packages"]:
        source = ROOT / _source(package, settings["package-dir"])
        folder = target / package.replace(".", "/")
        folder.mkdir(parents=True, exist_ok=True)
        for link in folder.iterdir():
            if link.is_symlink():
                link.unlink()
        for file in (*source.glob("*.py"), *source.glob("py.typed")):
            (folder / file.name).symlink_to(file)


def _source(package: str, places: dict[str, str]) -> str:
    for parent, place in places.items():
        if package == parent or package.startswith(f"{parent}."):
            return (place + package.removeprefix(parent)).replace(".", "/")
    return package.replace(".", "/")


if __name__ == "__main__":
    link_tree(Path(sys.argv[1]))
