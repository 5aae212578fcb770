"""Distilling one width of a model folder into four steps: teacher, data, run, LoRA."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np

from ..config import DiTConfig
from ..device import inference_dtype, training_dtype
from ..errors import UsageError
from ..loading import load_dit, load_float_supernet, load_vae
from ..lora import fuse_lora, load_lora
from ..memory import TILE
from ..models.dit import DiT
from ..models.elastic import slice_flat
from ..models.sizes import weight_bytes
from ..sampling import FEW_STEPS
from .checkpoint import fingerprint
from .data import LatentDataset
from .encoding import encode_data, encode_prompts
from .kdmd import KDMDOptions, KDMDTrainer
from .loop import LOG, RunOptions, check_run, train
from .lora_training import about_training, attach_lora, lora_change, lora_params, save_lora
from .output import LORA, check_output, nothing_changed, write_model
from .pictures import Example
from .report import can_plot, plot_losses
from .teacher import Teacher, teach
from .training_memory import TrainingMemory
from .watch import SEEDS, Watch

CAPTIONS = 4  # captions that a run is watched by


def distill_few_steps(
    model,
    variant: str | None,
    teacher: Teacher,
    source: list[Example] | list[str],
    output,
    options: RunOptions,
    kdmd: KDMDOptions,
    fuse: bool = False,
    stop: Callable[[], bool] = lambda: False,
) -> Iterator[dict]:
    """Distil one width of a model into four steps without guidance [paper 3.3].

    Args:
        model: folder of the student.
        variant: its width; None for the widest.
        teacher: a teacher of this student.
        source: pictures with captions, or prompts alone. Pictures count only with ``noised_real``,
            which needs them.
        output: folder for ``lora.safetensors``. ``output/run`` holds the state and the pictures of
            ``Watch``.
        options: of the run.
        kdmd: of the distillation.
        fuse: also write the width as a model of its own to ``output``.
        stop: asked after each step; True ends the run before anything is written.

    Yields:
        The records of ``finetune``.

    Raises:
        SnapGenError: the run fails.
    """
    model, output = Path(model), Path(output)
    world = mx.distributed.init()
    check_output(model, output)
    check_run(options, kdmd)
    dit = load_dit(model, variant, training_dtype())
    variant = dit.config.variants[0]
    memory = few_steps_memory(model, dit, teacher, kdmd.lora)
    if excess := memory.check(kdmd, -(-options.batch // world.size()), options.force):
        yield {"note": excess}
    attach_lora(dit, lora_params(dit.config, kdmd.lora))
    if prompts := [text for text in source if isinstance(text, str)]:
        if kdmd.noised_real:
            raise UsageError("prompts alone have no pictures to start from; leave out noised_real")
        data: LatentDataset = yield from encode_prompts(model, prompts, output / "cache")
    else:
        examples = [e for e in source if isinstance(e, Example)]
        (data,) = yield from encode_data(model, [examples], output / "cache")
    sets = yield from teach(teacher, [data, to_watch(data)], output / "cache")
    run = output / "run"
    prints = {"base": fingerprint(model / "transformer"), "teacher": teacher.fingerprint}
    watch = Watch(load_vae(model), run / "grids")
    trainer = KDMDTrainer(dit, teacher, kdmd, options.seed, prints, watch)
    for record in train(trainer, sets[0], run, options, sets[1], stop):
        yield record
        if can_plot() and not world.rank() and ("done" in record or "val/std" in record):
            plot_losses(run / LOG, run / "loss.png")
    if (record["stopped"] and not record["done"]) or world.rank():
        return

    change = lora_change(trainer.bind(trainer.lora))
    if not change:
        raise nothing_changed("weight", record)
    yield {f"change/{variant}": change}
    save_lora(output / LORA, trainer.lora, about_training(model, [variant], ()))
    if fuse:
        config, params = load_float_supernet(model)
        index = config.variant_index(variant)
        updates = load_lora(output / LORA, config, index)
        weights = fuse_lora(slice_flat(params, config, index), updates)
        write_model(model, output, dit.config, weights, FEW_STEPS)


def few_steps_memory(model: Path, dit: DiT, teacher: Teacher, rank: int) -> TrainingMemory:
    """Predicts what distilling one width of a model folder needs."""
    memory, vae = TrainingMemory.from_model(model, teacher.memory), load_vae(model)
    memory = with_critic(replace(memory, frozen=weight_bytes(dit)), dit.config, rank)
    size = 4 if vae.config.always_float32 else inference_dtype().size
    decoding = vae.config.decoding_bytes(*memory.size, TILE, size)
    return replace(memory, beside=memory.beside + vae.decoder_bytes, watched=decoding)


def with_critic(memory: TrainingMemory, config: DiTConfig, rank: int) -> TrainingMemory:
    """``memory`` of one width, with the critic's LoRA in float32, its two moments and gradients."""
    critic = 4 * 4 * sum(a.size for a in lora_params(config, rank).values())
    return replace(memory, config=config, beside=critic, guided=True)


def to_watch(data: LatentDataset) -> LatentDataset:
    """A few captions of ``data``, evenly spread, each SEEDS times in a row."""
    bucket = np.unique(data.buckets[0])
    n = min(CAPTIONS, len(bucket))
    rows = [bucket[i * len(bucket) // n] for i in range(n) for _ in range(SEEDS)]
    captions = [data.captions[i] for i in rows]
    return LatentDataset([data.latents[i] for i in rows], captions, data.encoders)
