"""Editing: image to image, masks, margins and varied noise, on the embedded and a tiny model."""

import struct

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image, ImageCms
from PIL.PngImagePlugin import PngImageFile

from snapgen_mlx import Pipeline
from snapgen_mlx.cli.main import main
from snapgen_mlx.editing import Edit, parse_margins, read_picture
from snapgen_mlx.errors import UsageError

from .test_picture_faults import p3_profile
from .tiny import write_tiny_model

# A colour profile's curve y = x: type, reserved word, function 3, its g, a, b, c and d.
LINEAR = b"para" + struct.pack(">IHH5i", 0, 3, 0, 1 << 16, 1 << 16, 0, 1 << 16, 0)


@pytest.fixture(scope="module")
def embedded():
    return Pipeline.load(None)


@pytest.fixture(scope="module")
def cat(embedded):
    return embedded.generate("a cat", seed=1)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("model"))


def mask_of(size, box) -> Image.Image:
    mask = Image.new("L", size)
    mask.paste(255, box)
    return mask


def array(image) -> np.ndarray:
    return np.array(image, dtype=np.int64)


def psnr(a, b) -> float:
    """Of what is seen: a transparent pixel's colour is not."""
    a, b = (array(Image.alpha_composite(Image.new("RGBA", i.size, "white"), i)) for i in (a, b))
    return float(10 * np.log10(255**2 / ((a - b) ** 2).mean()))


def test_strength_0_gives_the_picture_back_and_1_a_new_one(embedded, cat):
    again = embedded.edit("a dog", cat, strength=0)
    pixels = Edit(cat).pixels(*cat.size, embedded.memory.vae.image_channels)
    through = embedded.decode(embedded.vae.encode(pixels))
    assert (array(again) == array(through)).all()  # no error but the autoencoder's own
    assert psnr(again, cat) > 25
    new = embedded.edit("a dog", cat, strength=1.0, seed=5)
    assert (array(new) == array(embedded.generate("a dog", seed=5))).all()
    near, far = (embedded.edit("a dog", cat, strength=s, seed=5) for s in (0.25, 0.75))
    assert psnr(near, cat) > psnr(far, cat) > psnr(new, cat)


@pytest.mark.parametrize("variant", ["tiny", "full"])
@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
def test_outside_the_mask_not_one_pixel_differs(cat, variant, mode):
    pipe = Pipeline.load(None, variant)
    noise = np.random.default_rng(0).integers(0, 256, (*cat.size[::-1], 4), np.uint8)
    image = Image.fromarray(noise).convert(mode)
    box = (40, 37, 99, 90)
    mask = mask_of(image.size, box)
    result = pipe.edit("a red apple", image, mask, seed=3)
    assert (result.mode, result.size) == (mode, image.size)
    changed = (array(result) != array(image)).any(axis=2)
    inside = np.array(mask) > 0
    assert not changed[~inside].any()
    assert changed[inside].mean() > 0.95


def test_many_steps_with_guidance_and_sizes_of_another_shape(model):
    pipe = Pipeline.load(model)  # 3 steps, guidance 2, 64 pixels
    image = Image.fromarray(np.random.default_rng(1).integers(0, 256, (100, 210, 3), np.uint8))
    edit = Edit(image)
    s = pipe.edit_settings("a cat", edit)
    assert (s.width, s.height) == (64, 64) and s.strength == 0.6
    assert Edit(image).fit(128, 64) == (192, 64)  # the area of 128², multiples of 64
    mask = mask_of(image.size, (100, 0, 210, 50))
    result = pipe.edit("a cat", image, mask, steps=5, guidance=3.0)
    outside = np.array(mask) == 0
    assert result.size == image.size
    assert (array(result)[outside] == array(image)[outside]).all()


def test_the_known_part_steers_what_is_drawn(embedded, cat):
    """What is put back at every step must reach the part that is drawn."""
    mask = mask_of(cat.size, (128, 0, 256, 256))
    results = [
        embedded.edit("a cat", image, mask, seed=2)
        for image in (cat, Image.new("RGBA", cat.size, "black"))
    ]
    a, b = (array(r)[:, 192:] for r in results)
    assert np.abs(a - b).mean() > 2


def test_outpaint_keeps_the_middle(embedded, cat):
    wider = embedded.edit("a cat", cat, margins=(16, 0, 32, 8))
    assert wider.size == (256 + 48, 256 + 8)
    assert (array(wider.crop((16, 0, 272, 256))) == array(cat)).all()


def test_openai_masks_are_transparent_where_to_draw():
    image = Image.new("RGB", (64, 64), "red")
    mask = Image.new("RGBA", (64, 64), (0, 0, 0, 255))
    mask.paste((0, 0, 0, 0), (10, 10, 20, 20))
    assert np.array(Edit(image, mask).mask).nonzero()[0].size == 100


def test_premultiplied_alpha_and_white_below():
    image = Image.new("RGBA", (8, 8), (255, 0, 0, 128))
    four = np.array(Edit(image).pixels(8, 8, 4))[0, 0, 0]
    np.testing.assert_allclose((four + 1) / 2, [128 / 255, 0, 0, 128 / 255], atol=1e-6)
    three = np.array(Edit(image).pixels(8, 8, 3))[0, 0, 0]
    np.testing.assert_allclose((three + 1) / 2, [1, 127 / 255, 127 / 255], atol=1e-6)


def test_varied_noise_goes_from_one_seed_to_the_other(embedded):
    one, other = (embedded.generate("a cat", seed=seed) for seed in (1, 2))
    start, end = (embedded.generate("a cat", seed=1, vary=f"2:{a}") for a in (0, 1))
    assert psnr(start, one) > 40 and psnr(end, other) > 40
    near = embedded.generate("a cat", seed=1, vary="2:0.2")
    assert psnr(near, one) > psnr(near, other)


def test_wrong_edits_are_refused():
    image = Image.new("RGB", (64, 64))
    for mask in (Image.new("L", (32, 32), 255), Image.new("L", (64, 64))):
        with pytest.raises(UsageError, match="mask"):
            Edit(image, mask)
    for margins in ((0, 0, 0, 0), (-1, 0, 0, 0), (10**6, 0, 0, 0)):
        with pytest.raises(UsageError, match="widen"):
            Edit(image, margins=margins)
    with pytest.raises(UsageError, match="16448x16448 pixels; 8192 a side at most"):
        Edit(image, margins=(8192,) * 4)  # before it is made
    for text in ("", "a", "1,2", "1,2,3,4,5", "1.5"):
        with pytest.raises(UsageError, match="margin"):
            parse_margins(text)


def test_large_pictures_are_refused_before_they_are_decoded(tmp_path, monkeypatch):
    Image.new("1", (9000, 10)).save(tmp_path / "wide.png")
    monkeypatch.setattr(PngImageFile, "load", lambda *_: pytest.fail("was decoded"))
    with pytest.raises(UsageError, match="9000x10 pixels; 8192 a side at most"):
        read_picture(tmp_path / "wide.png")


def test_pictures_of_cameras_are_read_as_they_look(tmp_path):
    """16 bits are scaled, not clipped at white; colours are those of the file's profile."""
    levels = np.linspace(0, 65535, 64 * 64).reshape(64, 64).astype(np.uint16)
    Image.fromarray(levels).save(tmp_path / "deep.png")
    grey = np.array(Edit(read_picture(tmp_path / "deep.png")).image)[..., 0].astype(int)
    assert np.abs(grey - levels / 257).max() <= 1
    own = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    colours = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
    colours.save(tmp_path / "own.png", icc_profile=own)
    assert (array(Edit(read_picture(tmp_path / "own.png")).image) == array(colours)).all()
    colours.save(tmp_path / "phone.png", icc_profile=p3_profile())
    seen = array(Edit(read_picture(tmp_path / "phone.png")).image)
    assert np.abs(seen - array(colours)).mean() > 3  # Display P3 is wider
    start = own.index(b"para")
    linear = own[:start] + LINEAR + own[start + len(LINEAR) :]
    colours.save(tmp_path / "linear.png", icc_profile=linear)
    seen = array(Edit(read_picture(tmp_path / "linear.png")).image)
    assert (seen - array(colours)).mean() > 20  # of the same name and primaries, but brighter
    with pytest.raises(UsageError, match="floating-point"):
        Edit(Image.new("F", (64, 64)))


def test_a_mask_is_turned_as_its_picture(tmp_path):
    """Both as a phone writes them: on their side, with a note."""
    exif = Image.Exif()
    exif[274] = 6  # turn right
    pair = Image.new("RGB", (64, 32)), mask_of((64, 32), (0, 0, 64, 8))
    for picture, name in zip(pair, ("image", "mask"), strict=True):
        picture.save(tmp_path / f"{name}.png", exif=exif)
    edit = Edit(*(read_picture(tmp_path / f"{name}.png") for name in ("image", "mask")))
    assert edit.image.size == edit.mask.size == (32, 64)
    assert edit.mask.getbbox() == (24, 0, 32, 64)


@pytest.fixture
def run(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (64, 64), "green").save("in.png")
    mask_of((64, 64), (0, 0, 32, 64)).save("mask.png")
    (tmp_path / "text.png").write_text("no picture")

    def run(*args):
        return CliRunner().invoke(main, ["generate", *map(str, args), "-m", str(model)])

    return run


def test_the_command_edits_previews_and_makes_a_grid(run, tmp_path):
    done = run("a {red,happy} cat", "--image", "in.png", "--mask", "mask.png", "--seed", 1)
    assert done.exit_code == 0, done.output
    for name in ("a-red-cat-1.png", "a-happy-cat-1.png"):
        assert Image.open(name).getpixel((60, 10)) == (0, 128, 0)
    again = run("--from-metadata", "a-red-cat-1.png", "-o", "x.png")
    assert again.exit_code == 2 and "--image in.png" in again.stderr
    more = ("--image", "in.png", "--mask", "mask.png")
    assert run("--from-metadata", "a-red-cat-1.png", "-o", "x.png", *more).exit_code == 0
    assert (tmp_path / "x.png").read_bytes() == (tmp_path / "a-red-cat-1.png").read_bytes()
    options = ("--count", 2, "--steps", 3, "--preview", "steps", "--grid", "grid.png")
    assert run("a {cat,dog}", *options).exit_code == 0
    assert len(list((tmp_path / "steps").iterdir())) == 2 * 2 * 3
    grid = Image.open("grid.png")
    assert grid.width > 2 * 64 and grid.height > 2 * 64


def test_a_picture_that_would_be_squeezed_is_told(run):
    Image.new("RGB", (80, 60), "green").save("photo.png")
    Image.new("RGB", (66, 64), "green").save("nearly.png")
    mask_of((80, 60), (0, 0, 40, 60)).save("part.png")
    done = run("a cat", "--image", "photo.png", "-o", "a.png")
    assert done.exit_code == 0
    assert "note: the picture of 80x60 is drawn as 64x64, which changes its shape" in done.stderr
    for given in (("nearly.png",), ("photo.png", "--mask", "part.png")):
        done = run("a cat", "--image", *given, "-o", "b.png")
        assert done.exit_code == 0 and "shape" not in done.stderr, done.output


@pytest.mark.parametrize(
    "options",
    [
        ("--mask", "mask.png"),
        ("--strength", 0.5),
        ("--image", "none.png"),
        ("--image", "text.png"),
        ("--image", "in.png", "--strength", 2),
        ("--image", "in.png", "--outpaint", "x"),
        ("--vary", "8"),
        ("--vary", "8:nan"),
    ],
)
def test_bad_options_give_one_line(run, options):
    result = run("a cat", *options)
    assert result.exit_code == 2, result.output
    assert len(result.stderr.strip().splitlines()) == 1 and result.stderr.startswith("error: ")
