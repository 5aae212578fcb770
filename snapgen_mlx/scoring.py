"""How well a model's widths draw what they are asked for: GenEval's protocol, by the judge."""

from collections.abc import Iterator
from typing import Any

import numpy as np
from PIL import Image

from .geneval import TASKS, Prompt, Score, correct
from .judge import BATCH, Judge, Looked, diversity, frechet, protocol, real_pictures
from .pipeline import Pipeline
from .sampling import last_step
from .settings import Settings

SEEDS = 4  # pictures of a prompt
STYLE = "style"  # a task beside GenEval's six


def score_model(
    model,
    variants: list[str] | None = None,
    steps: int | None = None,
    guidance: float | None = None,
    count: int | None = None,
) -> Iterator[dict]:
    """Let ``model`` (a folder, a Hub id, or None) draw the protocol's prompts, and judge them.

    Args:
        variants: widths; all when None.
        steps, guidance: the model's own when None.
        count: pictures of each width, at most; all prompts from four seeds when None. Fewer are of
            all tasks in their proportions, first of each prompt once.

    Yields:
        First ``pictures``, ``prompts`` and ``real``, the judge's figures of real scenes. Then for
        each width {"variant", "drawn"} after every few pictures, and last its ``summary`` with
        "variant", "steps" and "guidance".

    Raises:
        UsageError: an unknown variant, or pictures that do not fit into memory.
    """
    pipe = Pipeline.load(
        model, variants[0] if variants else None, guidance=guidance, keep_encoders=False
    )
    variants = variants or pipe.dit_config.variants
    for name in variants:
        pipe.dit_config.variant_index(name)
    pipe.settings("any", steps=steps, guidance=guidance)  # what is wrong is said at once
    judge, prompts = Judge.load(), protocol()
    asked = [(prompt, seed) for seed in range(SEEDS) for prompt in prompts][:count]
    real = real_pictures()
    yield {
        "pictures": len(asked),
        "prompts": len({prompt.text for prompt, _ in asked}),
        "real": real.shares,
    }
    given = dict(steps=steps, guidance=guidance)
    jobs: dict[str, list[Settings]] = {}
    for name in variants:  # few steps may be the matter of some widths alone
        pipe.switch(name)
        jobs[name] = [pipe.settings(prompt.text, seed=seed, **given) for prompt, seed in asked]
    pipe.prepare([job for own in jobs.values() for job in own])
    pipe.free("encoders")
    for name, own in jobs.items():
        pipe.switch(name)
        looks: list[Looked] = []
        for start in range(0, len(own), BATCH):
            drawn: list[Image.Image] = [
                pipe.decode(last_step(pipe.stream(job)).x, job.background)
                for job in own[start : start + BATCH]
            ]
            looks += judge.look(drawn)
            yield {"variant": name, "drawn": len(looks)}
        record = {"variant": name, "steps": own[0].steps, "guidance": own[0].guidance}
        yield record | summary([prompt for prompt, _ in asked], looks)


def summary(prompts: list[Prompt], looks: list[Looked]) -> dict[str, Any]:
    """The figures of judged pictures.

    Returns:
        "all", "seen" and "held_out": shares of right pictures by task, and "overall", the mean of
        the six tasks; None where nothing was drawn. And where pictures suffice "frechet" and
        "diversity", each with that of real scenes.
    """
    score = Score()
    for prompt, look in zip(prompts, looks, strict=True):
        score.add(prompt, correct(prompt, look.things))
    out: dict[str, Any] = {
        title: {task: score.share(task, held) for task in (*TASKS, STYLE)}
        | {"overall": score.overall(held)}
        for title, held in (("all", None), ("seen", False), ("held_out", True))
    }
    own = [
        (p.text, look.features) for p, look in zip(prompts, looks, strict=True) if p.task in TASKS
    ]
    by_prompt: dict[str, list[np.ndarray]] = {}
    for text, features in own:
        by_prompt.setdefault(text, []).append(features)
    real = real_pictures()
    seeds = min(len(group) for group in by_prompt.values())
    if len(by_prompt) == real.prompts:
        seeds = min(seeds, len(real.floors))
        features = np.stack([f for group in by_prompt.values() for f in group[:seeds]])
        distance = frechet(features, real.mean, real.covariance)
        out["frechet"] = {"drawn": distance, "real": real.floors[seeds - 1]}
    if real.diversity and min(len(group) for group in by_prompt.values()) > 1:
        spread = diversity([np.stack(group) for group in by_prompt.values()])
        out["diversity"] = {"drawn": spread, "real": real.diversity}
    return out
