"""Pretrain a SnapGen++ supernet: elastic flow matching on shards of latents and captions.

    python -m recipes.pretrain.train --data DIR --out RUN --config FILE.json

RUN keeps the state (a run goes on where it stopped), log.jsonl and sample sheets. Ctrl-C and
SIGTERM end it after the current step, with its state saved. Under `torchrun` every process takes
its share of each batch.
"""

import argparse
import dataclasses
import json
import signal
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

from snapgen_mlx.config import DiTConfig
from snapgen_mlx.errors import SnapGenError, UsageError
from snapgen_mlx.files import atomic_write
from snapgen_mlx.training.checkpoint import locked

from . import state as states
from .data import Shards, noise_like
from .elastic import Elastic, Network, Training
from .model import SnapGenPPTransformer2DModel
from .sample import denoise
from .text import NAME, WordTransformer, load_words, pad

WORD_TABLE = Path(__file__).parents[2] / "snapgen_mlx" / "assets" / "embedded" / "text_encoder"
SAVE_EVERY = 300.0  # seconds
SHEET_STEPS, SHEET_GUIDANCE = 12, 4.0


class Stopped(Exception):
    """The user asked the run to end."""


def read_config(path: Path) -> tuple[dict, dict, Training]:
    """(transformer, text, training) of a run's JSON file.

    Raises:
        UsageError: it is no such file; says which key is wrong.
    """
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        if unknown := set(config) - {"transformer", "text", "training"}:
            raise UsageError(f"{path}: unknown part {min(unknown)!r}")
        training = config.get("training", {})
        names = {field.name for field in dataclasses.fields(Training)}
        if unknown := set(training) - names:
            raise UsageError(f"{path}: unknown key {min(unknown)!r} of training")
        return config["transformer"], config.get("text", {}), Training(**training)
    except OSError as e:
        raise UsageError(f"cannot read {path}: {e.strerror}") from e
    except (ValueError, TypeError, AttributeError) as e:
        raise UsageError(f"{path} is no run configuration: {e}") from e
    except KeyError as e:
        raise UsageError(f"{path} lacks the part {e}") from e


def build(transformer: dict, text: dict, training: Training, table: Path) -> Network:
    """The network of a configuration, freshly initialised from the seed."""
    torch.manual_seed(training.seed)
    try:
        encoder = WordTransformer.from_table(table, **text)
    except TypeError as e:
        raise UsageError(f"the configuration's text part: {e}") from e
    config = DiTConfig.from_dict({**transformer, "text_dims": {NAME: encoder.config.dim}})
    if not (config.mid_skips and config.downsample):
        raise UsageError("mid_skips and downsample cannot be switched off in pretraining")
    return Network(SnapGenPPTransformer2DModel(config, training.checkpointing), encoder)


def geometry(network: Network) -> dict:
    """What a state must agree in with the network that it is loaded into, flat."""
    parts = {"text": network.text.config.to_dict(), "transformer": network.dit.config.to_dict()}
    return {f"{part} {k}": v for part, config in parts.items() for k, v in config.items()}


def resume(trainer: Elastic, folder: Path) -> bool:
    """Load the run's state, if there is one. Raises UsageError for another geometry's."""
    state = states.load(folder)
    if state is None:
        return False
    for key, value in geometry(trainer.network).items():
        if state["geometry"].get(key) != value:
            raise UsageError(
                f"the run in {folder} has {key} {state['geometry'].get(key)}, the configuration "
                f"{value}; choose another --out"
            )
    trainer.restore(state)
    return True


class Log:
    """log.jsonl of a run; records after the step that it goes on from are removed."""

    def __init__(self, path: Path, step: int):
        kept = []
        if path.exists():
            lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
            kept = [line for line in lines if line.endswith("\n")]
            kept = [line for line in kept if json.loads(line).get("step", 0) <= step]
        with atomic_write(path) as temporary:
            temporary.write_text("".join(kept), encoding="utf-8")
        self.file = path.open("a", encoding="utf-8")

    def write(self, record: dict) -> None:
        record = {k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in record.items()}
        self.file.write(json.dumps(record) + "\n")
        self.file.flush()
        print(" ".join(f"{k} {v}" for k, v in record.items()), flush=True)


class Run:
    """The loop around a trainer: shards, log, validation, sheets, state."""

    def __init__(self, trainer: Elastic, shards: Shards, folder: Path, decode=None):
        self.trainer, self.shards, self.folder, self.decode = trainer, shards, folder, decode
        self.options = trainer.options
        self.stopping = False
        self.waited_for = None
        self.log = None

    def stop(self, *_) -> None:
        self.stopping = True

    def waiting(self, name: str) -> None:
        if self.stopping:
            raise Stopped
        if name != self.waited_for:
            self.log.write({"step": self.trainer.steps, "waiting_for": name})
            self.waited_for = name

    def save(self) -> None:
        state = {**self.trainer.state(), "geometry": geometry(self.trainer.network)}
        states.save(self.folder, state)

    def loop(self, last: int | None) -> None:
        """Train until step `last` (None: until stopped)."""
        trainer, o = self.trainer, self.options
        self.log = Log(self.folder / "log.jsonl", trainer.steps)
        try:
            heldout = self.shards.heldout(o.validation_samples, o.batch)
            heldout = [batch.to(trainer.device) for batch in heldout]
            sums, start, saved = {}, time.monotonic(), time.monotonic()
            while not self.stopping and (last is None or trainer.steps < last):
                self.shards.visible(trainer.steps, self.waiting)
                batch = self.shards.batch(
                    trainer.steps,
                    o.batch,
                    slice(0, o.batch),
                    trainer.full,
                    o.text_dropout,
                    o.shift,
                )
                for k, v in trainer.step(batch.to(trainer.device)).items():
                    total, n = sums.get(k, (0.0, 0))
                    sums[k] = total + v, n + 1
                step = trainer.steps
                if step % o.log_every == 0:
                    record = {"step": step, **{k: float(v) / n for k, (v, n) in sums.items()}}
                    seconds = time.monotonic() - start
                    steps = next(iter(sums.values()))[1]
                    record |= {"rate": o.rate(step - 1), "seconds": seconds / steps}
                    record |= {"samples_per_second": o.batch * steps / seconds}
                    self.log.write(record)
                    sums = {}
                if heldout and step % o.validate_every == 0:
                    self.log.write({"step": step, **trainer.validate(heldout)})
                if o.prompts and step % o.sheet_every == 0:
                    self.sheet()
                if time.monotonic() - saved > SAVE_EVERY:
                    self.save()
                    saved = time.monotonic()
                if step % o.log_every == 0:
                    start = time.monotonic()
        except Stopped:
            pass
        self.save()

    def sheet(self) -> None:
        """Latents of the fixed prompts at every width with the averaged weights, and a picture."""
        trainer = self.trainer
        shape = self.shards.shards[0].latents.shape[1:]
        count = len(self.options.prompts)
        ids, mask = pad(self.shards.words.ids(list(self.options.prompts)))
        noise = noise_like(torch.empty(count, *shape), range(count)).to(trainer.device)
        text, masks = {NAME: ids.to(trainer.device)}, {NAME: mask.to(trainer.device)}
        trainer.swap()
        try:
            with trainer.autocast():
                rows = [
                    denoise(
                        trainer.network, noise, text, masks, i, SHEET_STEPS, SHEET_GUIDANCE
                    ).cpu()
                    for i in range(len(trainer.widths))
                ]
        finally:
            trainer.swap()
        latents = torch.stack(rows)
        path = self.folder / "sheets" / f"{trainer.steps:07d}.safetensors"
        with atomic_write(path) as temporary:
            save_file({"latents": latents}, temporary)
        if self.decode:
            self.decode(latents).save(path.with_suffix(".png"))


def decoder(folder: Path):
    """A function, latents (widths, prompts, h, w, C) -> PIL image, of a `vae/` folder."""
    from PIL import Image

    from recipes.embedded.autoencoder import load_autoencoder

    model = load_autoencoder(folder)

    @torch.no_grad()
    def decode(latents):
        rows = []
        for row in latents:
            x = model.decode(row.permute(0, 3, 1, 2).contiguous())  # (prompts, 3 or 4, H, W)
            x = (x.clamp(-1, 1) + 1) / 2
            if x.shape[1] == 4:  # premultiplied, on white
                x = (x[:, :3] + 1 - x[:, 3:]).clamp(0, 1)
            rows.append(torch.cat(list(x), dim=2))
        grid = (torch.cat(rows, dim=1) * 255).round().byte().permute(1, 2, 0)
        return Image.fromarray(grid.numpy())

    return decode


def train(args) -> None:
    transformer, text, options = read_config(args.config)
    network = build(transformer, text, options, args.words).to(args.device)
    forward = torch.compile(network, dynamic=False) if options.compile else network
    trainer = Elastic(network, options, forward)
    words = load_words(args.words, network.text.config)
    channels = network.dit.config.in_channels
    shards = Shards(
        args.data, words, channels, options.seed, options.first_shards, options.steps_per_shard
    )
    with locked(args.out):
        resume(trainer, args.out)
        run = Run(trainer, shards, args.out, decoder(args.vae) if args.vae else None)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, run.stop)
        run.loop(options.steps)


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of shards")
    parser.add_argument("--out", type=Path, required=True, help="folder of the run")
    parser.add_argument("--config", type=Path, required=True, help="JSON file of the run")
    parser.add_argument("--words", type=Path, default=WORD_TABLE, help="folder of the word table")
    parser.add_argument("--vae", type=Path, help="autoencoder that decodes the sample sheets")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    args = parser.parse_args(argv)
    try:
        train(args)
    except SnapGenError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2 if isinstance(e, UsageError) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
