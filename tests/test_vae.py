"""The 2-D Qwen-Image VAE against diffusers' 3-D one, and decoding in tiles."""

import mlx.core as mx
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLQwenImage as TorchVAE
from mlx.utils import tree_flatten

from snapgen_mlx.errors import SnapGenError, UsageError
from snapgen_mlx.models import convolution
from snapgen_mlx.models import vae as vae_module
from snapgen_mlx.models.vae import AutoencoderKLQwenImage, VAEConfig
from snapgen_mlx.tensors.weights import assign

from .settled import active_memory

TINY = dict(
    base_dim=8,
    z_dim=4,
    dim_mult=[1, 2, 4, 4],
    num_res_blocks=1,
    attn_scales=[],
    temperal_downsample=[False, True, True],
    latents_mean=[0.3, -0.2, 0.1, 0.5],
    latents_std=[2.0, 1.5, 0.7, 3.0],
)


def as_2d(state: dict) -> dict[str, mx.array]:
    """The last temporal slice of each convolution, in MLX's layout."""
    tensors = {}
    for key, a in state.items():
        if "time_conv" in key:
            continue
        a = a[:, :, -1] if a.ndim == 5 else a
        a = a.permute(0, 2, 3, 1) if key.endswith("weight") else a.reshape(-1)
        tensors[key] = mx.array(a.contiguous().numpy())
    return tensors


def pair(**changes):
    torch.manual_seed(0)
    theirs = TorchVAE(**(TINY | changes)).eval()
    with torch.no_grad():
        for p in theirs.parameters():  # gammas of one and small convolutions would hide errors
            p.copy_(torch.randn_like(p) * (0.3 if p.ndim < 4 else p[0].numel() ** -0.5))
    config = VAEConfig.from_dict(dict(theirs.config))
    return theirs, assign(AutoencoderKLQwenImage(config), as_2d(theirs.state_dict()), "vae")


@pytest.fixture(scope="module")
def tiny():
    return pair()


def rel(a, b) -> float:
    a, b = np.asarray(a), np.asarray(b)
    assert a.shape == b.shape
    return float(np.abs(a - b).max() / np.abs(b).max())


def to_torch(x: mx.array) -> torch.Tensor:
    return torch.from_numpy(np.array(x)).permute(0, 3, 1, 2)[:, :, None]


def to_numpy(x: torch.Tensor):
    return x[:, :, 0].permute(0, 2, 3, 1).numpy()


@pytest.mark.parametrize("changes", [{}, {"num_res_blocks": 2, "base_dim": 16}])
def test_encode_and_decode_equal_the_original(changes):
    theirs, ours = pair(**changes)
    mx.random.seed(1)
    images, latents = mx.random.uniform(-1, 1, (2, 64, 96, 3)), mx.random.normal((2, 8, 12, 4))
    mean = torch.tensor(TINY["latents_mean"]).reshape(1, 4, 1, 1, 1)
    std = torch.tensor(TINY["latents_std"]).reshape(1, 4, 1, 1, 1)
    with torch.no_grad():
        z = (theirs.encode(to_torch(images)).latent_dist.mode() - mean) / std
        raw = theirs.decoder(theirs.post_quant_conv(to_torch(latents) * std + mean))
        y = theirs.decode(to_torch(latents) * std + mean).sample
    assert rel(ours.encode(images), to_numpy(z)) < 1e-5
    assert rel(ours.decode(latents), to_numpy(y)) < 1e-5
    # Clamping may flatten most of a random network's picture: compare what it clamps as well.
    z = latents * mx.array(TINY["latents_std"]) + mx.array(TINY["latents_mean"])
    assert rel(ours.decoder(ours.post_quant_conv(z)), to_numpy(raw)) < 1e-5


def test_full_geometry_has_the_published_size():
    def count(module):
        return sum(a.size for _, a in tree_flatten(module.parameters()))

    # The last temporal slice is a third of each 3x3x3 kernel of the 126.9 M original.
    ours = AutoencoderKLQwenImage(VAEConfig())
    with torch.device("meta"):
        theirs = TorchVAE()
    expected = sum(
        a[:, :, -1].numel() if a.ndim == 5 else a.numel()
        for key, a in theirs.state_dict().items()
        if "time_conv" not in key
    )
    assert count(ours) == expected
    assert {k for k, _ in tree_flatten(ours.parameters())} == {
        k for k in theirs.state_dict() if "time_conv" not in k
    }


@pytest.mark.parametrize(("size", "tile"), [((11, 17), 3), ((16, 9), 5), ((9, 24), 1), ((8, 8), 7)])
def test_tiled_decode_equals_the_whole(tiny, size, tile):
    _, ours = tiny
    mx.random.seed(2)
    z = mx.random.normal((2, *size, 4))
    assert rel(ours.decoder(z, tile), ours.decoder(z)) < 1e-5


@pytest.mark.parametrize("changes", [{}, {"num_res_blocks": 2}])
def test_the_halo_is_the_receptive_field(changes):
    """A row of NaN reaches the tile exactly when it is no further away than the halo."""
    decoder = AutoencoderKLQwenImage(VAEConfig.from_dict(TINY | changes)).decoder
    halo = decoder.halos()[0]
    for distance, reaches in ((halo, True), (halo + 1, False)):
        for row in (20 - distance, 21 + distance):
            x = mx.random.normal((1, 42, 8, 32))
            x[:, row] = mx.nan
            for block in decoder.up_blocks:
                x = block(x)
            x = decoder.conv_out(decoder.norm_out(x))
            assert mx.isnan(x[:, 160:176]).any().item() is reaches


def test_attention_in_chunks_equals_attention_at_once(tiny, monkeypatch):
    _, ours = tiny
    x = mx.random.normal((1, 10, 13, 32))
    whole = ours.decoder.mid_block(x)
    monkeypatch.setattr(vae_module, "SCORES", 9999)
    assert rel(ours.decoder.mid_block(x), whole) < 1e-5


def test_tiles_need_less_memory(tiny):
    _, ours = tiny
    z = mx.random.normal((1, 48, 48, 4))
    peaks = []
    for tile in (None, 8):
        mx.synchronize()
        mx.reset_peak_memory()
        before = active_memory()
        mx.eval(ours.decode(z, tile=tile))
        peaks.append(mx.get_peak_memory() - before)
    assert peaks[1] < 0.5 * peaks[0]


def test_what_it_cannot_do_is_refused(tiny):
    with pytest.raises(UsageError):
        tiny[1].decode(mx.zeros((1, 8, 8, 4)), tile=0)
    with pytest.raises(SnapGenError):
        VAEConfig.from_dict(TINY | {"attn_scales": [1.0]})
    with pytest.raises(SnapGenError):
        VAEConfig.from_dict(TINY | {"latents_std": [1.0]})


@pytest.mark.parametrize("shape", [(1, 16, 12, 8), (2, 13, 5, 8), (1, 3, 64, 8)])
def test_a_convolution_in_strips_is_the_whole_one(monkeypatch, shape):
    layer = convolution.Conv3x3(8, 6)
    x = mx.random.normal(shape, key=mx.random.key(0))
    whole = layer(x)
    monkeypatch.setattr(convolution, "UNFOLDED", 9 * 8 * shape[0] * shape[2] * 4)  # four rows
    assert layer(x).shape == whole.shape
    assert mx.abs(layer(x) - whole).max() <= 1e-6


def test_predicted_peak_of_the_middle_block():
    # Wide and large enough that convolutions run in strips and attention in chunks.
    config = VAEConfig()
    decoder = vae_module.Decoder(config)
    latents = mx.zeros((1, 64, 64, 16))
    mx.eval(latents, decoder.conv_in.parameters(), decoder.mid_block.parameters())
    mx.clear_cache()
    before = active_memory()
    mx.reset_peak_memory()
    mx.eval(decoder.mid_block(decoder.conv_in(latents)))
    peak = mx.get_peak_memory() - before
    # Tiles so small that the up blocks need less than the middle one.
    assert config.decoding_bytes(64, 64, 4, 4) == pytest.approx(peak, rel=0.15)
