"""Captions cut, pictures left out and colours misread: each is right, or named."""

import io
import struct
import unicodedata

import numpy as np
import pytest
from PIL import Image, ImageCms, PngImagePlugin

from snapgen_mlx.errors import SnapGenError
from snapgen_mlx.training.picture_list import left_out
from snapgen_mlx.training.pictures import load_image, read_folder, scan_folder


def pictures(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), "red").save(folder / name, "PNG")


def table(folder, text, encoding="utf-8"):
    pictures(folder, "1.png", "2.png", "3.png")
    (folder / "metadata.csv").write_bytes(text.encode(encoding))
    return folder


def captions(folder):
    return [e.captions[0] for e in read_folder(folder)]


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("file_name,text\n1.png,a\n2.png,red, on a table\n", "metadata.csv:3 .3 fields for 2"),
        ("text,file_name\nred, on a table,1.png\n", "metadata.csv:2 .3 fields"),
        ('file_name,text\n1.png,"a red\n2.png,b\n3.png,c\n', "from line 2 on: a quote"),
        ('file_name,text\n1.png,a\n2.png,"b\n3.png,"c"\n', "from line 3 on: a quote"),
        ('file_name,text\n1.png,"a\n2.png,b"\n', "from line 2 on: a quote"),
        ('file_name,text\n1.png,"a 24" screen, new"\n', "from line 2 on: a quote"),
    ],
)
def test_a_row_of_a_table_that_is_not_what_it_seems_is_named(tmp_path, text, place):
    with pytest.raises(SnapGenError, match=place):
        captions(table(tmp_path, text))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('file_name,text\n1.png,"red, on\na table"\n', "red, on\na table"),
        ('file_name,text\r\n1.png,a 24" screen\r\n', 'a 24" screen'),
        ("sep=,\nfile_name,text\n1.png,a cat\n", "a cat"),
        ("sep=;\nimage;prompt\n1.png;a, b\n", "a, b"),
        ("image\tcaption\n1.png\ta, b\n", "a, b"),
        ("file_name,caption,prompt\n1.png,,a cat\n", "a cat"),
    ],
)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_tables_as_programs_write_them(tmp_path, text, expected, encoding):
    assert captions(table(tmp_path, text, encoding)) == [expected]


def test_another_code_page_is_named_with_the_cure(tmp_path):
    with pytest.raises(SnapGenError, match=r"metadata.csv is not UTF-8 .line 2.*CSV UTF-8"):
        captions(table(tmp_path, "file_name,text\n1.png,café\n", "cp1252"))


def test_what_is_left_out_is_counted_with_the_reason(tmp_path):
    pictures(tmp_path, "1.png", "2.png", "below/3.png", "below/4.jpg", "no_extension")
    for name in ("a.jxl", "b.DNG", "c.dng", "notes.pdf", ".5.png.icloud", "._1.png", "x.caption"):
        (tmp_path / name).write_bytes(b"II*\0")
    assert [e.file.name for e in read_folder(tmp_path, "x")] == ["1.png", "2.png", "no_extension"]
    lines = left_out(tmp_path)
    assert len(lines) == 4
    for start in ("1 are in iCloud", "1 are .jxl", "2 are .dng", "2 stand in folders below"):
        assert any(line.startswith(start) for line in lines), (start, lines)
    (tmp_path / "metadata.jsonl").write_text('{"image": "1.png", "prompt": "a"}\n')
    (tmp_path / "2.txt").write_text("beside a list")
    assert "4 are not named in metadata.jsonl" in left_out(tmp_path)


JPEGS = [(name, "JPEG") for name in ("1.jfif", "1.jpe", "1.pjpeg")]
OTHERS = [
    ("1", "PNG"),
    ("1.jp2", "JPEG2000"),
    ("1.tga", "TGA"),
    ("1.ppm", "PPM"),
    ("1.what", "WEBP"),
]


@pytest.mark.parametrize(("name", "kind"), [*JPEGS, *OTHERS])
def test_what_pillow_reads_is_read_whatever_its_name(tmp_path, name, kind):
    Image.new("RGB", (16, 16), "red").save(tmp_path / name, kind)
    (tmp_path / "1.caption").write_text("a red square")
    assert captions(tmp_path) == ["a red square"] and not left_out(tmp_path)


@pytest.mark.parametrize("forms", [("NFC", "NFD"), ("NFD", "NFC")])
def test_names_match_however_their_accents_are_stored(tmp_path, forms):
    listed, stored = (unicodedata.normalize(form, "café.png") for form in forms)
    pictures(tmp_path, stored)
    (tmp_path / (listed.removesuffix("png") + "txt")).write_text("a café")
    assert captions(tmp_path) == ["a café"]
    (tmp_path / "metadata.csv").write_text(f"file_name,text\n{listed},x\n", encoding="utf-8")
    assert captions(tmp_path) == ["x"] and not left_out(tmp_path)


P3 = {
    b"rXYZ": (0.5151, 0.2412, -0.0011),
    b"gXYZ": (0.2919, 0.6922, 0.0419),
    b"bXYZ": (0.1572, 0.0666, 0.7841),
}


def p3_profile() -> bytes:
    """Display P3's primaries in the sRGB profile."""
    data = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    (count,) = struct.unpack(">I", data[128:132])
    for i in range(count):
        name, at, _ = struct.unpack(">4sII", data[132 + 12 * i : 144 + 12 * i])
        if name in P3:
            data[at + 8 : at + 20] = struct.pack(">3i", *(round(x * 65536) for x in P3[name]))
    return bytes(data)


def trained_on(path):
    return ((load_image(path, (8, 8))[4, 4] + 1) * 127.5).round()


@pytest.mark.parametrize("colour", [(200, 60, 40), (40, 180, 90), (128, 128, 128)])
def test_colours_are_what_the_profile_says(tmp_path, colour):
    icc = p3_profile()
    theirs = ImageCms.ImageCmsProfile(io.BytesIO(icc))
    picture = Image.new("RGB", (8, 8), colour)
    p3 = ImageCms.profileToProfile(picture, ImageCms.createProfile("sRGB"), theirs)
    p3.save(tmp_path / "p3.png", icc_profile=icc)
    np.testing.assert_allclose(trained_on(tmp_path / "p3.png"), colour, atol=2)
    p3.putalpha(255)  # and with transparency
    p3.save(tmp_path / "alpha.png", icc_profile=icc)
    np.testing.assert_allclose(trained_on(tmp_path / "alpha.png"), colour, atol=2)
    p3.quantize(4).save(tmp_path / "palette.png", icc_profile=icc)
    np.testing.assert_allclose(trained_on(tmp_path / "palette.png"), colour, atol=2)
    picture.save(tmp_path / "damaged.png", icc_profile=icc[:200])
    np.testing.assert_allclose(trained_on(tmp_path / "damaged.png"), colour, atol=1)


def test_pngs_with_large_text_and_profiles_are_read(tmp_path):
    info = PngImagePlugin.PngInfo()
    info.add_itxt("workflow", "x" * 3_000_000, zip=True)
    Image.new("RGB", (8, 8), "red").save(tmp_path / "text.png", pnginfo=info)
    Image.new("RGB", (8, 8), "red").save(tmp_path / "icc.png", icc_profile=bytes(2_000_000))
    examples, bad = scan_folder(tmp_path, "x")
    assert len(examples) == 2 and not bad
