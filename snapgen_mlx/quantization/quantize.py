"""A float model folder in, one of few bits out, compared with the float one."""

import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from ..background import WHITE
from ..config import DiTConfig
from ..description import stored
from ..digest import derived_config
from ..errors import SnapGenError, UsageError, format_bytes
from ..files import atomic_folder, expand_user, folder_bytes, write_json
from ..layout import COMPONENTS, TINY_DECODER, TOKENIZERS, load_config
from ..loading import load_dit_config
from ..lora import copy_few_step_loras
from ..pipeline import Pipeline
from ..tensors.readers import open_component
from ..tensors.safetensors_io import READ_AS
from ..tensors.stream import (
    Component,
    Row,
    verify,
    write_components,
)
from ..tensors.weights import load_infos, load_tensors
from .backends import Affine, Backend, Palette, backend_of, half
from .calibration import Calibration, load_widths, peak, psnr, snr
from .plot import draw, import_matplotlib
from .prompt_sets import BUILT_IN, PromptSets
from .recipe import (
    Recipe,
    average_bits,
    check_budget,
    design,
    least_bits,
    protected,
    quantizable,
    uniform,
)
from .sensitivity import cutter, measure, own_path, width_has
from .tuning import TuningOptions, remove_run, tune

BITS = 4.3
GEMMA, GEMMA_BITS = Affine(64), 4
OTHER_BITS = 8  # bits of palettes outside the recipe: convolutions, LoRAs, the autoencoder, CLIP
ENTRY, LAYER = 120, 200  # most bytes of a tensor in a file's header, and of a layer in JSON files
SEARCH = 7  # how often the range of bits is halved for a given PSNR
PICTURES = 4  # pictures that both autoencoders decode
CHECKED = 1 << 31  # seed of the noise for the check; no training picture has it


def quantize(
    model,
    dest,
    *,
    backend: str = "affine",
    bits: float | None = None,
    size: int | None = None,
    target: float | None = None,
    recipe: Recipe | str | Path | None = None,
    method: str = "density",
    prompts: PromptSets = BUILT_IN,
    sensitivity=None,
    plot=None,
    progress: Callable[[int, int], None] | None = None,
    tuning: int = 0,
    follow: Callable[[dict], None] = lambda record: None,
) -> dict:
    """Write the float model folder ``model`` in few bits to the new folder ``dest``.

    Args: backend, "affine" or "palette"; then one of bits, the average of the codes of the
        transformer's Linear layers, without scales (4.3 when nothing is given), size, bytes of
        the whole folder at most, target, PSNR of the final latents in dB, about, or recipe, one or
        its file; method of a recipe to be made, "density" or "mse"; prompts to choose bits by, to
        tune on and to score on; sensitivity, the file that keeps the measurement
        (DEST.sensitivity.json when not given), progress(done, in all) of it, and plot, a
        PNG to draw it in; tuning, steps of ``tuning.tune`` afterwards, whose state
        is kept in DEST.tuning until they are done and whose records ``follow`` is given.
    The transformer follows the recipe, which is kept as recipe.json. Gemma gets 4 bits in groups
    of 64; with palettes convolutions, autoencoder, CLIP and few-step LoRAs get 8 bits. What is left
    becomes 16 bits. Returns a report (JSON-ready) of what was read back. Raises
    UsageError for a request that cannot be met, SnapGenError for damaged files and for a recipe of
    another architecture.
    """
    model, dest = Path(model), expand_user(dest).absolute()
    if plot:
        import_matplotlib()  # before the long measurement
    if sum(x is not None for x in (bits, size, target, recipe)) > 1:
        raise UsageError("give only one of bits, size, PSNR and recipe")
    config = load_dit_config(model)
    _check_float(model)
    form = backend_of(backend, config)
    shapes = quantizable(config, form.group)
    budget = BITS if bits is None else bits
    # What cannot be met is refused before the long work.
    if recipe is None and size is None and target is None:
        check_budget(shapes, budget, protected(shapes))
    elif recipe is not None and not isinstance(recipe, Recipe):
        recipe = Recipe.load(recipe, config, shapes)
    with atomic_folder(dest) as tmp:
        others = _write_others(model, tmp, form)
        if recipe is None:
            if size is not None:
                budget = _affordable(size - folder_bytes(tmp), model, config, shapes, form)
            calibration = Calibration.from_model(model, prompts.choose)
            path = sensitivity or dest.with_name(f"{dest.name}.sensitivity.json")
            effect = method == "density"
            found = measure(model, form, calibration, path, progress, effect)

            def make(budget: float) -> Recipe:
                return design(config, shapes, found, budget, method)

            if target is None:
                recipe = make(budget)
            else:
                kept = protected(shapes) | (shapes.keys() - found.keys())
                least = least_bits(shapes, kept)
                recipe = _search(target, make, least, model, form, calibration)
            if plot:
                draw(found, recipe.layers, plot)
        part = transformer_part(model, recipe, form)
        write_components(tmp, [part])
        recipe.save(tmp / "recipe.json")
        if tuning:
            run = dest.with_name(f"{dest.name}.tuning")
            options = TuningOptions.from_bits(average_bits(recipe.layers, shapes), tuning)
            for record in tune(model, tmp, prompts.tune, run, options):
                follow(record)
        written = verify(tmp, [*others, part])
        report: dict[str, Any] = {
            "backend": form.name,
            "method": recipe.method,
            "bits": average_bits(recipe.layers, shapes),
            "layers": dict(sorted(Counter(recipe.layers.values()).items())),
            "bytes": folder_bytes(tmp),
            "parts": {name: _stored(model / name, part) for name, part in written.items()},
        }
        if size is not None and report["bytes"] > size:
            raise SnapGenError(f"{dest} came out at {format_bytes(report['bytes'])}, above --size")
        report |= _compare(model, tmp, Calibration.from_model(model, prompts.score, seed=CHECKED))
    if tuning:
        remove_run(run)
    return report


# --- the recipe


def _check_float(model: Path) -> None:
    for key, info in load_infos(model / "transformer").items():
        if not mx.issubdtype(READ_AS.get(info.dtype, mx.int8), mx.floating):
            raise UsageError(
                f"{model} is quantized already ({key} is stored as {info.dtype}); quantize the "
                "float model that it was made from"
            )


def _affordable(size: int, model: Path, config: DiTConfig, shapes: dict, form: Backend) -> float:
    """Average bits with which the transformer's folder has at most ``size`` bytes."""
    part = transformer_part(model, uniform(config, shapes, 8), form)
    weights = sum(map(prod, shapes.values()))  # one byte each at 8 bits
    entries = sum(len(row.entries()) for row in part.rows)
    fixed = part.nbytes - weights + ENTRY * entries + LAYER * len(shapes)
    least = fixed + least_bits(shapes, protected(shapes)) * weights / 8
    if size < least:
        raise UsageError(
            f"the folder would need {format_bytes(int(least - size))} more even with the fewest "
            "bits; allow a larger size"
        )
    return min(8, 8 * (size - fixed) / weights)


def load_rounded(model: Path, layers: dict[str, int], form: Backend) -> Iterator[Pipeline]:
    """The model's widths, one after the other, with these layers rounded to so many bits."""
    widths = load_dit_config(model).widths
    for index, pipe in enumerate(load_widths(model)):
        tensors = load_tensors(model / "transformer")
        modules = dict(pipe.dit.named_modules())
        for layer, bits in layers.items():
            if width_has(layer, index):
                change = form.rounding(tensors.pop(f"{layer}.weight"), bits)
                change = cutter(layer, widths[index])(change)
                module = modules[own_path(layer)]
                # Not in the place of it: a few-step LoRA may be fused with the weight.
                module.weight = module.weight + change.astype(module.weight.dtype)
                mx.eval(module.weight)
        yield pipe
        pipe.free("dit")


def _search(
    target: float,
    make: Callable[[float], Recipe],
    least: float,
    model: Path,
    form: Backend,
    calibration: Calibration,
) -> Recipe:
    """The recipe of the fewest bits whose PSNR reaches ``target`` at every width, by halving."""

    def latents(layers: dict[str, int]) -> list[mx.array]:
        return [calibration.latents(pipe)[1] for pipe in load_rounded(model, layers, form)]

    references = latents({})

    def score(recipe: Recipe) -> float:
        return min(map(psnr, latents(recipe.layers), references))

    low, high, best = least, 8.0, make(8)
    if (most := score(best)) < target:
        raise UsageError(f"a PSNR of {target:g} dB cannot be reached; 8 bits give {most:.1f} dB")
    for _ in range(SEARCH):
        middle = (low + high) / 2
        if score(recipe := make(middle)) >= target:
            high, best = middle, recipe
        else:
            low = middle
    return best


# --- writing


def _component(
    folder: Path, bits_of: Callable[[str, tuple[int, ...]], int | None], form: Backend
) -> Component:
    """What becomes of a folder's tensors: few bits where ``bits_of`` names them, else 16."""
    part = Component(name=folder.name, config=load_config(folder), reader=open_component(folder))
    for key, info in part.reader.infos.items():
        dtype = READ_AS[info.dtype]
        if bits := bits_of(key, info.shape):
            part.rows.append(form.row(key, info.shape, dtype, bits))
        else:
            part.rows.append(Row(key, info.shape, key, half(dtype)))
    return part


def _is_matrix(key: str, shape: tuple, group: int) -> bool:
    return key.endswith(".weight") and len(shape) > 1 and shape[-1] % group == 0


def transformer_part(model: Path, recipe: Recipe, form: Backend) -> Component:
    def bits_of(key, shape):
        layer = key.removesuffix(".weight")
        if layer in recipe.layers:
            return recipe.layers[layer]
        is_convolution = len(shape) > 2 and _is_matrix(key, shape, form.group)
        return OTHER_BITS if is_convolution and isinstance(form, Palette) else None

    part = _component(model / "transformer", bits_of, form)
    if isinstance(form, Affine):
        usual = Counter(recipe.layers.values()).most_common(1)[0][0]
        own = {k: {"group_size": form.group, "bits": b} for k, b in recipe.layers.items()}
        part.config["quantization"] = {
            **{"group_size": form.group, "bits": usual},
            **{layer: how for layer, how in own.items() if how["bits"] != usual},
        }
    return part


def other_part(folder: Path, form: Backend) -> Component:
    """An autoencoder or a text encoder."""
    kind = load_config(folder).get("model_type")
    is_float = not any(key.endswith(".scales") for key in load_infos(folder))
    if kind in ("gemma3_text", "gemma3") and is_float:

        def gemma_bits(key, shape):
            return GEMMA_BITS if _is_matrix(key, shape, GEMMA.group) else None

        part = _component(folder, gemma_bits, GEMMA)
        part.config["quantization"] = {"group_size": GEMMA.group, "bits": GEMMA_BITS}
        return part

    def bits_of(key, shape):
        is_palette = isinstance(form, Palette) and is_float
        return OTHER_BITS if is_palette and _is_matrix(key, shape, form.group) else None

    return _component(folder, bits_of, form)


def _write_others(model: Path, tmp: Path, form: Backend) -> list[Component]:
    """Everything but the transformer."""
    names = [n for n in COMPONENTS if n != "transformer" and (model / n).is_dir()]
    parts = [other_part(model / name, form) for name in names]
    weights = shutil.ignore_patterns("*.safetensors", "*.safetensors.index.json")
    for name in (*names, *TOKENIZERS.values()):
        if (model / name).is_dir():
            shutil.copytree(model / name, tmp / name, ignore=weights)
    if (model / TINY_DECODER).is_dir():
        shutil.copytree(model / TINY_DECODER, tmp / TINY_DECODER)
    for file in model.iterdir():
        if file.is_file():
            shutil.copyfile(file, tmp / file.name)
    write_json(tmp / "config.json", derived_config(model))
    copy_few_step_loras(model, tmp, partial(short_lora, form=form))
    write_components(tmp, parts)
    return parts


def short_lora(tensors: dict[str, mx.array], form: Backend) -> dict[str, mx.array]:
    """A LoRA's tensors in 16 bits, or with palettes its matrices in 8."""
    out: dict[str, mx.array] = {}
    for key, a in tensors.items():
        # Indices of 8 bits fill whole words, whatever multiple of 4 the rank is.
        if isinstance(form, Palette) and a.ndim == 2 and a.shape[-1] % 4 == 0:
            row = form.row(key, a.shape, a.dtype, OTHER_BITS)
            out |= zip(row.entries(), row.encode(a.astype(row.dtype)), strict=True)
        else:
            out[key] = a.astype(half(a.dtype))
    return out


# --- afterwards


def _stored(folder: Path, written: dict) -> dict:
    """Bytes of a part's weight files, by its float weights."""
    size, count = written["bytes_on_disk"], stored(folder)["parameters"]
    return {"bytes": size, "bits_per_weight": round(8 * size / count, 3)}


def _compare(model: Path, quantized: Path, calibration: Calibration) -> dict:
    """PSNR with its peak, and SNR, in dB, of each width's latents from the same noise and text;
    PSNR of pictures of the same latents; of the text states."""
    result: dict[str, Any] = {"psnr": {}, "snr": {}, "peak": {}}
    for float_pipe, pipe in zip(load_widths(model), load_widths(quantized), strict=True):
        theirs = calibration.latents(float_pipe)
        ours = calibration.latents(pipe)
        for name, ratio in (("psnr", psnr), ("snr", snr)):
            first, last = map(ratio, ours, theirs)
            result[name][pipe.variant] = {"first step": first, "last step": last}
        result["peak"][pipe.variant] = peak(theirs[1])
        float_pipe.free("dit")
        pipe.free("dit")
    pictures = [
        np.stack([np.array(p.decode(z[None], WHITE)) for z in theirs[1][:PICTURES]]).astype(float)
        for p in (pipe, float_pipe)
    ]
    result["pictures"] = psnr(*map(mx.array, pictures))
    states = Calibration.from_model(quantized, calibration.prompts).text
    changed = {k: a for k, a in calibration.text.items() if not mx.array_equal(states[k], a)}
    result["text"] = {k: psnr(states[k], a) for k, a in changed.items()}
    return result
