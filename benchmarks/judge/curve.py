"""A point of a pretraining run's curve: what its averaged weights draw right by now.

    OMP_NUM_THREADS=1 python -m benchmarks.judge.curve RUN --vae VAE

Draws the first prompts of the protocol once, at every width, in PyTorch, and adds a line to
RUN/judge.jsonl: step, shares by task and overall, and overall of seen and held-out combinations.
It reads the run's last state and may run beside the training. What has a line already is not
drawn again. ``--first 96`` draws the prompts after those, on which to choose a guidance.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import torch
from PIL import Image

from recipes.command import command
from recipes.embedded.autoencoder import Autoencoder, load_autoencoder
from recipes.embedded.scenes import flatten
from recipes.pretrain import state as states
from recipes.pretrain.data import noise_like
from recipes.pretrain.elastic import Network
from recipes.pretrain.export import part
from recipes.pretrain.model import SnapGenPPTransformer2DModel
from recipes.pretrain.sample import denoise
from recipes.pretrain.text import NAME, TextConfig, WordTransformer, load_words, pad
from snapgen_mlx.config import DiTConfig
from snapgen_mlx.errors import UsageError
from snapgen_mlx.geneval import Prompt
from snapgen_mlx.judge import Judge, protocol
from snapgen_mlx.scoring import summary

BATCH = 16
FILE = "judge.jsonl"


def load_network(run: Path, state: dict) -> Network:
    """The network of a run with its averaged weights."""
    config = state["geometry"].get("text")
    if config is None:
        raise UsageError(f"{run} has no text encoder of its own: it cannot read the prompts")
    text = WordTransformer(TextConfig(**{k: v for k, v in config.items() if k != "model_type"}))
    text.read_table(run / "words")
    text.load_state_dict(part(state, "text") | {"table": text.table, "scale": text.scale})
    dit = SnapGenPPTransformer2DModel(DiTConfig.from_dict(state["geometry"]["transformer"]))
    dit.load_state_dict(part(state, "dit"))
    return Network(dit, text).eval()


@torch.no_grad()
def draw(
    network: Network,
    words,
    autoencoder: Autoencoder,
    shape: list[int],
    prompts: list[Prompt],
    index: int,
    steps: int,
    guidance: float,
) -> list[Image.Image]:
    """A picture on white of each prompt; its noise depends on its number alone.

    Args:
        words: the tokenizer of the network's texts.
        shape: of a latent, (h, w, C).
        index: the width.
    """
    out = []
    for start in range(0, len(prompts), BATCH):
        batch = prompts[start : start + BATCH]
        ids, mask = pad(words.ids([p.text for p in batch]))
        noise = noise_like(torch.empty(len(batch), *shape), range(start, start + len(batch)))
        text, masks = {NAME: ids}, {NAME: mask}
        latents = denoise(network, noise, text, masks, index, steps, guidance)
        pixels = autoencoder.decode(latents.permute(0, 3, 1, 2).contiguous())
        pixels = ((pixels + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
        out += [Image.fromarray(flatten(image)) for image in pixels]
    return out


def point(run: Path, vae: Path, first: int, count: int, steps: int, guidance: float) -> dict | None:
    """The line for the run's last state; None when it has one. Raises SnapGenError."""
    state = states.load(run)
    if state is None:
        raise UsageError(f"{run} holds no state of a run ({states.NAME})")
    file = run / FILE
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    asked = {"first": first, "prompts": count, "steps": steps, "guidance": guidance}
    about = {"step": state["step"]} | asked
    usual = {"first": 0, "guidance": 4.0}  # of lines that do not say it
    if any(about.items() <= (usual | json.loads(line)).items() for line in lines):
        return None
    started = time.monotonic()
    network, autoencoder, judge = load_network(run, state), load_autoencoder(vae), Judge.load()
    words = load_words(run / "words", network.text.config)
    prompts, widths = protocol()[first : first + count], {}
    for i, width in enumerate(network.dit.config.widths):
        drawn = draw(network, words, autoencoder, state["latents"], prompts, i, steps, guidance)
        found = summary(prompts, judge.look(drawn))
        parts = {name: found[name]["overall"] for name in ("seen", "held_out")}
        widths[f"{width:g}"] = {
            k: None if v is None else round(v, 4) for k, v in (found["all"] | parts).items()
        }
    seconds = round(time.monotonic() - started)
    record = about | {"seconds": seconds, "widths": widths}
    with file.open("a", encoding="utf-8") as out:
        out.write(json.dumps(record) + "\n")
    return record


@command
def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="folder of a run of recipes.pretrain.train")
    parser.add_argument("--vae", type=Path, required=True, help="folder of its autoencoder")
    parser.add_argument("--first", type=int, default=0, help="prompts to leave out (0)")
    parser.add_argument("--prompts", type=int, default=96, help="how many (96)")
    parser.add_argument("--steps", type=int, default=12, help="denoising steps (12)")
    parser.add_argument("--guidance", type=float, default=4.0, help="(4)")
    args = parser.parse_args(argv)
    record = point(args.run, args.vae, args.first, args.prompts, args.steps, args.guidance)
    print("there is a line for this already" if record is None else json.dumps(record))


if __name__ == "__main__":
    sys.exit(main())
