"""Fine-tuning a model folder on a folder of pictures: data, run, and the trained model folder."""

import shutil
from collections.abc import Iterator
from pathlib import Path

from ..pipeline import load_text_encoders, load_vae
from ..weights import load_config, load_supernet, save_tensors, write_json
from .data import LatentDataset, encode_images, read_folder
from .loop import RunOptions, averaged_weights, train


def finetune(model, data, output, options: RunOptions, validation=None) -> Iterator[dict]:
    """Train all widths of ``model`` on ``data``; yields the records of ``loop.train``.

    Writes the trained model (the averaged weights, with everything else of ``model`` beside
    them) to ``output``; the run's state lies in ``output/run`` and is resumed from there. Raises
    SnapGenError for bad folders and pictures.
    """
    model, output = Path(model), Path(output)
    config, params = load_supernet(model)
    size = load_config(model)["sampling"]["size"]
    encoders = load_text_encoders(model)
    vae = load_vae(model)

    def dataset(folder):
        examples = read_folder(folder)
        latents = encode_images(vae, [e.file for e in examples], (size, size))
        return LatentDataset(latents, [e.captions for e in examples], encoders)

    sets = [dataset(folder) for folder in (data, validation) if folder]
    yield from train(config, params, sets[0], output / "run", options, *sets[1:])

    for part in model.iterdir():
        if part.is_dir() and part.name not in ("transformer", "run"):
            shutil.copytree(part, output / part.name, dirs_exist_ok=True)
        elif part.is_file():
            shutil.copy(part, output / part.name)
    write_json(output / "transformer" / "config.json", config.to_dict())
    save_tensors(output / "transformer", averaged_weights(output / "run"))
