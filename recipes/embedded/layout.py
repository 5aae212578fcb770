"""Where things stand in a scene: left, top and side in pixels of each thing's square.

`tidy` puts the middle of every thing on a corner of the transformer's patches and gives it one of
few sizes. So a thing meets the patches in the same way wherever it stands, and a small model learns
its shape instead of its shape under every shift. The generator learns from tidy scenes. `loose`
puts things anywhere in about the same places; the judge learns from loose scenes, because it must
not depend on how the generator was taught.
"""

import random

SIZE = 256  # pixels
QUARTER, HALF = SIZE // 4, SIZE // 2  # multiples of the 32 pixels of a patch
SMALL, LARGE, HUGE = 112, 224, 248  # sides in pixels
Box = tuple[float, float, float]


def tidy(rng: random.Random, n: int, relation: str | None, size_word: str | None) -> list[Box]:
    """Squares of ``n`` things on the grid of patches.

    Args:
        rng: the only source of chance.
        n: how many things, 1 to 4.
        relation: where the first thing stands from the second, or None.
        size_word: "small", "big" or None, for one thing.
    """
    side = SMALL if n > 1 else {"small": SMALL, "big": HUGE, None: LARGE}[size_word]
    low, high = QUARTER, SIZE - QUARTER
    if n == 1:
        centres = [(HALF, HALF)]
    elif n == 4:
        centres = [(low, low), (high, low), (low, high), (high, high)]
    elif n == 3:
        centres = [(HALF, low), (low, high), (high, high)]
    else:
        centres = [(low, HALF), (high, HALF)]
        if _stacked(rng, relation):
            centres = [(y, x) for x, y in centres]
        if relation in ("right of", "below"):
            centres.reverse()
    return [(x - side / 2, y - side / 2, side) for x, y in centres]


def loose(rng: random.Random, n: int, relation: str | None, size_word: str | None) -> list[Box]:
    """Squares of ``n`` things that move and vary in size; arguments as for ``tidy``."""
    if n == 1:
        sides = {"small": (80, 110), "big": (236, 248), None: (168, 240)}[size_word]
        return [_centred(rng, rng.uniform(*sides))]
    if n > 2:
        if n == 3 and rng.random() < 0.35:
            side = rng.uniform(72, 80)
            places = [(44, 128), (128, 128), (212, 128)]
        else:
            side = rng.uniform(94, 112)
            top = [(128, 66)] if n == 3 else [(66, 66), (190, 66)]
            places = [*top, (66, 190), (190, 190)]
    else:
        side = rng.uniform(96, 116)
        places = [(66, 128), (190, 128)]
        if _stacked(rng, relation):
            places = [(y, x) for x, y in places]
        if relation in ("right of", "below"):
            places.reverse()
    slack = 126 - side if n != 3 or side > 90 else 82 - side
    boxes = []
    for cx, cy in places:
        own = side * rng.uniform(0.86, 1)
        free = max(0.0, (slack + side - own) / 2 - 2)
        # Where nothing stands beside, a thing may move further.
        wide = free + (28 if n == 2 else 0)
        dx = rng.uniform(-free, free) if cx != 128 else rng.uniform(-wide, wide)
        dy = rng.uniform(-free, free) if cy != 128 else rng.uniform(-wide, wide)
        x = min(max(cx + dx - own / 2, 1), SIZE - own - 1)
        y = min(max(cy + dy - own / 2, 1), SIZE - own - 1)
        boxes.append((x, y, own))
    return boxes


def _stacked(rng: random.Random, relation: str | None) -> bool:
    return relation in ("above", "below") if relation else rng.random() < 0.15


def _centred(rng: random.Random, side: float) -> Box:
    free = (SIZE - side) / 2
    x, y = (free + rng.uniform(-0.6, 0.6) * free for _ in "xy")
    return x, y, side
