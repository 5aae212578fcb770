"""One iteration of K-DMD with Qwen-Image as the teacher, measured in parts, and predicted for Macs.

    python -m benchmarks.teacher --size 256 --layers 2

Measured here: a student of 0.43 B (``small``) with the LoRA pairs of student and critic, a teacher
of the published sizes with only a few of its 60 layers, random weights, batch 1, blocks computed
twice (``--checkpoint``). Each part is measured once. Its peak counts all that is in memory then.

Predicted for Macs at 1024² pixels: peaks are those of ``training_memory`` with Metal's types.
Seconds are the arithmetic of each part (counted below) at SHARE of the GPU's peak rate. For an
offloaded teacher the time to read its weights is added. Nobody has measured either.
"""

import argparse
import dataclasses
import os
import platform
import time
from pathlib import Path

import mlx.core as mx
import numpy as np

from snapgen_mlx.config import DiTConfig, QwenImageConfig
from snapgen_mlx.convert.rules.qwen_transformer import bits as bits_of
from snapgen_mlx.loading import layer_shapes
from snapgen_mlx.lora import Update
from snapgen_mlx.memory import attention_scores
from snapgen_mlx.models.dit import DiT
from snapgen_mlx.models.qwen_image import GROUP, QwenImage
from snapgen_mlx.models.sizes import weight_bytes
from snapgen_mlx.tensors.weights import flat_parameters, parameter_shapes
from snapgen_mlx.training.kdmd import KDMDOptions, KDMDTrainer
from snapgen_mlx.training.lora_training import attach_lora, lora_params
from snapgen_mlx.training.teacher import ModelTeacher
from snapgen_mlx.training.training_memory import TeacherMemory, TrainingMemory

from .sizes import USABLE, as_on_a_mac

RANK = 64
TOKENS = {"clip": 77, "gemma": 64}
TEACHER_TOKENS = 128
PIXELS = 1024  # a side, of what is predicted
# GB of memory: the chip, and its GPU's peak rate in float32, TFLOP/s, as commonly reported.
MACS = {16: ("M4", 4.3), 36: ("M4 Max, 32 cores", 14.7), 64: ("M4 Max, 40 cores", 18.4)}
MACS |= {128: ("M4 Max, 40 cores", 18.4)}
SHARE = 0.5  # of the peak rate, that is assumed to be reached
READING = 3e9  # bytes a second from the disk, assumed
JUMPS = 1.5 + 1  # of the student, without gradients: k is 0 to 3, and the last step


class NullText:
    """Gives the teacher the states that guidance leads away from."""

    name = "qwen"

    def encode(self, texts):
        return normal((len(texts), 8, QwenImageConfig().joint_attention_dim), 9), mx.ones(
            (len(texts), 8), mx.bool_
        )


def normal(shape, seed: int) -> mx.array:
    return mx.random.normal(shape, key=mx.random.key(seed))


# --- arithmetic


def student_flops(config: DiTConfig, side: int) -> float:
    """Of one evaluation for one latent: each matrix once for each token of its stage."""
    n, total = (side // config.patch_size) ** 2, 0.0
    shapes = layer_shapes(parameter_shapes(DiT(config)))
    for stage, name in enumerate(("down", "mid", "up")):
        tokens = n // 4 if stage == 1 and config.downsample else n
        rows = [a * b for path, (a, b) in shapes.items() if path.startswith(f"{name}.")]
        scores = config.layers[stage] * attention_scores(config, stage, tokens)
        total += 2 * sum(rows) * tokens + 4 * config.num_heads * config.head_dim * scores
    return total


def teacher_flops(config: QwenImageConfig, side: int) -> float:
    """Of one evaluation for one latent, unguided."""
    d, n = config.hidden_size, (side // config.patch_size) ** 2
    each = 12 * d * d * (n + TEACHER_TOKENS)  # of each stream: 4 projections, 8 of the MLP
    modulation, attention = 12 * d * d, 2 * d * (n + TEACHER_TOKENS) ** 2
    return 2.0 * config.num_layers * (each + modulation + attention)


# --- measured


def part(name: str, flops: float, compute) -> tuple:
    """Print seconds, rate and peak of ``compute``; its result, evaluated."""
    mx.clear_cache()
    mx.reset_peak_memory()
    started, busy = time.perf_counter(), time.process_time()
    result = compute()
    mx.eval(result)
    seconds, busy = time.perf_counter() - started, time.process_time() - busy
    rate = f"{flops / busy / 1e9:.0f}" if flops else ""
    peak = mx.get_peak_memory() / 1e9
    print(f"| {name} | {seconds:.1f} | {busy:.1f} | {rate} | {peak:.2f} |", flush=True)
    return result, np.array([seconds, busy])


def make_trainer(layers: int) -> KDMDTrainer:
    mx.random.seed(0)
    config = DiTConfig.from_preset("small")
    dit = DiT(config)
    attach_lora(dit, lora_params(config, RANK))
    network = QwenImage(dataclasses.replace(QwenImageConfig(), num_layers=layers))
    updates = {
        path: Update(normal((RANK, columns), 1) * 0.01, normal((rows, RANK), 2) * 0.01)
        for path, (rows, columns) in layer_shapes(parameter_shapes(network)).items()
        if ".attn." in path or "_mlp." in path
    }
    mx.eval(network.parameters(), dit.parameters(), updates)
    teacher = ModelTeacher(network, updates, own_text=Path("teacher"))
    teacher.read_null([NullText()])
    return KDMDTrainer(dit, teacher, KDMDOptions(checkpoint=True, lora=RANK))


def measure(size: int, layers: int) -> None:
    """One iteration on which it is the student's turn, part by part."""
    trainer, side = make_trainer(layers), size // 8
    config, teacher = trainer.model.config, trainer.teacher
    one = student_flops(config, side)
    asked = teacher_flops(dataclasses.replace(QwenImageConfig(), num_layers=layers), side)
    held = [weight_bytes(trainer.model), teacher.memory.weights]
    print(
        f"{size}x{size} pixels, {layers} of the teacher's 60 layers, float32; weights of the "
        f"student {held[0] / 1e9:.2f} GB, of the teacher {held[1] / 1e9:.2f} GB\n\n"
        "| part | s | s of the core | GFLOP per s of the core | peak, GB |\n|---|---|---|---|---|"
    )
    text = {name: normal((1, n, config.text_dims[name]), 3) for name, n in TOKENS.items()}
    text["teacher/qwen"] = normal((1, TEACHER_TOKENS, QwenImageConfig().joint_attention_dim), 4)
    masks = {name: mx.ones(a.shape[:2], mx.bool_) for name, a in text.items()}
    shape = (1, side, side, config.in_channels)
    noise = {name: normal(shape, i) for i, name in enumerate(("x", "eps/critic", "eps/student"))}
    noise |= {f"tau/{name}": mx.array([0.7]) for name in ("critic", "student")}
    student, critic = trainer.student, trainer.critic
    t, zero, total = mx.array([1.0]), mx.array([0.0]), np.zeros(2)
    x, tau = noise["x"], noise["tau/student"]

    def timed(name, flops, compute):
        nonlocal total
        result, seconds = part(name, flops, compute)
        total += seconds
        return result

    def to_end(params, x, t):
        return trainer._jump(params, x, t, zero, text, masks)

    def four_steps():
        return teacher.outputs(x, t, text, masks, few_step=True)

    def student_grads():
        return trainer._losses(guide, x, t, text, masks)

    def critic_grads():
        eps = noise["eps/critic"]
        return trainer._critic_grads(critic.params, y, eps, tau, text, masks)

    y = timed("student draws, one step", one, lambda: to_end(student.params, x, t))
    v = timed("teacher, guided", 2 * asked, lambda: teacher.velocity(y, tau, text, masks, 4.0))
    out = timed("teacher, four-step LoRA", asked, four_steps)
    c0 = timed("critic predicts", one, lambda: to_end(critic.params, y, tau))
    guide = {"r0": y - tau * v, "c0": c0, "v": out[0], "tokens": out[1]}
    _, grads = timed("student's gradients", 0, student_grads)
    timed("student's update", 0, lambda: (student.update(grads), student.state()))
    del grads
    _, grads = timed("critic's gradients", 0, critic_grads)
    timed("critic's update", 0, lambda: (critic.update(grads), critic.state()))
    print(f"| all | {total[0]:.1f} | {total[1]:.1f} | | |")
    lora = sum(a.size for a in lora_params(config, RANK).values())
    memory = TrainingMemory(
        config,
        (side, side),
        1 + sum(TOKENS.values()),
        weight_bytes(DiT(config)),
        16 * lora,
        teacher=teacher.memory,
        guided=True,
    )
    print(
        f"\nThe peak that is predicted of this run: {memory.peak(trainer.options, 1) / 1e9:.2f} GB"
    )


# --- predicted


def quantized_bytes(model: QwenImage, bits: int) -> tuple[int, int]:
    """Bytes of a teacher converted to ``bits``, and of those that are read at once."""
    total, groups = 0.0, {}
    for path, a in flat_parameters(model).items():
        layer = path.removesuffix(".weight")
        each = 16.0
        if bits < 16 and a.ndim == 2 and path.endswith(".weight"):
            each = bits_of(layer, bits) + 32 / 64  # a scale and a bias for 64 weights
        total += a.size * each / 8
        names = path.split(".")
        place = "around"
        if names[0] == "transformer_blocks":
            place = (int(names[1]) // GROUP, names[2].endswith("_mod"))
        groups[place] = groups.get(place, 0) + a.size * each / 8
    around = groups.pop("around")
    return int(total), int(around + max(groups.values()))


def predicted() -> str:
    """The table for Macs."""
    with as_on_a_mac():
        config, qwen = DiTConfig.from_preset("small"), QwenImage(QwenImageConfig())
        base = 2 * sum(a.size for a in flat_parameters(DiT(config)).values())
        lora = sum(a.size for a in lora_params(config, RANK).values())
        updates = sum(
            RANK * sum(shape)
            for path, shape in layer_shapes(parameter_shapes(qwen)).items()
            if ".attn." in path or "_mlp." in path
        )
        side = PIXELS // 8
        student = student_flops(config, side)
        teacher = teacher_flops(QwenImageConfig(), side)
        lines = [
            "| Mac | chip | teacher | in memory | offloaded | s per iteration | s, offloaded |",
            "|---|---|---|---|---|---|---|",
        ]
        # Gradients of LoRAs alone cost about two evaluations, and computing blocks twice one more.
        per_turn = (JUMPS + 3) * student + ((3 + 1) * student + 3 * teacher) / 5
        for gb, (chip, rate) in MACS.items():
            for bits in (4, 16):
                weights, streamed = quantized_bytes(qwen, bits)
                weights, streamed = weights + 2 * updates, streamed + 2 * updates
                needs = TeacherMemory(QwenImageConfig(), weights, streamed, 513)
                tokens = 1 + sum(TOKENS.values())
                memory = TrainingMemory(
                    config, (side, side), tokens, base, 16 * lora, teacher=needs, guided=True
                )
                cells = []
                for offload in (False, True):
                    options = KDMDOptions(checkpoint=True, lora=RANK, offload=offload)
                    peak = memory.peak(options, 1) / 1e9
                    cells.append(f"{peak:.1f} GB" + (" (no)" if peak > USABLE * gb else ""))
                seconds = per_turn / (SHARE * rate * 1e12)
                read = 2 * weights / READING / 5
                lines.append(
                    f"| {gb} GB | {chip} | {bits} bits | {' | '.join(cells)} | {seconds:.0f} | "
                    f"{seconds + read:.0f} |"
                )
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=256, help="pixels a side, a multiple of 64")
    parser.add_argument("--layers", type=int, default=2, help="of the teacher; 1.4 GB each")
    parser.add_argument("--predict", action="store_true", help="print the table for Macs alone")
    args = parser.parse_args()
    if args.size < 64 or args.size % 64:
        parser.error("--size must be a multiple of 64")
    if not args.predict:
        mx.disable_compile()  # on a CPU, compiling takes longer than all else
        print(f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores")
        measure(args.size, args.layers)
    print(f"\nPredicted, {PIXELS}x{PIXELS} pixels, batch 1, --checkpoint; (no): does not fit\n")
    print(predicted())


if __name__ == "__main__":
    main()
