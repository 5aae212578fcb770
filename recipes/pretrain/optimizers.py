"""The optimizers of a run: Adam for everything, or Muon (K. Jordan 2024) for the inner matrices."""

import torch
from torch import nn

from snapgen_mlx.errors import UsageError

# Weights of the first and last layers are better left to Adam.
OUTER = ("patch_embed", "final", "time_embed", "text_embed", "text.proj")


def is_inner(name: str, p: nn.Parameter) -> bool:
    """Whether Muon moves this parameter: a matrix that is neither first nor last, nor a table."""
    inside = not any(f"{part}." in name for part in OUTER)
    return p.ndim == 2 and inside and name.endswith(".weight")


def build(params: dict[str, nn.Parameter], options, split: bool) -> list[torch.optim.Optimizer]:
    """The optimizers over `params`; `options` are the run's `Training`.

    Muon's steps are scaled to the size of Adam's, so that both have one learning rate.

    Raises:
        UsageError: there is no such optimizer, or Muon is asked for split parameters.
    """
    if options.optimizer not in ("adam", "muon"):
        raise UsageError(f"optimizer is {options.optimizer!r}; it can be 'adam' or 'muon'")
    inner = [] if options.optimizer == "adam" else [p for k, p in params.items() if is_inner(k, p)]
    if inner and split:
        raise UsageError("muon needs whole matrices; set split to false or optimizer to 'adam'")
    known = {id(p) for p in inner}
    adam = torch.optim.AdamW(
        [p for p in params.values() if id(p) not in known],
        lr=options.learning_rate,
        betas=tuple(options.betas),
        weight_decay=options.weight_decay,
        fused=True,
    )
    if not inner:
        return [adam]
    muon = torch.optim.Muon(
        inner,
        lr=options.learning_rate,
        weight_decay=options.weight_decay,
        adjust_lr_fn="match_rms_adamw",
    )
    return [adam, muon]
