"""MLX's own packed weights: a scale and a bias for every group of a row."""

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten

from ..errors import SnapGenError


def dequantize(tensors: dict[str, mx.array], shapes: dict[str, tuple]) -> dict[str, mx.array]:
    """Replace packed affine weights by floats.

    Bits and group size follow from the shapes: a row of n weights has n·bits/32 words and n/group
    scales.

    Args:
        tensors: {key: array} with packed weights, scales and biases.
        shapes: {weight key: float shape}.
    """
    out = {k: a for k, a in tensors.items() if not k.endswith((".scales", ".biases"))}
    for key, scales in tensors.items():
        if not key.endswith(".scales"):
            continue
        layer = key.removesuffix(".scales")
        try:
            packed, n = tensors[f"{layer}.weight"], shapes[f"{layer}.weight"][-1]
            out[f"{layer}.weight"] = mx.dequantize(
                packed,
                # In half precision each weight would be rounded once more.
                scales.astype(mx.float32),
                tensors[f"{layer}.biases"].astype(mx.float32),
                group_size=n // scales.shape[-1],
                bits=packed.shape[-1] * 32 // n,
            )
        except (KeyError, ValueError, ZeroDivisionError) as e:
            raise SnapGenError(f"{layer} is not an affine-quantized layer of this model") from e
    return out


def quantize_like(module: nn.Module, tensors: dict[str, mx.array]) -> None:
    """Make those layers quantized whose weights are packed in ``tensors``."""

    def how(path: str, layer: nn.Module):
        if f"{path}.scales" not in tensors:
            return False
        n, packed = layer.weight.shape[-1], tensors[f"{path}.weight"].shape[-1]
        return {"group_size": n // tensors[f"{path}.scales"].shape[-1], "bits": packed * 32 // n}

    nn.quantize(module, class_predicate=how)
    answer_in_kind(module)


class QuantizedLinear(nn.QuantizedLinear):
    """Answers in the type of its input: scales of a finer one would raise all that follows."""

    def __call__(self, x: mx.array) -> mx.array:
        return super().__call__(x).astype(x.dtype)


def answer_in_kind(module: nn.Module) -> None:
    """Make every packed layer of a model a ``QuantizedLinear`` of ours."""
    for layer in module.modules():
        if type(layer) is nn.QuantizedLinear:
            layer.__class__ = QuantizedLinear


def cast_floats(tensors: dict[str, mx.array], dtype: mx.Dtype) -> dict[str, mx.array]:
    """Cast tensors to the type to compute with.

    Packed weights are integers and stay. Scales and biases of groups keep a finer type: rounded to
    bfloat16 they would add half as much again to the error of 8 bits.

    Args:
        tensors: {key: array}.
        dtype: to compute with.
    """
    out = {}
    for key, a in tensors.items():
        of_groups = key.endswith((".scales", ".biases"))
        if not mx.issubdtype(a.dtype, mx.floating) or (of_groups and _finer(a.dtype, dtype)):
            out[key] = a
        else:
            out[key] = a.astype(dtype)
    return out


def _finer(a: mx.Dtype, b: mx.Dtype) -> bool:
    return mx.finfo(a).eps < mx.finfo(b).eps


def float_weight(layer: nn.Module) -> mx.array:
    """The weight of a Linear layer, packed or not, as floats."""
    if not isinstance(layer, nn.QuantizedLinear):
        return layer.weight
    how = {"group_size": layer.group_size, "bits": layer.bits, "mode": layer.mode}
    scales, biases = layer.scales, layer.get("biases")
    if biases is not None:  # affine, whose scales are floats
        scales, biases = scales.astype(mx.float32), biases.astype(mx.float32)
    return mx.dequantize(layer.weight, scales, biases, **how)


def dequantize_layers(module: nn.Module, dtype: mx.Dtype) -> None:
    """Make a model's packed Linear layers float ones."""
    layers = []
    for path, packed in module.named_modules():
        if isinstance(packed, nn.QuantizedLinear):
            layer = nn.Linear(1, 1, bias="bias" in packed)
            layer.weight = float_weight(packed).astype(dtype)
            if "bias" in packed:
                layer.bias = packed.bias.astype(dtype)
            layers.append((path, layer))
    module.update_modules(tree_unflatten(layers))
