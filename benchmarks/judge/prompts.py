"""The judge's prompts: GenEval's 553 in our world, half of them held-out combinations.

    python -m benchmarks.judge.prompts SPRITES

Writes ``snapgen_mlx/assets/judge/prompts.jsonl``, in GenEval's form. The first N lines hold the
tasks in their proportions. Forty prompts of a style follow, which are no part of the overall score.
"""

import argparse
import json
import random
import sys
from pathlib import Path

from recipes.command import command
from recipes.embedded.colors import COLORS
from recipes.embedded.scenes import Scene, Thing, World
from recipes.embedded.sprites import STYLES
from recipes.embedded.things import NUMBERS, RELATIONS, WORDINGS, article, plural
from snapgen_mlx.files import atomic_write
from snapgen_mlx.geneval import Prompt
from snapgen_mlx.judge import FOLDER, PROMPTS

# GenEval's numbers of prompts, and the scenes' kinds.
SIZES = {
    "single_object": (80, "single"),
    "two_object": (99, "two"),
    "counting": (80, "count"),
    "colors": (94, "color"),
    "position": (100, "position"),
    "color_attr": (100, "attribution"),
}
STYLED = 40


def _plan(world: World, rng: random.Random, task: str) -> tuple[list[Thing], str | None]:
    colors = rng.sample(sorted(COLORS), 2)
    a, b = rng.sample(world.things, 2)
    if task == "single_object":
        return [Thing(a, "3d")], None
    if task == "counting":
        return [Thing(a, "3d")] * rng.choice((2, 3, 4)), None
    if task == "colors":
        return [Thing(a, "3d", colors[0])], None
    pair = [Thing(name, "3d") for name in (a, b)]
    if task == "color_attr":
        for thing, color in zip(pair, colors, strict=True):
            thing.color = color
    return pair, rng.choice(RELATIONS) if task == "position" else None


def _text(task: str, things: list[Thing], relation: str | None) -> str:
    names = [f"{t.color} {t.name}" if t.color else t.name for t in things]
    if task == "counting":
        return f"{NUMBERS[len(things)]} {plural(names[0])}"
    if relation:
        return f"{article(names[0])} {WORDINGS[relation][0]} {article(names[1])}"
    return " and ".join(article(name) for name in names)


def _row(task: str, things: list[Thing], relation: str | None, held: bool) -> dict:
    if task == "counting":
        name, n = things[0].name, len(things)
        include = [{"class": name, "count": n}]
        rest = {"exclude": [{"class": name, "count": n + 1}]}
    else:
        include = [{"class": t.name, "count": 1} for t in things]
        for row, thing in zip(include, things, strict=True):
            row |= {"color": thing.color} if thing.color else {}
        rest = {}
        if relation:  # as GenEval: the second is found first, the first stands to it
            include.reverse()
            include[1]["position"] = [relation, 0]
    return {
        "tag": task,
        "include": include,
        **rest,
        "prompt": _text(task, things, relation),
        "held_out": held,
    }


def rows(world: World) -> list[dict]:
    """All prompts; ``single_object`` knows no combinations, so none of its is held out."""
    placed = []
    for task, (count, kind) in SIZES.items():
        rng, seen = random.Random(f"prompts/{task}"), set()
        while len(seen) < count:
            held = task != "single_object" and len(seen) % 2 == 1
            while True:
                things, relation = _plan(world, rng, task)
                text = _text(task, things, relation)
                if text not in seen and world._held(kind, things, relation) == held:
                    break
            place = (len(seen) + 0.5) / count
            seen.add(text)
            placed.append((place, _row(task, things, relation, held)))
    out = [row for _, row in sorted(placed, key=lambda pair: pair[0])]
    rng = random.Random("prompts/style")
    for i in range(STYLED):
        style, held = STYLES[i % len(STYLES)], i % 8 == 7
        while True:
            name = rng.choice(world.things)
            thing = Thing(name, style)
            text = f"{article(name)}, {style} style"
            fits = style in world._styles(name) and world._drawing_held(thing) == held
            if fits and all(row["prompt"] != text for row in out):
                break
        include = [{"class": name, "count": 1, "style": style}]
        out.append({"tag": "style", "include": include, "prompt": text, "held_out": held})
    return out


def real_scene(world: World, prompt: Prompt, seed: str) -> Scene:
    """A scene that shows what a prompt asks for: a picture that must be judged right."""
    rng = random.Random(seed)
    things = [
        Thing(w.name, w.style or "3d", w.color) for w in prompt.include for _ in range(w.count)
    ]
    kind = SIZES[prompt.task][1] if prompt.task in SIZES else "single"
    relation = None
    if kind == "position":
        things.reverse()
        relation = prompt.include[1].position[0]
    return world.compose(rng, kind, things, relation)


@command
def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sprites", type=Path, help="folder of recipes.embedded.sprites")
    args = parser.parse_args(argv)
    made = rows(World.load(args.sprites))
    with atomic_write(FOLDER / PROMPTS) as temporary:
        temporary.write_text("".join(json.dumps(row) + "\n" for row in made), "utf-8")


if __name__ == "__main__":
    sys.exit(main())
