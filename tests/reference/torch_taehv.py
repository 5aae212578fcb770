"""TAEHV's decoder in PyTorch, for videos, with the keys of its published files."""

import torch
from torch import nn
from torch.nn import functional as F

CHANNELS = (256, 128, 64, 64)
FRAMES = (1, 2, 2)


def conv(inputs: int, outputs: int, **options) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1, **options)


class MemBlock(nn.Module):
    def __init__(self, n: int):
        super().__init__()
        self.conv = nn.Sequential(conv(2 * n, n), nn.ReLU(), conv(n, n), nn.ReLU(), conv(n, n))

    def forward(self, x):
        """x (B, T, C, H, W): every frame with the one before it, the first with zeros."""
        B, T = x.shape[:2]
        past = torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], dim=1)
        update = self.conv(torch.cat([x, past], dim=2).flatten(0, 1))
        return F.relu(update.unflatten(0, (B, T)) + x)


class TGrow(nn.Module):
    def __init__(self, n: int, frames: int):
        super().__init__()
        self.frames = frames
        self.conv = nn.Conv2d(n, n * frames, 1, bias=False)

    def forward(self, x):
        B, T, C = x.shape[:3]
        x = self.conv(x.flatten(0, 1)).unflatten(1, (self.frames, C))
        return x.flatten(0, 1).unflatten(0, (B, T * self.frames))


class Decoder(nn.Module):
    """Latents (B, T, 16, h, w) -> frames (B, 4T - 3, 3, 8h, 8w) in [0, 1]."""

    def __init__(self, latent_channels: int = 16):
        super().__init__()
        layers = [nn.Identity(), conv(latent_channels, CHANNELS[0]), nn.ReLU()]
        for i, frames in enumerate(FRAMES):
            layers += [MemBlock(CHANNELS[i]) for _ in range(3)]
            layers += [nn.Upsample(scale_factor=2), TGrow(CHANNELS[i], frames)]
            layers.append(conv(CHANNELS[i], CHANNELS[i + 1], bias=False))
        layers += [nn.ReLU(), conv(CHANNELS[-1], 3)]
        self.decoder = nn.ModuleList(layers)

    def forward(self, x):
        x = 3 * torch.tanh(x / 3)
        for layer in self.decoder:
            if isinstance(layer, MemBlock | TGrow):
                x = layer(x)
            else:
                x = layer(x.flatten(0, 1)).unflatten(0, x.shape[:2])
        return x[:, 3:].clamp(0, 1)
