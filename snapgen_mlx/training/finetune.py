"""Fine-tuning a model folder on a folder of pictures: data, run, and the trained model folder."""

import functools
import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from ..config import DiTConfig
from ..errors import SnapGenError, UsageError
from ..files import atomic_write
from ..lora import FEW_STEP
from ..memory import TEXT_TOKENS
from ..models.elastic import random_supernet, slice_flat
from ..pipeline import Pipeline, load_text_encoders, load_vae
from ..weights import (
    assign,
    compute_dtype,
    dequantize,
    load_config,
    load_dit,
    load_infos,
    load_supernet,
    save_tensors,
    write_json,
)
from .checkpoint import fingerprint
from .data import LatentDataset, bucket_sizes, cached_latents, cached_states
from .distill import TEXT_FOLDERS, KDTrainer, teach, without_projectors
from .elastic import ElasticOptions, ElasticTrainer, empty_models, norm, training_shift
from .loop import RunOptions, check_batch, train
from .lora import attach_lora, lora_change, lora_params, save_lora
from .memory import TrainingMemory
from .pictures import Example
from .report import Report

LORA = "lora.safetensors"
# A model's card, recipe and LoRAs are of the weights that it had.
NOT_COPIED = ("transformer", FEW_STEP, "run", "cache", "README.md", "recipe.json", LORA)


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
    teacher=None,
) -> Iterator[dict]:
    """Train all widths of ``model`` on ``examples``; yields the records of ``loop.train``.

    ``teacher``, such as ``distill.load_teacher`` gives, is learned from too, with ``KDOptions``.

    Before them come records of pictures and captions encoded (``encode_data``), after them
    ``weight_change`` and ``Report.picture_change``. ``flip``: pictures are mirrored in half of
    their draws; ``prior``: prompts for ``draw_prior``. Writes the averaged weights to ``output``,
    unless ``stop`` ended the run: a LoRA as ``lora.safetensors``, all weights as a model in floats
    with everything else of ``model`` beside them. The run's state lies in ``output/run`` and is
    resumed from there, with what ``Report`` draws; latents and text states in ``output/cache``.
    Raises SnapGenError for bad folders, and when training changed nothing.
    """
    model, output = Path(model), Path(output)
    check_output(model, output)
    check_batch(options, elastic)
    processes = mx.distributed.init().size()
    memory = training_memory(model, teacher.nbytes if teacher else 0)
    memory.check(elastic, -(-options.batch // processes))
    size = load_config(model).get("sampling", {}).get("size", 1024)
    elastic = replace(elastic, shift=training_shift(size))
    trainer = make_trainer(model, elastic, options.seed, teacher)
    parts = [part for part in (examples, validation) if part]
    sets = yield from encode_data(model, parts, output / "cache", flip, prior)
    if teacher:
        sets = yield from teach(teacher, sets, output / "cache")
    if elastic.lora:
        # Or every compiled function would read, cut and expand them again in each step.
        mx.eval([dit.parameters() for dit in trainer.models])
    report = None
    if mx.distributed.init().rank() == 0:
        captions = [e.captions[0] for e in parts[-1]]
        report = Report(output / "run", model, captions, options)
    for record in train(trainer, sets[0], output / "run", options, *sets[1:], stop=stop):
        yield record
        if report:
            report.update(record, trainer)
    if (record["stopped"] and not record["done"]) or not report:
        return

    # Not the averaged ones, which rounding changes even when training does not.
    if not all(weight_change(model, trainer, trainer.weights.params).values()):
        raise nothing_changed("weight", record)
    weights = without_projectors(trainer.weights.mean)
    change = weight_change(model, trainer, weights)
    yield {f"change/{name}": value for name, value in change.items()}
    rank = elastic.lora
    before = lora_params(trainer.config, rank, options.seed) if rank else float_supernet(model)[1]
    if pictures := report.picture_change(trainer, before):
        if not any(pictures.values()):
            raise nothing_changed("picture", record)
        yield {f"picture_change/{name}": value for name, value in pictures.items()}
    if elastic.lora:
        save_lora(output / LORA, weights)
    else:
        write_model(model, output, trainer.config, weights)


def nothing_changed(what: str, record: dict) -> SnapGenError:
    """For a run that ended with ``record`` and changed none of ``what``."""
    line = f"no {what} had changed after step {record['step']}, so nothing was written; "
    if not record["done"]:
        return SnapGenError(line + "the same command goes on from there")
    return SnapGenError(line + "train into another folder, longer or with a higher learning rate")


def check_output(model: Path, output: Path) -> None:
    """Raises UsageError for a folder that is not to be trained into."""
    if output.resolve().is_relative_to(model.resolve()):
        raise UsageError(f"{output} lies in the model that is to be trained; choose another folder")
    for name, what in (("config.json", "model"), (LORA, "LoRA")):
        if (output / name).exists() and not (output / "run").is_dir():
            raise UsageError(f"{output} holds another {what}; choose another folder")


def training_memory(model: Path, beside: int = 0) -> TrainingMemory:
    """Predicts what training a model folder at its own picture size needs, with ``beside`` bytes
    of what else is held."""
    config = DiTConfig.from_dict(load_config(model / "transformer"))
    latent = load_config(model).get("sampling", {}).get("size", 1024) // 8
    tokens = 1 + sum(TEXT_TOKENS.get(name, 0) for name in config.text_dims)
    weights = sum(a.size for dit in empty_models(config) for _, a in tree_flatten(dit.parameters()))
    infos = load_infos(model / "transformer")
    each = compute_dtype().size
    if mx.default_device() == mx.gpu and any(key.endswith(".scales") for key in infos):
        full = sum(a.size for a in random_supernet(config).values())
        each = sum(info.nbytes for info in infos.values()) / full  # packed weights stay packed
    return TrainingMemory(config, (latent, latent), tokens, int(each * weights), beside)


def draw_prior(model: Path, prompts: list[str], cache: Path) -> Iterator[dict]:
    """Latents of the pictures that the widest variant of ``model`` draws of ``prompts``, from the
    folder ``cache`` where they are there.

    Learned beside new pictures, they keep what the model knows (prior preservation [Ruiz et al.
    2023, 4.2]). Yields a record after each drawn; the value is the list of arrays (h, w, C).
    """
    config = DiTConfig.from_dict(load_config(model / "transformer"))
    pipe = Pipeline(model, config.variants[-1], keep_encoders=False)
    key = fingerprint(model / "transformer", model / FEW_STEP)
    out, missing = [None] * len(prompts), {}
    for i, prompt in enumerate(prompts):
        name = hashlib.sha256(json.dumps([key, prompt, i]).encode()).hexdigest()[:32]
        path = cache / f"prior-{name}.npy"
        try:
            out[i] = np.load(path)
        except (OSError, ValueError, EOFError):  # absent or damaged
            missing[i] = path
    jobs = {i: pipe.settings(prompts[i], seed=i) for i in missing}
    if jobs:
        pipe.prepare(list(jobs.values()))
    for i, path in missing.items():
        *_, last = pipe.stream(jobs[i])
        out[i] = np.array(last.x.astype(mx.float32))[0]
        if mx.distributed.init().rank() == 0:
            with atomic_write(path) as tmp:
                np.save(tmp, out[i])
        yield {"drawn": i + 1, "prompts": len(prompts)}
    return out


def encode_data(
    model: Path,
    parts: list[list[Example]],
    cache: Path,
    flip: bool = False,
    prior: list[str] | None = None,
) -> Iterator[dict]:
    """A ``LatentDataset`` of each of ``parts``, encoded by the model unless ``cache`` has it.

    The first part alone is flipped, and gets the ``draw_prior`` of the prompts ``prior``. Yields a
    record after each batch encoded. Autoencoder and text encoders are in memory one after the
    other, and no longer. Raises SnapGenError for a model without text encoder.
    """
    text_encoders = load_text_encoders(model)
    if not text_encoders:
        raise SnapGenError(f"{model} has no text encoder, so captions could not be learned")
    size = load_config(model).get("sampling", {}).get("size", 1024)
    sizes = bucket_sizes(size, DiTConfig.from_dict(load_config(model / "transformer")))
    vae, key = functools.cache(functools.partial(load_vae, model)), fingerprint(model / "vae")
    latents, mirrored = [], [None] * len(parts)
    for part in parts:
        latents.append((yield from cached_latents(vae, key, part, sizes, cache)))
    if flip:
        mirrored[0] = yield from cached_latents(vae, key, parts[0], sizes, cache, mirror=True)
    del vae
    prior = prior or []
    if prior:
        drawn = yield from draw_prior(model, prior, cache)
        latents[0] = [*latents[0], *drawn]
        mirrored[0] = mirrored[0] and [*mirrored[0], *drawn]
    mx.clear_cache()

    key = fingerprint(*(model / name for name in TEXT_FOLDERS))
    captions = [[e.captions for e in part] for part in parts]
    captions[0] += [[prompt] for prompt in prior]
    texts = [text for part in captions for of_picture in part for text in of_picture]
    encoders = yield from cached_states(text_encoders, key, texts, cache)
    del text_encoders
    mx.clear_cache()
    if not any(encoder.length(text) for encoder in encoders for text in texts):
        raise SnapGenError(f"the captions have no word that {model} knows; write other ones")
    return [
        LatentDataset(x0, texts, encoders, turned)
        for x0, texts, turned in zip(latents, captions, mirrored, strict=True)
    ]


def make_trainer(model: Path, options: ElasticOptions, seed: int, teacher=None) -> ElasticTrainer:
    """A trainer of all weights of a model folder, in floats, or of LoRA matrices beside them.

    Raises SnapGenError for damaged or foreign weights.
    """
    make = functools.partial(KDTrainer, teacher=teacher) if teacher else ElasticTrainer
    base = fingerprint(model / "transformer")
    if not options.lora:
        config, params = float_supernet(model)
        for dit, i in zip(empty_models(config), range(len(config.widths)), strict=True):
            assign(dit, slice_flat(params, config, i), model / "transformer")
        return make(config, params, options, base=base)
    config = DiTConfig.from_dict(load_config(model / "transformer"))
    models = [load_dit(model, name) for name in config.variants]
    params = lora_params(config, options.lora, seed)
    for i, dit in enumerate(models):
        attach_lora(dit, slice_flat(params, config, i))
    return make(config, params, options, models, base)


def float_supernet(model: Path) -> tuple[DiTConfig, dict[str, mx.array]]:
    """A quantized model, such as the embedded one, as the floats it stands for."""
    config, params = load_supernet(model)
    return config, dequantize(params, {k: a.shape for k, a in random_supernet(config).items()})


def weight_change(model: Path, trainer: ElasticTrainer, params: dict) -> dict[str, float]:
    """|after - before| / |before| of each width's weights, or of those that a LoRA updates."""
    config = trainer.config
    if trainer.options.lora:
        return {v: lora_change(trainer.bind(i, params)) for i, v in enumerate(config.variants)}
    change, before = {}, float_supernet(model)[1]
    for i, name in enumerate(config.variants):
        old, new = (
            {k: a.astype(mx.float32) for k, a in slice_flat(p, config, i).items()}
            for p in (before, params)
        )
        change[name] = (norm({k: new[k] - old[k] for k in old}) / norm(old)).item()
    return change


def write_model(
    model: Path, output: Path, config: DiTConfig, weights: dict, sampling: dict | None = None
) -> None:
    """A copy of the folder ``model`` with this transformer and ``sampling`` for its own; LoRAs for
    few steps, which belong to the weights before, are left out. config.json, which makes it a model
    folder, comes last."""
    try:
        for part in model.iterdir():
            if part.is_dir() and part.name not in NOT_COPIED:
                shutil.copytree(part, output / part.name, dirs_exist_ok=True)
            elif part.is_file() and part.name not in (*NOT_COPIED, "config.json"):
                shutil.copy(part, output / part.name)
    except OSError as e:
        raise SnapGenError(f"cannot write {output}: {e.strerror or e}") from e
    save_tensors(output / "transformer", weights)
    write_json(output / "transformer" / "config.json", config.to_dict())
    head = load_config(model)
    write_json(
        output / "config.json", head | {"sampling": head.get("sampling", {}) | (sampling or {})}
    )
