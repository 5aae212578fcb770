"""Writing files and folders whole or not at all: a temporary name, fsync, then rename."""

import hashlib
import itertools
import json
import os
import platform
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import SnapGenError, UsageError

UNFINISHED = ".unfinished"  # end of the names of temporary folders
NAMED = 24  # characters of a name that are part of its temporary name


def file_sha256(path) -> str:
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def folder_bytes(folder) -> int:
    """Bytes of all files below a folder."""
    return sum(f.stat().st_size for f in Path(folder).rglob("*") if f.is_file())


def name_impostor(head: bytes) -> str | None:
    """What stands in a file's place after a download that failed, by the file's first bytes."""
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if text.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer, not the file itself; run `git lfs pull` where it comes from"
    if text.startswith((b"<!doctype html", b"<html", b"<?xml")):
        return "a web page, not the file itself; download it again (is a login needed?)"
    return None if head else "empty; download it again"


def check_impostor(path) -> None:
    """Raises SnapGenError for a file that holds something else, see ``name_impostor``."""
    try:
        with open(path, "rb") as f:
            what = name_impostor(f.read(64))
    except OSError as e:
        raise SnapGenError(f"cannot read {path}: {e.strerror}") from e
    if what:
        raise SnapGenError(f"{path} is {what}")


def expand_user(path) -> Path:
    """A path whose ~ is filled in. Raises UsageError for a user that does not exist."""
    try:
        return Path(path).expanduser()
    except RuntimeError as e:
        raise UsageError(f"{path}: there is no user of this name here") from e


def read_json(path: Path) -> dict:
    """Raises SnapGenError for a file that is missing or holds no JSON object."""
    try:
        d = json.loads(path.read_text(encoding="utf-8"))
    except OSError as e:
        raise SnapGenError(f"cannot read {path}: {e.strerror}; is this a model folder?") from e
    except (ValueError, RecursionError) as e:
        check_impostor(path)
        raise SnapGenError(f"{path} is not valid JSON; download or convert it again") from e
    if not isinstance(d, dict):
        raise SnapGenError(f"{path} does not hold a JSON object")
    return d


def write_json(path, d: dict) -> None:
    with atomic_write(path) as tmp:
        tmp.write_text(json.dumps(d, indent=2) + "\n", encoding="utf-8")


def _remove_unfinished(path: Path) -> None:
    """Remove the temporary folders of ``path`` whose processes were of this machine and are gone.

    On a shared disk another machine's process may have the number of none here.
    """
    shown = re.escape(path.name[:NAMED])
    own = rf"\.{shown}\.{re.escape(_machine())}\.(\d+)\.\w{{8}}"
    name = re.compile(own + re.escape(UNFINISHED))
    for folder in path.parent.iterdir():
        if match := name.fullmatch(folder.name):
            try:
                os.kill(int(match[1]), 0)
            except ProcessLookupError:
                shutil.rmtree(folder, ignore_errors=True)
            except OSError:  # another user's
                continue


def _machine() -> str:
    """A name of this machine, and of the container in which its processes are numbered."""
    try:
        processes = os.readlink("/proc/self/ns/pid")  # Linux
    except OSError:
        processes = ""
    return hashlib.sha256(f"{platform.node()}{processes}".encode()).hexdigest()[:12]


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextmanager
def _temporary_file(path: Path) -> Iterator[Path]:
    """A temporary file beside ``path``, which is removed at the end unless it was renamed."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # A part of the name only: ``path`` may be as long as the file system takes.
        prefix, suffix = f".{path.stem[:NAMED]}.", path.suffix[-NAMED:]
        fd, name = tempfile.mkstemp(prefix=prefix, suffix=suffix, dir=path.parent)
        os.fchmod(fd, 0o666 & ~_umask())
        os.close(fd)
    except OSError as e:
        raise SnapGenError(f"cannot write {path}: {e.strerror}; choose another place") from e
    temporary = Path(name)
    try:
        yield temporary
    except OSError as e:
        raise SnapGenError(f"cannot write {path}: {e.strerror or e}") from e
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_write(path):
    """Yield a temporary path beside ``path``; on success it is synced and renamed to ``path``.

    On any error the temporary file is removed and what stood at ``path`` before is untouched.
    Raises SnapGenError when the folder cannot be written or the disk is full.
    """
    path = Path(path)
    with _temporary_file(path) as temporary:
        yield temporary
        _sync(temporary)
        os.replace(temporary, path)
        _sync(path.parent)


def write_new(path, data: bytes) -> Path:
    """Write a file whole or not at all, and never over another one.

    Returns:
        The path that it got: ``path``, or the first free one of ``path-2``, ``path-3``, ... Another
        process that writes the same name at the same time gets another one.

    Raises:
        SnapGenError: the folder cannot be written or the disk is full.
    """
    path = Path(path)
    with _temporary_file(path) as temporary:
        temporary.write_bytes(data)
        _sync(temporary)
        for n in itertools.count(1):
            free = path if n == 1 else numbered(path, n)
            if _place(temporary, free):
                break
        _sync(path.parent)
    return free


def numbered(path: Path, n: int) -> Path:
    """``path`` with -n at the end of its stem, which is cut where the name would be too long."""
    end = f"-{n}{path.suffix}"
    room = name_limit(path.parent) - len(os.fsencode(end))
    stem = os.fsencode(path.stem)[:room].decode(errors="ignore")
    return path.with_name(stem + end)


def name_limit(folder: Path) -> int:
    """Bytes that the name of a file in a folder may have."""
    try:
        return os.pathconf(folder, "PC_NAME_MAX")
    except (OSError, ValueError):
        return 255


def _place(temporary: Path, path: Path) -> bool:
    """Give a file a name unless another file has it; whether it got it."""
    try:
        os.link(temporary, path)
    except FileExistsError:
        return False
    except OSError:  # a file system without links: take the name first
        try:
            os.close(os.open(path, os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return False
        os.replace(temporary, path)
    return True


@contextmanager
def atomic_folder(path):
    """Yield a temporary folder beside ``path`` that is renamed to ``path`` when whole.

    ``path`` must not exist (or be an empty folder). On any error nothing is left behind; what a
    process left that was killed on this machine is removed. Raises SnapGenError when ``path`` holds
    something or cannot be written.
    """
    path = Path(path)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise SnapGenError(f"{path} already exists and is not empty; choose another folder")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_unfinished(path)
        prefix = f".{path.name[:NAMED]}.{_machine()}.{os.getpid()}."
        temporary = Path(tempfile.mkdtemp(UNFINISHED, prefix, path.parent))
        os.chmod(temporary, 0o777 & ~_umask())
    except OSError as e:
        raise SnapGenError(f"cannot write {path}: {e.strerror}; choose another place") from e
    try:
        yield temporary
        for file in temporary.rglob("*"):
            _sync(file)
        _sync(temporary)
        os.replace(temporary, path)
        _sync(path.parent)
    except OSError as e:
        raise SnapGenError(f"cannot write {path}: {e.strerror or e}") from e
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
