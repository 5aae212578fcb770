"""Folders of pictures as users have them: captions, odd files, and what is refused."""

import json
import os

import mlx.core as mx
import numpy as np
import pytest
from PIL import Image

from snapgen_mlx.errors import SnapGenError
from snapgen_mlx.training.data import (
    cached_latents,
    encode_images,
    load_image,
    read_folder,
    scan_folder,
)

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


def test_text_files_beside_pictures_and_what_is_not_one(tmp_path):
    picture(tmp_path / "b.JPG", format="JPEG")
    picture(tmp_path / "a.webp")
    (tmp_path / "b.txt").write_text(" a dog\n on grass \n")
    (tmp_path / "a.txt").write_text("a cat")
    for name in (".DS_Store", "._a.webp", "Thumbs.db", "desktop.ini", "README.md", "notes.txt"):
        (tmp_path / name).write_bytes(b"\0\1")
    picture(tmp_path / ".hidden.png")
    picture(tmp_path / "__MACOSX" / "a.png")
    assert found(tmp_path) == [("a.webp", ["a cat"]), ("b.JPG", ["a dog on grass"])]


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
    for reason in ("page.png (not a picture)", "phone.heic (HEIC is not read; save it as JPEG)"):
        assert reason in message
    examples, bad = scan_folder(tmp_path)
    assert [e.file.name for e in examples] == ["good.png"] and len(bad) == 9


def test_many_bad_pictures_are_counted(tmp_path):
    metadata(tmp_path, *({"file_name": f"{i}.png", "text": "x"} for i in range(25)))
    with pytest.raises(SnapGenError, match=r"25 of 25 .*9\.png \(missing\) and 15 more; repair"):
        read_folder(tmp_path)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ("{", "no file_name"),
        ("[1]", "no file_name"),
        ("3", "no file_name"),
        ("[" * 100_000, "no file_name"),
        ({"text": "x"}, "no file_name"),
        ({"file_name": 3, "text": "x"}, "no file_name"),
        ({"file_name": "", "text": "x"}, "no file_name"),
        ({"file_name": "a.png"}, "no caption"),
        ({"file_name": "a.png", "text": None}, "no caption"),
        ({"file_name": "a.png", "text": ""}, "no caption"),
        ({"file_name": "a.png", "text": " "}, "its captions are no texts"),
        ({"file_name": "a.png", "text": 5}, "its captions are no texts"),
        ({"file_name": "a.png", "captions": "abc"}, "its captions are no texts"),
        ({"file_name": "a.png", "captions": ["a", 3]}, "its captions are no texts"),
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
    with pytest.raises(SnapGenError, match="holds no picture; PNG"):
        read_folder(tmp_path)
    (tmp_path / "metadata.csv").write_bytes(b"file_name,text\n\xff\xfe,x\n")
    with pytest.raises(SnapGenError, match="cannot read the data"):
        read_folder(tmp_path)
    metadata(tmp_path)
    with pytest.raises(SnapGenError, match="holds no picture"):
        read_folder(tmp_path)


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


# Latents


class ToyVAE:
    """Means of 8 x 8 pixels; counts the pictures it has encoded."""

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


def test_latents_are_encoded_once(tmp_path):
    rng = np.random.default_rng(0)
    data, cache, vae = tmp_path / "data", tmp_path / "out" / "cache", ToyVAE()
    for i in range(40):
        picture(data / f"{i:02}.png", tuple(rng.integers(0, 256, 3)))

    def latents(key="vae", size=(16, 16), caption="x"):
        before, examples = vae.encoded, read_folder(data, caption)
        out, records = collect(cached_latents(vae.load, key, examples, size, cache))
        assert out.dtype == np.float32
        assert [r["pictures"] for r in records] == [40] * len(records)
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
    assert encoded == 32 and close((changed[0] + 1) * 127.5, RED)
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
    records = cached_latents(ToyVAE, "k", examples, (8, 8), cache)
    assert next(records) == {"encoded": 32, "pictures": 70}
    records.close()
    vae = ToyVAE()
    latents, _ = collect(cached_latents(vae.load, "k", examples, (8, 8), cache))
    assert vae.encoded == 38
    assert mx.allclose(mx.array(latents[:, 0, 0, 0]), mx.arange(70) / 127.5 - 1, atol=1e-5)
