"""What stands where in a model folder."""

import re
from pathlib import Path

from .files import read_json

FORMAT = {"format": "snapgen-mlx", "version": 1}  # part of a model folder's config.json
COMPONENTS = ("transformer", "vae", "text_encoder", "text_encoder_2")
TINY_DECODER = "tiny_decoder"  # a model's folder of a decoder that is smaller than its own
TOKENIZERS = {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2"}
# All that the states of a text depend on.
TEXT_FOLDERS = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
FEW_STEP = "few_step"  # folder of a model's few-step LoRAs, one for each width

TOKENIZER_FILE = re.compile(
    r"(.*token.*|vocab|merges|chat_template|spiece)\.(json|txt|model|jinja)"
)
VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json")


def load_config(folder) -> dict:
    """The folder's ``config.json``. Raises SnapGenError when missing or not JSON."""
    return read_json(Path(folder) / "config.json")


def picture_size(config: dict) -> int:
    """Pixels a side of the pictures that a model is made for, by its ``config.json``."""
    return config.get("sampling", {}).get("size", 1024)


def few_step_lora(folder, variant: str) -> Path | None:
    """The LoRA of a model folder with which a width draws in few steps, if it has one."""
    path = Path(folder) / FEW_STEP / f"{variant}.safetensors"
    return path if path.is_file() else None


def few_step_loras(folder) -> list[Path]:
    """The LoRAs of all widths with which a model folder draws in few steps."""
    files = sorted((Path(folder) / FEW_STEP).glob("*.safetensors"))
    return [file for file in files if not file.name.startswith(".")]


def tokenizer_files(folder: Path) -> list[Path]:
    """The files of a folder that make up its tokenizer; none without a vocabulary."""
    # A Mac leaves ._NAME beside NAME on other systems' disks.
    names = sorted(f for f in folder.iterdir() if not f.name.startswith("."))
    files = [f for f in names if TOKENIZER_FILE.fullmatch(f.name)]
    return files if any(f.name in VOCABULARIES for f in files) else []
