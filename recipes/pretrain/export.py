"""Write a run's averaged weights as a PyTorch checkpoint that `snapgen-mlx convert` reads.

    python -m recipes.pretrain.export RUN OUT --parts DIR

DIR holds what the run did not train, each in its folder: `vae/` and, where the text encoders are
not trained along, `text_encoder/`, `tokenizer/`, `text_encoder_2/`, `tokenizer_2/`.
"""

import argparse
import shutil
import sys
from pathlib import Path

from safetensors.torch import save_file

from snapgen_mlx.errors import UsageError
from snapgen_mlx.files import atomic_folder, read_json, write_json
from snapgen_mlx.loading import load_vae_config
from snapgen_mlx.tokenizer_files import copy_word_files

from ..command import command
from . import state as states
from .text import TextConfig, WordTransformer

PARTS = ("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
MODEL_FILES = (".json", ".safetensors", ".txt", ".model", ".jinja")
SAMPLING = {"steps": 28, "guidance": 4.0, "shift": 3.0}
SCHEDULER = "FlowMatchEulerDiscreteScheduler"


def part(state: dict, name: str) -> dict:
    """The averaged weights of "dit" or "text", contiguous."""
    prefix = f"{name}."
    ema = state["ema"].items()
    return {k.removeprefix(prefix): a.contiguous() for k, a in ema if k.startswith(prefix)}


def export(run: Path, out: Path, parts: Path | None = None) -> None:
    """Write the checkpoint folder `out`, which must not exist, whole or not at all.

    Args:
        run: folder of a run of `recipes.pretrain.train`.
        out: the checkpoint, laid out as architecture section 4 says.
        parts: folder of the models that were not trained, to be copied.

    Raises:
        SnapGenError: the run has no whole state, or a part is missing.
    """
    state = states.load(run)
    if state is None:
        raise UsageError(f"{run} holds no state of a run ({states.NAME})")
    trained = "text" in state["geometry"]
    wanted = [name for name in PARTS if not (trained and name != "vae")]
    copied = [name for name in wanted if parts and (parts / name).is_dir()]
    if parts and "vae" not in copied:
        raise UsageError(f"{parts} holds no folder vae/")
    there = parts and (parts / "model_index.json").exists()
    theirs = read_json(parts / "model_index.json") if there else {}
    index = {"_class_name": "SnapGenPPPipeline", "_step": state["step"], "sampling": dict(SAMPLING)}
    with atomic_folder(out) as folder:
        for name in ("transformer", "scheduler"):
            (folder / name).mkdir()
        config = state["geometry"]["transformer"]
        write_json(folder / "transformer" / "config.json", config)
        save_file(
            part(state, "dit"), folder / "transformer" / "diffusion_pytorch_model.safetensors"
        )
        index["transformer"] = ["snapgen_mlx", config["_class_name"]]
        if trained:
            write_text(state, run / "words", folder / "text_encoder")
            index["text_encoder"] = ["snapgen_mlx", "WordTransformer"]
        for name in copied:
            copy_model(parts / name, folder / name)
            if name in theirs:
                index[name] = theirs[name]
            elif not name.startswith("tokenizer"):
                kind = read_json(parts / name / "config.json")
                index[name] = library(kind)
        if "vae" in copied:
            index["sampling"]["size"] = state["latents"][0] * load_vae_config(folder).downsampling
        index["scheduler"] = ["diffusers", SCHEDULER]
        shift = {"_class_name": SCHEDULER, "shift": SAMPLING["shift"]}
        write_json(folder / "scheduler" / "scheduler_config.json", shift)
        write_json(folder / "model_index.json", index)


def copy_model(source: Path, target: Path) -> None:
    """Copy the files of a model; what a training left beside them stays."""
    target.mkdir()
    for file in source.iterdir():
        if file.suffix in MODEL_FILES:
            shutil.copyfile(file, target / file.name)


def write_text(state: dict, words: Path, folder: Path) -> None:
    """The text encoder that was trained along, with its table and vocabulary."""
    config = state["geometry"]["text"]
    model = WordTransformer(TextConfig(**{k: v for k, v in config.items() if k != "model_type"}))
    model.read_table(words)
    model.load_state_dict(part(state, "text") | {"table": model.table, "scale": model.scale})
    folder.mkdir()
    write_json(folder / "config.json", config)
    save_file(model.state_dict(), folder / "model.safetensors")
    copy_word_files(words, folder)


def library(config: dict) -> list[str]:
    """The model_index.json entry of a model, by its config."""
    if name := config.get("_class_name"):
        return ["diffusers" if name.startswith("AutoencoderKL") else "snapgen_mlx", name]
    return ["transformers", config.get("architectures", ["AutoModel"])[0]]


@command
def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="folder of the run")
    parser.add_argument("out", type=Path, help="folder of the checkpoint, which is made")
    parser.add_argument("--parts", type=Path, help="folder of the models that were not trained")
    args = parser.parse_args(argv)
    export(args.run, args.out, args.parts)


if __name__ == "__main__":
    sys.exit(main())
