"""Files and folders are written whole or not at all."""

import os
import resource
import shutil
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from snapgen_mlx.errors import SnapGenError
from snapgen_mlx.files import atomic_folder, atomic_write


@pytest.fixture
def locked():
    """A folder that cannot be written, for root neither: he becomes an ordinary user."""
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        with tempfile.TemporaryDirectory() as folder:
            locked = Path(folder) / "locked"
            locked.mkdir(mode=0o500)
            yield locked
    finally:
        if root:
            os.seteuid(0)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_write_makes_folders_and_keeps_the_suffix(tmp_path):
    path = tmp_path / "a" / "b" / "x.safetensors"
    with atomic_write(path) as tmp:
        assert tmp.parent == path.parent and tmp.suffix == ".safetensors" and tmp != path
        tmp.write_text("new")
        assert not path.exists()
    assert path.read_text() == "new" and names(path.parent) == ["x.safetensors"]


def test_modes_follow_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        with atomic_write(tmp_path / "file") as tmp:
            tmp.write_text("new")
        with atomic_folder(tmp_path / "folder"):
            pass
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o640
    assert stat.S_IMODE((tmp_path / "folder").stat().st_mode) == 0o750


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, OSError(28, "No space left")])
def test_an_error_inside_leaves_the_old_file(tmp_path, error):
    path = tmp_path / "x"
    path.write_text("old")
    expected = SnapGenError if isinstance(error, OSError) else error
    with pytest.raises(expected), atomic_write(path) as tmp:
        tmp.write_text("half")
        raise error
    assert path.read_text() == "old" and names(tmp_path) == ["x"]


def test_a_full_disk_leaves_the_old_file(tmp_path):
    """A limit on the size of files stands in for the disk."""
    path = tmp_path / "x"
    path.write_text("old")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        with pytest.raises(SnapGenError, match=r"cannot write .*x: "), atomic_write(path) as tmp:
            tmp.write_bytes(bytes(100_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_text() == "old" and names(tmp_path) == ["x"]


def test_kill_inside_leaves_the_old_file(tmp_path):
    path = tmp_path / "x"
    path.write_text("old")
    code = f"""
from snapgen_mlx.files import atomic_write
with atomic_write({str(path)!r}) as tmp:
    tmp.write_text("half")
    print("writing", flush=True)
    time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"writing\n"
        process.kill()
    assert path.read_text() == "old"


def test_what_a_killed_process_left_is_removed(tmp_path):
    kill = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
    code = f"from snapgen_mlx.files import atomic_folder\nwith atomic_folder('x'): {kill}"
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path)
    assert len(names(tmp_path)) == 1
    with atomic_folder(tmp_path / "x.1") as other, atomic_folder(tmp_path / "x") as tmp:
        (tmp / "file").write_text("new")
        assert other.exists() and len(names(tmp_path)) == 2
        with pytest.raises(SnapGenError), atomic_folder(tmp_path / "x") as second:
            assert tmp.exists()
            (tmp_path / "x").mkdir()
            (tmp_path / "x" / "file").write_text("")
            (second / "file").write_text("")
        (tmp_path / "x" / "file").unlink()
    assert names(tmp_path) == ["x", "x.1"]


@pytest.mark.parametrize("write", [atomic_write, atomic_folder])
def test_places_that_cannot_be_written(locked, write):
    file = locked.parent / "file"
    file.write_text("")
    for place in (locked / "x", locked / "new" / "x", file / "x"):
        with pytest.raises(SnapGenError, match="cannot write") as e, write(place):
            raise AssertionError("reached")
        assert str(place) in str(e.value) and "\n" not in str(e.value)
    assert names(locked.parent) == ["file", "locked"] and not names(locked)


def test_write_over_a_folder(tmp_path):
    (tmp_path / "x").mkdir()
    with pytest.raises(SnapGenError, match="cannot write"), atomic_write(tmp_path / "x") as tmp:
        tmp.write_text("new")
    assert names(tmp_path) == ["x"] and (tmp_path / "x").is_dir()


def test_folder_appears_whole(tmp_path):
    path = tmp_path / "a" / "out"
    with atomic_folder(path) as tmp:
        (tmp / "deep" / "er").mkdir(parents=True)
        (tmp / "deep" / "er" / "x").write_text("new")
        assert not path.exists() and tmp.parent == path.parent
    assert (path / "deep" / "er" / "x").read_text() == "new" and names(path.parent) == ["out"]


def test_folder_over_an_empty_one_only(tmp_path):
    path = tmp_path / "out"
    path.mkdir()
    with atomic_folder(path) as tmp:
        (tmp / "x").write_text("old")
    with pytest.raises(SnapGenError, match="already exists"), atomic_folder(path):
        raise AssertionError("reached")
    assert names(path) == ["x"]
    (tmp_path / "file").write_text("old")
    with pytest.raises(SnapGenError, match="already exists"), atomic_folder(tmp_path / "file"):
        raise AssertionError("reached")
    assert names(tmp_path) == ["file", "out"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, OSError(28, "No space left")])
def test_an_error_inside_leaves_no_folder(tmp_path, error):
    expected = SnapGenError if isinstance(error, OSError) else error
    with pytest.raises(expected), atomic_folder(tmp_path / "out") as tmp:
        (tmp / "x").write_text("half")
        raise error
    assert names(tmp_path) == []


def test_folder_that_appeared_meanwhile_is_kept(tmp_path):
    path = tmp_path / "out"
    with pytest.raises(SnapGenError, match="cannot write"), atomic_folder(path) as tmp:
        (tmp / "x").write_text("new")
        path.mkdir()
        (path / "x").write_text("someone else's")
    assert (path / "x").read_text() == "someone else's" and names(tmp_path) == ["out"]


def test_unfinished_folders_of_dead_processes_here_go_and_those_of_other_machines_stay(
    tmp_path, monkeypatch
):
    ask = [sys.executable, "-c", "import os; print(os.getpid())"]
    gone = subprocess.run(ask, capture_output=True, check=True)
    monkeypatch.setattr(os, "getpid", lambda: int(gone.stdout))

    def leave():
        """What a killed process leaves."""
        with monkeypatch.context() as m:
            m.setattr(shutil, "rmtree", lambda *_, **__: None)
            with pytest.raises(KeyError), atomic_folder(tmp_path / "model"):
                raise KeyError
        return max(tmp_path.iterdir(), key=lambda p: p.stat().st_ctime_ns)

    with monkeypatch.context() as m:
        m.setattr("platform.node", lambda: "another-machine")
        theirs = leave()
    ours = leave()
    assert ours != theirs
    with atomic_folder(tmp_path / "model"):
        assert theirs.is_dir() and not ours.exists()
