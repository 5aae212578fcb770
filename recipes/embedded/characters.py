"""Characters whose parts caption themselves: faces of two freely licensed DiceBear styles.

"Custom Avatar" by Ashley Seo (CC BY 4.0) and "Open Peeps" by Pablo Stanley (CC0 1.0).
"""

import io
import json
import random
from functools import cache
from importlib.resources import files

import numpy as np
import resvg_py
from dicebear import Avatar, Style
from PIL import Image

from .things import article, held_out

SIZE = 256  # pixels
HAIR_COLORS = {
    "black": "#220f00",
    "brown": "#71472d",
    "blond": "#e9b729",
    "red": "#c9371c",
    "grey": "#b7b7b7",
    "purple": "#605de4",
    "green": "#238d80",
    "pink": "#f59797",
}
SKINS = {
    "big-smile": ["#ffe4c0", "#efcc9f", "#c99c62", "#a47539", "#8c5a2b", "#643d19"],
    "open-peeps": ["#ffdbb4", "#edb98a", "#d08b5b", "#ae5d29", "#694d3d"],
}
CLOTHES = {
    "blue": "#5f7fe0",
    "green": "#5fd66d",
    "orange": "#ffa63d",
    "pink": "#f08fd0",
    "red": "#e0483c",
    "yellow": "#fbe04a",
}
# What parts are called; several parts of one name are drawn with equal chance.
HAIR = {
    "big-smile": {
        "short": ["shortHair"],
        "long": ["straightHair"],
        "long wavy": ["wavyBob"],
        "curly": ["curlyBob"],
        "short curly": ["curlyShortHair"],
        "braided": ["braids"],
        "a mohawk": ["mohawk"],
        "a bowl cut": ["bowlCutHair"],
        "a bun": ["bunHair", "froBun"],
        "a shaved head": ["shavedHead"],
    },
    "open-peeps": {
        "short": ["grayShort", "short4"],
        "curly": ["mediumBangs2"],
        "bobbed": ["bangs"],
        "long": ["long", "longBangs"],
        "long curly": ["longCurly"],
        "an afro": ["afro", "longAfro"],
        "a bun": ["grayBun"],
        "cornrows": ["cornrows2"],
        "dreadlocks": ["dreads1", "dreads2"],
        "a mohawk": ["mohawk"],
        "no": ["noHair1"],
        "a beanie": ["hatBeanie"],
        "a turban": ["turban"],
        "a hijab": ["hijab"],
    },
}
# Drawn in ink, whatever the hair's colour.
BLACK = {
    "big-smile": set(),
    "open-peeps": {"long", "long curly", "an afro", "cornrows", "dreadlocks", "a hijab"},
}
MOODS = {
    "big-smile": {
        "smiling": ("cheery", "openedSmile"),
        "happy": ("normal", "teethSmile"),
        "sad": ("sad", "openSad"),
        "angry": ("angry", "unimpressed"),
        "winking": ("winking", "gapSmile"),
        "sleepy": ("sleepy", "unimpressed"),
        "confused": ("confused", "awkwardSmile"),
        "starry-eyed": ("starstruck", "kawaii"),
    },
    "open-peeps": {
        "smiling": ["smile", "smileBig"],
        "laughing": ["smileLOL"],
        "angry": ["rage", "veryAngry"],
        "sad": ["concerned", "solemn"],
        "scared": ["fear", "concernedFear"],
        "tired": ["tired"],
        "calm": ["calm", "eyesClosed"],
        "surprised": ["awe"],
        "serious": ["serious"],
        "in love": ["lovingGrin1", "lovingGrin2"],
    },
}
EXTRAS = {
    "big-smile": {
        "glasses": "glasses",
        "sunglasses": "sunglasses",
        "a mustache": "mustache",
        "cat ears": "catEars",
        "a clown nose": "clownNose",
    },
    "open-peeps": {
        "glasses": "glasses",
        "round glasses": "glasses3",
        "sunglasses": "sunglasses",
        "an eyepatch": "eyepatch",
    },
}
BEARDS = {"a beard": ["full", "full2", "full3"], "a mustache": ["moustache1", "moustache4"]}
UNCOLORED = {"no", "a shaved head", "a beanie", "a turban"}  # their captions name no hair colour
LONG_HAIR = {"long", "bobbed", "long wavy", "braided", "a bun", "a hijab", "long curly"}


@cache
def _style(name: str) -> Style:
    return Style(json.loads((files("dicebear_styles") / f"{name}.json").read_text("utf-8")))


def character(rng: random.Random, split: str) -> tuple[np.ndarray, str]:
    """Draw one character.

    Args:
        rng: the only source of chance.
        split: "train" draws no held-out (hair, colour, mood), "heldout" only such ones.

    Returns:
        Straight RGBA (256, 256, 4) uint8, and a caption without an article.
    """
    while True:
        name = rng.choice(sorted(HAIR))
        hair = rng.choice(sorted(HAIR[name]))
        color = "black" if hair in BLACK[name] else rng.choice(sorted(HAIR_COLORS))
        mood = rng.choice(sorted(MOODS[name]))
        told = None if hair in UNCOLORED else color
        if held_out("character", hair, told, mood) == (split == "heldout"):
            break
    extra = rng.choice(sorted(EXTRAS[name])) if rng.random() < 0.4 else None
    skin = rng.choice(SKINS[name])
    options: dict = {"seed": "0", "size": SIZE, "skinColor": [skin]}
    bits, shirt = [], None
    if name == "big-smile":
        eyes, mouth = MOODS[name][mood]
        options |= {
            "hairVariant": [rng.choice(HAIR[name][hair])],
            "hairColor": [HAIR_COLORS[color]],
            "eyesVariant": [eyes],
            "mouthVariant": [mouth],
            "accessoriesProbability": 100 if extra else 0,
        }
    else:
        shirt = rng.choice(sorted(CLOTHES))
        beard = rng.choice(sorted(BEARDS)) if hair not in LONG_HAIR and rng.random() < 0.3 else None
        options |= {
            "headVariant": [rng.choice(HAIR[name][hair])],
            "headContrastColor": [HAIR_COLORS[color]],
            "clothingColor": [CLOTHES[shirt]],
            "expressionVariant": [rng.choice(MOODS[name][mood])],
            "accessoriesProbability": 100 if extra else 0,
            "facialHairProbability": 100 if beard else 0,
            "maskProbability": 0,
        }
        if beard:
            options["facialHairVariant"] = [rng.choice(BEARDS[beard])]
            bits.append(beard)
    if extra:
        options["accessoriesVariant"] = [EXTRAS[name][extra]]
        bits.append(extra)
    svg = Avatar(_style(name), options).to_string()
    data = resvg_py.svg_to_bytes(svg_string=svg, width=SIZE)
    picture = np.asarray(Image.open(io.BytesIO(bytes(data))).convert("RGBA"))

    if hair in ("no", "a shaved head"):
        bits.insert(0, "no hair" if hair == "no" else hair)
    elif hair in ("a beanie", "a turban"):  # in the colour of the clothes
        bits.insert(0, _colored(hair, shirt))
    elif hair.startswith(("a ", "an ")) or hair in ("cornrows", "dreadlocks"):
        bits.insert(0, _colored(hair, color))
    else:
        bits.insert(0, f"{hair} {color} hair")
    if shirt and rng.random() < 0.5:
        bits.append(article(f"{shirt} shirt"))
    who = "woman" if hair in LONG_HAIR else "man"
    who = "person" if rng.random() < 0.3 else who
    bits = bits[: 1 + rng.randrange(len(bits))] if rng.random() < 0.3 else bits
    listed = ", ".join(bits[:-1]) + " and " + bits[-1] if len(bits) > 1 else bits[0]
    if mood == "in love":
        return picture, f"{who} in love with {listed}"
    return picture, f"{mood} {who} with {listed}"


def _colored(hair: str, color: str) -> str:
    """'a bun', 'red' -> 'a red bun'; 'cornrows', 'black' -> 'black cornrows'."""
    if not hair.startswith(("a ", "an ")):
        return f"{color} {hair}"
    return article(f"{color} {hair.split(' ', 1)[1]}")
