"""SnapGen++ in MLX: text-to-image with an elastic three-stage diffusion transformer."""

from pathlib import Path

__version__ = "0.1.0"

# In a checkout, `convert/` and `cli/` stand beside this package; installed, they are inside it.
_root = Path(__file__).resolve().parent.parent
if (_root / "pyproject.toml").is_file() and (_root / "convert" / "__init__.py").is_file():
    __path__.append(str(_root))


def __getattr__(name):
    # Lazy, so that `snapgen-mlx --help` does not pay for importing MLX.
    if name == "Pipeline":
        from .pipeline import Pipeline

        return Pipeline
    if name == "load_dit":
        from .weights import load_dit

        return load_dit
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
