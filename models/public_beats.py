"""Public BEATs checkpoint files: their cfg and key layout, turned into ours."""

from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor

from aesanet.errors import CheckpointError
from aesanet.lengths import PATCH_SIZE
from aesanet.models.config import GATE_PARTS, BEATsConfig
from aesanet.models.weights import check_dict, check_tensors, read_pickle

KNOWN_FILES = {
    "d43cbfad4d7b56381c061d7a24774f908d4d94c72961f6eb1d9090ff18cd8d34": "BEATs_iter3_plus_AS2M.pt",
}
"""sha256 of public files that this project knows by name."""

# Values of the public class where a file's cfg is silent; they differ from those of the public files.
_CLASS_DEFAULTS: dict[str, Any] = {
    "input_patch_size": -1,
    "activation_fn": "gelu",
    "layer_norm_first": False,
    "relative_position_embedding": False,
    "gru_rel_pos": False,
    "deep_norm": False,
    "max_distance": 1280,
}
# Choices that the public class knows and of which one is implemented: the one of every public file.
_IMPLEMENTED: dict[str, Any] = {
    "input_patch_size": PATCH_SIZE,
    "activation_fn": "gelu",
    "layer_norm_first": False,
    "relative_position_embedding": True,
    "gru_rel_pos": True,
}
_FINE_TUNED_PREFIX = "predictor."  # the classifier of fine-tuned files, not part of the trunk


def read_public(path: str | Path) -> tuple[BEATsConfig, dict[str, Tensor]]:
    """Read a public file into a config and a state dict of `BEATs`; raises CheckpointError."""
    content = read_pickle(path)
    if not {"cfg", "model"} <= content.keys():
        raise CheckpointError(
            f"{path}: not a BEATs file: it has {sorted(map(str, content))}, expected 'cfg' and 'model'"
        )
    config = _config(path, content["cfg"])
    return config, _state(path, config, content["model"])


def public_layout(config: BEATsConfig) -> dict[str, tuple[int, ...]]:
    """Every key of a pre-trained public file of this size, with its shape; 250 for the base model."""
    width, ffn = config.encoder_embed_dim, config.encoder_ffn_embed_dim
    layout: dict[str, tuple[int, ...]] = {
        "patch_embedding.weight": (config.embed_dim, 1, PATCH_SIZE, PATCH_SIZE),
        "layer_norm.weight": (config.embed_dim,),
        "layer_norm.bias": (config.embed_dim,),
        "encoder.pos_conv.0.bias": (width,),
        "encoder.pos_conv.0.weight_g": (1, 1, config.conv_pos),
        "encoder.pos_conv.0.weight_v": (width, width // config.conv_pos_groups, config.conv_pos),
        "encoder.layer_norm.weight": (width,),
        "encoder.layer_norm.bias": (width,),
    }
    if config.conv_bias:
        layout["patch_embedding.bias"] = (config.embed_dim,)
    if config.embed_dim != width:
        layout["post_extract_proj.weight"], layout["post_extract_proj.bias"] = (width, config.embed_dim), (width,)
    heads = config.encoder_attention_heads
    layer: dict[str, tuple[int, ...]] = {
        "self_attn.grep_linear.weight": (GATE_PARTS, config.head_width),
        "self_attn.grep_linear.bias": (GATE_PARTS,),
        "self_attn.grep_a": (1, heads, 1, 1),
        "self_attn.relative_attention_bias.weight": (config.num_buckets, heads),
        "fc1.weight": (ffn, width),
        "fc1.bias": (ffn,),
        "fc2.weight": (width, ffn),
        "fc2.bias": (width,),
    }
    for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
        layer[f"self_attn.{name}.weight"], layer[f"self_attn.{name}.bias"] = (width, width), (width,)
    for name in ("self_attn_layer_norm", "final_layer_norm"):
        layer[f"{name}.weight"], layer[f"{name}.bias"] = (width,), (width,)
    for index in range(config.encoder_layers):
        layout |= {f"encoder.layers.{index}.{name}": shape for name, shape in layer.items()}
    return layout


def _config(path: str | Path, cfg: Any) -> BEATsConfig:
    if not isinstance(cfg, dict):
        raise CheckpointError(f"{path}: cfg is {type(cfg).__name__}; expected a dict of settings")
    known = _CLASS_DEFAULTS | cfg
    for name, value in _IMPLEMENTED.items():
        if known[name] != value:
            raise CheckpointError(f"{path}: cfg {name} is {known[name]!r}; only {value!r} is implemented")
    ours = {name: known[name] for name in BEATsConfig.__struct_fields__ if name in known}
    try:
        return msgspec.convert(ours, BEATsConfig)
    except msgspec.ValidationError as error:
        raise CheckpointError(f"{path}: cfg: {error}") from None


def _state(path: str | Path, config: BEATsConfig, model: Any) -> dict[str, Tensor]:
    check_dict(path, model)
    public = {_one_spelling(key): value for key, value in model.items() if not key.startswith(_FINE_TUNED_PREFIX)}
    check_tensors(path, public, public_layout(config))
    gain, direction = (public.pop(f"encoder.pos_conv.0.weight_{part}") for part in "gv")
    norm = direction.double().norm(dim=(0, 1), keepdim=True)
    public["encoder.pos_conv.0.weight"] = (gain.double() * direction.double() / norm).float()
    tables = [
        public.pop(f"encoder.layers.{i}.self_attn.relative_attention_bias.weight") for i in range(config.encoder_layers)
    ]
    for index, table in enumerate(tables):
        if not torch.equal(table, tables[0]):
            raise CheckpointError(
                f"{path}: encoder.layers.{index}.self_attn.relative_attention_bias.weight differs from layer 0's; "
                "BEATs shares one table among its layers"
            )
    public["encoder.relative_bias.table.weight"] = tables[0]
    return {_our_name(key): value.float() for key, value in public.items()}


def _one_spelling(key: str) -> str:
    """Newer torch writes weight norm's `weight_g` and `weight_v` as parametrizations."""
    for ours, theirs in (("weight_g", "original0"), ("weight_v", "original1")):
        key = key.replace(f"pos_conv.0.parametrizations.weight.{theirs}", f"pos_conv.0.{ours}")
    return key


def _our_name(key: str) -> str:
    for public, ours in (
        ("encoder.layer_norm.", "encoder_norm."),
        ("encoder.pos_conv.0.", "positions.conv."),
        ("encoder.", ""),
    ):
        if key.startswith(public):
            return ours + key.removeprefix(public)
    return key
