"""Words to picture in PyTorch: the original encoders and autoencoder around the reference DiT.

It reads a diffusers-style checkpoint folder and shares no code with the library: tokenizers, text
encoders and autoencoder are those of transformers and diffusers, the sampler is written out.
"""

import json
from itertools import pairwise
from pathlib import Path

import torch
from diffusers import AutoencoderKLQwenImage
from safetensors.torch import load_file
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer, Gemma3TextModel, GemmaTokenizer

from .torch_dit import SnapGenPPTransformer2DModel

# Name in the transformer's text_dims: folders of model and tokenizer, their classes, most tokens.
ENCODERS = {
    "clip": ("text_encoder", "tokenizer", CLIPTextModel, CLIPTokenizer, 77),
    "gemma": ("text_encoder_2", "tokenizer_2", Gemma3TextModel, GemmaTokenizer, 256),
}


def sigmas(steps: int, shift: float) -> Tensor:
    """(steps + 1,) from 1 to 0: linspace(1, 1/N, N), shifted, and 0."""
    s = torch.linspace(1, 1 / steps, steps, dtype=torch.float64)
    return torch.cat([shift * s / (1 + (shift - 1) * s), torch.zeros(1, dtype=torch.float64)])


class TorchPipeline:
    """In float32, whatever the checkpoint's dtype; with those of `encoders` that it has."""

    def __init__(self, folder, encoders=tuple(ENCODERS)):
        folder = Path(folder)
        config = json.loads((folder / "transformer" / "config.json").read_text())
        state = {}
        for file in (folder / "transformer").glob("*.safetensors"):
            state |= load_file(file)
        self.dit = SnapGenPPTransformer2DModel(config)
        self.dit.load_state_dict(state, strict=True)
        vae = AutoencoderKLQwenImage.from_pretrained(folder / "vae", low_cpu_mem_usage=False)
        self.vae = vae.float().eval()
        self.encoders = {}
        for name in encoders:
            part, words, model, tokenizer, length = ENCODERS[name]
            if (folder / part).is_dir():
                model = model.from_pretrained(folder / part).float().eval()
                self.encoders[name] = model, tokenizer.from_pretrained(folder / words), length

    def encode(self, prompt: str) -> tuple[dict, dict]:
        """Last hidden states {name: (1, L, dim)} and masks {name: (1, L)}, the raw prompt's."""
        text, masks = {}, {}
        for name, (model, tokenizer, length) in self.encoders.items():
            batch = tokenizer(prompt, truncation=True, max_length=length, return_tensors="pt")
            text[name] = model(**batch).last_hidden_state
            masks[name] = batch["attention_mask"].bool()
        return text, masks

    @torch.no_grad()
    def latents(
        self,
        noise: Tensor,
        prompt: str,
        *,
        steps: int,
        guidance: float,
        shift: float,
        negative: str | None = None,
        width: int | None = None,
    ) -> Tensor:
        """Euler steps from noise (1, C, h, w); `width` indexes the transformer's widths.

        Without a negative prompt the other branch of guidance has no text at all.
        """
        positive = self.encode(prompt)
        negative = self.encode(negative) if negative else ({}, {})
        schedule = sigmas(steps, shift)
        x = noise
        for sigma, following in pairwise(schedule):
            t = sigma.float()[None]
            v = self.dit(x, t, *positive, width=width)
            if guidance != 1:
                v_negative = self.dit(x, t, *negative, width=width)
                v = v_negative + guidance * (v - v_negative)
            x = x + (following - sigma).float() * v
        return x

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Normalised latents (1, C, h, w) -> picture (8 h, 8 w, 3), uint8."""
        config = self.vae.config
        mean, std = (
            torch.tensor(values)[:, None, None]
            for values in (config.latents_mean, config.latents_std)
        )
        image = self.vae.decode((latents * std + mean)[:, :, None]).sample[0, :, 0]
        return ((image.permute(1, 2, 0) + 1) * 127.5).round().to(torch.uint8)
