"""The benchmark of editing: what it counts."""

from PIL import Image

from benchmarks.editing import border_mask, compare
from snapgen_mlx.judge import Judge
from snapgen_mlx.pipeline import Pipeline


def test_mask():
    mask = border_mask((128, 64))
    assert mask.getbbox() == (8, 4, 120, 60)


def test_shares(monkeypatch):
    """What is painted over is no longer found, and what was asked for is."""
    pipe, judge = Pipeline.load(variant="full"), Judge.load()
    found = compare(pipe, judge, ["banana", "rocket"])
    assert found["changed outside"] == 0
    assert all(0 <= found[key] <= 1 for key in ("before", "edited", "drawn"))
    # An edit that returns its picture finds as much as before, and changes nothing.
    monkeypatch.setattr(Pipeline, "edit", lambda self, prompt, image, mask, **_: image)
    same = compare(pipe, judge, ["banana", "rocket"])
    assert same["edited"] == same["before"] and same["changed outside"] == 0
    monkeypatch.setattr(
        Pipeline, "edit", lambda self, p, image, m, **_: Image.new("RGB", image.size)
    )
    assert compare(pipe, judge, ["banana", "rocket"])["changed outside"] > 0
