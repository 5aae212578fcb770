"""What a user would type to get a scene: several wordings, some of them never trained on."""

import random

from .concepts import with_article
from .sprites import Sprites
from .things import (
    NUMBERS,
    OPPOSITE,
    THINGS,
    WORDINGS,
    article,
    plural,
    synonyms,
)

# {} is the whole phrase, such as "a red apple" or "two cats".
FRAMES = {
    "train": ["a picture of {}", "an image of {}", "a drawing of {}", "a sticker of {}", "draw {}"],
    "heldout": ["a photo of {}", "show me {}", "please make {}", "an illustration of {}"],
}
STYLE_WORDS = {
    "3d": ["{}, 3d style", "{} in 3d", "a 3d render of {}", "3d {bare}"],
    "gradient": ["{}, gradient style", "{} in a gradient style", "glossy {bare}"],
    "flat": ["{}, flat style", "{} in a flat style", "a flat icon of {}", "flat {bare}"],
    "cartoon": ["{}, cartoon style", "{} in a cartoon style", "a cartoon of {}", "cartoon {bare}"],
}
PAIRS = {
    "train": ["{a} and {b}", "{a} and {b}", "{a} with {b}", "{a} next to {b}", "{a}, {b}"],
    "heldout": ["{a} together with {b}", "{a} beside {b}", "{a} plus {b}"],
}
COLORED = {
    "train": ["{color} {name}", "{color} {name}", "{name} that is {color}"],
    "heldout": ["{name} colored {color}"],
}
BACKGROUND_WORDS = {
    "train": ["{} on {a_color} background", "{}, {color} background"],
    "heldout": ["{} in front of {a_color} background"],
}


class Captions:
    """Captions of scenes whose things, colours, places and styles are known."""

    def __init__(self, sprites: Sprites):
        self.sprites = sprites

    def scene(
        self,
        rng: random.Random,
        kind: str,
        things: list,
        relation: str | None,
        background: str | None,
        size_word: str | None,
        split: str,
    ) -> str:
        """A caption of planned things; see ``scenes.World.compose``."""
        first, n = things[0], len(things)
        if kind == "single" and first.name not in THINGS:
            phrase = self._single(rng, first, split)
            tags = first.name not in phrase  # such as "energy power", which takes no article
            if size_word:
                phrase = f"{size_word} {phrase}"
            text = phrase if tags or rng.random() < 0.25 else with_article(phrase)
        elif n == 1:
            phrase = self._named(rng, first, split)
            if size_word:
                phrase = f"{size_word} {phrase}"
            text = phrase if rng.random() < 0.2 else article(phrase)
        elif kind == "count":
            number = str(n) if rng.random() < 0.25 else NUMBERS[n]
            phrase = text = f"{number} {self._named(rng, first, split, plural)}"
        else:
            a, b = (article(self._named(rng, t, split)) for t in things)
            if relation:
                text = f"{a} {rng.choice(WORDINGS[relation])} {b}"
                if rng.random() < 0.35:  # the same place, named from the other side
                    text = f"{b} {rng.choice(WORDINGS[OPPOSITE[relation]])} {a}"
            else:
                pair = [a, b] if rng.random() < 0.5 else [b, a]
                text = rng.choice(PAIRS[split]).format(a=pair[0], b=pair[1])
            phrase = text
        return self._dressed(rng, text, phrase, first.style, n, background, split)

    def _single(self, rng, thing, split: str) -> str:
        """The label of any concept, or another phrase that singles it out."""
        concept = self.sprites.by_label[thing.name]
        phrases = concept.phrases if split == "train" else concept.held_phrases
        phrases = [p for p in phrases if not p.startswith(("a ", "an ", "the "))]
        return rng.choice(phrases) if phrases and rng.random() < 0.3 else concept.label

    def _named(self, rng, thing, split: str, form=str) -> str:
        """A thing's name, with its colour."""
        others = synonyms(thing.name)
        name = rng.choice(others) if others and rng.random() < 0.2 else thing.name
        name = form(name)
        if not thing.color:
            return name
        frames = COLORED[split] if form is str else ["{color} {name}"]
        return rng.choice(frames).format(color=thing.color, name=name)

    def _dressed(self, rng, text, bare, style, n, background, split) -> str:
        """The style's word (always, unless it is 3D), a frame, and the background."""
        if style != "3d" or rng.random() < 0.15:
            frames = [f for f in STYLE_WORDS[style] if n == 1 or "{bare}" not in f]
            text = rng.choice(frames).format(text, bare=bare)
        elif rng.random() < 0.2:
            text = rng.choice(FRAMES[split]).format(text)
        if background:
            text = rng.choice(BACKGROUND_WORDS[split]).format(
                text, color=background, a_color=article(background)
            )
        return text
