"""MLX beside PyTorch in one process, on a checkpoint for which it takes seconds."""

import mlx.core as mx
import pytest
import torch

from benchmarks import versus_torch
from snapgen_mlx.convert.slice import slice_model
from snapgen_mlx.convert.to_mlx import convert
from snapgen_mlx.convert.to_pytorch import export

from . import checkpoints
from .reference import torch_dit


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    mx.disable_compile()
    folder = tmp_path_factory.mktemp("both")
    checkpoints.save_checkpoint(folder / "widths")
    convert(folder / "widths", folder / "supernet", only=["transformer", "vae"])
    slice_model(folder / "supernet", folder / "mlx", "small")
    export(folder / "mlx", folder / "torch")
    kept = torch_dit.attend, torch_dit.neighbourhood_mask
    yield folder
    torch_dit.attend, torch_dit.neighbourhood_mask = kept
    mx.enable_compile()


@pytest.mark.parametrize("part", versus_torch.PARTS)
def test_both_compute_the_same(folder, part):
    torch.manual_seed(0)
    for name, work in versus_torch.contests(part, folder, 128).items():
        seconds, error = versus_torch.take_turns(work, 2)
        assert [len(times) for times in seconds.values()] == [2, 2]
        if name != "decoding, in tiles":
            assert error < 1e-4, name
    line = versus_torch.row(name, 128, work, 1)
    assert line.count("|") == 6
