"""The sticker world: labels are exact, held-out combinations never reach training."""

import random

import numpy as np
import pytest
from PIL import Image, ImageDraw

from recipes.embedded import layout, scenes, things
from recipes.embedded.colors import COLORS, from_oklab, recolor, to_oklab
from recipes.embedded.latents import encode
from recipes.embedded.scenes import KINDS, STICKERS, VARIED, World
from recipes.embedded.sprites import STYLES, Concept, Sprites, framed
from recipes.embedded.things import THINGS, held_out
from snapgen_mlx.errors import SnapGenError


@pytest.fixture(scope="module", params=[STICKERS, VARIED], ids=["tidy", "loose"])
def world(request):
    """A world of plain discs, as large as sprites are, in the colour of their style."""
    pixels, concepts = [], []
    labels = [*THINGS.values(), "winking face", "volcano"]
    for label in labels:
        styles = {}
        for style, color in zip(STYLES, ("#c33", "#c63", "#c93", "#cc3"), strict=True):
            image = Image.new("RGBA", (256, 256))
            ImageDraw.Draw(image).ellipse((0, 0, 255, 255), fill=color)
            styles[style] = len(pixels)
            pixels.append(np.asarray(image))
        concepts.append(Concept("1", label, "x", [f"the {label}"], [], styles))
    return World(Sprites(np.stack(pixels), concepts), request.param)


def draw(world, seed, **given):
    return world.scene(random.Random(seed), **given)


def test_a_seed_gives_one_scene(world):
    a, b, c = draw(world, "1"), draw(world, "1"), draw(world, "2")
    assert a.caption == b.caption and np.array_equal(a.image, b.image)
    assert not np.array_equal(a.image, c.image)


@pytest.mark.parametrize("kind", [k for k in KINDS if k != "character"])
def test_boxes_hold_what_is_seen(world, kind):
    for seed in range(20):
        scene = draw(world, f"{kind}{seed}", kind=kind)
        assert scene.image.shape == (256, 256, 4) and scene.image.dtype == np.uint8
        assert (scene.image[..., :3] <= scene.image[..., 3:]).all(), "not premultiplied"
        if scene.background:
            assert (scene.image[..., 3] == 255).all()
            continue
        seen = np.zeros((256, 256), bool)
        for thing in scene.things:
            x0, y0, x1, y1 = map(int, thing.box)
            assert 0 <= x0 < x1 <= 256 and 0 <= y0 < y1 <= 256
            assert not seen[y0:y1, x0:x1].any(), "things overlap"
            seen[y0:y1, x0:x1] = True
        assert not (scene.image[..., 3] > 24)[~seen].any()


def test_a_concept_named_by_a_colour_is_one_of_that_colour(world):
    """Otherwise "an orange book", a held-out pair, would be trained as a concept's name."""
    assert world._colored(scenes.Thing("orange book", "3d")) == [("book", "orange")]
    assert world._colored(scenes.Thing("cat", "3d", "red")) == [("cat", "red")]
    assert not world._colored(scenes.Thing("orange", "3d"))


def test_a_picture_is_encoded_once_whatever_its_captions(world):
    """In shards of large drawings, few pictures have many captions; each gets its own latents."""

    class Corners:
        seen = 0

        def encode(self, x):
            self.seen += len(x)
            return x[:, :, ::64, ::64]

    drawings, corners = World(world.sprites, scenes.LARGER), Corners()
    names = [f"shard/{i}" for i in range(300)]
    latents, captions = encode(drawings, corners, names, "train")
    made = [drawings.scene(random.Random(name)) for name in names]
    assert captions == [scene.caption for scene in made] and latents.shape == (300, 4, 4, 4)
    assert corners.seen == len({scene.image.tobytes() for scene in made}) < 300
    for i in range(0, 300, 7):
        expected = made[i].image[::64, ::64] / 127.5 - 1
        np.testing.assert_allclose(latents[i], expected, atol=1e-3)
    large = [scene.kind in ("single", "color") for scene in made]
    assert 0.5 < np.mean(large) < 0.75


def test_tidy_things_meet_the_patches_in_one_way():
    rng, met = random.Random(0), set()
    for n, relation in [(1, None), (2, "left of"), (2, "above"), (3, None), (4, None)]:
        for x, y, side in layout.tidy(rng, n, relation, None):
            met.add(((x + side / 2) % 32, (y + side / 2) % 32))
            assert side == (layout.LARGE if n == 1 else layout.SMALL)
    assert met == {(0, 0)}
    ((x, y, side),) = layout.tidy(rng, 1, None, "small")
    assert (x, y, side) == (72, 72, layout.SMALL)


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_combinations_are_held_out(world, split):
    for kind in ("two", "count", "color", "position", "attribution"):
        for seed in range(40):
            scene = draw(world, f"{kind}/{seed}", split=split, kind=kind)
            assert world._held(kind, scene.things, scene.relation) == (split == "heldout")
    pairs = [held_out("pair", a, b) for a in THINGS for b in THINGS if a < b]
    assert 0.09 < np.mean(pairs) < 0.11
    assert held_out("pair", "cat", "dog") == held_out("pair", "dog", "cat")


def test_relations_are_true(world):
    for seed in range(60):
        scene = draw(world, f"r{seed}", kind="position")
        (a, b), middle = scene.things, lambda t: (t.box[0] + t.box[2], t.box[1] + t.box[3])
        (ax, ay), (bx, by) = middle(a), middle(b)
        holds = {"left of": ax < bx, "right of": ax > bx, "above": ay < by, "below": ay > by}
        assert holds[scene.relation]
        said = next(
            w for words in things.WORDINGS.values() for w in words if f" {w} " in scene.caption
        )
        named = next(r for r, words in things.WORDINGS.items() if said in words)
        order = [scene.caption.find(t.name) for t in (a, b)]
        if min(order) >= 0 and a.name not in b.name and b.name not in a.name:
            expected = scene.relation if order[0] < order[1] else things.OPPOSITE[scene.relation]
            assert named == expected, scene.caption


def test_counts_and_colors_are_said(world):
    for seed in range(40):
        scene = draw(world, f"c{seed}", kind="count")
        n = len(scene.things)
        assert str(n) in scene.caption or things.NUMBERS[n] in scene.caption
        scene = draw(world, f"d{seed}", kind="attribution")
        assert all(t.color in scene.caption for t in scene.things)


def test_characters_are_captioned_by_their_parts(world):
    a, b = (draw(world, "7", kind="character") for _ in "ab")
    assert a.caption == b.caption and np.array_equal(a.image, b.image)
    captions = [draw(world, f"k{i}", kind="character").caption for i in range(12)]
    assert len(set(captions)) > 8 and all("with" in c for c in captions)


def test_plurals():
    assert [things.plural(w) for w in ("cat", "strawberry", "bus", "wine glass", "fish")] == [
        "cats",
        "strawberries",
        "buses",
        "wine glasses",
        "fish",
    ]


def test_oklab_round_trip():
    rgb = np.random.default_rng(0).integers(0, 256, (500, 3), dtype=np.uint8)
    assert np.abs(from_oklab(to_oklab(rgb)).astype(int) - rgb).max() <= 1


@pytest.mark.parametrize("color", COLORS)
def test_recolored_things_have_the_color(color):
    sprite = np.zeros((8, 8, 4), np.uint8)
    sprite[:] = (40, 90, 200, 255)
    sprite[:2] = (80, 130, 230, 255)
    got = to_oklab(recolor(sprite, color)[..., :3]).mean((0, 1))
    L, C, hue = COLORS[color]
    want = np.array([L, C * np.cos(np.deg2rad(hue)), C * np.sin(np.deg2rad(hue))])
    others = [
        np.array([lightness, c * np.cos(np.deg2rad(h)), c * np.sin(np.deg2rad(h))])
        for name, (lightness, c, h) in COLORS.items()
        if name != color
    ]
    assert np.linalg.norm(got - want) < min(np.linalg.norm(got - o) for o in others)


def test_edges_keep_their_color():
    """Scaling with straight alpha would mix hidden black into the edge of a red disc."""
    image = Image.new("RGBA", (300, 300))
    ImageDraw.Draw(image).ellipse((20, 20, 280, 280), fill=(255, 0, 0, 255))
    pixels = np.asarray(framed(image))
    assert pixels[pixels[..., 3] > 60][:, 0].min() > 240


def test_missing_sprites_are_named(tmp_path):
    with pytest.raises(SnapGenError, match="holds no sprites"):
        Sprites.load(tmp_path)


def test_flatten_shows_what_is_behind():
    image = np.zeros((1, 2, 4), np.uint8)
    image[0, 0] = (255, 0, 0, 255)
    assert scenes.flatten(image, (1, 2, 3)).tolist() == [[[255, 0, 0], [1, 2, 3]]]
