"""Fine-tuning a model folder on a folder of pictures: data, run, and the trained model folder."""

import functools
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import mlx.core as mx

from ..device import scalar, training_dtype
from ..errors import UsageError
from ..files import file_sha256
from ..layout import load_config, picture_size
from ..loading import load_dit, load_dit_config, load_float_supernet
from ..lora_file import find_file
from ..models.elastic import empty_models, slice_flat
from ..tensors.weights import assign
from .checkpoint import fingerprint
from .distill import KDTrainer, without_projectors
from .elastic_trainer import ElasticOptions, ElasticTrainer
from .encoding import encode_data
from .flow_matching import training_shift
from .loop import RunOptions, check_run, train
from .lora_training import (
    about_training,
    attach_lora,
    lora_change,
    lora_params,
    read_lora,
    save_lora,
)
from .optimizer import global_norm
from .output import LORA, check_output, nothing_changed, write_model
from .pictures import Example
from .report import Report
from .teacher import Teacher, teach
from .training_memory import TrainingMemory


def finetune(
    model,
    examples: list[Example],
    output,
    options: RunOptions,
    elastic: ElasticOptions,
    validation: list[Example] | None = None,
    flip: bool = False,
    prior: list[str] | None = None,
    stop: Callable[[], bool] = lambda: False,
    teacher: Teacher | None = None,
    from_lora=None,
) -> Iterator[dict]:
    """Train all widths of a model.

    Args:
        model: folder, Hub id, or None for the embedded model.
        examples: pictures with captions.
        output: folder for the averaged weights: a LoRA as ``lora.safetensors``, or all weights as a
            model in floats with all other parts of ``model``. ``output/run`` holds the state, from
            which a run resumes, and what ``Report`` draws. ``output/cache`` holds latents and text
            states.
        options: of the run.
        elastic: of the training.
        validation: held-out examples.
        flip: mirror pictures at random.
        prior: prompts for ``draw_prior``.
        stop: asked after each step; True ends the run before anything is written.
        teacher: to learn from too, with ``KDOptions``.
        from_lora: file of a LoRA to go on from. Its rank is used if ``elastic`` names none.

    Yields:
        The records of ``encode_data``, then those of ``loop.train``, then ``weight_change`` and
        ``Report.picture_change``.

    Raises:
        SnapGenError: folders are bad, or the training changed nothing.
    """
    model, output = Path(model), Path(output)
    check_output(model, output)
    start = None
    if from_lora:
        if Path(from_lora).resolve().is_relative_to(output.resolve()):
            raise UsageError(f"{from_lora} lies in {output}; go on with --resume there")
        rank, start = read_lora(from_lora, model, elastic.lora)
        elastic = replace(elastic, lora=rank)
    check_run(options, elastic)
    processes = mx.distributed.init().size()
    memory = TrainingMemory.from_model(model, teacher.memory if teacher else None)
    own_batch = -(-options.batch // processes)
    if excess := memory.check(elastic, own_batch, options.force):
        yield {"note": excess}
    size = picture_size(load_config(model))
    elastic = replace(elastic, shift=training_shift(size))
    trainer = make_trainer(model, elastic, options.seed, teacher, start)
    if from_lora:
        trainer.base += file_sha256(find_file(from_lora))
    trainer.ahead = memory.ahead(elastic, own_batch)
    parts = [part for part in (examples, validation) if part]
    sets = yield from encode_data(model, parts, output / "cache", flip, prior)
    if teacher:
        sets = yield from teach(teacher, sets, output / "cache")
    report = None
    if mx.distributed.init().rank() == 0:  # it reads the text encoders, so before the weights
        captions = [e.captions[0] for e in parts[-1]]
        report = Report(output / "run", model, captions, options)
    if elastic.lora:
        # Or every compiled function would read, cut and expand them again in each step.
        mx.eval([dit.parameters() for dit in trainer.models])
    held_out = sets[1] if validation else None
    for record in train(trainer, sets[0], output / "run", options, held_out, stop):
        yield record
        if report:
            report.update(record, trainer)
    if (record["stopped"] and not record["done"]) or not report:
        return

    # Not the averaged ones, which rounding changes even when training does not.
    if not all(weight_change(model, trainer, trainer.weights.params, start).values()):
        raise nothing_changed("weight", record)
    weights = without_projectors(trainer.weights.mean)
    change = weight_change(model, trainer, weights, start)
    yield {f"change/{name}": value for name, value in change.items()}
    if not elastic.lora:
        before = load_float_supernet(model)[1]
    else:
        before = start or lora_params(trainer.config, elastic.lora, options.seed)
    if pictures := report.picture_change(trainer, before):
        if not any(pictures.values()):
            raise nothing_changed("picture", record)
        yield {f"picture_change/{name}": value for name, value in pictures.items()}
    if elastic.lora:
        texts = (caption for example in examples for caption in example.captions)
        about = about_training(model, trainer.config.variants, texts)
        save_lora(output / LORA, weights, about)
    else:
        write_model(model, output, trainer.config, weights)


def make_trainer(
    model: Path,
    options: ElasticOptions,
    seed: int,
    teacher: Teacher | None = None,
    start: dict[str, mx.array] | None = None,
) -> ElasticTrainer:
    """A trainer of all weights of a model folder in float32, or of LoRA matrices beside them.

    Args:
        model: folder.
        options: of the training.
        seed: of the LoRA matrices.
        teacher: to learn from too; None for none.
        start: LoRA matrices to go on from; None for fresh ones.

    Raises:
        SnapGenError: weights are damaged or belong to another model.
    """
    make: Callable[..., ElasticTrainer] = ElasticTrainer
    if teacher:
        make = functools.partial(KDTrainer, teacher=teacher)
    base = fingerprint(model / "transformer")
    if not options.lora:
        config, params = load_float_supernet(model)
        for dit, i in zip(empty_models(config), range(len(config.widths)), strict=True):
            assign(dit, slice_flat(params, config, i), model / "transformer")
        return make(config, params, options, base=base)
    config = load_dit_config(model)
    models = [load_dit(model, name, training_dtype()) for name in config.variants]
    params = start or lora_params(config, options.lora, seed)
    for i, dit in enumerate(models):
        attach_lora(dit, slice_flat(params, config, i))
    return make(config, params, options, models, base)


def weight_change(
    model: Path, trainer: ElasticTrainer, params: dict, start: dict | None = None
) -> dict[str, float]:
    """|after - before| / |before| of each width's weights, or of those that a LoRA updates.

    Args: start, the LoRA's matrices before, where they were not fresh.
    """
    config = trainer.config
    change: dict[str, float] = {}
    if trainer.options.lora:
        for i, name in enumerate(config.variants):
            own = slice_flat(start, config, i) if start else None
            change[name] = lora_change(trainer.bind(i, params), own)
        return change
    before = load_float_supernet(model)[1]
    for i, name in enumerate(config.variants):
        old, new = (
            {k: a.astype(mx.float32) for k, a in slice_flat(p, config, i).items()}
            for p in (before, params)
        )
        change[name] = scalar(global_norm({k: new[k] - old[k] for k in old}) / global_norm(old))
    return change
