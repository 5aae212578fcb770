"""Captioned pictures to the latent shards that `recipes.pretrain.train` reads.

    python -m recipes.pretrain.encode OUT TAR... --parts DIR --size 256 [--device cuda]

Each tar, in WebDataset's layout (`NAME.jpg` or .png or .webp beside `NAME.txt`), becomes one shard
of latents and text states. DIR is a diffusers-style folder: `vae/` (AutoencoderKLQwenImage),
`text_encoder/` and `tokenizer/` (CLIP), `text_encoder_2/` and `tokenizer_2/` (Gemma 3), either
encoder or both. A shard that is there is not made again; under `torchrun` the tars are shared out.
"""

import argparse
import io
import json
import os
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from snapgen_mlx.errors import SnapGenError, UsageError
from snapgen_mlx.files import atomic_write

from ..command import command

PICTURES = (".jpg", ".jpeg", ".png", ".webp")
BATCH = 16
# Name in the transformer's text_dims: folders of model and tokenizer, most tokens (section 2).
ENCODERS = {
    "clip": ("text_encoder", "tokenizer", 77),
    "gemma": ("text_encoder_2", "tokenizer_2", 256),
}


def read_tar(path: Path) -> Iterator[tuple[Image.Image, str]]:
    """(picture, caption) of every sample of a tar.

    Raises:
        SnapGenError: the tar is damaged, or a picture stands without a caption.
    """
    texts, pictures = {}, {}
    try:
        with tarfile.open(path) as tar:
            for member in tar:
                stem, kind = os.path.splitext(member.name)
                if not member.isfile() or kind.lower() not in (*PICTURES, ".txt"):
                    continue
                content = tar.extractfile(member).read()
                if kind.lower() == ".txt":
                    texts[stem] = content.decode("utf-8").strip()
                else:
                    pictures[stem] = content
                if stem in texts and stem in pictures:
                    yield Image.open(io.BytesIO(pictures.pop(stem))), texts.pop(stem)
    except (OSError, EOFError, tarfile.TarError, UnicodeDecodeError) as e:
        raise SnapGenError(f"{path} is damaged: {e}; download it again") from e
    if pictures:
        raise SnapGenError(f"{path}: the picture {min(pictures)!r} has no .txt beside it")


def square(picture: Image.Image, size: int) -> np.ndarray:
    """The middle of a picture, (size, size, 3) uint8; transparent parts become white."""
    picture = picture.convert("RGBA")
    white = Image.new("RGBA", picture.size, "white")
    picture = Image.alpha_composite(white, picture).convert("RGB")
    side = min(picture.size)
    left, top = (picture.width - side) // 2, (picture.height - side) // 2
    box = (left, top, left + side, top + side)
    return np.asarray(picture.resize((size, size), Image.Resampling.LANCZOS, box=box))


class Encoders:
    """The autoencoder and the text encoders of a diffusers-style folder.

    Raises:
        SnapGenError: a part is missing or cannot be loaded.
    """

    def __init__(self, parts: Path, device: str):
        from diffusers import AutoencoderKLQwenImage
        from transformers import CLIPTextModel, CLIPTokenizer, Gemma3TextModel, GemmaTokenizer

        classes = {
            "clip": (CLIPTextModel, CLIPTokenizer),
            "gemma": (Gemma3TextModel, GemmaTokenizer),
        }
        self.device = device
        self.dtype = torch.bfloat16 if device == "cuda" else torch.float32
        self.texts = {}
        try:
            self.vae = AutoencoderKLQwenImage.from_pretrained(
                parts / "vae", torch_dtype=self.dtype, low_cpu_mem_usage=False
            ).to(device)
            for name, (folder, tokenizer, most) in ENCODERS.items():
                if (parts / folder).is_dir():
                    kind, words = classes[name]
                    model = kind.from_pretrained(parts / folder, dtype=self.dtype)
                    words = words.from_pretrained(parts / tokenizer)
                    self.texts[name] = model.to(device).eval(), words, most
        except (OSError, ValueError) as e:
            raise SnapGenError(f"cannot load {parts}: {str(e).splitlines()[0]}") from e
        if not self.texts:
            raise SnapGenError(f"{parts} holds no text_encoder/ and no text_encoder_2/")
        config = self.vae.config
        self.mean, self.std = (
            torch.tensor(values, device=device)[:, None, None]
            for values in (config.latents_mean, config.latents_std)
        )

    @torch.no_grad()
    def latents(self, pictures: list[np.ndarray]) -> Tensor:
        """Pictures (H, W, 3) uint8 -> normalised latents (B, h, w, C) float16."""
        x = torch.from_numpy(np.stack(pictures)).to(self.device)
        x = (x.permute(0, 3, 1, 2).float() / 127.5 - 1).to(self.dtype)
        mode = self.vae.encode(x[:, :, None]).latent_dist.mode()[:, :, 0].float()
        return ((mode - self.mean) / self.std).permute(0, 2, 3, 1).half().cpu().contiguous()

    @torch.no_grad()
    def states(self, captions: list[str]) -> dict[str, tuple[Tensor, Tensor]]:
        """{encoder: (last hidden states (B, L, dim) float16, how many are valid (B,))}."""
        out = {}
        for name, (model, tokenizer, most) in self.texts.items():
            rows = [tokenizer(c, truncation=True, max_length=most)["input_ids"] for c in captions]
            lengths = torch.tensor([len(row) for row in rows])
            ids = torch.zeros(len(rows), int(lengths.max()), dtype=torch.long)
            for target, row in zip(ids, rows, strict=True):
                target[: len(row)] = torch.tensor(row)
            mask = torch.arange(ids.shape[1]) < lengths[:, None]
            states = model(
                input_ids=ids.to(self.device), attention_mask=mask.to(self.device)
            ).last_hidden_state
            out[name] = states.half().cpu(), lengths
        return out


def encode(tar: Path, encoders: Encoders, size: int) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors and captions of the shard of one tar."""
    latents, captions, states = [], [], {name: [] for name in encoders.texts}
    samples = read_tar(tar)
    while True:
        batch = [sample for _, sample in zip(range(BATCH), samples, strict=False)]
        if not batch:
            break
        try:
            pictures = [square(picture, size) for picture, _ in batch]
        except OSError as e:
            raise SnapGenError(f"{tar}: a picture after {len(captions)} is damaged: {e}") from e
        texts = [text for _, text in batch]
        latents.append(encoders.latents(pictures))
        for name, pair in encoders.states(texts).items():
            states[name].append(pair)
        captions += texts
    if not captions:
        raise SnapGenError(f"{tar} holds no picture with a caption")
    tensors = {"latents": torch.cat(latents)}
    for name, pairs in states.items():
        longest = max(part.shape[1] for part, _ in pairs)
        padded = [
            torch.nn.functional.pad(part, (0, 0, 0, longest - part.shape[1])) for part, _ in pairs
        ]
        tensors[f"text.{name}"] = torch.cat(padded)
        tensors[f"length.{name}"] = torch.cat([lengths for _, lengths in pairs])
    return tensors, captions


def write(folder: Path, name: str, tensors: dict[str, Tensor], captions: list[str]) -> None:
    """One shard; the file that a reader looks for last is complete when it appears."""
    with atomic_write(folder / f"{name}.json") as temporary:
        temporary.write_text(json.dumps(captions, indent=0) + "\n", encoding="utf-8")
    with atomic_write(folder / f"{name}.safetensors") as temporary:
        save_file(tensors, temporary)


@command
def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="data folder")
    parser.add_argument("tars", type=Path, nargs="+", help="tars of pictures and captions")
    parser.add_argument("--parts", type=Path, required=True, help="folder of the encoders")
    parser.add_argument("--size", type=int, default=256, help="pixels a side (256)")
    parser.add_argument("--heldout", action="store_true", help="the one tar is for validation")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    args = parser.parse_args(argv)
    rank, processes = (int(os.environ.get(k, d)) for k, d in (("RANK", 0), ("WORLD_SIZE", 1)))
    if args.size % 64 or args.size < 64:
        raise UsageError(f"--size {args.size}: must be a multiple of 64")
    if args.heldout and len(args.tars) != 1:
        raise UsageError("--heldout takes one tar")
    if args.device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    names = ["heldout"] if args.heldout else [f"shard-{i:05d}" for i in range(len(args.tars))]
    todo = list(zip(names, args.tars, strict=True))[rank::processes]
    todo = [(n, tar) for n, tar in todo if not (args.out / f"{n}.safetensors").exists()]
    encoders = Encoders(args.parts, args.device) if todo else None
    for name, tar in todo:
        tensors, captions = encode(tar, encoders, args.size)
        write(args.out, name, tensors, captions)
        print(f"{name}: {len(captions)} pictures of {tar}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
