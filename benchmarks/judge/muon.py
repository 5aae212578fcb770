"""Muon (K. Jordan 2024) for matrices, Adam for the rest: a third of Adam's steps at the start.

``torch.optim.Muon`` works in bfloat16, which takes a second a step on a CPU without it.
"""

import torch
from torch import Tensor, nn

MATRICES, OTHERS = 0.05, 4e-3  # learning rates
MOMENTUM, DECAY = 0.95, 0.02
ITERATIONS, COEFFICIENTS = 5, (3.4445, -4.775, 2.0315)


class Muon(torch.optim.Optimizer):
    """Steps of which all singular values are about 1; convolutions are matrices (out, rest)."""

    def __init__(self, params):
        super().__init__(list(params), {"lr": MATRICES})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p not in self.state:
                    self.state[p]["mean"] = torch.zeros_like(p)
                mean = self.state[p]["mean"]
                mean.lerp_(p.grad, 1 - MOMENTUM)
                matrix = p.grad.lerp(mean, MOMENTUM).flatten(1)
                rows, columns = matrix.shape
                p.mul_(1 - DECAY * group["lr"])
                update = orthogonal(matrix) * max(1, rows / columns) ** 0.5
                p.add_(update.view_as(p), alpha=-group["lr"])


def orthogonal(matrix: Tensor) -> Tensor:
    """About U V^T of matrix = U S V^T, by Newton and Schulz's iteration."""
    if matrix.shape[0] > matrix.shape[1]:
        return orthogonal(matrix.T).T
    a, b, c = COEFFICIENTS
    x = matrix / (matrix.norm() + 1e-7)
    for _ in range(ITERATIONS):
        square = x @ x.T
        x = a * x + (b * square + c * square @ square) @ x
    return x


def optimizers(model: nn.Module) -> list[torch.optim.Optimizer]:
    """One for the matrices inside, one for all else: norms, depthwise weights, the head."""
    matrices, others = [], []
    for name, p in model.named_parameters():
        inside = p.ndim == 4 and p.shape[1] > 1 and not name.startswith("head")
        (matrices if inside else others).append(p)
    adam = torch.optim.AdamW(others, OTHERS, betas=(0.9, 0.99), weight_decay=0.01)
    return [Muon(matrices), adam]
