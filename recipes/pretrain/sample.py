"""Guided sampling with the PyTorch model: Euler steps along the shifted schedule."""

from itertools import pairwise

import torch
from torch import Tensor


def schedule(steps: int, shift: float = 3.0) -> list[float]:
    """Sigmas from 1 to 0: shift·s / (1 + (shift-1)·s) on linspace(1, 1/N, N), then 0."""
    grid = [1 - i / steps for i in range(steps)]
    return [shift * s / (1 + (shift - 1) * s) for s in grid] + [0.0]


@torch.no_grad()
def denoise(
    network,
    noise: Tensor,
    text: dict,
    masks: dict,
    index: int,
    steps: int = 28,
    guidance: float = 4.0,
    shift: float = 3.0,
) -> Tensor:
    """Latents (B, h, w, C) from noise of that shape; the negative branch has no text at all.

    Args:
        network: called as network(x, t, text, masks, index), like `elastic.Network`.
        text, masks: of the B prompts.
        index: the width.
    """
    B = len(noise)
    both = {k: torch.cat([a, a]) for k, a in text.items()}
    seen = {k: torch.cat([m, torch.zeros_like(m)]) for k, m in masks.items()}
    x = noise.float()
    for sigma, following in pairwise(schedule(steps, shift)):
        t = torch.full((2 * B,), sigma, device=x.device)
        v_pos, v_neg = network(torch.cat([x, x]), t, both, seen, index).split(B)
        x = x + (following - sigma) * (v_neg + guidance * (v_pos - v_neg))
    return x
