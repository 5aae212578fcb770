"""The everyday things that scenes are composed of, and the words of a scene's caption."""

from .concepts import CLASS_NAME, STANDS_FOR, fraction

# name in captions, and the sprite's label where it is another
_THINGS = """
apple=red apple, pear, peach, lemon, banana, strawberry, pineapple, watermelon, tomato, carrot,
eggplant, mushroom, avocado, coconut, croissant, pretzel, hamburger, pizza, taco, hot dog, egg,
doughnut, cookie, cupcake, cake=birthday cake, candy, lollipop, beer mug, wine glass, teapot, cat,
dog, fox, lion, tiger, horse, cow, pig, rabbit, bear, koala, panda, monkey, elephant, giraffe,
camel, frog, turtle, snake, whale, dolphin, fish, shark, octopus, crab, snail, butterfly,
bee=honeybee, ladybug, spider, owl, penguin, eagle, duck, flamingo, peacock, parrot, rooster,
hedgehog, zebra, kangaroo, squid, dinosaur=t-rex, unicorn, rose, sunflower, tulip, cactus,
tree=deciduous tree, palm tree, leaf=maple leaf, house, castle, tent, star, cloud,
moon=crescent moon, sun, snowman, umbrella, balloon, gift=wrapped gift, teddy bear, kite, trophy,
crown, hat=top hat, shirt=t-shirt, dress, shoe=running shoe, boot=woman's boot, backpack, ring,
bell, key, hammer, axe, pencil, light bulb, candle, camera, television, laptop,
phone=mobile phone, clock=alarm clock, chair, bed, couch=couch and lamp, door, bucket, broom,
book=closed book, envelope, car, bus, taxi, bicycle, motorcycle, train, tractor, airplane,
helicopter, rocket, sailboat, ship, truck=delivery truck, guitar, violin, drum, trumpet,
soccer ball, basketball, heart=red heart, robot, ghost, anchor, bomb, magnet, telescope,
microscope, spoon, toilet, mirror, window, fountain pen, lipstick
"""
THINGS: dict[str, str] = {}
for _entry in _THINGS.replace("\n", " ").split(","):
    _name, _, _label = _entry.strip().partition("=")
    THINGS[_name] = _label or _name

NUMBERS = {1: "one", 2: "two", 3: "three", 4: "four"}
RELATIONS = ("left of", "right of", "above", "below")
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
WORDINGS = {
    "left of": ["left of", "to the left of", "on the left of"],
    "right of": ["right of", "to the right of", "on the right of"],
    "above": ["above", "on top of", "over"],
    "below": ["below", "under", "underneath", "beneath"],
}
IRREGULAR = {
    "fish": "fish",
    "leaf": "leaves",
    "mouse": "mice",
    "wolf": "wolves",
    "squid": "squid",
    "snowman": "snowmen",
}
OWN_DRAWINGS = {"telephone"}  # words of one meaning with a thing, but with a drawing of their own
HELD_OUT_SHARE = 0.1


def held_out(*parts) -> bool:
    """Whether a combination is held out for good: 10 % of them, by hash; order does not count."""
    return fraction("held/" + "/".join(sorted(map(str, parts)))) < HELD_OUT_SHARE


def plural(name: str) -> str:
    """'strawberry' -> 'strawberries'."""
    head, _, last = name.rpartition(" ")
    if last in IRREGULAR:
        last = IRREGULAR[last]
    elif last.endswith(("s", "x", "ch", "sh")) or last in ("tomato", "potato"):
        last += "es"
    elif last.endswith("y") and last[-2] not in "aeiou":
        last = last[:-1] + "ies"
    else:
        last += "s"
    return f"{head} {last}".strip()


def article(phrase: str) -> str:
    """'apple' -> 'an apple'."""
    vowel = phrase[0] in "aeiou" and not phrase.startswith(("uni", "one", "ewe"))
    return f"{'an' if vowel or phrase.startswith('hour') else 'a'} {phrase}"


def synonyms(name: str) -> list[str]:
    """Other names of a thing, such as 'donut' for 'doughnut'."""
    others = STANDS_FOR.get(name, [])
    others = [o for o in others if CLASS_NAME.get(o) == CLASS_NAME.get(name)]
    return [o for o in others if o not in THINGS and o not in OWN_DRAWINGS]
