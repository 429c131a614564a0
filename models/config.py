"""The sizes and choices that travel in every checkpoint; a name or a type that is not known is refused by name."""

from typing import Literal

import msgspec

from aesanet.lengths import WindowPolicy

GATE_PARTS = 8
"""Outputs of BEATs' gate projection (`grep_linear`): two gates, each the sum of four."""


LARGEST_SIZE, LARGEST_DEPTH = 2**16, 256
"""Of anything in a config: a damaged one must not ask for all memory before it is refused."""


def _check_size(name: str, value: int) -> None:
    largest = LARGEST_DEPTH if name.endswith("_layers") else LARGEST_SIZE
    if not 1 <= value <= largest:
        raise ValueError(f"{name} is {value}; it must be from 1 to {largest}")


class BEATsConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Sizes of a BEATs trunk, under the names of the public `cfg`; the defaults are the public base model's."""

    embed_dim: int = 512
    conv_bias: bool = False
    encoder_layers: int = 12
    encoder_embed_dim: int = 768
    encoder_ffn_embed_dim: int = 3072
    encoder_attention_heads: int = 12
    deep_norm: bool = True
    conv_pos: int = 128
    conv_pos_groups: int = 16
    num_buckets: int = 320
    max_distance: int = 800

    def __post_init__(self) -> None:
        for name in self.__struct_fields__:
            if not isinstance(value := getattr(self, name), bool):
                _check_size(name, value)
        for name in ("encoder_attention_heads", "conv_pos_groups"):
            if self.encoder_embed_dim % getattr(self, name):
                raise ValueError(
                    f"{name} is {getattr(self, name)}; it must divide encoder_embed_dim, {self.encoder_embed_dim}"
                )
        if self.num_buckets % 4 or self.max_distance <= self.num_buckets // 4:
            raise ValueError(
                f"num_buckets is {self.num_buckets} and max_distance {self.max_distance}; "
                "num_buckets must be a multiple of 4, and max_distance above a quarter of it"
            )

    @property
    def head_width(self) -> int:
        """Width of one attention head."""
        return self.encoder_embed_dim // self.encoder_attention_heads

    @property
    def residual_scale(self) -> float:
        """DeepNorm's alpha, (2 * layers)^(1/4), which multiplies the residual stream (arXiv 2203.00555)."""
        return float((2 * self.encoder_layers) ** 0.25) if self.deep_norm else 1.0


class Affine(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A calibrated score is `scale * score + offset`; a positive scale leaves ranks untouched."""

    scale: float = 1.0
    offset: float = 0.0

    def __post_init__(self) -> None:
        if not self.scale > 0:
            raise ValueError(f"scale is {self.scale}; it must be above 0, or the order of clips would change")


class Calibration(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One affine map an axis, identity by default."""

    CE: Affine = Affine()
    CU: Affine = Affine()
    PC: Affine = Affine()
    PQ: Affine = Affine()


class HeadConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The AESA-Net head: structure of the paper (arXiv 2509.03292), sizes, which it does not give, of this project."""

    normalise_layers: bool = True
    adapter_width: int = 256
    lstm_layers: int = 2
    lstm_hidden: int = 128
    shared_width: int = 256
    dropout: float = 0.3
    attention_heads: int = 16
    score_range: tuple[float, float] = (0.0, 10.0)
    calibration: Calibration = Calibration()

    def __post_init__(self) -> None:
        for name in ("adapter_width", "lstm_layers", "lstm_hidden", "shared_width", "attention_heads"):
            _check_size(name, getattr(self, name))
        if self.shared_width % self.attention_heads:
            raise ValueError(
                f"attention_heads is {self.attention_heads}; it must divide shared_width, {self.shared_width}"
            )
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is {self.dropout}; it must be in [0, 1)")
        low, high = self.score_range
        if not low < high:
            raise ValueError(f"score_range is [{low}, {high}]; the first must be below the second")


class AESANetConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Everything that a checkpoint says of itself.

    `weights` says what the numbers are worth: `trained` on human ratings, `demo` (trained on the demo's own
    labels) or `untrained` (random).
    """

    beats: BEATsConfig = BEATsConfig()
    head: HeadConfig = HeadConfig()
    window: WindowPolicy = WindowPolicy()
    weights: Literal["trained", "demo", "untrained"] = "trained"
