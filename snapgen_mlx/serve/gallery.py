"""Finished pictures in a folder: PNGs that carry their settings; there is no other record."""

import re
import threading
import time
from pathlib import Path

from PIL import Image

from ..errors import SnapGenError
from ..files import expand_user
from ..picture_file import read_metadata, save_picture

NAME = re.compile(r"\d{8}-\d{6}[\w-]*\.png")


class Gallery:
    """The pictures of a folder, newest first. May be used by several threads.

    Names start with the time, so that they sort by it; other files in the folder are left alone.
    """

    def __init__(self, folder):
        self.folder = expand_user(folder)
        self._lock = threading.Lock()
        self._settings: dict[str, dict] = {}  # by name, the oldest first
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            found = sorted(p.name for p in self.folder.iterdir() if NAME.fullmatch(p.name))
        except OSError as e:
            raise SnapGenError(f"cannot use {self.folder}: {e.strerror}; choose another") from e
        for name in found:
            try:
                self._settings[name] = read_metadata(self.folder / name)
            except SnapGenError:  # somebody else's picture
                continue

    def __len__(self) -> int:
        return len(self._settings)

    def add(self, image: Image.Image, metadata: dict) -> str:
        """Write a picture to disk. Returns its name. Raises SnapGenError when it cannot."""
        words = re.sub(r"[^a-z0-9]+", "-", metadata["prompt"].lower()).strip("-")[:40].strip("-")
        stamp = time.strftime("%Y%m%d-%H%M%S")
        path = self.folder / f"{stamp}-{words or 'picture'}-{metadata['seed']}.png"
        name = save_picture(image, path, metadata).name
        with self._lock:
            self._settings[name] = metadata
        return name

    def list(self, search: str = "", offset: int = 0, limit: int = 100) -> tuple[list[dict], int]:
        """Pictures whose prompts have all words of ``search``: (a part of them, their number)."""
        words = search.lower().split()
        self._forget()
        with self._lock:
            found = [
                {"name": name, **settings}
                for name, settings in reversed(self._settings.items())
                if all(word in settings["prompt"].lower() for word in words)
            ]
        return found[offset : offset + limit], len(found)

    def path(self, name: str) -> Path | None:
        """The file of a picture; None when there is none of this name."""
        path = self.folder / name
        if name in self._settings and not path.is_file():
            self._forget()
        return path if name in self._settings and path.is_file() else None

    def _forget(self) -> None:
        """Leave out pictures whose files were deleted by somebody else."""
        with self._lock:  # ``add`` enters a name when its file is there
            if not self.folder.is_dir():  # such as one on a disk that is away for a moment
                return
            there = {path.name for path in self.folder.iterdir()}
            self._settings = {k: v for k, v in self._settings.items() if k in there}

    def remove(self, name: str) -> bool:
        """Delete a picture for good. Returns whether there was one."""
        with self._lock:
            if self._settings.pop(name, None) is None:
                return False
        (self.folder / name).unlink(missing_ok=True)
        return True
