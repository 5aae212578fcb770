"""Elastic widths [paper 3.2]: a pure, differentiable function from a supernet's parameters to a
variant's (architecture section 3).

A width w keeps the leading fraction w of every hidden-tied axis; axes that join several windows
or skips keep it in each of their groups. Text-side weights and per-head norms are shared whole.
``time_embed`` and every ``scale_shift_table`` are banks with an entry per width. Packed affine
weights, scales and biases slice alike, as long as widths fall on quantization-group boundaries.
"""

import mlx.core as mx
from mlx.utils import tree_flatten, tree_unflatten

from ..config import DiTConfig
from ..errors import SnapGenError, UsageError
from ..tensors.weights import flat_parameters
from .dit import DiT

# "projector" stands beside a model while it learns from a teacher (training.distill).
BANKS = ("time_embed", "scale_shift_table", "projector")

# Groups along (output, input) of each layer's weight; 0 = not sliced. A bias follows the output.
_GROUPS = {
    "patch_embed.proj": (1, 0),
    "attn.to_q": (1, 1),
    "attn.to_k": (1, 1),
    "attn.to_v": (1, 1),
    "attn.to_out": (1, 1),
    "attn.head_gate": (1, 1),
    "attn.kv_compress.k": (1, 0),
    "attn.kv_compress.v": (1, 0),
    "cross.to_q": (1, 1),
    "cross.to_out": (1, 1),
    "ffn.fc1": (1, 1),
    "ffn.fc2": (1, 1),
    "skip_proj": (1, 2),
    "downsample.proj": (1, 4),
    "upsample.proj": (4, 1),
    "final.proj": (0, 1),
}


def _layer(path: str) -> tuple[str, str]:
    """ "down.3.attn.to_q.weight" -> ("attn.to_q", "weight")."""
    parts = path.split(".")
    if parts[0] in ("down", "mid", "up"):
        parts = parts[2:]
    return ".".join(parts[:-1]), parts[-1]


def bank_index(path: str) -> int | None:
    """The width index of an isolated parameter's path, None for a shared one."""
    parts = path.split(".")
    for i, part in enumerate(parts[:-1]):
        if part in BANKS:
            return int(parts[i + 1])
    return None


def in_bank(path: str, index: int) -> str:
    parts = path.split(".")
    at = next(i for i, part in enumerate(parts) if part in BANKS)
    return ".".join([*parts[: at + 1], str(index), *parts[at + 2 :]])


def axis_groups(path: str) -> tuple[int, ...]:
    """Groups along each axis of a weight, a bias, or a LoRA's A (rank, in) and B (out, rank)."""
    layer, name = _layer(path)
    rows, columns = _GROUPS.get(layer, (0, 0))
    kinds = {"bias": (rows,), "lora_a": (0, columns), "lora_b": (rows, 0)}
    return kinds.get(name, (rows, columns))


def leading_slice(a: mx.array, groups: tuple[int, ...], width: float, path: str) -> mx.array:
    for axis, g in enumerate(groups):
        if not g or width == 1:
            continue
        keep = a.shape[axis] // g * width
        if a.shape[axis] % g or keep != int(keep):
            raise SnapGenError(f"{path}: {a.shape[axis]} does not slice to width {width}")
        shape = a.shape
        a = a.reshape(*shape[:axis], g, -1, *shape[axis + 1 :])
        a = a[(slice(None),) * (axis + 1) + (slice(0, int(keep)),)]
        a = a.reshape(*shape[:axis], -1, *shape[axis + 1 :])
    # Not a view: it would hold the whole parent, and strided matmuls round differently.
    return a if width == 1 else mx.contiguous(a)


def slice_flat(params: dict, config: DiTConfig, index: int) -> dict:
    """``slice_params`` on a flat {path: array} dictionary."""
    out = {}
    for path, a in params.items():
        bank = bank_index(path)
        if bank is None:
            out[path] = leading_slice(a, axis_groups(path), config.widths[index], path)
        elif bank == index:
            out[in_bank(path, 0)] = a
    return out


def slice_params(params: dict, config: DiTConfig, index: int) -> dict:
    """Parameter tree of one width, sliced from a supernet's tree. Differentiable.

    Args:
        params: the supernet's tree.
        config: of the supernet.
        index: of the width in ``config.widths``.

    Returns:
        A tree that fits ``DiT(config.variant(index))``.

    Raises:
        SnapGenError: an axis does not divide.
    """
    return tree_unflatten(list(slice_flat(dict(tree_flatten(params)), config, index).items()))


def scatter_add(full: dict, sub: dict, config: DiTConfig, index: int) -> dict:
    """Add a variant's gradients into the supernet's leading slices (adjoint of ``slice_flat``).

    Args:
        full: {path: gradient} of the supernet.
        sub: {path: gradient} of the variant, with its bank entry at 0. An isolated parameter goes
            to its own bank entry, which ``full`` need not hold.
        config: of the supernet.
        index: of the variant in ``config.widths``.
    """
    out = dict(full)
    for path, g in sub.items():
        if bank_index(path) is not None:
            path = in_bank(path, index)
            out[path] = out[path] + g if path in out else g
            continue
        a, shape = out[path], out[path].shape
        # Split each grouped axis into (groups, units) so that one basic index names the slice.
        split_a, split_g, where = [], [], []
        groups = (axis_groups(path) + (0,) * a.ndim)[: a.ndim]
        for n_a, n_g, k in zip(shape, g.shape, groups, strict=True):
            if k > 1:
                split_a += [k, n_a // k]
                split_g += [k, n_g // k]
                where += [slice(None), slice(0, n_g // k)]
            else:
                split_a.append(n_a)
                split_g.append(n_g)
                where.append(slice(0, n_g))
        out[path] = a.reshape(split_a).at[tuple(where)].add(g.reshape(split_g)).reshape(shape)
    return out


def group_size(config: DiTConfig) -> int:
    """The largest group of weights in a row that no width cuts through.

    Raises UsageError if none fits.
    """
    sizes = [config.variant(i).hidden_size for i in range(len(config.widths))]
    sizes += [config.variant(i).num_heads * config.head_dim for i in range(len(config.widths))]
    for group in (64, 32):
        if all(size % group == 0 for size in sizes):
            return group
    raise UsageError(
        f"widths of {sorted(set(sizes))} channels do not divide into groups of 32; convert "
        "without --quantize"
    )


def random_supernet(config: DiTConfig) -> dict:
    """Flat parameters of a freshly initialised supernet (uses MLX's global random state)."""
    params = flat_parameters(DiT(config.variant(len(config.widths) - 1)))
    out = {path: a for path, a in params.items() if bank_index(path) is None}
    for i in range(len(config.widths)):
        sub = flat_parameters(DiT(config.variant(i)))
        out |= {in_bank(p, i): a for p, a in sub.items() if bank_index(p) is not None}
    return out


def empty_models(config: DiTConfig) -> list[DiT]:
    """A ``DiT`` per width, to be given weights."""
    if len(config.widths) == 1:
        return [DiT(config)]
    return [DiT(config.variant(i)) for i in range(len(config.widths))]
