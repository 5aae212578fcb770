"""Sticker packs."""

import json

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from snapgen_mlx.cli.main import main
from snapgen_mlx.errors import UsageError
from snapgen_mlx.packs import trimmed, webp_below

from .tiny import write_tiny_model


@pytest.mark.parametrize("mode", ["transparent", "white"])
def test_the_visible_part_fills_the_square(mode):
    image = Image.new("RGBA", (256, 128), (0, 0, 0, 0) if mode == "transparent" else "white")
    image.paste((255, 0, 0, 255), (40, 50, 80, 70))
    square = trimmed(image, 100)
    assert square.size == (100, 100)
    ys, xs = (np.array(square)[..., 3] > 128).nonzero()
    assert (xs.min(), xs.max()) == (3, 96) and abs(np.ptp(ys) + 1 - 47) <= 1


def test_nothing_and_busy_pictures_stay_whole():
    assert trimmed(Image.new("RGBA", (64, 64)), 32).size == (32, 32)
    busy = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
    assert (np.array(trimmed(busy, 100))[..., 3] > 0).sum() == 94 * 94


def test_webp_keeps_to_the_limit_or_says_so():
    noise = np.random.default_rng(0).integers(0, 256, (256, 256, 3), np.uint8)
    noise = Image.fromarray(noise)
    assert len(webp_below(noise, 300_000)) > 150_000  # lossless
    assert len(webp_below(noise, 100_000)) <= 100_000
    with pytest.raises(UsageError, match="1000 bytes"):
        webp_below(noise, 1000)


def test_the_command_writes_a_pack_whole(tmp_path, monkeypatch):
    (tmp_path / "model").mkdir()
    model = write_tiny_model(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    args = ["pack", "a {happy,red} cat", "--styles", "smiling,dog", "-o", "cats", "-m", str(model)]
    result = CliRunner().invoke(main, args)
    assert result.exit_code == 0, result.output
    manifest = json.loads((tmp_path / "cats" / "manifest.json").read_text())
    assert [e["settings"]["prompt"] for e in manifest["pictures"]] == [
        "a happy cat, smiling",
        "a happy cat, dog",
        "a red cat, smiling",
        "a red cat, dog",
    ]
    for entry in manifest["pictures"]:
        files = {k: tmp_path / "cats" / path for k, path in entry["files"].items()}
        sticker, emoji = (Image.open(files[k]) for k in ("sticker", "emoji"))
        assert (sticker.format, sticker.size) == ("WEBP", (512, 512))
        assert files["sticker"].stat().st_size <= 100_000
        assert (emoji.format, emoji.size) == ("PNG", (128, 128))
        assert Image.open(files["ico"]).format == "ICO"
        assert Image.open(files["icns"]).format == "ICNS"
    assert Image.open("cats/sheet.png").height > 4 * 128
    again = CliRunner().invoke(main, args)
    assert again.exit_code == 1 and "not empty" in again.stderr


def test_a_failure_leaves_nothing(tmp_path):
    args = ["pack", "a cat", "--variant", "huge", "-o", str(tmp_path / "cats")]
    result = CliRunner().invoke(main, args)
    assert result.exit_code == 2 and len(result.stderr.strip().splitlines()) == 1
    assert list(tmp_path.iterdir()) == []
