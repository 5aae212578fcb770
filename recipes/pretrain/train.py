"""Pretrain a SnapGen++ supernet: elastic flow matching on shards of latents and captions.

    python -m recipes.pretrain.train --data DIR --out RUN --config FILE.json

RUN keeps the state (a run goes on where it stopped), log.jsonl and sample sheets. Ctrl-C and
SIGTERM end it after the current step, with its state saved. Under `torchrun` every process takes
its share of each batch.
"""

import argparse
import dataclasses
import json
import shutil
import signal
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from snapgen_mlx.config import DiTConfig
from snapgen_mlx.errors import UsageError
from snapgen_mlx.files import atomic_folder, atomic_write
from snapgen_mlx.training.checkpoint import locked

from ..command import command
from . import distributed
from . import state as states
from .data import Shards, noise_like
from .elastic import Elastic, Network, Training
from .model import SnapGenPPTransformer2DModel
from .sample import denoise
from .text import NAME, WordTransformer, load_words, pad

WORD_TABLE = Path(__file__).parents[2] / "snapgen_mlx" / "assets" / "embedded" / "text_encoder"
WORD_FILES = ("config.json", "model.safetensors", "vocab.txt", "emoji.json")
SAVE_EVERY = 300.0  # seconds
WAIT = 2.0  # seconds between two looks for a shard that is not there yet
SHEET_STEPS, SHEET_GUIDANCE = 12, 4.0


def read_config(path: Path) -> tuple[dict, dict | None, Training]:
    """(transformer, text, training) of a run's JSON file; text is None for states in the shards.

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
        return config["transformer"], config.get("text"), Training(**training)
    except OSError as e:
        raise UsageError(f"cannot read {path}: {e.strerror}") from e
    except (ValueError, TypeError, AttributeError) as e:
        raise UsageError(f"{path} is not a run configuration: {e}") from e
    except KeyError as e:
        raise UsageError(f"{path} lacks the part {e}") from e


def build(transformer: dict, text: dict | None, training: Training, table: Path) -> Network:
    """The network of a configuration, freshly initialised from the seed."""
    torch.manual_seed(training.seed)
    encoder = None
    if text is not None:
        try:
            encoder = WordTransformer.from_table(table, **text)
        except TypeError as e:
            raise UsageError(f"the configuration's text part: {e}") from e
        transformer = {**transformer, "text_dims": {NAME: encoder.config.dim}}
    config = DiTConfig.from_dict(transformer)
    if not (config.mid_skips and config.downsample):
        raise UsageError("mid_skips and downsample cannot be switched off in pretraining")
    return Network(SnapGenPPTransformer2DModel(config, training.checkpointing), encoder)


def start_from(network: Network, checkpoint: Path) -> None:
    """Load the weights of a checkpoint folder, such as `snapgen-mlx export` writes.

    Raises:
        UsageError: a file is missing or damaged, or its weights are of another geometry.
    """
    files = {network.dit: checkpoint / "transformer" / "diffusion_pytorch_model.safetensors"}
    if network.text is not None:
        files[network.text] = checkpoint / "text_encoder" / "model.safetensors"
    for part, file in files.items():
        try:
            part.load_state_dict({k: a.float() for k, a in load_file(file).items()})
        except Exception as e:  # the many ways in which a file is missing, damaged or another's
            raise UsageError(f"cannot start from {file}: {str(e).splitlines()[0]}") from e


def geometry(network: Network) -> dict[str, dict]:
    """What a state must agree in with the network that it is loaded into."""
    text = {"text": network.text.config.to_dict()} if network.text else {}
    return {"transformer": network.dit.config.to_dict(), **text}


def resume(trainer: Elastic, shards: Shards, folder: Path) -> None:
    """Load the run's state, if there is one. Raises UsageError for another geometry's."""
    state = states.load(folder)
    if state is None:
        return
    if trainer.options.first_shards is None:  # as many as when it began
        if "first_shards" not in state:
            raise UsageError(
                f"the run in {folder} does not say how many shards it saw; give first_shards as "
                "when it began"
            )
        shards.first = state["first_shards"]
    own = geometry(trainer.network)
    for part in ("transformer", "text"):
        there, here = (sizes.get(part, {}) for sizes in (state["geometry"], own))
        for key in sorted(there.keys() | here.keys()):
            if there.get(key) != here.get(key):
                raise UsageError(
                    f"the run in {folder} has {part} {key} {there.get(key)}, the configuration "
                    f"{here.get(key)}; choose another --out"
                )
    if len(state["optimizers"]) != len(trainer.optimizers):
        raise UsageError(
            f"the run in {folder} has another optimizer than {trainer.options.optimizer!r}; "
            "choose another --out"
        )
    trainer.restore(state)


def keep_words(table: Path, folder: Path) -> Path:
    """Copy the word table into the run's folder, which thereby is whole; the copy's folder."""
    copy = folder / "words"
    if distributed.rank() == 0 and not copy.exists():
        with atomic_folder(copy) as temporary:
            for name in WORD_FILES:
                if (table / name).exists():
                    shutil.copyfile(table / name, temporary / name)
    distributed.wait()
    return copy


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


class Meter:
    """Means of what the steps report, and their speed.

    Args:
        batch: samples of a step.
    """

    def __init__(self, batch: int):
        self.batch = batch
        self.reset()

    def reset(self) -> None:
        self.values, self.steps, self.seconds = {}, 0, 0.0

    def start(self) -> None:
        self.started = time.monotonic()

    def add(self, metrics: dict) -> None:
        for k, v in metrics.items():
            self.values.setdefault(k, []).append(v)
        self.steps += 1
        self.seconds += time.monotonic() - self.started

    def read(self) -> dict[str, float]:
        """The means since the last call."""
        self.start()
        out = {k: torch.stack(v).mean().item() for k, v in self.values.items()}
        # A GPU is done only now.
        seconds = self.seconds + time.monotonic() - self.started
        out |= {
            "seconds": seconds / self.steps,
            "samples_per_second": self.batch * self.steps / seconds,
        }
        self.reset()
        return out


class Run:
    """The loop around a trainer: shards, log, validation, sheets, state.

    Args:
        decode: makes a picture of a sheet's latents (`decoder`); None for none.
    """

    def __init__(self, trainer: Elastic, shards: Shards, folder: Path, decode=None):
        self.trainer, self.shards, self.folder, self.decode = trainer, shards, folder, decode
        self.first = distributed.rank() == 0  # of the processes: it writes
        self.log = Log(folder / "log.jsonl", trainer.steps) if self.first else None
        self.saved = time.monotonic()
        self.stopping = False

    def stop(self, *_) -> None:
        self.stopping = True

    def write(self, record: dict) -> None:
        if self.first:
            self.log.write({"step": self.trainer.steps, **record})

    def save(self) -> None:
        state = self.trainer.state() | {"geometry": geometry(self.trainer.network)}
        state["first_shards"] = self.shards.first
        if self.shards.shards:
            state["latents"] = list(self.shards.shards[0].latents.shape[1:])
        if self.first:
            states.save(self.folder, state)
        self.saved = time.monotonic()

    def ready(self) -> bool:
        """Wait for the next step's shards and save what is due; False when the run is to end."""
        waited_for = None
        while True:
            missing = self.shards.missing(self.trainer.steps)
            due = time.monotonic() - self.saved > SAVE_EVERY
            flags = [self.stopping, due, missing is not None]
            stop, save, wait = distributed.any_process(flags, self.trainer.device)
            if save or stop:
                self.save()
            if stop or not wait:
                return not stop
            if missing and missing != waited_for:
                self.write({"waiting_for": missing})
                waited_for = missing
            time.sleep(WAIT)

    def loop(self) -> None:
        """Train until the last step, or until stopped."""
        trainer, o = self.trainer, self.trainer.options
        share = o.batch // distributed.processes()
        rows = slice(distributed.rank() * share, (distributed.rank() + 1) * share)
        fixed = self.shards.fixed(o.validation_samples, share)
        fixed = {name: [b.to(trainer.device) for b in batches] for name, batches in fixed.items()}
        meter = Meter(o.batch)
        while o.steps is None or trainer.steps < o.steps:
            if not self.ready():
                return
            meter.start()
            batch = self.shards.batch(
                trainer.steps, o.batch, rows, trainer.full, o.text_dropout, o.shift
            )
            meter.add(trainer.step(batch.to(trainer.device)))
            step = trainer.steps
            if step % o.log_every == 0:
                self.write({**meter.read(), "rate": o.rate(step - 1)})
            if fixed and step % o.validate_every == 0:
                self.write(trainer.validate(fixed))
            if o.prompts and trainer.network.text and step % o.sheet_every == 0:
                self.sheet()
        self.save()

    def sheet(self) -> None:
        """Latents of the fixed prompts at every width with the averaged weights, and a picture."""
        trainer, prompts = self.trainer, self.trainer.options.prompts
        shape = self.shards.shards[0].latents.shape[1:]
        count = len(prompts)
        ids, mask = pad(self.shards.words.ids(list(prompts)))
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
        if self.first:
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
    with distributed.joined(args.device) as device:
        processes = distributed.processes()
        transformer, text, options = read_config(args.config)
        if options.batch % processes:
            raise UsageError(f"{processes} processes do not divide {options.batch}")
        with locked(args.out) if distributed.rank() == 0 else nullcontext():
            table = args.words if text is None else keep_words(args.words, args.out)
            network = build(transformer, text, options, table).to(device)
            if args.init:
                start_from(network, args.init)
            words = load_words(table, network.text.config) if network.text else None
            config = network.dit.config
            shards = Shards(
                args.data,
                words,
                [] if words else list(config.text_dims),
                config.in_channels,
                options.seed,
                options.first_shards,
                options.steps_per_shard,
            )
            if options.split and processes > 1:
                distributed.shard(network, device)
            forward = torch.compile(network, dynamic=False) if options.compile else network
            if processes > 1 and not options.split:
                forward = distributed.replicate(forward)
            trainer = Elastic(network, options, forward)
            resume(trainer, shards, args.out)
            run = Run(trainer, shards, args.out, decoder(args.vae) if args.vae else None)
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, run.stop)
            run.loop()


@command
def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of shards")
    parser.add_argument("--out", type=Path, required=True, help="folder of the run")
    parser.add_argument("--config", type=Path, required=True, help="JSON file of the run")
    parser.add_argument("--init", type=Path, help="checkpoint whose weights a new run starts from")
    parser.add_argument("--words", type=Path, default=WORD_TABLE, help="folder of the word table")
    parser.add_argument("--vae", type=Path, help="autoencoder that decodes the sample sheets")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    args = parser.parse_args(argv)
    train(args)


if __name__ == "__main__":
    sys.exit(main())
