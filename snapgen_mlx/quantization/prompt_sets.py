"""Three sets of prompts that share none: to choose bits by, to tune on, and to score on.

A model that is scored on what it was tuned on looks better than it is.
"""

from typing import NamedTuple

from ..errors import UsageError

MOST_CHOOSE, MOST_SCORE = 16, 32


class PromptSets(NamedTuple):
    """Prompts by their use."""

    choose: list[str]
    tune: list[str]
    score: list[str]


def split_prompts(prompts: list[str]) -> PromptSets:
    """Make three sets of one list, each of every third prompt, and all that is over for tuning.

    Raises:
        UsageError: there are fewer than three different prompts.
    """
    prompts = list(dict.fromkeys(prompts))
    if len(prompts) < 3:
        raise UsageError(
            f"{len(prompts)} different prompts are too few: bits are chosen, tuned and scored on "
            "other ones each; give three or more, best hundreds"
        )
    choose, score = prompts[::3][:MOST_CHOOSE], prompts[2::3][:MOST_SCORE]
    rest = {*choose, *score}
    return PromptSets(choose, [p for p in prompts if p not in rest], score)


CHOOSE = [
    *("a smiling cat", "a red apple", "a rocket", "a slice of pizza", "a green book", "a sad face"),
    *("a dog", "an owl", "a yellow star", "a snowman", "a cup of coffee", "a birthday cake"),
    *("a car", "a house", "a guitar", "a sunflower"),
]
SCORE = [
    *("a fox", "a frog on a leaf", "a blue whale", "a penguin", "a ripe banana", "a loaf of bread"),
    *(
        "a slice of watermelon",
        "a hot dog",
        "a green tractor",
        "a sailing boat",
        "a bus",
        "a train",
    ),
    *("a laughing face", "an angry face", "a face with sunglasses", "a robot", "a pink heart"),
    *("a full moon", "a rainbow", "a snowflake", "a cactus", "a mushroom", "a red rose", "a key"),
    *("a wooden chair", "a lamp", "a camera", "a trumpet", "a football", "a gold medal", "a tent"),
    "an umbrella",
]
_THINGS = (
    *("bear", "bee", "bird", "butterfly", "chicken", "cow", "crab", "dolphin", "duck", "horse"),
    *("lion", "monkey", "mouse", "panda", "pig", "rabbit", "shark", "snail", "tiger", "turtle"),
    *("bottle", "burger", "carrot", "cheese", "cherry", "cookie", "doughnut", "grape", "lemon"),
    *("peach", "pear", "potato", "strawberry", "tomato", "bicycle", "helicopter", "motorcycle"),
    *("ship", "truck", "wagon", "bell", "box", "candle", "clock", "crown", "cup", "drum", "hammer"),
    *("hat", "knife", "ladder", "lock", "pencil", "phone", "ring", "shirt", "shoe", "spoon"),
    *("castle", "church", "cloud", "flame", "flower", "leaf", "mountain", "tree"),
)
_FORMS = ("a {}", "a red {}", "a small blue {}", "a picture of a {}")
TUNE = [form.format(thing) for thing in _THINGS for form in _FORMS]
BUILT_IN = PromptSets(CHOOSE, TUNE, SCORE)
