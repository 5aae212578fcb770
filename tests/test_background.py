"""Pictures with premultiplied alpha become PIL's, without fringes."""

import mlx.core as mx
import numpy as np
import pytest

from snapgen_mlx.background import check_background, to_picture
from snapgen_mlx.errors import UsageError


def edge(color, steps: int = 256) -> tuple[mx.array, np.ndarray]:
    """(1, steps, 4) in [-1, 1], one colour whose alpha falls from 1 to 0; and alpha."""
    alpha = np.linspace(1, 0, steps)[:, None]
    premultiplied = np.concatenate([alpha * np.array(color) / 255, alpha], axis=1)
    return mx.array(premultiplied[None] * 2 - 1), alpha[:, 0]


def test_an_edge_keeps_its_colour_down_to_the_last_alpha():
    image, alpha = edge((250, 200, 30))
    picture = to_picture(image)
    assert picture.mode == "RGBA"
    pixels = np.asarray(picture)[0].astype(int)
    assert (pixels[:, 3] == np.round(255 * alpha)).all()
    visible = pixels[:, 3] > 0
    assert np.abs(pixels[visible, :3] - (250, 200, 30)).max() <= 1
    assert (pixels[~visible] == 0).all()


@pytest.mark.parametrize(
    "background, behind", [("white", (255, 255, 255)), ("#1080ff", (16, 128, 255))]
)
def test_on_a_colour_it_is_mixed(background, behind):
    color = np.array((250, 200, 30))
    image, alpha = edge(color)
    picture = to_picture(image, background)
    assert picture.mode == "RGB"
    expected = alpha[:, None] * color + (1 - alpha[:, None]) * np.array(behind)
    assert np.abs(np.asarray(picture)[0] - expected).max() <= 0.51


def test_what_no_picture_can_have_is_clamped():
    """Alpha outside [0, 1] and colours above alpha, as an approximate decoder gives them."""
    values = [[2.0, 0.5, -3.0, 1.4], [0.6, 0.2, 0.0, -0.2], [0.9, 0.1, 0.5, 0.5]]
    pixels = np.asarray(to_picture(mx.array([values]) * 2 - 1))[0]
    assert pixels.tolist() == [[255, 128, 0, 255], [0, 0, 0, 0], [255, 51, 255, 128]]


def test_without_alpha_a_picture_stays_as_it_is():
    image = mx.array([[[-1.0, 0.0, 1.0]]])
    for background in (None, "white"):
        picture = to_picture(image, background)
        assert picture.mode == "RGB" and picture.getpixel((0, 0)) == (0, 128, 255)
    for background in ("transparent", "#ffffff"):
        with pytest.raises(UsageError, match="draws no transparent pictures"):
            to_picture(image, background)


@pytest.mark.parametrize("background", ["blue", "#12345", "#1234567", "ffffff", ""])
def test_unknown_backgrounds_are_refused(background):
    with pytest.raises(UsageError, match="must be white, transparent or"):
        check_background(background, 4)
