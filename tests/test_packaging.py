"""The wheel: what is in it, and that it works from anywhere without heavy imports."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ASSETS = ROOT / "snapgen_mlx" / "assets"
PACKAGES = {
    "snapgen_mlx": "snapgen_mlx",
    "convert": "snapgen_mlx/convert",
    "cli": "snapgen_mlx/cli",
}
PROBE = "snapgen_mlx/assets/embedded/some/folder/probe.bin"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from a copy of the sources, so that no earlier build leaks into it."""
    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE", "THIRD_PARTY_NOTICES.md"):
        shutil.copy(ROOT / name, source)
    for name in (*PACKAGES, "tests", "benchmarks"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    (source / PROBE).parent.mkdir(parents=True)
    (source / PROBE).touch()
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation"]
    subprocess.run(
        [*command, "--quiet", "-w", str(source / "dist"), "."],
        cwd=source,
        check=True,
        capture_output=True,
    )
    (built,) = (source / "dist").glob("*.whl")
    return built


@pytest.fixture(scope="module")
def run(wheel, tmp_path_factory):
    """Run Python code in another directory with the unpacked wheel first on the path."""
    site, elsewhere = tmp_path_factory.mktemp("site"), tmp_path_factory.mktemp("elsewhere")
    zipfile.ZipFile(wheel).extractall(site)

    def run(code):
        code = f"import sys; sys.path.insert(0, {str(site)!r})\n{code}"
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=elsewhere, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


def test_wheel_holds_the_packages_and_assets(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    expected = {
        f"{target}/{path.relative_to(ROOT / folder).as_posix()}"
        for folder, target in PACKAGES.items()
        for path in (ROOT / folder).rglob("*.py")
    }
    expected |= {p.relative_to(ROOT).as_posix() for p in ASSETS.rglob("*") if p.is_file()}
    assert "snapgen_mlx/convert/to_mlx.py" in expected and "snapgen_mlx/cli/main.py" in expected
    assert expected | {PROBE} <= names
    tops = {name.split("/")[0] for name in names}
    assert tops == {"snapgen_mlx", "snapgen_mlx-0.1.0.dist-info"}
    licenses = {Path(name).name for name in names if "/licenses/" in name}
    assert licenses == {"LICENSE", "THIRD_PARTY_NOTICES.md"}


def test_assets_are_small():
    size = sum(p.stat().st_size for p in ASSETS.rglob("*") if p.is_file())
    assert size <= 43e6  # 40 for the model, 3 for the judge


def test_help_is_quick_and_imports_no_mlx(run):
    out = run(
        "import time, snapgen_mlx.cli.main as cli\n"
        "cli.main(['--help'], standalone_mode=False)\n"
        "print('mlx' in sys.modules, cli.__file__, time.process_time())"
    )
    text, _, last = out.rstrip().rpartition("\n")
    for command in ("generate", "info", "convert", "export", "slice", "init", "finetune"):
        assert f"  {command} " in text
    mlx, file, seconds = last.split()
    assert mlx == "False"
    assert not Path(file).is_relative_to(ROOT)
    assert float(seconds) < 1


def test_console_script_and_version(wheel, run):
    archive = zipfile.ZipFile(wheel)
    (entry,) = (n for n in archive.namelist() if n.endswith(".dist-info/entry_points.txt"))
    assert b"snapgen-mlx = snapgen_mlx.cli.main:main" in archive.read(entry)
    out = run("from snapgen_mlx.cli.main import main; main(['--version'], standalone_mode=False)")
    assert "0.1.0" in out


def test_wheel_draws_with_the_embedded_model(run):
    out = run(
        "from PIL import Image\nfrom snapgen_mlx.cli.main import main\n"
        "main(['generate', 'a smiling cat', '--steps', '1', '-o', 'cat.png'], "
        "standalone_mode=False)\nprint(Image.open('cat.png').size)"
    )
    assert "(256, 256)" in out


def test_no_module_imports_a_heavy_library(run):
    out = run(
        "import importlib, pkgutil, snapgen_mlx\n"
        "for m in pkgutil.walk_packages(snapgen_mlx.__path__, 'snapgen_mlx.'):\n"
        "    importlib.import_module(m.name)\n"
        "print(*sys.modules)"
    )
    loaded = set(out.split())
    assert {"snapgen_mlx.pipeline", "snapgen_mlx.convert.to_mlx", "mlx.core"} <= loaded
    assert not loaded & {"torch", "torchvision", "transformers", "diffusers", "mlx_lm"}
