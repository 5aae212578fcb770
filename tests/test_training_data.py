"""Folders of pictures as users have them: captions, odd files, and what is refused."""

import csv
import hashlib
import json
import os
import re
import runpy
import warnings
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from snapgen_mlx.cli.main import main
from snapgen_mlx.config import DiTConfig
from snapgen_mlx.errors import SnapGenError
from snapgen_mlx.hub import embedded_model
from snapgen_mlx.text_loading import load_text_encoders
from snapgen_mlx.training import pictures as module
from snapgen_mlx.training.checkpoint import fingerprint
from snapgen_mlx.training.data import (
    LatentDataset,
    bucket_sizes,
    cached_latents,
    cached_states,
    encode_images,
    nearest_size,
)
from snapgen_mlx.training.loop import fixed_batches
from snapgen_mlx.training.pictures import load_image, read_folder, scan_folder

from .tiny import write_tiny_model

RED, GREEN, BLUE = (200, 30, 40), (20, 180, 60), (10, 40, 220)


def picture(path, color=RED, size=(16, 16), **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, color).save(path, **options)
    return path


def metadata(folder, *rows):
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def found(folder, *args):
    return [(str(e.file.relative_to(folder)), e.captions) for e in read_folder(folder, *args)]


def pixels(path, size=(16, 16)):
    return np.round((load_image(path, size) + 1) * 127.5).astype(int)


def close(a, color, off=1):
    return np.abs(a.reshape(-1, 3) - color).max() <= off


# Captions


def test_jsonl(tmp_path):
    picture(tmp_path / "a.png")
    picture(tmp_path / "train" / "b.png")
    metadata(
        tmp_path,
        {"file_name": "train/b.png", "text": "a b", "captions": ["one", "two"], "other": 1},
        "",
        {"file_name": "a.png", "text": "line\u2028separator, é"},
    )
    expected = [("train/b.png", ["one", "two"]), ("a.png", ["line\u2028separator, é"])]
    assert found(tmp_path) == expected
    text = (tmp_path / "metadata.jsonl").read_text()
    (tmp_path / "metadata.jsonl").write_text(text.replace("\\u2028", "\u2028"), "utf-8-sig")
    assert found(tmp_path) == expected  # written by an editor that marks UTF-8


def test_csv(tmp_path):
    picture(tmp_path / "a.png")
    picture(tmp_path / "b.png")
    rows = 'file_name,label,text\r\nb.png,1,"red, ""very"" red"\r\na.png,2,"two\nlines"\r\n'
    (tmp_path / "metadata.csv").write_bytes(rows.encode("utf-8-sig"))
    assert found(tmp_path) == [("b.png", ['red, "very" red']), ("a.png", ["two\nlines"])]


LITTER = (".DS_Store", "._a.webp", "._a.txt", "Thumbs.db", "desktop.ini", "__MACOSX/._a.webp")


def litter(folder):
    """What macOS and Windows leave in folders and archives."""
    for name in (*LITTER, "._metadata.jsonl", "._metadata.csv"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"\0\1")


def test_text_files_beside_pictures_and_what_is_not_one(tmp_path):
    picture(tmp_path / "b.JPG", format="JPEG")
    picture(tmp_path / "a.webp")
    (tmp_path / "b.txt").write_text(" a dog\n on grass \n")
    (tmp_path / "a.txt").write_text("a cat")
    litter(tmp_path)
    for name in ("README.md", "notes.txt"):
        (tmp_path / name).write_bytes(b"\0\1")
    picture(tmp_path / ".hidden.png")
    picture(tmp_path / "__MACOSX" / "a.png")
    assert found(tmp_path) == [("a.webp", ["a cat"]), ("b.JPG", ["a dog on grass"])]


@pytest.mark.parametrize("listed", [False, True])
def test_litter_beside_metadata_and_in_it(tmp_path, listed):
    """Scripts that list a folder list its litter too, with or without captions."""
    picture(tmp_path / "a.webp")
    litter(tmp_path)
    rows = [{"file_name": name, "text": "x" * (i % 2)} for i, name in enumerate(LITTER)]
    rows = [*rows * listed, {"file_name": "a.webp", "text": "a cat"}]
    with open(tmp_path / "metadata.csv", "w", newline="") as f:
        writer = csv.DictWriter(f, ["file_name", "text"])
        writer.writeheader()
        writer.writerows(rows)
    assert found(tmp_path) == [("a.webp", ["a cat"])]
    metadata(tmp_path, *rows)
    assert found(tmp_path) == [("a.webp", ["a cat"])]
    metadata(tmp_path, *rows[:-1])
    with pytest.raises(SnapGenError, match=r"metadata\.jsonl names no picture"):
        read_folder(tmp_path)


def test_one_caption_for_all_without(tmp_path):
    for name in "ab":
        picture(tmp_path / f"{name}.png")
    with pytest.raises(SnapGenError, match=r"a\.png \(no caption\), b\.png .*--caption"):
        read_folder(tmp_path)
    assert found(tmp_path, "my dog") == [("a.png", ["my dog"]), ("b.png", ["my dog"])]
    (tmp_path / "a.txt").write_text("my cat")
    assert found(tmp_path, "my dog") == [("a.png", ["my cat"]), ("b.png", ["my dog"])]
    metadata(tmp_path, {"file_name": "b.png"}, {"file_name": "a.png", "text": "a"})
    assert found(tmp_path, "my dog") == [("b.png", ["my dog"]), ("a.png", ["a"])]


# What cannot be used


def test_everything_bad_is_named_at_once(tmp_path):
    picture(tmp_path / "good.png")
    picture(tmp_path / "whole.jpg", size=(300, 300))
    (tmp_path / "short.jpg").write_bytes((tmp_path / "whole.jpg").read_bytes()[:-100])
    noise = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "short.png")
    (tmp_path / "short.png").write_bytes((tmp_path / "short.png").read_bytes()[:400])
    (tmp_path / "page.png").write_text("<html>404</html>")
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "phone.heic").write_bytes(b"\0\0\0\x18ftypheic")
    (tmp_path / "folder.png").mkdir()
    Image.fromarray(np.zeros((8, 8), np.float32)).save(tmp_path / "float.tiff")
    names = ["missing.png", "short.jpg", "short.png", "page.png", "empty.png", "phone.heic"]
    names += ["folder.png", "float.tiff", "deep/missing.png"]
    rows = [{"file_name": name, "text": "x"} for name in [*names, "good.png"]]
    metadata(tmp_path, *rows)
    with pytest.raises(SnapGenError) as e:
        read_folder(tmp_path)
    message = str(e.value)
    assert message.startswith(f"{tmp_path}: 9 of 10 pictures cannot be used: missing.png (miss")
    assert "\n" not in message and "leave them out with --skip-bad" in message
    assert "--caption" not in message
    for name in names:
        assert f"{name} (" in message
    assert "page.png (a web page" in message
    examples, bad = scan_folder(tmp_path)
    assert [e.file.name for e in examples] == ["good.png"] and len(bad) == 9


def test_many_bad_pictures_are_counted(tmp_path):
    metadata(tmp_path, *({"file_name": f"{i}.png", "text": "x"} for i in range(25)))
    with pytest.raises(SnapGenError, match=r"25 of 25 .*9\.png \(missing\) and 15 more; repair"):
        read_folder(tmp_path)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ("{", "not a JSON object"),
        ("[1]", "not a JSON object"),
        ("3", "not a JSON object"),
        ("[" * 100_000, "not a JSON object"),
        ({"text": "x"}, "no file_name"),
        ({"file_name": 3, "text": "x"}, "no file_name"),
        ({"file_name": "", "text": "x"}, "no file_name"),
        ({"file_name": "a.png"}, "no caption"),
        ({"file_name": "a.png", "text": None}, "no caption"),
        ({"file_name": "a.png", "text": ""}, "no caption"),
        ({"file_name": "a.png", "text": " "}, "no caption"),
        ({"file_name": "a.png", "text": 5}, "its captions are no texts"),
        ({"file_name": "a.png", "captions": "abc"}, "its captions are no texts"),
        ({"file_name": "a.png", "captions": ["a", 3]}, "its captions are no texts"),
        ({"file_name": "a.png", "text": "half \ud83d an emoji"}, "surrogates not allowed"),
        ({"file_name": "../secret.png", "text": "x"}, "../secret.png is outside the folder"),
        ({"file_name": "b/../../secret.png", "text": "x"}, "is outside the folder"),
        ({"file_name": "/etc/secret.png", "text": "x"}, "/etc/secret.png is outside the folder"),
        ({"file_name": "a\0.png", "text": "x"}, "null"),
    ],
)
def test_bad_rows(tmp_path, row, reason):
    data = tmp_path / "data"
    picture(data / "a.png")
    picture(tmp_path / "secret.png")
    metadata(data, {"file_name": "a.png", "text": "fine"}, row)
    examples, bad = scan_folder(data)
    assert [e.captions for e in examples] == [["fine"]] and len(bad) == 1
    assert reason in bad[0]
    assert bad[0].startswith("metadata.jsonl:2 (") or "null" in reason
    with pytest.raises(SnapGenError, match="1 of 2 pictures"):
        read_folder(data)


def test_links_are_followed(tmp_path):
    """Downloaded data sets are folders of links into a cache."""
    picture(tmp_path / "blobs" / "a.png")
    (tmp_path / "data").mkdir()
    os.symlink(tmp_path / "blobs" / "a.png", tmp_path / "data" / "a.png")
    assert found(tmp_path / "data", "x") == [("a.png", ["x"])]


def test_folders_that_are_none(tmp_path):
    with pytest.raises(SnapGenError, match=r"cannot read the data in .*none: missing"):
        read_folder(tmp_path / "none")
    (tmp_path / "file").write_text("")
    with pytest.raises(SnapGenError, match="Not a directory"):
        read_folder(tmp_path / "file")
    picture(tmp_path / "below" / "a.png")
    with pytest.raises(SnapGenError, match=r"itself holds no picture; PNG.* in folders below"):
        read_folder(tmp_path)
    (tmp_path / "metadata.csv").write_bytes(b"file_name,text\n\xff\xfe,x\n")
    with pytest.raises(SnapGenError, match="is not UTF-8"):
        read_folder(tmp_path)
    (tmp_path / "metadata.csv").write_text("file;text\na.png;x\n")
    with pytest.raises(SnapGenError, match=r"no column file_name, .* but 'file;text'"):
        read_folder(tmp_path)
    metadata(tmp_path)
    with pytest.raises(SnapGenError, match=r"metadata\.jsonl names no picture"):
        read_folder(tmp_path)


def test_captions_as_others_write_them(tmp_path):
    """Under another name, in a column after a space, in .TXT."""
    for name in "abc":
        picture(tmp_path / f"{name}.png")
    (tmp_path / "a.TXT").write_text("a cat")
    (tmp_path / "c.txt").write_bytes("ein Kätzchen".encode("latin-1"))
    examples, bad = scan_folder(tmp_path, "x")
    assert [e.captions for e in examples] == [["a cat"], ["x"]]
    assert bad == ["c.png (c.txt is not UTF-8)"]
    (tmp_path / "metadata.csv").write_text("file_name, text\na.png,a dog\nb.png, \n")
    assert found(tmp_path, "x") == [("a.png", ["a dog"]), ("b.png", ["x"])]
    metadata(tmp_path, {"file_name": "a.png", "caption": "a fish"})
    assert found(tmp_path, "x") == [("a.png", ["a fish"])]


def test_large_pictures_are_read_in_silence(tmp_path, monkeypatch):
    picture(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 200)  # Pillow warns from here on
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert found(tmp_path, "x") == [("a.png", ["x"])]


# Pixels


def test_exif_rotation(tmp_path):
    """A phone writes every picture as its sensor saw it, and how to turn it."""
    upright = Image.new("RGB", (16, 32), BLUE)
    upright.paste(RED, (0, 0, 16, 16))
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90° clockwise
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "a.png", exif=exif)
    a = pixels(tmp_path / "a.png", (32, 16))
    assert close(a[:16], RED) and close(a[16:], BLUE)


def test_transparency_becomes_white(tmp_path):
    image = Image.new("RGBA", (16, 16), (*GREEN, 0))
    image.paste((*RED, 255), (0, 0, 8, 16))
    image.paste((*BLUE, 128), (8, 0, 16, 8))
    image.save(tmp_path / "rgba.png")
    a = pixels(tmp_path / "rgba.png")
    assert close(a[:, :8], RED) and close(a[8:, 8:], (255, 255, 255))
    assert close(a[:8, 8:], [(c + 255) / 2 for c in BLUE], off=2)

    image = Image.new("P", (16, 16), 0)
    image.putpalette([*GREEN, *RED])
    image.paste(1, (0, 0, 8, 16))
    image.save(tmp_path / "p.png")
    a = pixels(tmp_path / "p.png")
    assert close(a[:, :8], RED) and close(a[:, 8:], GREEN)
    image.save(tmp_path / "p.gif", transparency=0)
    a = pixels(tmp_path / "p.gif")
    assert close(a[:, :8], RED) and close(a[:, 8:], (255, 255, 255))

    Image.new("LA", (16, 16), (90, 0)).save(tmp_path / "la.png")
    assert close(pixels(tmp_path / "la.png"), (255, 255, 255))


def test_sixteen_bits_cmyk_gray_and_black(tmp_path):
    ramp = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    for name in ("a.png", "a.tiff"):
        Image.fromarray(ramp).save(tmp_path / name)
        gray = pixels(tmp_path / name)
        assert np.abs(gray - np.arange(256).reshape(16, 16, 1)).max() <= 1, name
    Image.new("CMYK", (16, 16), (0, 255, 255, 0)).save(tmp_path / "c.jpg", quality=100)
    assert close(pixels(tmp_path / "c.jpg"), (255, 0, 0), off=3)
    Image.new("L", (16, 16), 77).save(tmp_path / "l.png")
    assert close(pixels(tmp_path / "l.png"), (77, 77, 77))
    Image.new("1", (16, 16), 1).save(tmp_path / "one.png")
    assert close(pixels(tmp_path / "one.png"), (255, 255, 255))
    read_folder(tmp_path, "all of them pass the check")


def test_the_middle_is_kept(tmp_path):
    image = Image.new("RGB", (60, 20), BLUE)
    image.paste(RED, (20, 0, 40, 20))
    image.save(tmp_path / "wide.png")
    a = pixels(tmp_path / "wide.png", (8, 8))
    assert a.shape == (8, 8, 3) and close(a[:, 1:-1], RED, off=3)
    picture(tmp_path / "thin.png", RED, (20_000, 1))
    assert close(pixels(tmp_path / "thin.png"), RED)
    exact = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    Image.fromarray(exact).save(tmp_path / "exact.png")
    assert np.array_equal(pixels(tmp_path / "exact.png"), exact)
    with pytest.raises(SnapGenError, match=r"cannot read the picture .*none\.png: missing"):
        load_image(tmp_path / "none.png", (8, 8))


def test_heic(tmp_path):
    """A phone's own format: upright, and read whatever its name."""
    upright = Image.new("RGB", (48, 64), BLUE)
    upright.paste(RED, (0, 0, 48, 32))
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90° clockwise
    turned = upright.transpose(Image.Transpose.ROTATE_90)
    turned.save(tmp_path / "a.heic", quality=95, exif=exif.tobytes())
    upright.save(tmp_path / "b.heif", quality=95)
    (tmp_path / "c.jpg").write_bytes((tmp_path / "a.heic").read_bytes())
    examples = read_folder(tmp_path, "x")
    assert [(e.file.name, e.aspect) for e in examples] == [
        ("a.heic", 0.75),
        ("b.heif", 0.75),
        ("c.jpg", 0.75),
    ]
    for example in examples:
        a = pixels(example.file, (64, 48))
        assert close(a[:30], RED, off=6) and close(a[34:], BLUE, off=6), example.file


def test_a_damaged_heic(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (128, 192, 3), dtype=np.uint8)
    image = Image.fromarray(noise)
    image.save(tmp_path / "a.heic", thumbnails=[64])
    whole = (tmp_path / "a.heic").read_bytes()
    (example,) = read_folder(tmp_path, "x")
    assert example.aspect == 1.5
    (tmp_path / "a.heic").write_bytes(whole[: len(whole) // 2])
    _, bad = scan_folder(tmp_path, "x")
    assert len(bad) == 1 and bad[0].startswith("a.heic (")


def test_heic_without_its_reader(tmp_path, monkeypatch):
    picture(tmp_path / "a.heic", format="HEIF")
    (tmp_path / "b.jpg").write_bytes((tmp_path / "a.heic").read_bytes())
    (tmp_path / "c.heic").write_text("nothing")
    monkeypatch.setattr(module, "pillow_heif", None)
    monkeypatch.setattr(Image, "ID", [name for name in Image.ID if name != "HEIF"])
    install = "(HEIC, read after: pip install 'snapgen-mlx[heic]')"
    _, bad = scan_folder(tmp_path, "x")
    assert bad == [f"a.heic {install}", f"b.jpg {install}", "c.heic (not a picture)"]


# Buckets


@pytest.mark.parametrize("base", [1024, 768, 512, 256])
def test_bucket_sizes(base):
    sizes = bucket_sizes(base, DiTConfig.from_preset("full"), 8)
    assert (base, base) in sizes and len(set(sizes)) == len(sizes) >= 3
    for h, w in sizes:
        assert (w, h) in sizes and h % 64 == w % 64 == 0
        assert 0.5 <= w / h <= 2 and 0.8 * base**2 <= h * w <= base**2


def test_bucket_sizes_of_known_bases():
    full, embedded = (DiTConfig.from_preset(name) for name in ("full", "embedded"))
    wide = [(704, 1408), (768, 1344), (832, 1216), (896, 1152), (960, 1088)]
    sizes = [*wide, (1024, 1024), *((w, h) for h, w in reversed(wide))]
    assert bucket_sizes(1024, full, 8) == sizes
    assert bucket_sizes(128, embedded, 8) == [(128, 128)]  # it learned squares alone
    assert bucket_sizes(192, embedded, 8) == [(128, 256), (192, 192), (256, 128)]
    # 128 x 256 px have 8 x 16 tokens, which do not divide into 9 blocks.
    assert bucket_sizes(192, DiTConfig(bna_blocks=9), 8) == [(192, 192)]
    for pixels, size in {
        (1000, 1000): (1024, 1024),
        (3024, 4032): (1152, 896),
        (4032, 3024): (896, 1152),
        (1920, 1080): (768, 1344),
        (5000, 100): (704, 1408),
        (1, 9000): (1408, 704),
    }.items():
        assert nearest_size(pixels[0] / pixels[1], sizes) == size


def test_pictures_are_measured_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    picture(tmp_path / "a.jpg", size=(4032, 3024))
    picture(tmp_path / "b.jpg", size=(4032, 3024), exif=exif)
    picture(tmp_path / "c.png", size=(30, 60))
    aspects = [e.aspect for e in read_folder(tmp_path, "x")]
    assert aspects == pytest.approx([4 / 3, 3 / 4, 1 / 2], rel=1e-3)


# Latents


class ToyVAE:
    """Means of 8 x 8 pixels; counts the pictures it has encoded."""

    config = SimpleNamespace(image_channels=3)

    def __init__(self):
        self.loaded, self.encoded = 0, 0

    def load(self):
        self.loaded += 1
        return self

    def encode(self, images):
        self.encoded += len(images)
        B, H, W, C = images.shape
        return images.reshape(B, H // 8, 8, W // 8, 8, C).mean(axis=(2, 4))


def collect(records):
    """(value, records) of a generator."""
    seen = []
    while True:
        try:
            seen.append(next(records))
        except StopIteration as e:
            return e.value, seen


def test_long_clauses_in_quoted_captions_are_no_file_names(tmp_path):
    """Captions in paragraphs: a clause after a line break may be longer than any name can be."""
    picture(tmp_path / "a.png", (200, 0, 0))
    caption = "A red square.\n" + "\u7ea2" * 100 + ", with a plain border, on white"
    with open(tmp_path / "metadata.csv", "w", newline="", encoding="utf-8") as f:
        csv.writer(f).writerows([["file_name", "text"], ["a.png", caption]])
    (example,) = read_folder(tmp_path)
    assert example.captions == [caption]
    (tmp_path / "dog").mkdir()  # a word of a caption, not a row
    with open(tmp_path / "metadata.csv", "w", newline="", encoding="utf-8") as f:
        csv.writer(f).writerows([["file_name", "text"], ["a.png", "A photo.\nA garden, dog, tree"]])
    assert len(read_folder(tmp_path)) == 1
    (tmp_path / "metadata.csv").write_text('file_name,text\na.png,"red\n./a.png,blue\n"\n')
    with pytest.raises(SnapGenError, match="a quote is not closed"):
        read_folder(tmp_path)


def test_transparent_pictures_keep_their_transparency(tmp_path):
    """Premultiplied, scaled without fringes; a photo is opaque."""
    pixels = np.zeros((16, 16, 4), np.uint8)
    pixels[:, 8:] = (200, 100, 0, 128)
    pixels[:, :8, 1] = 255  # what nobody sees
    Image.fromarray(pixels).save(tmp_path / "sticker.png")
    Image.new("RGB", (16, 16), (200, 100, 0)).save(tmp_path / "photo.png")
    got = (load_image(tmp_path / "sticker.png", (8, 8), channels=4) + 1) * 127.5
    assert got.shape == (8, 8, 4) and np.abs(got[:, 0]).max() == 0
    np.testing.assert_allclose(got[0, 7], np.array((200, 100, 0, 255)) * 128 / 255, atol=1)
    assert (got[..., :3] <= got[..., 3:] + 1e-3).all() and got[..., 1].max() <= 51
    opaque = load_image(tmp_path / "photo.png", (8, 8), channels=4)
    assert (opaque[..., 3] == 1).all()
    assert np.array_equal(opaque[..., :3], load_image(tmp_path / "photo.png", (8, 8)))


def test_latents_are_encoded_once(tmp_path):
    rng = np.random.default_rng(0)
    data, cache, vae = tmp_path / "data", tmp_path / "out" / "cache", ToyVAE()
    for i in range(40):
        picture(data / f"{i:02}.png", tuple(rng.integers(0, 256, 3)))

    def latents(key="vae", size=(16, 16), caption="x"):
        before, examples = vae.encoded, read_folder(data, caption)
        out, records = collect(cached_latents(vae.load, key, examples, [size], cache))
        assert [r["pictures"] for r in records] == [40] * len(records)
        out = np.stack(out)
        assert out.dtype == np.float32
        return out, vae.encoded - before

    first, encoded = latents()
    assert encoded == 40 and first.shape == (40, 2, 2, 3)
    files = sorted(data.iterdir())
    assert np.array_equal(first, encode_images(ToyVAE(), files, (16, 16)))
    loads = vae.loaded
    again, encoded = latents()
    assert encoded == 0 and np.array_equal(first, again) and vae.loaded == loads

    # Neither names nor times count, contents do.
    (data / "39.png").rename(data / "zz.png")
    os.utime(data / "00.png", (1, 1))
    assert latents(caption="another")[1] == 0
    picture(data / "00.png", RED)
    changed, encoded = latents()
    assert encoded == 1 and close((changed[0] + 1) * 127.5, RED)
    # So do the encoder and the size.
    assert latents(key="another")[1] == 40
    assert latents(size=(8, 8))[0].shape == (40, 1, 1, 3)

    # A damaged file is made anew.
    files = sorted(cache.iterdir())
    for damage in (b"", b"\x93NUMPY", files[0].read_bytes()[:-1]):
        for file in files:
            file.write_bytes(damage)
        again, encoded = latents()
        assert encoded == 40 and np.array_equal(again, changed)


def test_an_interrupted_encoding_goes_on(tmp_path):
    for i in range(70):
        picture(tmp_path / "data" / f"{i:02}.png", (i, i, i), (8, 8))
    examples, cache = read_folder(tmp_path / "data", "x"), tmp_path / "cache"
    records = cached_latents(ToyVAE, "k", examples, [(8, 8)], cache)
    assert next(records) == {"encoded": 32, "pictures": 70}
    records.close()
    vae = ToyVAE()
    latents, _ = collect(cached_latents(vae.load, "k", examples, [(8, 8)], cache))
    assert vae.encoded == 38
    np.testing.assert_allclose([a[0, 0, 0] for a in latents], np.arange(70) / 127.5 - 1, atol=1e-5)


def test_latents_by_bucket(tmp_path):
    """Each picture in its own shape, in the order of the pictures, mirrored on demand."""
    shapes = [(60, 60), (80, 40), (40, 80), (64, 60), (200, 100), (300, 10)]
    for i, shape in enumerate(shapes * 15):
        image = Image.new("RGB", shape, (i, i, i))
        image.paste((i, i, 255), (shape[0] // 2, 0, *shape))
        image.save(tmp_path / f"{i:02}.png")
    examples, cache, vae = read_folder(tmp_path, "x"), tmp_path / "cache", ToyVAE()
    sizes = [(16, 16), (8, 16), (16, 8)]

    def latents(**options):
        records = cached_latents(vae.load, "k", examples, sizes, cache, **options)
        out, records = collect(records)
        return out, [r["encoded"] for r in records]

    out, encoded = latents()
    by_shape = {(60, 60): (2, 2, 3), (40, 80): (2, 1, 3), (64, 60): (2, 2, 3)}
    assert [a.shape for a in out] == [by_shape.get(s, (1, 2, 3)) for s in shapes] * 15
    assert encoded == [30, 62, 75, 90]
    assert [round((a[0, 0, 0] + 1) * 127.5) for a in out] == list(range(90))
    mirrored, encoded = latents(mirror=True)
    assert encoded and vae.encoded == 180
    for a, b in zip(out, mirrored, strict=True):
        np.testing.assert_allclose(a[:, ::-1], b, atol=0.02)
    assert latents()[1] == latents(mirror=True)[1] == [] and vae.encoded == 180


# Text states


class ToyEncoder:
    """A text's characters one by one; counts the texts it has encoded."""

    def __init__(self, name="toy", dtype=mx.float32, dim=4):
        self.name, self.dtype, self.dim, self.encoded = name, dtype, dim, 0

    def encode(self, texts):
        self.encoded += len(texts)
        longest = max(1, *map(len, texts))
        rows = [[*map(ord, text), *[7] * (longest - len(text))] for text in texts]
        states = mx.array(rows)[..., None] + mx.arange(self.dim)
        mask = mx.arange(longest) < mx.array([*map(len, texts)])[:, None]
        return states.astype(self.dtype), mask


def same_text(encoder, cached, texts):
    (states, mask), (expected, valid) = cached.encode(texts), encoder.encode(texts)
    assert states.dtype == expected.dtype and mask.dtype == mx.bool_
    assert mx.array_equal(mask, valid) and cached.name == encoder.name
    return mx.array_equal(states, mx.where(mask[..., None], expected, 0))


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
def test_text_states_are_encoded_once(tmp_path, dtype):
    encoders = [ToyEncoder("one", dtype), ToyEncoder("two", mx.float32, dim=2)]
    texts = [f"{'very ' * (i % 7)}red {i}" for i in range(300)] + ["", "red 0"]

    def states(texts=texts, key="k"):
        before = [e.encoded for e in encoders]
        cached, records = collect(cached_states(encoders, key, texts, tmp_path))
        (encoded,) = {e.encoded - n for e, n in zip(encoders, before, strict=True)}
        return cached, encoded, records

    cached, encoded, records = states()
    assert encoded == 301 and records[-1] == {"encoded": 301, "captions": 301}
    assert len(records) == len(list(tmp_path.iterdir())) == 2
    again, encoded, records = states()
    assert encoded == 0 and records == []
    for own in (cached, again):
        for encoder, c in zip(encoders, own, strict=True):
            assert same_text(encoder, c, ["red 0"]) and same_text(encoder, c, [""])
            assert same_text(encoder, c, ["very red 295", "", *texts[250:260], "red 0"])

    # What is new is encoded with what shares its file; other encoders read all.
    assert states([*texts, "blue"])[1] == 46
    assert states(key="another")[1] == 301
    # A damaged file is made anew.
    for damage in (b"", b"\0" * 100, None):
        for file in tmp_path.iterdir():
            file.write_bytes(file.read_bytes()[:-1] if damage is None else damage)
        cached, encoded, _ = states()
        assert encoded == 301 and same_text(encoders[0], cached[0], texts[:9])


def test_a_vocabulary_is_part_of_the_key(tmp_path):
    folders = [write_tiny_model(tmp_path / "model") / name for name in ("text_encoder", "none")]
    before = fingerprint(*folders)
    (folders[0] / ".DS_Store").write_bytes(b"x")
    assert fingerprint(*folders) == before
    with open(folders[0] / "vocab.txt", "a") as f:
        f.write("blue\n")
    assert fingerprint(*folders) != before


def test_text_states_that_are_gone(tmp_path):
    (cached,), _ = collect(cached_states([ToyEncoder()], "k", ["a", "b"], tmp_path))
    (file,) = tmp_path.iterdir()
    for damage in (lambda: file.write_bytes(file.read_bytes()[:-20]), file.unlink):
        damage()
        with pytest.raises(SnapGenError, match=r"cannot read .*safetensors; run the command again"):
            cached.encode(["a", "b"])


def test_only_the_first_process_writes_text_states(tmp_path, monkeypatch):
    class Second:
        def rank(self):
            return 1

    first = ToyEncoder()
    collect(cached_states([first], "k", [str(i) for i in range(256)], tmp_path))
    before = sorted(tmp_path.iterdir())
    monkeypatch.setattr(mx.distributed, "init", Second)
    encoder, texts = ToyEncoder(), [str(i) for i in range(300)]
    (cached,), _ = collect(cached_states([encoder], "k", texts, tmp_path))
    assert encoder.encoded == 44 and sorted(tmp_path.iterdir()) == before
    assert same_text(encoder, cached, ["299", "0"])
    (folder,) = {path.parent for path, _ in cached.places.values()} - {tmp_path}
    assert folder.is_dir()
    del cached
    assert not folder.exists()


def test_batches_with_cached_states_are_those_of_the_encoder(tmp_path):
    """Of the embedded model's encoder, up to rounding; also a caption that it has no word for."""
    encoder = load_text_encoders(embedded_model())[0]
    captions = [["a red cat", "\u4e00"], ["a dog on the grass, flat style"], ["a cat " * 20]]
    texts = [text for phrasings in captions for text in phrasings]
    cached, _ = collect(cached_states([encoder], "k", texts, tmp_path))
    latents = np.random.default_rng(0).standard_normal((3, 2, 2, 4), dtype=np.float32)
    sets = [LatentDataset(latents, captions, own) for own in ([encoder], cached)]
    assert sets[0].fingerprint == sets[1].fingerprint
    for seed in range(5):
        (x0, text, masks), (x1, text1, masks1) = (
            data.batch(np.random.default_rng(seed), 6, dropout=0.3) for data in sets
        )
        assert mx.array_equal(x0, x1)
        # The same caption beside others: products of other shapes round otherwise.
        assert mx.allclose(text["words"], text1["words"], rtol=0, atol=1e-5)
        assert mx.array_equal(masks["words"], masks1["words"])


# Batches


def dataset(shapes, **options) -> LatentDataset:
    """Latents that say which picture they are of."""
    latents = [np.full((*shape, 3), i, np.float32) for i, shape in enumerate(shapes)]
    captions = [["a" * (i + 1), "b" * (i + 1)] for i in range(len(shapes))]
    return LatentDataset(latents, captions, [ToyEncoder()], **options)


def test_one_bucket_takes_no_draw():
    """Runs of before there were buckets are resumed: their draws and fingerprint, written out."""
    data = dataset([(2, 2)] * 9)
    latents = np.stack(data.latents)
    for seed in range(3):
        rng = np.random.default_rng([0, seed])
        rows = rng.integers(9, size=6)
        prompts = [data.captions[i][rng.integers(2)] for i in rows]
        kept = rng.random(6) >= 0.2
        other = np.random.default_rng([0, seed])
        x0, text, masks = data.batch(other, 6, dropout=0.2)
        assert np.array_equal(x0, latents[rows]) and text["toy"].shape[1] % 8 == 0
        lengths = [len(p) * bool(k) for p, k in zip(prompts, kept, strict=True)]
        assert masks["toy"].sum(axis=1).tolist() == lengths
        assert rng.random() == other.random()
    digest = hashlib.sha256(latents.data)
    digest.update(json.dumps(data.captions).encode())
    assert data.fingerprint == digest.hexdigest()


def test_a_batch_is_of_one_bucket():
    """Buckets are drawn by their number of pictures, so that all pictures are drawn alike."""
    shapes = [(2, 4), (2, 2), (2, 4), (4, 2), (2, 4), (2, 4)]
    data, counts = dataset(shapes), np.zeros(6)
    rng = np.random.default_rng(0)
    for _ in range(800):
        x0, _, masks = data.batch(rng, 4)
        drawn = np.array(x0[:, 0, 0, 0]).astype(int)
        assert all(shapes[i] == x0.shape[1:3] for i in drawn)
        assert masks["toy"].sum(axis=1).tolist() == [i + 1 for i in drawn]
        counts += np.bincount(drawn, minlength=6)
    # 800 draws of a bucket with p = 1/6 have a standard deviation of 8 % of their mean.
    np.testing.assert_allclose(counts / counts.mean(), 1, atol=0.25)


def test_mirrored_pictures_are_drawn_as_often():
    data = dataset([(2, 4), (2, 2)] * 2)
    plain = data.fingerprint
    data = dataset([(2, 4), (2, 2)] * 2, mirrored=[-1 - a for a in data.latents])
    assert data.fingerprint != plain
    x0 = [data.batch(np.random.default_rng(i), 4)[0] for i in range(500)]
    values = np.concatenate([np.array(a[:, 0, 0, 0]) for a in x0])
    assert set(values) == {0, 1, 2, 3, -1, -2, -3, -4}
    assert abs((values < 0).mean() - 0.5) < 0.05  # five standard deviations
    again = data.batch(np.random.default_rng(7), 4)[0]
    assert mx.array_equal(again, x0[7])


def test_validation_batches():
    """Each of one bucket; all pictures once; noise and times as if they were one array."""
    data = dataset([(2, 4), (2, 2), (2, 4), (2, 2), (2, 4)])
    batches = list(fixed_batches(data, 2))
    assert [b[0][:, 0, 0, 0].tolist() for b in batches] == [[0, 2], [4], [1, 3]]
    assert [b[4]["toy"].sum(axis=1).tolist() for b in batches] == [[1, 3], [5], [2, 4]]
    times = sorted(t for b in batches for t in b[2].tolist())
    np.testing.assert_allclose(times, [0.1, 0.3, 0.5, 0.7, 0.9], atol=1e-6)
    assert all(x0.shape == eps.shape for x0, eps, *_ in batches)

    data = dataset([(2, 2)] * 5)
    rng = np.random.default_rng(0)
    eps = rng.standard_normal((5, 2, 2, 3), dtype=np.float32)
    t = rng.permutation((np.arange(5, dtype=np.float32) + 0.5) / 5)
    one = [np.concatenate([b[i] for b in fixed_batches(data, 2)]) for i in (1, 2)]
    assert np.array_equal(one[0], eps) and np.array_equal(one[1], t)


# All of it


def test_the_example():
    """Its words are known to the embedded model, its pictures are what its script draws."""
    folder = Path(__file__).parent.parent / "examples"
    examples = read_folder(folder / "pip")
    assert len(examples) == len(list((folder / "pip").glob("*.webp"))) == 20
    assert sum(path.stat().st_size for path in (folder / "pip").iterdir()) < 300_000
    table = embedded_model() / "text_encoder" / "vocab.txt"
    known = set(table.read_text(encoding="utf-8").splitlines())
    for example in examples:
        assert len(example.captions) >= 3 and example.aspect == 1
        assert set(re.findall(r"\w+", " ".join(example.captions))) <= known
    script = runpy.run_path(str(folder / "draw_pip.py"))
    does, background, drawing = script["SCENES"][10]
    assert examples[10].captions == script["captions"](does, background)
    with Image.open(examples[10].file) as kept:
        pictures = [i.convert("RGBA") for i in (script["draw"](background, **drawing), kept)]
    drawn, kept = (np.asarray(i, np.float32) for i in pictures)
    assert (drawn[..., 3] == kept[..., 3]).all() and drawn[..., 3].min() == 0
    error = (np.abs(drawn - kept) * drawn[..., 3:] / 255).mean()
    assert error < 2  # of 255: lossy colours


def test_finetuning_on_pictures_of_several_shapes(tmp_path):
    """From the command on: encoded once, mirrored, and not again when it is resumed."""
    model = write_tiny_model(tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    config["sampling"] |= {"size": 192, "steps": 1, "guidance": 1.0}
    (model / "config.json").write_text(json.dumps(config))
    rng = np.random.default_rng(0)
    for i, shape in enumerate([(50, 100), (100, 50), (60, 60)]):
        image = Image.fromarray(rng.integers(0, 256, (*shape, 3), dtype=np.uint8))
        (tmp_path / "data").mkdir(exist_ok=True)
        image.save(tmp_path / "data" / f"{i}.png")
        (tmp_path / "data" / f"{i}.txt").write_text(f"a {['cat', 'dog', 'red'][i]}")
    folders = [model, tmp_path / "data", "--validation", tmp_path / "data", "-o", tmp_path / "out"]
    command = ["finetune", *map(str, folders), "--flip", "--batch=2", "--warmup=1"]
    mx.disable_compile()
    result = CliRunner().invoke(main, [*command, "--steps=4"])
    mx.enable_compile()
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    encoded = [line for line in lines if line.startswith("encoded")]
    assert encoded.count("encoded 3 of 3 pictures") == 2  # as they are, mirrored
    assert encoded[-1] == "encoded 3 of 3 captions" and "  val tiny " in result.stdout
    caches = sorted(path.suffix for path in (tmp_path / "out" / "cache").iterdir())
    assert caches == [".npy"] * 6 + [".safetensors"]
    result = CliRunner().invoke(main, [*command, "--steps=4"])
    assert result.exit_code == 0 and "encoded" not in result.stdout, result.output
