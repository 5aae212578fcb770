"""Models of random weights, for tests and benchmarks: written tensor by tensor."""

import shutil
from dataclasses import asdict
from pathlib import Path

import mlx.core as mx

from ..config import DiTConfig
from ..errors import UsageError
from ..files import atomic_folder, atomic_write, expand_user, write_json
from ..layout import FORMAT
from ..loading import build_autoencoder
from ..models.autoencoder import SnapGenAutoencoderConfig
from ..models.elastic import random_supernet
from ..models.vae import VAEConfig
from ..tensors.readers import Info
from ..tensors.stream import Component, Row, verify, write_components
from ..tensors.weights import flat_parameters
from .to_pytorch import export

GEOMETRIES = ("full", "small", "tiny", "embedded")
CARD = """# Random weights

A SnapGen++ model of random weights ({geometry}, seed {seed}), for tests and benchmarks. It was
never trained and has no text encoder: its pictures are noise.
"""


class _Random:
    """A reader of tensors that are drawn when they are read, each once."""

    def __init__(self, tensors: dict[str, mx.array]):
        self.files: list[Path] = []
        self._tensors = tensors
        self.infos = {key: Info("F32", tuple(a.shape)) for key, a in tensors.items()}

    def read(self, key: str) -> mx.array:
        return self._tensors.pop(key)


def init(dest, geometry: str, seed: int, form: str = "mlx") -> dict:
    """Write a float32 model with random weights and without text encoders.

    Args:
        dest: new folder.
        geometry: one of ``GEOMETRIES``.
        seed: the same seed gives the same weights.
        form: "mlx" or "pytorch".

    Returns:
        {"bytes"} of the transformer.

    Raises:
        UsageError: the geometry is unknown.
        SnapGenError: ``dest`` is not empty, or its disk is too small.
    """
    if geometry not in GEOMETRIES:
        raise UsageError(f"no geometry {geometry!r}; there are {', '.join(GEOMETRIES)}")
    with atomic_folder(expand_user(dest).absolute()) as tmp:
        if form == "mlx":
            size = _write(tmp, geometry, seed)
        else:
            _write(tmp / "mlx", geometry, seed)
            size = export(tmp / "mlx", tmp / "pytorch")["bytes"]
            shutil.rmtree(tmp / "mlx")
            for path in (tmp / "pytorch").iterdir():
                path.rename(tmp / path.name)
            (tmp / "pytorch").rmdir()
        with atomic_write(tmp / "README.md") as card:
            card.write_text(CARD.format(geometry=geometry, seed=seed))
    return {"bytes": size}


def _write(folder: Path, geometry: str, seed: int) -> int:
    mx.random.seed(seed)
    config = DiTConfig.from_preset(geometry)
    transformer = random_supernet(config)
    # A fresh model's output layer is zero, which would hide all before it.
    shape = transformer["final.proj.weight"].shape
    transformer["final.proj.weight"] = mx.random.normal(shape) * shape[-1] ** -0.5
    if geometry == "embedded":
        vae_config = {"_class_name": "SnapGenAutoencoder", **asdict(SnapGenAutoencoderConfig())}
    else:
        vae_config = {"_class_name": "AutoencoderKLQwenImage", **asdict(VAEConfig())}
        vae_config["temperal_downsample"] = [False, True, True]
    components = [
        _component("transformer", config.to_dict(), transformer),
        _component("vae", vae_config, flat_parameters(build_autoencoder(vae_config))),
    ]
    folder.mkdir(exist_ok=True)
    write_components(folder, components)
    size = 128 if geometry == "embedded" else 1024
    sampling = {"steps": 4, "guidance": 1.0, "shift": 3.0, "size": size}
    source = {"name": f"random weights, {geometry}, seed {seed}"}
    write_json(folder / "config.json", {**FORMAT, "sampling": sampling, "source": source})
    verify(folder, components)
    return sum(c.nbytes for c in components)


def _component(name: str, config: dict, tensors: dict[str, mx.array]) -> Component:
    reader = _Random(tensors)
    rows = [Row(key, info.shape, key, mx.float32) for key, info in reader.infos.items()]
    return Component(name=name, config=config, reader=reader, rows=rows)
