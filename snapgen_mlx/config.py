"""Configurations of transformers: keys of ``transformer/config.json``, known geometries."""

import dataclasses
from dataclasses import dataclass, field
from typing import ClassVar, Self

from .errors import SnapGenError, UsageError, shown

CLASS_NAME = "SnapGenPPTransformer2DModel"
QWEN_IMAGE = "QwenImageTransformer2DModel"
QWEN_TEXT = "qwen"  # the name of the only text states that Qwen-Image reads
VARIANT_NAMES = {0.375: "tiny", 0.5: "small", 1.0: "full"}


class ConfigMixin:
    """A dataclass made from the dictionary of a config.json."""

    __dataclass_fields__: ClassVar[dict[str, dataclasses.Field]]

    @classmethod
    def from_dict(cls, d: dict) -> Self:
        """Keys that the class does not know are left out."""
        return cls(**{k: v for k, v in d.items() if k in cls.__dataclass_fields__})


@dataclass
class DiTConfig(ConfigMixin):
    """One SnapGen++ transformer (architecture section 4; the switches of ablations A-D last).

    With several ``widths`` the sizes are those of the full width and the checkpoint is a supernet;
    ``variant(i)`` is the configuration of one width cut out of it.
    """

    # What guidance leads away from without a negative text: a learned token instead.
    null_text: ClassVar[str | None] = None
    rescale_guidance: ClassVar[bool] = False  # whether guidance keeps the length of each token
    in_channels: int = 16
    patch_size: int = 2
    hidden_size: int = 2048
    head_dim: int = 64
    num_heads: int = 32
    num_kv_heads: int = 16
    cross_kv_heads: int = 4
    caption_dim: int = 2048
    text_dims: dict = field(default_factory=lambda: {"clip": 512, "gemma": 2560})
    layers: list = field(default_factory=lambda: [8, 10, 10])
    ffn_ratio: list = field(default_factory=lambda: [4, 3, 4])
    bna_blocks: int = 16
    bna_radius: int = 1
    rope_theta: float = 10000.0
    widths: list = field(default_factory=lambda: [0.375, 0.5, 1.0])
    variant_name: str | None = None
    attention: list = field(default_factory=lambda: ["assa", "dense", "assa"])
    mid_skips: bool = True
    downsample: bool = True

    def __post_init__(self):
        positive = ["in_channels", "patch_size", "hidden_size", "head_dim", "num_heads"]
        positive += ["num_kv_heads", "cross_kv_heads", "caption_dim", "bna_blocks"]
        for name in positive:
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or not 0 < value <= 2**20:
                raise SnapGenError(f"transformer config: {name} must be a positive integer")
        if not isinstance(self.bna_radius, int) or self.bna_radius < 0:
            raise SnapGenError("transformer config: bna_radius must be an integer >= 0")
        if not isinstance(self.rope_theta, (int, float)) or self.rope_theta <= 0:
            raise SnapGenError("transformer config: rope_theta must be a positive number")
        lists: dict[str, type | tuple[type, ...]] = {
            "layers": int,
            "ffn_ratio": (int, float),
            "attention": str,
        }
        for name, kind in lists.items():
            value = getattr(self, name)
            if not isinstance(value, list | tuple) or len(value) != 3:
                raise SnapGenError(f"transformer config: {name} must have three entries")
            if not all(isinstance(v, kind) for v in value):
                raise SnapGenError(f"transformer config: {name} has an entry of a wrong type")
        if not all(0 <= n <= 1000 for n in self.layers) or not sum(self.layers):
            raise SnapGenError("transformer config: layers must be counts, not all zero")
        if not all(0 < r <= 64 for r in self.ffn_ratio):
            raise SnapGenError("transformer config: ffn_ratio must be positive")
        if set(self.attention) - {"assa", "dense"}:
            raise SnapGenError('transformer config: attention must be "assa" or "dense" per stage')
        if not isinstance(self.text_dims, dict) or not all(
            isinstance(k, str) and k.isidentifier() and k != "null" and isinstance(v, int) and v > 0
            for k, v in self.text_dims.items()
        ):
            raise SnapGenError("transformer config: text_dims must map encoder names to dimensions")
        if self.num_heads % self.num_kv_heads:
            raise SnapGenError("transformer config: num_kv_heads must divide num_heads")
        if self.head_dim % 4:
            raise SnapGenError("transformer config: head_dim must be a multiple of 4 (2-D RoPE)")
        if not isinstance(self.widths, list | tuple) or not self.widths:
            raise SnapGenError("transformer config: widths must be a list of fractions")
        for w in self.widths:
            if not isinstance(w, (int, float)) or not 0 < w <= 1:
                raise SnapGenError(f"transformer config: width {w!r} is not in (0, 1]")
            for size in (self.hidden_size, self.num_heads, self.num_kv_heads):
                if size * w != int(size * w):
                    raise SnapGenError(f"transformer config: width {w} does not divide {size}")
        if list(self.widths) != sorted(set(self.widths)) or self.widths[-1] != 1.0:
            raise SnapGenError("transformer config: widths must rise and end with 1.0")

    @classmethod
    def from_dict(cls, d: dict) -> Self:
        """Read ``transformer/config.json``. Raises SnapGenError for another model's config."""
        if d.get("_class_name", CLASS_NAME) != CLASS_NAME or "hidden_size" not in d:
            other = d.get("_class_name") or d.get("model_type") or "another model"
            raise SnapGenError(
                f"this config is of {other}, not of a SnapGen++ transformer ({CLASS_NAME})"
            )
        names = {f.name for f in dataclasses.fields(cls)} - {"variant_name"}
        other = set(d) - names - {"_class_name", "_diffusers_version", "variant", "quantization"}
        if other:
            raise SnapGenError(f"transformer config: unknown key {sorted(other)[0]!r}")
        return super().from_dict(d | {"variant_name": d.get("variant")})

    def to_dict(self) -> dict:
        d = dataclasses.asdict(self)
        name = d.pop("variant_name")
        return {"_class_name": CLASS_NAME, **d, **({"variant": name} if name else {})}

    @property
    def variants(self) -> list[str]:
        """Names of the widths, narrowest first: of three, whatever they are, tiny, small, full."""
        if len(self.widths) == 1:
            return [self.variant_name or "full"]
        if len(self.widths) == len(VARIANT_NAMES):
            return list(VARIANT_NAMES.values())
        return [VARIANT_NAMES.get(w, f"w{w:g}") for w in self.widths]

    def variant_index(self, name: str) -> int:
        """Index into ``widths`` of a variant's name. Raises UsageError for an unknown one."""
        if not isinstance(name, str) or name not in self.variants:
            raise UsageError(
                f"no variant {shown(name)} in this model; it has {', '.join(self.variants)}"
            )
        return self.variants.index(name)

    def variant(self, index: int) -> Self:
        """The configuration of one width as a model of its own (architecture section 3)."""
        w = self.widths[index]
        return dataclasses.replace(
            self,
            hidden_size=int(self.hidden_size * w),
            num_heads=int(self.num_heads * w),
            num_kv_heads=int(self.num_kv_heads * w),
            widths=[1.0],
            variant_name=self.variants[index],
        )

    @classmethod
    def from_preset(cls, name: str) -> Self:
        """ "full" (the 1.6 B supernet), "small" and "tiny" (its slices), "embedded"
        (sizes of the embedded model's first edition)."""
        if name == "embedded":
            return cls(
                hidden_size=256,
                head_dim=16,
                num_heads=16,
                num_kv_heads=8,
                cross_kv_heads=4,
                caption_dim=256,
                text_dims={"static": 128},
                layers=[1, 6, 2],
                bna_blocks=4,
            )
        full = cls()
        return full if name == "full" else full.variant(full.variant_index(name))

    @property
    def token_multiple(self) -> int:
        """Latent height and width must be multiples of this (windows and BNA blocks fit)."""
        return 4 * self.patch_size

    @property
    def latent_channels(self) -> int:
        return self.in_channels

    def takes(self, h: int, w: int) -> bool:
        """Whether a latent of this size falls into whole windows and blocks."""
        tokens = h * w // self.patch_size**2
        return not (h % self.token_multiple or w % self.token_multiple or tokens % self.bna_blocks)


@dataclass
class QwenImageConfig(ConfigMixin):
    """Qwen-Image's transformer: keys of diffusers' class, the published sizes.

    It has one width. Guidance leads away from the states of ``null_text``, and keeps the length
    of each token's velocity.
    """

    null_text: ClassVar[str | None] = " "
    rescale_guidance: ClassVar[bool] = True
    variants: ClassVar[list[str]] = ["full"]
    patch_size: int = 2
    in_channels: int = 64  # channels of a token: those of the latent, patch_size² times
    out_channels: int = 16
    num_layers: int = 60
    attention_head_dim: int = 128
    num_attention_heads: int = 24
    joint_attention_dim: int = 3584
    axes_dims_rope: tuple[int, int, int] = (16, 56, 56)

    def __post_init__(self):
        for field_ in dataclasses.fields(self)[:-1]:
            value = getattr(self, field_.name)
            if type(value) is not int or value < 1:
                raise SnapGenError(f"Qwen-Image config: {field_.name} must be a positive integer")
        axes = self.axes_dims_rope
        if len(axes) != 3 or any(type(n) is not int or n < 2 or n % 2 for n in axes):
            raise SnapGenError("Qwen-Image config: axes_dims_rope must be three even numbers")
        if sum(axes) != self.attention_head_dim:
            raise SnapGenError("Qwen-Image config: axes_dims_rope must add up to a head's dims")
        if self.in_channels != self.out_channels * self.patch_size**2:
            raise SnapGenError("Qwen-Image config: in_channels must be a patch of out_channels")

    @classmethod
    def from_dict(cls, d: dict) -> Self:
        """Read a config.json. Raises SnapGenError for variants that work otherwise."""
        for key in ("guidance_embeds", "zero_cond_t", "use_additional_t_cond", "use_layer3d_rope"):
            if d.get(key):
                raise SnapGenError(f"Qwen-Image config: {key} = {d[key]!r} is not supported")
        return super().from_dict(d)

    @property
    def hidden_size(self) -> int:
        return self.num_attention_heads * self.attention_head_dim

    @property
    def latent_channels(self) -> int:
        return self.out_channels

    @property
    def text_dims(self) -> dict[str, int]:
        return {QWEN_TEXT: self.joint_attention_dim}

    @property
    def token_multiple(self) -> int:
        """Latent height and width must be multiples of this."""
        return self.patch_size

    def variant_index(self, name: str) -> int:
        """Raises UsageError for another name than that of the only width."""
        if not isinstance(name, str) or name not in self.variants:
            raise UsageError(f"no variant {shown(name)} in this model; it has {self.variants[0]}")
        return 0

    def takes(self, h: int, w: int) -> bool:
        """Whether a latent of this size falls into whole tokens."""
        return not (h % self.token_multiple or w % self.token_multiple)


TransformerConfig = DiTConfig | QwenImageConfig
