"""Short trainings that differ in one thing each, compared at equal time.

    python -m recipes.pretrain.trials CONFIG.json TRIALS.json --data DIR --out DIR --minutes 3

TRIALS.json holds under "trials", for each name, what this trial changes of CONFIG.json, part by
part, and under "common" what all of them change. Every trial trains for the same time from the same
seed on the same samples. The table that is printed gives the flow loss of the validation files that
there are, with the averaged weights, at each width; a trial whose result stands in the output
folder is not run again.
"""

import argparse
import json
import sys
import time
from pathlib import Path

from snapgen_mlx.errors import SnapGenError, UsageError
from snapgen_mlx.files import atomic_write

from ..command import command
from .data import Shards
from .elastic import Elastic
from .text import load_words
from .train import WORD_TABLE, build, read_config

VALIDATION_BATCH = 64


def run(config: Path, data: Path, words: Path, seconds: float) -> dict[str, float]:
    """Train for some seconds; the held-out losses, steps and samples a second."""
    transformer, text, options = read_config(config)
    network = build(transformer, text, options, words)
    if network.text is None:
        raise UsageError(f"{config}: trials need a text part")
    tokens = load_words(words, network.text.config)
    channels = network.dit.config.in_channels
    shards = Shards(data, tokens, [], channels, options.seed, options.first_shards, 0)
    if name := shards.missing(0):
        raise SnapGenError(f"{data} lacks {name}")
    trainer = Elastic(network, options)
    started = time.monotonic()
    while time.monotonic() - started < seconds:
        batch = shards.batch(
            trainer.steps,
            options.batch,
            slice(options.batch),
            trainer.full,
            options.text_dropout,
            options.shift,
        )
        trainer.step(batch)
    taken = time.monotonic() - started
    fixed = shards.fixed(options.validation_samples, VALIDATION_BATCH)
    return {
        "steps": trainer.steps,
        "samples/s": trainer.steps * options.batch / taken,
        **trainer.validate(fixed),
    }


def merged(config: dict, change: dict) -> dict:
    """`config` with the values of `change`."""
    out = dict(config)
    for part, values in change.items():
        out[part] = {**config.get(part, {}), **values}
    return out


def read(path: Path) -> dict:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise UsageError(f"cannot read {path}: {e}") from e


def trials(args) -> None:
    config, listed = read(args.config), read(args.trials)
    if not isinstance(listed, dict) or "trials" not in listed:
        raise UsageError(f'{args.trials} has no part "trials"')
    config = merged(config, listed.get("common", {}))
    args.out.mkdir(parents=True, exist_ok=True)
    for name, change in listed["trials"].items():
        own, result = args.out / f"{name}.config.json", args.out / f"{name}.json"
        if not result.exists():
            own.write_text(json.dumps(merged(config, change), indent=2) + "\n", encoding="utf-8")
            row = run(own, args.data, args.words, 60 * args.minutes)
            with atomic_write(result) as temporary:
                temporary.write_text(json.dumps(row) + "\n", encoding="utf-8")
        row = {k: float(f"{v:.4g}") for k, v in read(result).items()}
        print(name, *(f"{k} {v:g}" for k, v in row.items()), flush=True)


@command
def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config", type=Path, help="JSON file of the run")
    parser.add_argument("trials", type=Path, help="JSON file of the trials")
    parser.add_argument("--data", type=Path, required=True, help="folder of shards")
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument("--words", type=Path, default=WORD_TABLE, help="folder of the word table")
    parser.add_argument("--minutes", type=float, default=3.0, help="of training for each trial")
    trials(parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
