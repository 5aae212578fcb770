"""The comparison with PyTorch at full size, on a checkpoint for which it takes seconds."""

import re

from benchmarks.full_size import compare
from snapgen_mlx.convert.to_mlx import convert

from . import checkpoints


def test_comparison(tmp_path):
    checkpoints.save_checkpoint(tmp_path / "torch")
    convert(tmp_path / "torch", tmp_path / "mlx", only=["transformer", "vae"])
    text = compare(tmp_path, 320)  # large enough for diffusers' tiles
    head, rule, *rows = [line.strip("| ").split(" | ") for line in text.splitlines() if "|" in line]
    assert len(head) == 4 and set(rule[0]) == {"-", "|"}  # the corner is empty
    assert [row[0].split()[0] for row in rows] == ["MLX", "PyTorch"]
    for row in rows:
        step, step_peak, picture, peak = ([*map(float, re.findall(r"[\d.]+", c))] for c in row[1:])
        steps, decoding, total = picture
        assert step[0] > 0 and decoding > 0
        assert abs(steps + decoding - total) < 0.16  # each is rounded
        assert 0 < step_peak[0] <= peak[0]
    # Both compute the same thing, or their times would not compare.
    assert float(re.search(r"differ by (\S+)", text)[1]) < 1e-4
