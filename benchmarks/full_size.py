"""MLX beside PyTorch at full size, on random weights: seconds and peak memory of a picture.

    python -m benchmarks.full_size --geometry small --size 1024

Both read the same float32 checkpoint (transformer and Qwen-Image VAE, written first), the same
noise and random text states in the shapes of the real encoders', each in a process of its own.
PyTorch runs the transformer of tests/reference with the fused attention below and diffusers' VAE
in its tiles (for a large picture both decode in tiles; only ours equal the whole).
"""

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path

# The parent imports nothing large: on Linux a child's peak never reads below its parent's.
import numpy as np

STEPS = 4
TOKENS = {"clip": 77, "gemma": 64}


def peak() -> float:
    """The most memory this process has held so far, GB."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def inputs(folder: Path, size: int) -> tuple[np.ndarray, dict, dict]:
    """Noise (1, h, w, C), text states and masks, the same in every process."""
    config = json.loads((folder / "transformer" / "config.json").read_text())
    rng = np.random.default_rng(0)
    shape = (1, size // 8, size // 8, config["in_channels"])
    noise = rng.standard_normal(shape, dtype=np.float32)
    text, masks = {}, {}
    for name, dim in config["text_dims"].items():
        text[name] = rng.standard_normal((1, TOKENS[name], dim), dtype=np.float32)
        masks[name] = np.ones((1, TOKENS[name]), dtype=bool)
    return noise, text, masks


def measure(evaluate, decode, noise: np.ndarray) -> dict:
    """Time the steps that ``evaluate(noise)`` yields, then decoding of the last one's latents.

    The warm-up is a step on a corner of the latent.
    """
    result = {"loaded": peak()}
    next(evaluate(noise[:, :8, :8]))
    seconds = []
    start = time.perf_counter()
    for x in evaluate(noise):  # noqa: B007
        seconds.append(time.perf_counter() - start)
        result.setdefault("peak of a step", peak())
        start = time.perf_counter()
    decode(x)
    result["decoding"] = time.perf_counter() - start
    return result | {"steps": seconds, "peak": peak(), "latents": x}


def run_mlx(folder: Path, size: int) -> dict:
    import mlx.core as mx

    from snapgen_mlx import Pipeline
    from snapgen_mlx.config import DiTConfig
    from snapgen_mlx.layout import load_config
    from snapgen_mlx.sampling import denoise, schedule

    folder = folder / "mlx"
    widest = DiTConfig.from_dict(load_config(folder / "transformer")).variants[-1]
    pipe = Pipeline.load(folder, widest)
    mx.eval(pipe.dit.parameters())
    noise, text, masks = inputs(folder, size)
    text, masks = ({k: mx.array(a) for k, a in d.items()} for d in (text, masks))

    def evaluate(noise):
        for step in denoise(pipe.dit, mx.array(noise), text, masks, schedule(STEPS)):
            mx.eval(step.x)
            yield step.x

    result = measure(evaluate, pipe.decode, noise)
    # On Metal not all of it counts as resident memory.
    result["name"] = f"MLX {mx.__version__}, {mx.default_device()}"
    result["peak of MLX"] = mx.get_peak_memory() / 1e9
    return result


def run_torch(folder: Path, size: int) -> dict:
    import torch
    from diffusers import AutoencoderKLQwenImage
    from safetensors.torch import load_file

    from tests.reference import torch_dit

    folder = folder / "torch"
    config = json.loads((folder / "transformer" / "config.json").read_text())
    torch_dit.attend = fused_attention
    torch_dit.neighbourhood_mask = lambda tokens, blocks, radius: (blocks, radius)
    with torch.device("meta"):
        dit = torch_dit.SnapGenPPTransformer2DModel(config)
    state = {}
    for file in (folder / "transformer").glob("*.safetensors"):
        state |= load_file(file)
    dit.load_state_dict(state, strict=True, assign=True)
    vae = AutoencoderKLQwenImage.from_pretrained(folder / "vae", low_cpu_mem_usage=False).eval()
    vae.enable_tiling()
    mean, std = (
        torch.tensor(values)[:, None, None]
        for values in (vae.config.latents_mean, vae.config.latents_std)
    )
    noise, text, masks = inputs(folder, size)
    text, masks = ({k: torch.from_numpy(a) for k, a in d.items()} for d in (text, masks))
    grid = torch.linspace(1, 1 / STEPS, STEPS)
    sigmas = [*(3 * grid / (1 + 2 * grid)), torch.zeros(())]

    def evaluate(noise):
        x = torch.from_numpy(noise).permute(0, 3, 1, 2)
        for sigma, following in pairwise(sigmas):
            x = x + (following - sigma) * dit(x, sigma[None], text, masks)
            yield x.permute(0, 2, 3, 1)

    def decode(x):
        return vae.decode((x.permute(0, 3, 1, 2) * std + mean)[:, :, None]).sample

    with torch.inference_mode():
        result = measure(evaluate, decode, noise)
    result["name"] = f"PyTorch {torch.__version__}, CPU, {torch.get_num_threads()} threads"
    return result


def fused_attention(q, k, v, mask=None):
    """torch_dit's ``attend`` by PyTorch's fused kernel, the local branch block by block.

    mask: as there, or (blocks, radius) instead of a neighbourhood's dense mask.
    """
    import torch
    from torch.nn.functional import scaled_dot_product_attention as attend

    q, k, v = (a.transpose(1, 2) for a in (q, k, v))
    if not isinstance(mask, tuple):
        return attend(q, k, v, attn_mask=mask).transpose(1, 2)
    blocks, radius = mask
    size = q.shape[2] // blocks
    out = []
    for b in range(blocks):
        near = slice(max(b - radius, 0) * size, (b + radius + 1) * size)
        own = q[:, :, b * size : (b + 1) * size]
        out.append(attend(own, k[:, :, near], v[:, :, near]))
    return torch.cat(out, dim=2).transpose(1, 2)


def write_checkpoint(folder: Path, geometry: str) -> dict:
    """The random model in both forms; returns the transformer's parameters."""
    from snapgen_mlx.convert.init import init
    from snapgen_mlx.convert.to_pytorch import export
    from snapgen_mlx.tensors.weights import load_tensors

    init(folder / "mlx", geometry, seed=0)
    export(folder / "mlx", folder / "torch")
    tensors = load_tensors(folder / "mlx" / "transformer")
    return {"parameters": sum(a.size for a in tensors.values())}


CHILDREN = {"write": write_checkpoint, "mlx": run_mlx, "torch": run_torch}


def child(task: str, folder: str, argument: str) -> None:
    """Run one of CHILDREN in this process; its result goes to a file, latents to another."""
    folder = Path(folder)
    result = CHILDREN[task](folder, argument if task == "write" else int(argument))
    if "latents" in result:
        np.save(folder / f"{task}.npy", np.array(result.pop("latents")))
    (folder / f"{task}.json").write_text(json.dumps(result))


def run(task: str, folder: Path, argument) -> dict:
    code = "import sys; from benchmarks.full_size import child; child(*sys.argv[1:])"
    process = [sys.executable, "-c", code, task, str(folder), str(argument)]
    subprocess.run(process, check=True, cwd=Path(__file__).parents[1])
    return json.loads((folder / f"{task}.json").read_text())


def compare(folder: Path, size: int) -> str:
    """Both pipelines on the checkpoint in ``folder``, one after the other, as a Markdown table."""
    results = {task: run(task, folder, size) for task in ("mlx", "torch")}
    lines = [
        f"| | one step, s | peak, GB | {STEPS} steps + decoding, s | peak, GB |",
        "|---|---|---|---|---|",
    ]
    for result in results.values():
        step, total = np.median(result["steps"]), sum(result["steps"])
        decoding = result["decoding"]
        lines.append(
            f"| {result['name']} | {step:.2f} | {result['peak of a step']:.2f} | "
            f"{total:.1f} + {decoding:.1f} = {total + decoding:.1f} | {result['peak']:.2f} |"
        )
    ours, theirs = (np.load(folder / f"{task}.npy") for task in results)
    error = np.abs(ours - theirs).max() / np.abs(theirs).max()
    loaded = " and ".join(f"{result['loaded']:.2f}" for result in results.values())
    lines += [
        "",
        f"Peaks are of resident memory, {loaded} GB of them held before the first step; MLX's own",
        f"count is {results['mlx']['peak of MLX']:.2f} GB. The two latents differ by {error:.1e} "
        "of their largest value.",
    ]
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--geometry", default="small", choices=["full", "small", "tiny"])
    parser.add_argument("--size", type=int, default=1024, help="pixels a side, a multiple of 64")
    parser.add_argument("--dir", help="where to write the weights [default: a temporary folder]")
    args = parser.parse_args()
    if args.size < 64 or args.size % 64:
        parser.error("--size must be a multiple of 64")
    machine = f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores"
    with tempfile.TemporaryDirectory(dir=args.dir) as work:
        parameters = run("write", Path(work), args.geometry)["parameters"]
        title = f"{args.geometry}, {parameters / 1e6:.0f} M parameters, at {args.size}x{args.size}"
        print(f"{title} pixels, float32; {machine}\n\n{compare(Path(work), args.size)}")


if __name__ == "__main__":
    main()
