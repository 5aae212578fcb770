"""MLX's own packed weights: a scale and a bias for every group of a row."""

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten

from ..errors import SnapGenError


def dequantize(tensors: dict[str, mx.array], shapes: dict[str, tuple]) -> dict[str, mx.array]:
    """Replace packed affine weights by floats; ``shapes`` gives each weight's float shape.

    Bits and group size follow from the shapes: a row of n weights packs into n·bits/32 words and
    has n/group scales.
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
                scales,
                tensors[f"{layer}.biases"],
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


def float_weight(layer: nn.Module) -> mx.array:
    """The weight of a Linear layer, packed or not, as floats."""
    if not isinstance(layer, nn.QuantizedLinear):
        return layer.weight
    how = {"group_size": layer.group_size, "bits": layer.bits, "mode": layer.mode}
    return mx.dequantize(layer.weight, layer.scales, layer.get("biases"), **how)


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
