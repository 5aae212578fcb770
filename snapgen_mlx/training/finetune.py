"""Fine-tuning a model folder on a folder of pictures: data, run, and the trained model folder."""

import functools
import hashlib
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import mlx.core as mx

from ..config import DiTConfig
from ..errors import SnapGenError, UsageError
from ..models.dit import DiT
from ..models.elastic import random_supernet, slice_flat
from ..pipeline import load_text_encoders, load_vae
from ..weights import assign, dequantize, load_config, load_supernet, save_tensors, write_json
from .checkpoint import file_sha256
from .data import Example, LatentDataset, cached_latents
from .elastic import ElasticOptions, ElasticTrainer, norm
from .loop import RunOptions, saved_weights, train


def finetune(
    model,
    examples: list[Example],
    output,
    options: RunOptions,
    elastic: ElasticOptions,
    validation: list[Example] | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> Iterator[dict]:
    """Train all widths of ``model`` on ``examples``; yields the records of ``loop.train``.

    Before them come records of pictures encoded (``data.cached_latents``), after them
    ``weight_change``. Writes the trained model (the averaged weights in floats, with everything
    else of ``model`` beside them) to ``output``, unless ``stop`` ended the run; the run's state
    lies in ``output/run`` and is resumed from there, latents in ``output/cache``. Raises
    SnapGenError for bad folders, and when training changed nothing.
    """
    model, output = Path(model), Path(output)
    if output.resolve().is_relative_to(model.resolve()):
        raise UsageError(f"{output} lies in the model that is to be trained; choose another folder")
    if (output / "config.json").exists() and not (output / "run").is_dir():
        raise UsageError(f"{output} holds another model; choose another folder")
    config, params = load_supernet(model)
    # A quantized model, such as the embedded one, is trained from the floats it stands for.
    params = dequantize(params, {k: a.shape for k, a in random_supernet(config).items()})
    for i in range(len(config.widths)):
        dit = DiT(config.variant(i) if len(config.widths) > 1 else config)
        assign(dit, slice_flat(params, config, i), model / "transformer")
    size = load_config(model).get("sampling", {}).get("size", 1024)

    encoders = load_text_encoders(model)
    if not encoders:
        raise SnapGenError(f"{model} has no text encoder, so captions could not be learned")
    vae, key = functools.cache(functools.partial(load_vae, model)), _fingerprint(model / "vae")
    sets = []
    for part in (examples, validation):
        if part:
            latents = yield from cached_latents(vae, key, part, (size, size), output / "cache")
            sets.append(LatentDataset(latents, [e.captions for e in part], encoders))
    del vae  # frees it before the training

    trainer = ElasticTrainer(config, params, elastic)
    for record in train(trainer, sets[0], output / "run", options, *sets[1:], stop=stop):
        yield record
    if (record["stopped"] and not record["done"]) or mx.distributed.init().rank():
        return

    # Not the averaged ones, which rounding changes even when training does not.
    if not all(weight_change(config, params, saved_weights(output / "run", "params")).values()):
        raise SnapGenError(
            f"{record['step']} steps changed no weight, so no model was written; train for longer "
            "or with a higher learning rate"
        )
    weights = saved_weights(output / "run")
    change = weight_change(config, params, weights)
    yield {f"change/{name}": value for name, value in change.items()}
    _write_model(model, output, config, weights)


def weight_change(config: DiTConfig, before: dict, after: dict) -> dict[str, float]:
    """|after - before| / |before| over the weights of each width of two flat supernets."""
    change = {}
    for i, name in enumerate(config.variants):
        old, new = (
            {k: a.astype(mx.float32) for k, a in slice_flat(p, config, i).items()}
            for p in (before, after)
        )
        change[name] = (norm({k: new[k] - old[k] for k in old}) / norm(old)).item()
    return change


def _fingerprint(folder: Path) -> str:
    """Digest of the contents of all JSON and weight files in a folder."""
    files = sorted(path for path in folder.glob("*") if path.suffix in (".json", ".safetensors"))
    return hashlib.sha256("".join(map(file_sha256, files)).encode()).hexdigest()


def _write_model(model: Path, output: Path, config: DiTConfig, weights: dict) -> None:
    """A copy of the folder ``model`` with this transformer; config.json, which makes it a model
    folder, comes last."""
    try:
        for part in model.iterdir():
            if part.is_dir() and part.name not in ("transformer", "run", "cache"):
                shutil.copytree(part, output / part.name, dirs_exist_ok=True)
            elif part.is_file() and part.name != "config.json":
                shutil.copy(part, output / part.name)
    except OSError as e:
        raise SnapGenError(f"cannot write {output}: {e.strerror or e}") from e
    save_tensors(output / "transformer", weights)
    write_json(output / "transformer" / "config.json", config.to_dict())
    write_json(output / "config.json", load_config(model))
