"""A tiny random model folder in the shipped model's form, for tests of everything around it."""

import mlx.core as mx
from mlx.utils import tree_flatten

from snapgen_mlx.config import DiTConfig
from snapgen_mlx.files import write_json
from snapgen_mlx.layout import FORMAT
from snapgen_mlx.models.autoencoder import (
    SnapGenAutoencoder,
    SnapGenAutoencoderConfig,
    StickerAutoencoder,
    StickerAutoencoderConfig,
)
from snapgen_mlx.models.elastic import random_supernet
from snapgen_mlx.models.word_tokens import UNKNOWN
from snapgen_mlx.tensors.weights import save_tensors

WORDS = [UNKNOWN, "a", "smiling", "cat", "dog", "red", "happy", "kitty"]


def tiny_config(**changes) -> DiTConfig:
    sizes = dict(
        hidden_size=64,
        head_dim=8,
        num_heads=8,
        num_kv_heads=8,
        cross_kv_heads=4,
        caption_dim=32,
        text_dims={"static": 8},
        layers=[1, 2, 1],
        ffn_ratio=[2, 2, 2],
        bna_blocks=4,
    )
    return DiTConfig(**sizes | changes)


STICKER_VAE = {
    **{"channels": [8, 8], "encoder_blocks": [1, 1], "decoder_blocks": [1, 1]},
    **{"plain_stages": 1, "latent_channels": 16},
}


def write_sticker_model(folder):
    """A tiny model of transparent pictures."""
    write_tiny_model(folder)
    vae = StickerAutoencoder(StickerAutoencoderConfig.from_dict(STICKER_VAE))
    write_json(folder / "vae" / "config.json", {"_class_name": "StickerAutoencoder", **STICKER_VAE})
    save_tensors(folder / "vae", dict(tree_flatten(vae.parameters())))
    return folder


def write_tiny_model(folder, seed: int = 0, **changes):
    """Write the folder and return it; every weight of the output layer is random, not zero."""
    mx.random.seed(seed)
    config = tiny_config(**changes)
    sampling = {"steps": 3, "guidance": 2.0, "shift": 3.0, "size": 64}
    write_json(folder / "config.json", {**FORMAT, "sampling": sampling})
    params = random_supernet(config)
    params["final.proj.weight"] = mx.random.normal(params["final.proj.weight"].shape) * 0.1
    write_json(folder / "transformer" / "config.json", config.to_dict())
    save_tensors(folder / "transformer", params)
    vae_config = {"encoder_channels": [8, 8], "decoder_channels": [8, 8], "blocks": 1}
    vae = SnapGenAutoencoder(SnapGenAutoencoderConfig.from_dict(vae_config))
    write_json(folder / "vae" / "config.json", {"_class_name": "SnapGenAutoencoder", **vae_config})
    save_tensors(folder / "vae", dict(tree_flatten(vae.parameters())))
    table = mx.random.randint(-127, 128, (len(WORDS), 8)).astype(mx.int8)
    text = {"table": table, "scale": mx.full((len(WORDS),), 0.005, mx.float16)}
    text_config = {"model_type": "static_text", "dim": 8, "max_length": 16}
    write_json(folder / "text_encoder" / "config.json", text_config)
    save_tensors(folder / "text_encoder", text)
    (folder / "text_encoder" / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    return folder
