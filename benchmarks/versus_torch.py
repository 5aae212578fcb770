"""MLX beside PyTorch, turn by turn in one process: ``python -m benchmarks.versus_torch``.

Both have the same float32 weights and inputs. In each round every contestant works once, so that
whatever else runs on the machine slows all alike; the first round warms up and does not count.
Measured: a step of the transformer, a training step of it (forwards, backwards, Adam), and the
Qwen-Image VAE's decoder, whole and in tiles. PyTorch runs the transformer of tests/reference with
its own fused attention, and diffusers' VAE. The last column says how much the results differ.
"""

import argparse
import json
import os
import platform
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import numpy as np
import torch
from diffusers import AutoencoderKLQwenImage
from safetensors.torch import load_file

from snapgen_mlx.loading import load_dit, load_supernet, load_vae
from snapgen_mlx.memory import TILE
from snapgen_mlx.training.elastic_trainer import ElasticOptions, ElasticTrainer
from tests.reference import torch_dit

from .full_size import fused_attention, inputs, write_checkpoint

PARTS = ("step", "training", "decoding")
RATE = 1e-9  # of learning, so small that no weight changes and every round gives the same loss
Contestants = dict[str, Callable[[], np.ndarray]]


def take_turns(work: Contestants, rounds: int) -> tuple[dict[str, list[float]], float]:
    """Seconds of each contestant in each round, and the largest difference of the last results
    from the first contestant's, as a part of its largest value."""
    seconds: dict[str, list[float]] = {name: [] for name in work}
    results = {}
    for _ in range(1 + rounds):
        for name, run in work.items():
            started = time.perf_counter()
            results[name] = run()
            seconds[name].append(time.perf_counter() - started)
    first, *others = results.values()
    error = max(np.abs(a - first).max() / np.abs(first).max() for a in others)
    return {name: times[1:] for name, times in seconds.items()}, float(error)


def load_torch(folder: Path) -> torch.nn.Module:
    torch_dit.attend = fused_attention
    torch_dit.neighbourhood_mask = lambda tokens, blocks, radius: (blocks, radius)
    config = json.loads((folder / "transformer" / "config.json").read_text())
    with torch.device("meta"):
        dit = torch_dit.SnapGenPPTransformer2DModel(config)
    state = {}
    for file in (folder / "transformer").glob("*.safetensors"):
        state |= load_file(file)
    dit.load_state_dict(state, strict=True, assign=True)
    return dit


def arrays(folder: Path, size: int):
    """Noise, text states and masks for both: (MLX's, PyTorch's with channels first)."""
    noise, text, masks = inputs(folder, size)
    ours = mx.array(noise), *({k: mx.array(a) for k, a in d.items()} for d in (text, masks))
    theirs = (
        torch.from_numpy(noise).permute(0, 3, 1, 2),
        *({k: torch.from_numpy(a) for k, a in d.items()} for d in (text, masks)),
    )
    return ours, theirs


def step(folder: Path, size: int) -> Contestants:
    dit, reference = load_dit(folder / "mlx"), load_torch(folder / "torch")
    (x, text, masks), (y, words, valid) = arrays(folder / "mlx", size)
    condition, times = dit.condition_text(text, masks, 1), dit.condition_time(mx.array([0.5]))
    mx.eval(condition.keys_values, condition.mask, times.modulation, times.embedding)

    def ours():
        return np.array(dit.denoise(x, times, condition))

    @torch.inference_mode()
    def theirs():
        v = reference(y, torch.tensor([0.5]), words, valid)
        return v.permute(0, 2, 3, 1).numpy()

    return {"MLX": ours, "PyTorch": theirs}


def training(folder: Path, size: int) -> Contestants:
    """One step of Adam; the result is the loss."""
    config, params = load_supernet(folder / "mlx")
    options = ElasticOptions(learning_rate=RATE, warmup=0, ema=0, clip=1e9, final_rate=1.0)
    trainer, reference = ElasticTrainer(config, params, options), load_torch(folder / "torch")
    del params
    adam = torch.optim.Adam(reference.parameters(), RATE, betas=options.betas)
    (x0, text, masks), (y0, words, valid) = arrays(folder / "mlx", size)
    eps = mx.random.normal(x0.shape, key=mx.random.key(0))
    noise = {"eps": eps, "t": mx.array([0.5])}
    theirs_eps = torch.from_numpy(np.array(eps)).permute(0, 3, 1, 2)
    (width,) = config.variants

    def ours():
        return np.array([trainer.step(x0, text, masks, noise, [])[f"loss/{width}"]])

    def theirs():
        adam.zero_grad()
        v = reference(0.5 * theirs_eps + 0.5 * y0, torch.tensor([0.5]), words, valid)
        loss = (v - (theirs_eps - y0)).square().mean()
        loss.backward()
        adam.step()
        return np.array([loss.item()], np.float32)

    return {"MLX": ours, "PyTorch": theirs}


def decoding(folder: Path, size: int) -> dict[str, Contestants]:
    vae = load_vae(folder / "mlx")
    reference = AutoencoderKLQwenImage.from_pretrained(
        folder / "torch" / "vae", low_cpu_mem_usage=False
    ).eval()
    mean, std = (
        torch.tensor(values)[:, None, None]
        for values in (reference.config.latents_mean, reference.config.latents_std)
    )
    (x, _, _), (y, _, _) = arrays(folder / "mlx", size)

    def ours(tile):
        return np.array(vae.decode(x, tile))

    @torch.inference_mode()
    def theirs(tiled):
        (reference.enable_tiling if tiled else reference.disable_tiling)()
        picture = reference.decode((y * std + mean)[:, :, None]).sample[:, :, 0]
        return picture.permute(0, 2, 3, 1).numpy()

    whole = {"MLX": lambda: ours(None), "PyTorch": lambda: theirs(False)}
    # Tiles of diffusers overlap and are blended, so that the results differ.
    tiles = {"MLX": lambda: ours(TILE), "PyTorch": lambda: theirs(True)}
    return {"decoding, whole": whole, "decoding, in tiles": tiles}


def contests(part: str, folder: Path, size: int) -> dict[str, Contestants]:
    if part == "decoding":
        return decoding(folder, size)
    return {part: (step if part == "step" else training)(folder, size)}


def row(name: str, size: int, work: Contestants, rounds: int) -> str:
    seconds, error = take_turns(work, rounds)
    medians = {name: np.median(times) for name, times in seconds.items()}
    cells = [
        f"{medians[name]:.3g} ({min(times):.3g} to {max(times):.3g})"
        for name, times in seconds.items()
    ]
    ratio = medians["MLX"] / medians["PyTorch"]
    return f"| {name}, {size}² | {' | '.join(cells)} | {ratio:.2f} | {error:.1e} |"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--geometry", default="tiny", choices=["full", "small", "tiny"])
    parser.add_argument("--size", type=int, default=512, help="pixels a side")
    parser.add_argument("--training-size", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    args = parser.parse_args()
    threads = torch.get_num_threads()
    print(
        f"{args.geometry}, float32; {platform.system()} {platform.machine()}, {os.cpu_count()} "
        f"cores, {threads} threads of PyTorch; MLX {mx.__version__} on {mx.default_device()}, "
        f"PyTorch {torch.__version__}\n\n"
        "| | MLX, s | PyTorch, s | ratio | difference |\n|---|---|---|---|---|"
    )
    with tempfile.TemporaryDirectory() as work:
        write_checkpoint(Path(work), args.geometry)
        for part in args.parts:
            size = args.training_size if part == "training" else args.size
            for name, contestants in contests(part, Path(work), size).items():
                print(row(name, size, contestants, args.rounds), flush=True)


if __name__ == "__main__":
    main()
