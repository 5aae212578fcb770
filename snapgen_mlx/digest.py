"""Which model is it: short digests of what pictures depend on."""

import hashlib
from pathlib import Path

from .layout import load_config

KINDS = (".json", ".safetensors", ".txt", ".model", ".bin")  # files that pictures depend on
BLOCKS, BLOCK = 64, 16384  # number of blocks that are read of a large file, and their bytes


def digest(*paths: Path) -> str:
    """Digest of files, and of the files in folders, whatever their names.

    Of a file above a megabyte the beginning, with the header, and blocks spread over all of it are
    looked at: training or quantizing changes nearly every weight, and a model of 8 GB takes no
    longer than a small one.
    """
    files = [
        file
        for path in paths
        for file in ([path] if path.is_file() else sorted(path.glob("*")))
        if file.suffix in KINDS and not file.name.startswith(".")
    ]
    total = hashlib.sha256()
    for file in files:
        size = file.stat().st_size
        total.update(size.to_bytes(8, "little"))
        with open(file, "rb") as f:
            if size <= BLOCKS * BLOCK:
                total.update(f.read())
                continue
            for i in range(BLOCKS):
                f.seek(i * (size - BLOCK) // (BLOCKS - 1))
                total.update(f.read(BLOCK))
    return total.hexdigest()[:16]


def base_digest(folder) -> str:
    """Of the transformer that a LoRA is trained beside: that of the model which ``folder`` was
    quantized or cut from, or its own."""
    folder = Path(folder)
    if (folder / "config.json").is_file() and (folder / "transformer").is_dir():
        return load_config(folder).get("base") or digest(folder / "transformer")
    return digest(folder)


def derived_config(folder) -> dict:
    """The config.json of a model with the same weights in another form."""
    return load_config(folder) | {"base": base_digest(folder)}
