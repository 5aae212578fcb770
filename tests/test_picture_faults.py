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


# --- profiles made here: no library ships them


def profile(space: bytes, tags: dict[bytes, bytes], kind: bytes = b"mntr") -> bytes:
    """An ICC profile of version 2 with the white of D50."""
    white = struct.pack(">4s4x3i", b"XYZ ", *(round(x * 65536) for x in (0.9642, 1.0, 0.8249)))
    name = b"desc" + bytes(4) + struct.pack(">I", 2) + b"x\0" + bytes(78)
    tags = {b"wtpt": white, b"desc": name} | tags
    body, table, at = b"", struct.pack(">I", len(tags)), 132 + 12 * len(tags)
    for name, data in tags.items():
        data += bytes(-len(data) % 4)
        table += struct.pack(">4sII", name, at + len(body), len(data))
        body += data
    connection = b"Lab " if space == b"CMYK" else b"XYZ "
    head = struct.pack(
        ">I4sI4s4s4s12x4s4x4s4s4s8xI3i4s44x",
        *(at + len(body), b"lcms", 0x02400000, kind, space, connection, b"acsp"),
        *(b"none", b"none", b"none", 0, 63190, 65536, 54061, b"none"),
    )
    head = head[:36] + b"acsp" + head[40:]
    return head[:128] + table + body


def adobe_rgb() -> bytes:
    """Adobe RGB (1998): its primaries as seen under D50, gamma 2.2."""
    primaries = {
        b"rXYZ": (0.60974, 0.31111, 0.01947),
        b"gXYZ": (0.20528, 0.62567, 0.06087),
        b"bXYZ": (0.14919, 0.06322, 0.74457),
    }
    xyz = {
        k: struct.pack(">4s4x3i", b"XYZ ", *(round(x * 65536) for x in v))
        for k, v in primaries.items()
    }
    gamma = struct.pack(">4s4xIH", b"curv", 1, 563)  # 2.2 in 8.8 bits
    return profile(b"RGB ", xyz | dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), gamma))


def adobe_numbers(rgb) -> tuple[int, ...]:
    """The same colour in Adobe RGB, by the definitions alone."""
    to_xyz = [[0.4360, 0.3851, 0.1431], [0.2225, 0.7169, 0.0606], [0.0139, 0.0971, 0.7141]]
    theirs = [[0.60974, 0.20528, 0.14919], [0.31111, 0.62567, 0.06322], [0.01947, 0.06087, 0.74457]]
    c = np.array(rgb) / 255
    linear = np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)
    there = np.clip(np.linalg.solve(np.array(theirs), np.array(to_xyz) @ linear), 0, 1)
    return tuple((255 * there ** (1 / (563 / 256))).round().astype(int).tolist())


@pytest.mark.parametrize("colour", [(200, 60, 40), (40, 180, 90), (30, 40, 200), (128, 128, 128)])
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "WEBP"])
def test_adobe_rgb_is_converted(tmp_path, colour, kind):
    numbers, path = adobe_numbers(colour), tmp_path / f"a.{kind.lower()}"
    assert colour[0] == colour[1] or max(abs(np.subtract(numbers, colour))) > 5
    how = {"quality": 100, "lossless": True} if kind in ("JPEG", "WEBP") else {}
    Image.new("RGB", (8, 8), numbers).save(path, kind, icc_profile=adobe_rgb(), **how)
    np.testing.assert_allclose(trained_on(path), colour, atol=3)


PAPER_AND_INKS = {  # Lab of no ink, and of each ink alone, at all it can
    (0, 0, 0, 0): (95, 0, 0),
    (1, 0, 0, 0): (60, -20, -25),
    (0, 1, 0, 0): (55, 40, -5),
    (0, 0, 1, 0): (85, -5, 45),
    (0, 0, 0, 1): (30, 0, 0),
}


def cmyk() -> bytes:
    """A press: Lab colours at the corners of the ink cube, straight lines between them.

    Its table has 8 bits, and so has what is read by it: some levels are lost."""
    corners = []
    for inks in np.ndindex(2, 2, 2, 2):
        lab = np.array(PAPER_AND_INKS[0, 0, 0, 0], float)
        for i in range(4):
            if inks[i]:
                alone = PAPER_AND_INKS[tuple(int(j == i) for j in range(4))]
                lab += np.subtract(alone, PAPER_AND_INKS[0, 0, 0, 0])
        lab = np.clip(lab, (0, -100, -100), (100, 100, 100))
        corners += [round(lab[0] * 2.55), round(lab[1] + 128), round(lab[2] + 128)]
    identity = struct.pack(">9i", *(65536 * int(i % 4 == 0) for i in range(9)))
    line = bytes(range(256))
    lut = struct.pack(">4s4x4B", b"mft1", 4, 3, 2, 0) + identity + line * 4 + bytes(corners)
    return profile(b"CMYK", {b"A2B0": lut + line * 3}, b"prtr")


def srgb_of_lab(lab) -> np.ndarray:
    """By the definitions alone, seen under D50."""
    fy = (lab[0] + 16) / 116
    f = np.array([fy + lab[1] / 500, fy, fy - lab[2] / 200])
    xyz = np.where(f > 6 / 29, f**3, 3 * (6 / 29) ** 2 * (f - 4 / 29)) * (0.9642, 1.0, 0.8249)
    to_xyz = [[0.4360, 0.3851, 0.1431], [0.2225, 0.7169, 0.0606], [0.0139, 0.0971, 0.7141]]
    linear = np.clip(np.linalg.solve(np.array(to_xyz), xyz), 0, 1)
    return 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


@pytest.mark.parametrize("inks", PAPER_AND_INKS)
@pytest.mark.parametrize("kind", ["TIFF", "JPEG"])
def test_inks_are_what_the_profile_says(tmp_path, inks, kind):
    path = tmp_path / f"a.{kind.lower()}"
    how = {"quality": 100} if kind == "JPEG" else {}
    picture = Image.new("CMYK", (8, 8), tuple(255 * i for i in inks))
    picture.save(path, kind, icc_profile=cmyk(), **how)
    expected = srgb_of_lab(PAPER_AND_INKS[inks])
    if inks == (0, 0, 0, 0):  # relative to the paper, or as it is: both are right
        assert (trained_on(path) >= expected - 4).all()
    else:
        np.testing.assert_allclose(trained_on(path), expected, atol=12)
    picture.save(path, kind, **how)  # without it, inks are taken as plain complements
    plain = trained_on(path)
    if sum(inks) and inks[3] == 0:
        assert np.abs(plain - expected).max() > 30


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 3\n", "git lfs pull"),
        (b"<html><body>Not found</body></html>", "a web page"),
        (b"", "empty"),
    ],
)
def test_what_stands_in_a_pictures_place_is_named(tmp_path, data, words):
    pictures(tmp_path, "1.png")
    (tmp_path / "2.png").write_bytes(data)
    with pytest.raises(SnapGenError, match=rf"2\.png \(.*{words}"):
        read_folder(tmp_path, "x")
