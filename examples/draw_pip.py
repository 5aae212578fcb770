"""Draws Pip, an invented monster, twenty times, with captions: python examples/draw_pip.py FOLDER

Every shape is a mask, filled with a vertical gradient and lit from the upper left. Coordinates are
those of a picture of 256 x 256; it is drawn four times as large.
"""

import json
import math
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
from PIL import Image, ImageChops, ImageColor, ImageDraw, ImageFilter

SIZE, SCALE = 256, 4
# Colours at the top and at the bottom of a shape.
FUR, HAND, STROKE = ("#68cdf8", "#2f74d8"), ("#66c9f6", "#3f8ce4"), ("#3f8fe6", "#2765c4")
ARM, TUFT, BELLY = ("#55b9f3", "#3079dc"), ("#7fd6fb", "#5cc0f5"), ("#b5e6fc", "#8ccdf4")
HORN, ORANGE, INK = ("#fff3cf", "#f2bd66"), ("#ffb347", "#ee7a1c"), ("#3a2a4a", "#20162b")
WHITE, RED, PINK = ("#ffffff", "#dfe9f5"), ("#ff6b5e", "#c9202f"), ("#ff9db5", "#ee5f86")
YELLOW, GREEN, PURPLE = ("#ffe066", "#f5a800"), ("#7ddb6b", "#2f9a45"), ("#b58cf2", "#6d3fc4")
TEAL, BROWN, GRAY = ("#3fd6b5", "#0d8a78"), ("#b97a4a", "#7a4622"), ("#c3c9d4", "#a9b2c0")
CREAM, LIGHT, MOUTH = ("#fff6e0", "#f7dfae"), ("#ffffff", "#ffffff"), ("#7a1f3d", "#5a1030")


class Canvas:
    def __init__(self):
        self.image = Image.new("RGBA", (SIZE * SCALE, SIZE * SCALE))

    def fill(self, mask: Image.Image, colors, depth: float):
        """Colour the mask's area; ``depth`` is how wide its lit and its shaded edge are."""
        if not (box := mask.getbbox()):
            return
        # Room for the blur, as far as there is any.
        margin = round(4 * depth * SCALE)
        left, top = (max(v - margin, 0) for v in box[:2])
        mask = mask.crop((left, top, *(min(v + margin, SIZE * SCALE) for v in box[2:])))
        start, stop = (np.array(ImageColor.getrgb(c)) / 255 for c in colors)
        rows = (np.arange(mask.height) + top - box[1]) / (box[3] - box[1])
        rgb = start + (stop - start) * np.clip(rows, 0, 1)[:, None, None]
        if depth:
            lit, shade = (edge(mask, sign * depth * SCALE) for sign in (1, -1))
            rgb = (rgb + 0.55 * lit * (1 - rgb)) * (1 - 0.38 * shade)
        rgb = np.broadcast_to(rgb * 255, (mask.height, mask.width, 3)).round().astype(np.uint8)
        layer = Image.fromarray(rgb)
        layer.putalpha(mask)
        self.image.alpha_composite(layer, (left, top))

    def polygon(self, points, colors, depth=5.0, fur=False):
        mask = polygon(points)
        if fur:  # rounds the tips
            mask = mask.filter(ImageFilter.GaussianBlur(1.1 * SCALE))
            mask = mask.point(lambda v: min(max(round((v - 128) * 6 + 128), 0), 255))
        self.fill(mask, colors, depth)

    def ellipse(self, x, y, rx, ry, colors, depth=5.0, turn=0.0):
        self.polygon(ring(x, y, rx, ry, turn), colors, depth)

    def line(self, points, width, colors, depth=0.0, end=None):
        """A curved stroke with round ends; ``end`` is its width at the last point."""
        mask = Image.new("L", self.image.size)
        draw = ImageDraw.Draw(mask)
        path = bezier(points)
        widths = np.linspace(width, width if end is None else end, len(path))
        for (x, y), w in zip(path, widths, strict=True):
            draw.ellipse([SCALE * (v + s * w / 2) for s in (-1, 1) for v in (x, y)], fill=255)
        self.fill(mask, colors, depth)

    def place(self, other, x=128.0, y=136.0, size=0.9, turn=0.0, mirror=False):
        """Put another canvas with its middle at x, y."""
        image = other.image.rotate(turn, Image.Resampling.BICUBIC)
        if mirror:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        n = round(SIZE * SCALE * size)
        layer = Image.new("RGBA", self.image.size)
        image = image.resize((n, n), Image.Resampling.LANCZOS)
        layer.paste(image, (round(x * SCALE - n / 2), round(y * SCALE - n / 2)))
        self.image.alpha_composite(layer)


def edge(mask: Image.Image, shift: float) -> np.ndarray:
    """The soft upper left edge of a mask, or the lower right one for a negative shift."""
    moved = ImageChops.offset(mask, round(shift), round(shift))
    blurred = ImageChops.subtract(mask, moved).filter(ImageFilter.GaussianBlur(abs(shift)))
    return np.asarray(blurred)[..., None] / 255


def polygon(points) -> Image.Image:
    mask = Image.new("L", (SIZE * SCALE, SIZE * SCALE))
    ImageDraw.Draw(mask).polygon([(x * SCALE, y * SCALE) for x, y in points], fill=255)
    return mask


def ring(x, y, rx, ry, turn=0.0, tufts=1, length=0.0) -> list:
    """An ellipse, turned by degrees, with tufts of fur around it."""
    sizes = np.random.default_rng(tufts).uniform(0.6, 1.3, tufts)
    cos, sin = math.cos(math.radians(turn)), math.sin(math.radians(turn))
    points = []
    for i in range(720):
        angle = math.pi * i / 360
        tuft, p = divmod(i * tufts / 720, 1)
        out = length * sizes[int(tuft)] * min(p / 0.6, (1 - p) / 0.4)
        u, v = (rx + out) * math.cos(angle), (ry + out) * math.sin(angle)
        points.append((x + cos * u - sin * v, y + sin * u + cos * v))
    return points


def bezier(points, n=80) -> list:
    path = []
    for t in np.linspace(0, 1, n + 1):
        row = [np.array(p, float) for p in points]
        while len(row) > 1:
            row = [(1 - t) * a + t * b for a, b in pairwise(row)]
        path.append(row[0])
    return path


def pip(left="down", right="down", look=(0, 0), eye="open", mouth="smile", wears=None, holds=None):
    """Pip with arms "down", "side", "up" or "front"; what it holds is drawn in the right hand."""
    c = Canvas()
    for side in (-1, 1):
        horn = [(128 + side * x, y) for x, y in ((28, 80), (58, 72), (62, 36))]
        c.line(horn, 24, HORN, 4, end=3)
        c.ellipse(128 + side * 34, 212, 25, 13, ORANGE, 4)
        for toe in (-14, 0, 14):
            c.ellipse(128 + side * 34 + toe, 217, 8, 7, ORANGE, 2)
    arms = {-1: left, 1: right}
    for side in arms:
        if arms[side] in ("down", "side"):
            arm(c, side, arms[side])
    c.polygon(ring(128, 140, 67, 69, tufts=32, length=9), FUR, 9, fur=True)
    tuft = [(110, 77), (107, 57), (120, 66), (128, 45), (136, 66), (150, 57), (146, 77)]
    c.polygon(tuft, TUFT, 2, fur=True)
    c.polygon(ring(128, 190, 33, 17, tufts=24, length=3), BELLY, 0, fur=True)
    for x, y in ((84, 116), (172, 114), (88, 172), (168, 174), (74, 156), (182, 152)):
        for dx in (-5, 5):
            c.line([(x + dx, y), (x + dx / 2, y + 4), (x, y + 6)], 2.4, STROKE)
    draw_face(c, look, eye, mouth)
    for thing in (wears, holds):
        if thing:
            thing(c)
    for side in arms:
        if arms[side] in ("up", "front"):
            arm(c, side, arms[side])
    return c


def arm(c, side, pose):
    points = {
        "down": [(178, 140), (208, 148), (206, 180)],
        "side": [(178, 146), (206, 166), (222, 148)],
        "up": [(184, 140), (222, 130), (212, 88)],
        "front": [(186, 146), (206, 182), (166, 186)],
    }[pose]
    points = [(128 + side * (x - 128), y) for x, y in points]
    c.line(points, 25, ARM, 4)
    c.polygon(ring(*points[-1], 14, 14, tufts=11, length=3.5), HAND, 4, fur=True)


def draw_face(c, look, eye, mouth):
    for side in (-1, 1):
        c.ellipse(128 + side * 45, 139, 9, 6, ("#ffa5c4", "#f790b8"), 0)
    if eye == "closed":
        c.ellipse(128, 108, 31, 31, TUFT, 5)
        c.line([(101, 111), (128, 131), (155, 111)], 4.5, INK)
        for x, y, dx in ((107, 117, -4), (128, 121, 0), (149, 117, 4)):
            c.line([(x, y), (x + dx, y + 8)], 3.4, INK)
    else:
        size = 35 if eye == "wide" else 31
        x, y = 128 + 10 * look[0], 108 + 10 * look[1]
        c.ellipse(128, 108, size, size, WHITE, 4)
        c.ellipse(x, y, 18, 18, TEAL, 3)
        c.ellipse(x, y, 10.5, 10.5, INK, 0)
        c.ellipse(x - 6, y - 7, 5, 5, LIGHT, 0)
        c.ellipse(x + 5, y + 6, 2.4, 2.4, LIGHT, 0)
    if mouth == "smile":
        for x in (114, 142):
            c.polygon([(x - 5, 156), (x + 5, 156), (x, 167)], WHITE, 1)
        c.line([(102, 148), (128, 170), (154, 148)], 4.5, INK)
    elif mouth == "open":
        lips = bezier([(99, 146), (128, 152), (157, 146)])
        lips += bezier([(157, 146), (128, 206), (99, 146)])
        c.polygon(lips, MOUTH, 0)
        tongue = ImageChops.multiply(polygon(ring(128, 178, 16, 13)), polygon(lips))
        c.fill(tongue, PINK, 2)
        for x in (112, 144):
            c.polygon([(x - 6, 148.5), (x + 6, 148.5), (x, 160)], WHITE, 1)
    elif mouth == "round":
        c.ellipse(128, 159, 9, 11, MOUTH, 0)
    else:
        c.line([(118, 156), (128, 162), (138, 156)], 4, INK)


# What Pip wears, and what it holds: where the right hand is when it is up, or in front of it


def crown(c):
    c.polygon(
        [(94, 68), (162, 68), (168, 26), (148, 46), (128, 16), (108, 46), (88, 26)], YELLOW, 4
    )
    for x, y in ((168, 26), (128, 16), (88, 26)):
        c.ellipse(x, y, 6, 6, YELLOW, 2)
    for x, colors in ((108, GREEN), (128, RED), (148, GREEN)):
        c.ellipse(x, 58, 5, 5, colors, 2)


def party_hat(c):
    c.polygon([(99, 76), (157, 76), (128, 14)], PINK, 4)
    for x, y in ((112, 66), (142, 67), (122, 48), (135, 38), (127, 66)):
        c.ellipse(x, y, 4, 4, YELLOW, 0)
    c.ellipse(128, 14, 9, 9, YELLOW, 3)


def scarf(c):
    c.line([(156, 186), (164, 198), (160, 216)], 19, RED, 4)
    c.line([(74, 176), (128, 202), (182, 176)], 19, RED, 4)


def balloon(c):
    c.line([(212, 92), (207, 78), (213, 66)], 1.8, GRAY)
    c.polygon([(207, 74), (219, 74), (213, 65)], RED, 0)
    c.ellipse(213, 39, 24, 29, RED, 6)
    c.ellipse(204, 28, 5, 8, ("#ffd0cc", "#ffb3ad"), 0, turn=25)


def umbrella(c):
    c.line([(210, 92), (188, 22)], 4.5, BROWN, 1)
    x, y, r = 180, 54, 66
    top = [(x + r * math.cos(a), y + 0.75 * r * math.sin(a)) for a in np.linspace(-math.pi, 0, 90)]
    hem = []
    for k in (3, 1, -1):
        hem += bezier([(x + k * r / 3, y), (x + (k - 1) * r / 3, y - 14), (x + (k - 2) * r / 3, y)])
    c.polygon([*top, *hem], PURPLE, 5)
    for k in (-1, 1):
        c.line([(x + k * r / 3, y - 2), (x + k * r / 3, 22), (x, 6)], 2, ("#9468dc", "#5a30a8"))


def gift(c):
    c.polygon([(100, 172), (156, 172), (156, 218), (100, 218)], YELLOW, 4)
    c.polygon([(95, 164), (161, 164), (161, 178), (95, 178)], YELLOW, 3)
    c.polygon([(122, 164), (134, 164), (134, 218), (122, 218)], RED, 1)
    for side in (-1, 1):
        c.ellipse(128 + side * 12, 158, 12, 7, RED, 3, turn=side * -22)
    c.ellipse(128, 161, 5, 5, RED, 2)


def book(c):
    c.polygon([(84, 168), (128, 178), (172, 168), (172, 212), (128, 222), (84, 212)], RED, 3)
    for side in (-1, 1):
        page = [(128, 176), (128 + side * 39, 167), (128 + side * 39, 206), (128, 216)]
        c.polygon(page, WHITE, 2)
        for y in (180, 189, 198):
            c.line([(128 + side * 8, y + 5), (128 + side * 32, y)], 1.8, GRAY)


def ice_cream(c):
    c.polygon([(197, 66), (227, 66), (212, 108)], ("#f2c07a", "#c98a3c"), 3)
    for x in (-1, 1):
        c.line([(212 - x * 9, 70), (212 + x * 5, 94)], 1.6, BROWN)
    c.ellipse(212, 56, 18, 17, PINK, 5)
    c.ellipse(212, 36, 15, 14, CREAM, 5)
    c.ellipse(212, 20, 6, 6, RED, 2)


def lollipop(c):
    c.line([(212, 100), (212, 60)], 4.5, WHITE, 1)
    c.ellipse(212, 44, 27, 27, PINK, 5)
    for a in np.linspace(0.8, 4 * math.pi, 200):
        c.ellipse(212 + 1.75 * a * math.cos(a), 44 + 1.75 * a * math.sin(a), 2.2, 2.2, LIGHT, 0)


def flower(c):
    c.line([(212, 100), (216, 84), (212, 50)], 4.5, GREEN, 1)
    for i in range(8):
        a = math.pi * i / 4
        c.ellipse(212 + 20 * math.cos(a), 44 + 20 * math.sin(a), 12, 7.5, YELLOW, 2, turn=45 * i)
    c.ellipse(212, 44, 12, 12, BROWN, 3)


def apple(c):
    for x in (203, 221):
        c.ellipse(x, 62, 16, 19, RED, 4)
    c.ellipse(212, 64, 13, 16, ("#f5594e", "#d12b36"), 0)
    c.line([(212, 50), (213, 42), (218, 36)], 3.4, BROWN)
    c.ellipse(225, 38, 10, 5, GREEN, 2, turn=-20)


# Behind and before Pip


def skateboard(c):
    for x in (88, 168):
        c.ellipse(x, 232, 9, 9, GRAY, 3)
    c.line([(44, 212), (58, 224), (128, 224), (198, 224), (212, 212)], 10, PURPLE, 3)


def snow(c):
    for x, y in scattered(26):
        c.ellipse(x, y, 3.4, 3.4, LIGHT, 0)


def confetti(c):
    for i, (x, y) in enumerate(scattered(34)):
        c.ellipse(x, y, 5, 2.2, (RED, YELLOW, GREEN, PURPLE, TEAL)[i % 5], 0, turn=47 * i)


def rain(c):
    for x, y in scattered(26):
        c.line([(x + 2, y - 6), (x - 2, y + 6)], 2.2, ("#6ea8ea", "#6ea8ea"))


def zzz(c):
    for x, y, r in ((196, 78, 6), (212, 56, 8), (232, 30, 10)):
        points = [(x - r, y - r), (x + r, y - r), (x - r, y + r), (x + r, y + r)]
        for a, b in pairwise(points):
            c.line([a, b], r / 2.2, INK)


def scattered(n):
    """Points that leave no large gaps: Roberts' R2 sequence."""
    return [(256 * (i * 0.7549 % 1), 256 * (i * 0.5698 % 1)) for i in range(1, n + 1)]


BACKGROUNDS = {
    "yellow": ("#fff1a8", "#ffe27a"),
    "green": ("#d4f3c2", "#b4e4a0"),
    "pink": ("#ffdbe6", "#ffc3d6"),
    "blue": ("#dceffd", "#c2e1fa"),
    "purple": ("#e8dbfb", "#d6c2f5"),
    "orange": ("#ffdfb8", "#ffcb91"),
    "gray": ("#eceef2", "#d9dde4"),
}

CHEER = dict(left="up", right="up", mouth="open")
HUG = dict(left="front", right="front")
WIDE = dict(left="side", right="side")
LEFT = dict(x=134, mirror=True)

# What Pip does, the background, how Pip is drawn (``pip``) and where in the picture (``draw``).
SCENES = [
    ("", None, {}),
    ("waving", None, dict(right="up", mouth="open")),
    ("waving", "green", dict(right="up", where=dict(mirror=True))),
    ("with both arms up", "yellow", CHEER),
    ("far away", "green", dict(where=dict(y=150, size=0.5))),
    ("up close", "pink", dict(look=(0.3, 0.2), where=dict(y=162, size=1.5))),
    ("sleeping", "purple", dict(eye="closed", mouth="asleep", where=dict(turn=-9), before=zzz)),
    ("jumping", None, dict(**CHEER, look=(0, -0.7), where=dict(y=112, size=0.82, turn=8))),
    ("looking surprised", "orange", dict(**WIDE, eye="wide", mouth="round")),
    ("looking to the left", "gray", dict(look=(-1, 0))),
    ("holding a red balloon", None, dict(right="up", look=(0.8, -0.5), holds=balloon)),
    (
        "holding a purple umbrella in the rain",
        "blue",
        dict(right="up", holds=umbrella, behind=rain),
    ),
    ("wearing a party hat", None, dict(**CHEER, wears=party_hat, behind=confetti)),
    ("wearing a red scarf in the snow", "blue", dict(wears=scarf, behind=snow)),
    ("wearing a golden crown", "purple", dict(left="side", wears=crown)),
    ("holding a gift", None, dict(**HUG, holds=gift)),
    ("reading a book", "yellow", dict(**HUG, look=(0, 0.9), mouth="round", holds=book)),
    ("holding a yellow flower", "pink", dict(right="up", holds=flower, where=dict(x=122))),
    ("holding an apple", None, dict(right="up", mouth="open", holds=apple, where=LEFT)),
    ("on a skateboard", None, dict(**WIDE, behind=skateboard, where=dict(y=131, turn=4))),
]


def draw(background, where=None, behind=None, before=None, **pose) -> Image.Image:
    c = Canvas()
    if background:
        c.fill(Image.new("L", c.image.size, 255), BACKGROUNDS[background], 0)
    if behind:
        behind(c)
    c.place(pip(**pose), **(where or {}))
    if before:
        before(c)
    return c.image.resize((SIZE, SIZE), Image.Resampling.LANCZOS)


def captions(does: str, background: str | None) -> list[str]:
    forms = (
        "pip, a fluffy blue monster, {}",
        "a fluffy blue monster {}",
        "pip {}",
        "a picture of pip the monster {}",
        "a fluffy blue monster with one eye {}",
    )
    if background:
        does += f" on {'an' if background == 'orange' else 'a'} {background} background"
    return [form.format(does).strip(" ,") for form in forms]


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for i, (does, background, drawing) in enumerate(SCENES, 1):
        name, texts = f"pip-{i:02}.webp", captions(does, background)
        draw(background, **drawing).save(folder / name, quality=90)
        rows.append({"file_name": name, "text": texts[0], "captions": texts, "concept": "pip"})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
