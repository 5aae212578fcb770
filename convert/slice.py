"""One width of a supernet as a model of its own (architecture section 3)."""

import shutil
from pathlib import Path

import mlx.core as mx

from ..config import DiTConfig
from ..digest import derived_config
from ..errors import SnapGenError, UsageError
from ..files import atomic_folder, expand_user, write_json
from ..layout import COMPONENTS, FEW_STEP, TINY_DECODER, TOKENIZERS, few_step_lora, load_config
from ..loading import load_dit
from ..models.elastic import bank_index, in_bank, slice_flat
from ..tensors.readers import open_component
from ..tensors.stream import Component, Row, Step, copy_rows, verify, write_components


def slice_model(folder, dest, variant: str) -> dict:
    """Write one variant of an MLX model as a model of its own, with all its other parts.

    Packed layers stay packed: the result computes to the bit what the supernet does at this width.
    Weights are read one at a time.

    Args:
        folder: the supernet's model folder.
        dest: new folder.
        variant: name of the width.

    Returns:
        {"bytes"} of the transformer.

    Raises:
        UsageError: the variant is unknown, or the model has only one width.
        SnapGenError: files are damaged, or the width splits the quantization groups of a layer.
    """
    folder, dest = Path(folder), expand_user(dest).absolute()
    path = folder / "transformer"
    source = load_config(path)
    config = DiTConfig.from_dict(source)
    index = config.variant_index(variant)
    if len(config.widths) == 1:
        raise UsageError(f"{folder} has only this width; there is nothing to slice")
    part = Component(
        name="transformer", config=config.variant(index).to_dict(), reader=open_component(path)
    )
    for row in copy_rows(part.reader):
        part.rows += _cut(row, config, index)
    if isinstance(source.get("quantization"), dict):
        part.config["quantization"] = _renamed(source["quantization"], index)
    with atomic_folder(dest) as tmp:
        for name in (*COMPONENTS, TINY_DECODER, *TOKENIZERS.values()):
            if name != part.name and (folder / name).is_dir():
                shutil.copytree(folder / name, tmp / name)
        if lora := few_step_lora(folder, variant):
            (tmp / FEW_STEP).mkdir()
            shutil.copyfile(lora, tmp / FEW_STEP / lora.name)
        for file in folder.iterdir():
            if file.is_file() and file.name != "recipe.json":  # its layers have other names
                shutil.copyfile(file, tmp / file.name)
        write_json(tmp / "config.json", derived_config(folder))
        write_components(tmp, [part])
        verify(tmp, [part])
        load_dit(tmp)  # every key and shape is right
    return {"bytes": part.nbytes}


def _cut(row: Row, config: DiTConfig, index: int) -> list[Row]:
    """What is stored of a tensor: nothing of another width's."""

    def apply(a: mx.array) -> dict[str, mx.array]:
        return slice_flat({row.source: a}, config, index)

    try:
        cut = apply(mx.zeros(row.shape, row.dtype))  # lazy: only its shape is wanted
    except SnapGenError as e:
        if row.dtype != mx.uint32 and not row.source.endswith((".scales", ".biases")):
            raise
        layer, width = row.source.rpartition(".")[0], config.widths[index]
        raise SnapGenError(
            f"{layer} is quantized in groups that width {width:g} cuts through; cut the model "
            "before it is quantized"
        ) from e
    step = Step("slice", lambda a: next(iter(apply(a).values())))
    return [Row(row.source, a.shape, key, a.dtype, step) for key, a in cut.items()]


def _renamed(quantization: dict, index: int) -> dict:
    """The entries of single layers by the variant's paths, without those of other widths."""
    out = {}
    for key, value in quantization.items():
        bank = bank_index(f"{key}.weight")
        if bank in (None, index):
            out[key if bank is None else in_bank(key, 0)] = value
    return out
