"""SnapGen++ in MLX: text-to-image with an elastic three-stage diffusion transformer."""

from importlib.util import find_spec
from pathlib import Path

__version__ = "0.1.0"

# In a checkout `convert/` and `cli/` stand beside this package, and only an installation of the
# checkout, `pip install -e`, makes them its parts.
_root = Path(__file__).resolve().parent.parent
if (_root / "convert" / "rules").is_dir():
    _part = find_spec("snapgen_mlx.convert")
    if _part is None or not Path(_part.origin or "").is_relative_to(_root):
        raise ImportError(
            f"snapgen-mlx is not installed from this checkout: pip install -e {_root}"
        )


def __getattr__(name: str):
    # Lazy, so that `snapgen-mlx --help` does not pay for importing MLX.
    if name == "Pipeline":
        from .pipeline import Pipeline

        return Pipeline
    if name == "load_dit":
        from .loading import load_dit

        return load_dit
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
