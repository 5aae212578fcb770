"""The plan of the house: layers import downward only, and no two modules share a name."""

import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from .linked_tree import ROOT, link_tree

# As the lint-imports command, whose own folder comes first on the path.
LINT = "import importlinter.cli; importlinter.cli.lint_imports_command()"


@pytest.fixture
def tree(tmp_path):
    link_tree(tmp_path)
    return tmp_path


def lint(tree: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", LINT, "--config", str(ROOT / "pyproject.toml"), "--no-cache"]
    return subprocess.run(command, cwd=tree, capture_output=True, text=True)


def test_no_module_imports_upward(tree):
    done = lint(tree)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("module", "line", "broken"),
    [
        ("files.py", "from .pipeline import Pipeline", "files -> snapgen_mlx.pipeline"),
        (
            "convert/plan.py",
            "from ..quantization import recipe",
            "plan -> snapgen_mlx.quantization",
        ),
        (
            "models/dit.py",
            "def late():\n    from ..loading import load_dit",
            "dit -> snapgen_mlx.load",
        ),
    ],
)
def test_the_contract_fails_when_somebody_breaks_it(tree, module, line, broken):
    path = tree / "snapgen_mlx" / module
    text = path.read_text()
    path.unlink()
    path.write_text(f"{text}\n\n{line}\n")
    done = lint(tree)
    assert done.returncode == 1 and broken in done.stdout


def test_a_new_module_needs_a_layer(tree):
    (tree / "snapgen_mlx" / "more.py").touch()
    done = lint(tree)
    assert done.returncode == 1 and "snapgen_mlx.more" in done.stdout


def test_no_two_modules_share_a_name():
    folders = (ROOT / "snapgen_mlx", ROOT / "convert")
    names = Counter(p.stem for folder in folders for p in folder.rglob("*.py"))
    del names["__init__"]
    assert [name for name, count in names.items() if count > 1] == []


def test_a_checkout_that_is_not_installed_says_what_to_do():
    # Without site-packages, as in a new checkout.
    command = [sys.executable, "-S", "-c", "import snapgen_mlx"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].endswith(f": pip install -e {ROOT}")


def test_a_checkout_holds_no_second_package():
    """The packages beside this one are no parts of it but those that are installed."""
    code = "import snapgen_mlx, snapgen_mlx.convert, importlib.util as u; print(u.find_spec("
    for name in ("snapgen_mlx.snapgen_mlx", "snapgen_mlx.tests", "snapgen_mlx.recipes"):
        command = [sys.executable, "-c", f"{code}{name!r}))"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        assert done.stdout == "None\n"
