"""GenEval's protocol (Ghosh et al. 2023): is what was asked for among what was found?

A file of prompts has one JSON object a line, as GenEval's own:
{"tag", "prompt", "include": [{"class", "count", "color", "position": [relation, number of an
earlier one]}], "exclude": [{"class", "count"}]}. Ours may also ask for a "style", and say with
"held_out" that no training showed the combination.
"""

import json
from dataclasses import dataclass, field
from math import hypot
from pathlib import Path
from typing import Any

from .errors import SnapGenError

TASKS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
COUNTING = "counting"
RELATIONS = ("left of", "right of", "above", "below")
THRESHOLD, COUNTING_THRESHOLD = 0.3, 0.9  # of a detection's score
MOST = 16  # detections of a class
OVERLAP = 0.5  # of two boxes of a class: the fainter one is the same thing
POSITION_PART, POSITION_LIMIT = 0.1, 0.5

Box = tuple[float, float, float, float]  # left, top, right, bottom


@dataclass(frozen=True)
class Found:
    """A thing that was detected; its box in any unit."""

    name: str
    score: float
    box: Box
    color: str = ""
    style: str = ""


@dataclass(frozen=True)
class Wanted:
    """So many things of a class, perhaps of a colour, of a style, or in a place.

    ``position`` is a relation and the number of the earlier group that it leads from.
    """

    name: str
    count: int = 1
    color: str | None = None
    style: str | None = None
    position: tuple[str, int] | None = None


@dataclass(frozen=True)
class Prompt:
    """A prompt, and what a picture of it must show and must not."""

    text: str
    task: str
    include: tuple[Wanted, ...]
    exclude: tuple[Wanted, ...] = ()
    held_out: bool = False


def read_prompts(path: Path) -> list[Prompt]:
    """The prompts of a file. Raises SnapGenError that names the first line that is none."""
    prompts = []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeError) as e:
        raise SnapGenError(f"cannot read the prompts {path}: {e}") from e
    for number, line in enumerate(lines, 1):
        try:
            prompts.append(_prompt(json.loads(line)))
        except KeyError as e:
            raise SnapGenError(f"{path}, line {number}: lacks {e}") from e
        except (ValueError, TypeError, AttributeError) as e:
            raise SnapGenError(f"{path}, line {number}: is no prompt: {e}") from e
    if not prompts:
        raise SnapGenError(f"{path} holds no prompt")
    return prompts


def _prompt(row: dict[str, Any]) -> Prompt:
    include = tuple(_wanted(w, i) for i, w in enumerate(row["include"]))
    if not include:
        raise ValueError("nothing is to be included")
    exclude = tuple(_wanted(w, 0) for w in row.get("exclude", ()))
    text, task = row["prompt"], row["tag"]
    if not (isinstance(text, str) and text.strip() and isinstance(task, str)):
        raise ValueError("prompt and tag must be texts")
    return Prompt(text, task, include, exclude, bool(row.get("held_out", False)))


def _wanted(row: dict[str, Any], earlier: int) -> Wanted:
    count, position = row["count"], row.get("position")
    if not isinstance(count, int) or count < 1:
        raise ValueError(f"a count of {count!r}")
    if position is not None:
        relation, group = position
        if relation not in RELATIONS or group not in range(earlier):
            raise ValueError(f"a position of {position!r}")
        position = (relation, group)
    return Wanted(row["class"], count, row.get("color"), row.get("style"), position)


def overlap(a: Box, b: Box) -> float:
    """The common part of two boxes, of what both cover."""
    width = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
    height = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    both = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1])
    return width * height / max(both - width * height, 1e-12)


def kept(found: list[Found], task: str) -> dict[str, list[Found]]:
    """What counts as detected for a task, by class, the surest first."""
    least = COUNTING_THRESHOLD if task == COUNTING else THRESHOLD
    out: dict[str, list[Found]] = {}
    for thing in sorted(found, key=lambda f: -f.score):
        others = out.setdefault(thing.name, [])
        sure = thing.score > least and len(others) < MOST
        if sure and all(overlap(thing.box, other.box) < OVERLAP for other in others):
            others.append(thing)
    return out


def relations(a: Box, b: Box) -> set[str]:
    """How ``a`` stands to ``b``: its relations, none where both are nearly in one place."""
    offset, left = [], []
    for low, high in ((0, 2), (1, 3)):
        distance = (a[low] + a[high] - b[low] - b[high]) / 2
        slack = POSITION_PART * (a[high] - a[low] + b[high] - b[low])
        offset.append(distance)
        left.append(max(abs(distance) - slack, 0) * (1 if distance > 0 else -1))
    if all(abs(d) < 1e-3 for d in left):
        return set()
    dx, dy = (d / hypot(*offset) for d in left)
    found = {
        "left of": dx < -POSITION_LIMIT,
        "right of": dx > POSITION_LIMIT,
        "above": dy < -POSITION_LIMIT,
        "below": dy > POSITION_LIMIT,
    }
    return {name for name, holds in found.items() if holds}


def correct(prompt: Prompt, found: list[Found]) -> bool:
    """Whether a picture with these things is right in all that its prompt says."""
    things = kept(found, prompt.task)
    groups: list[list[Found]] = []
    for wanted in prompt.include:
        group = things.get(wanted.name, [])[: wanted.count]
        if len(group) < wanted.count:
            return False
        if wanted.color and any(f.color != wanted.color for f in group):
            return False
        if wanted.style and any(f.style != wanted.style for f in group):
            return False
        if wanted.position:
            relation, other = wanted.position
            places = (relations(f.box, target.box) for f in group for target in groups[other])
            if not all(relation in place for place in places):
                return False
        groups.append(group)
    return all(len(things.get(w.name, [])) < w.count for w in prompt.exclude)


@dataclass
class Score:
    """Right and drawn pictures by task, and apart for seen and held-out combinations."""

    right: dict[tuple[str, bool], int] = field(default_factory=dict)
    drawn: dict[tuple[str, bool], int] = field(default_factory=dict)

    def add(self, prompt: Prompt, is_right: bool) -> None:
        key = prompt.task, prompt.held_out
        self.right[key] = self.right.get(key, 0) + is_right
        self.drawn[key] = self.drawn.get(key, 0) + 1

    def share(self, task: str, held_out: bool | None = None) -> float | None:
        """Right pictures of a task, of all that were drawn; None where none were."""
        keys = [k for k in self.drawn if k[0] == task and held_out in (None, k[1])]
        drawn = sum(self.drawn[k] for k in keys)
        return sum(self.right[k] for k in keys) / drawn if drawn else None

    def overall(self, held_out: bool | None = None) -> float | None:
        """The mean over GenEval's six tasks, of those of which any picture was drawn; for seen or
        held-out combinations alone, of those that have both, so that the two can be compared."""
        tasks: list[str] = list(TASKS)
        if held_out is not None:
            both = [{(task, True), (task, False)} <= self.drawn.keys() for task in tasks]
            tasks = [task for task, has_both in zip(tasks, both, strict=True) if has_both]
        shares = [self.share(task, held_out) for task in tasks]
        known = [share for share in shares if share is not None]
        return sum(known) / len(known) if known else None
