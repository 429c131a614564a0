"""Small random models, public BEATs files and audio for the tests."""

import copy
import math

import numpy as np
import onnx
import torch

from aesanet.axes import AXES
from aesanet.lengths import WindowPolicy
from aesanet.models.aesanet import AESANet
from aesanet.models.config import AESANetConfig, Affine, BEATsConfig, Calibration, HeadConfig
from aesanet.runtime.rows.row import write_row
from aesanet.training.joining import ScoredClips
from aesanet.training.labels import LabelledClip


def tiny_config(**beats):
    """All sizes differ, and half a second of audio reaches all three regions of the distance buckets."""
    sizes = {
        "embed_dim": 24,
        "encoder_layers": 3,
        "encoder_embed_dim": 32,
        "encoder_ffn_embed_dim": 56,
        "encoder_attention_heads": 4,
        "conv_pos": 16,
        "conv_pos_groups": 4,
        "num_buckets": 20,  # near distances below 5,
        "max_distance": 14,  # logarithmic steps up to here
    }
    # Exact in float32, so that a float64 reference can agree with the model in float64 to the last digits.
    calibration = Calibration(CE=Affine(offset=0.25), CU=Affine(scale=0.875), PC=Affine(scale=1.25, offset=-0.5))
    head = HeadConfig(
        adapter_width=20,
        lstm_hidden=12,
        shared_width=16,
        attention_heads=4,
        score_range=(0.5, 9.5),
        calibration=calibration,
    )
    window = WindowPolicy(window_seconds=4.0, hop_seconds=3.0)
    return AESANetConfig(beats=BEATsConfig(**(sizes | beats)), head=head, window=window, weights="untrained")


def random_model(config, seed):
    """An AESANet in eval mode with random parameters, none of them at its initial or a trivial value."""
    generator = torch.Generator().manual_seed(seed)
    model = AESANet(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(_random_tensor(name, parameter.shape, generator))
    return model.eval()


def _random_tensor(name, shape, generator):
    """Random values of the scale that a trained network could have under this name, ours or the public one."""
    noise = torch.randn(shape, generator=generator)
    if name.endswith(("relative_bias.table.weight", "relative_attention_bias.weight", "layer_weights")):
        return noise
    if name.endswith("grep_a"):
        return 1 + 0.5 * noise
    if name.endswith("weight_g"):
        return 1 + 0.2 * noise
    if "norm." in name:
        return 1 + 0.2 * noise if name.endswith("weight") else 0.2 * noise
    if "bias" in name:
        return 0.2 * noise
    gains = {".q_proj": 1.5, ".k_proj": 1.5, "lstm.": 1.5, "axes.": 2.0}  # others 1
    gain = next((value for part, value in gains.items() if part in name), 1.0)
    return gain * noise / math.sqrt(noise[0].numel())


def state_of(model):
    """The model's state dict as the float64 arrays that `reference` takes."""
    return {key: value.double().numpy() for key, value in model.state_dict().items()}


def public_shapes(config, fine_tuned=False):
    """Every key of a public BEATs file with its shape, in the older spelling of weight norm."""
    width, embed, ffn = config.encoder_embed_dim, config.embed_dim, config.encoder_ffn_embed_dim
    heads = config.encoder_attention_heads
    shapes = {"patch_embedding.weight": (embed, 1, 16, 16), "layer_norm.weight": (embed,), "layer_norm.bias": (embed,)}
    if embed != width:
        shapes |= {"post_extract_proj.weight": (width, embed), "post_extract_proj.bias": (width,)}
    shapes |= {
        "encoder.pos_conv.0.bias": (width,),
        "encoder.pos_conv.0.weight_g": (1, 1, config.conv_pos),
        "encoder.pos_conv.0.weight_v": (width, width // config.conv_pos_groups, config.conv_pos),
        "encoder.layer_norm.weight": (width,),
        "encoder.layer_norm.bias": (width,),
    }
    for i in range(config.encoder_layers):
        layer = f"encoder.layers.{i}."
        for projection in "qkv":
            shapes[f"{layer}self_attn.{projection}_proj.weight"] = (width, width)
            shapes[f"{layer}self_attn.{projection}_proj.bias"] = (width,)
        shapes |= {
            layer + "self_attn.out_proj.weight": (width, width),
            layer + "self_attn.out_proj.bias": (width,),
            layer + "self_attn.grep_linear.weight": (8, width // heads),
            layer + "self_attn.grep_linear.bias": (8,),
            layer + "self_attn.grep_a": (1, heads, 1, 1),
            layer + "self_attn.relative_attention_bias.weight": (config.num_buckets, heads),
            layer + "self_attn_layer_norm.weight": (width,),
            layer + "self_attn_layer_norm.bias": (width,),
            layer + "fc1.weight": (ffn, width),
            layer + "fc1.bias": (ffn,),
            layer + "fc2.weight": (width, ffn),
            layer + "fc2.bias": (width,),
            layer + "final_layer_norm.weight": (width,),
            layer + "final_layer_norm.bias": (width,),
        }
    if fine_tuned:
        shapes |= {"predictor.weight": (527, width), "predictor.bias": (527,)}
    return shapes


def public_beats_file(path, config: BEATsConfig, seed, fine_tuned=False, new_weight_norm=False):
    """Write a random checkpoint as the public BEATs files are laid out, and return its content.

    The trunk depends on config and seed alone, so files of the other two choices hold the same network.
    """
    generator = torch.Generator().manual_seed(seed)
    model = {key: _random_tensor(key, shape, generator) for key, shape in public_shapes(config, fine_tuned).items()}
    table = model["encoder.layers.0.self_attn.relative_attention_bias.weight"]
    for i in range(config.encoder_layers):
        model[f"encoder.layers.{i}.self_attn.relative_attention_bias.weight"] = table.clone()
    if new_weight_norm:
        for old, new in (("weight_g", "original0"), ("weight_v", "original1")):
            model[f"encoder.pos_conv.0.parametrizations.weight.{new}"] = model.pop(f"encoder.pos_conv.0.{old}")
    cfg = {
        "input_patch_size": 16,
        "embed_dim": config.embed_dim,
        "conv_bias": False,
        "encoder_layers": config.encoder_layers,
        "encoder_embed_dim": config.encoder_embed_dim,
        "encoder_ffn_embed_dim": config.encoder_ffn_embed_dim,
        "encoder_attention_heads": config.encoder_attention_heads,
        "activation_fn": "gelu",
        "layer_wise_gradient_decay_ratio": 0.6,
        "layer_norm_first": False,
        "deep_norm": config.deep_norm,
        "dropout": 0.0,
        "attention_dropout": 0.0,
        "activation_dropout": 0.0,
        "encoder_layerdrop": 0.05,
        "dropout_input": 0.0,
        "conv_pos": config.conv_pos,
        "conv_pos_groups": config.conv_pos_groups,
        "relative_position_embedding": True,
        "num_buckets": config.num_buckets,
        "max_distance": config.max_distance,
        "gru_rel_pos": True,
        "finetuned_model": fine_tuned,
        "predictor_dropout": 0.0,
        "predictor_class": 527,
    }
    content = {"cfg": cfg, "model": model}
    if fine_tuned:
        content["label_dict"] = {i: f"/m/{i:05}" for i in range(527)}
    torch.save(content, path)
    return content


SPARSE = ("sine", "tones", "sweep", "clicks", "gaps")
"""Those of `synthetic_audio` that leave bins of some frames empty; there a float32 fbank shows its rounding errors."""


def synthetic_audio(rng, seconds):
    """Waveforms by name, float32 [samples] in [-1, 1): noise, tones, sweeps, speechlike bursts and gaps of silence."""
    samples = round(16000 * seconds)
    t = np.arange(samples) / 16000
    noise = rng.standard_normal(samples)
    low, high = 150 * rng.uniform(0.7, 1.4), 6000 * rng.uniform(0.7, 1.2)
    phase = 2 * np.pi * rng.uniform()
    sweep = 2 * np.pi * low * seconds / math.log(high / low) * np.expm1(t / seconds * math.log(high / low))
    pitch = 2 * np.pi * np.cumsum(low * (1 + 0.2 * np.sin(2 * np.pi * 3 * t + phase))) / 16000
    voiced = sum(np.sin(k * pitch) / k for k in range(1, 12))
    syllables = np.maximum(0, np.sin(2 * np.pi * 4 * rng.uniform(0.8, 1.2) * t + phase))
    speechlike = syllables * (0.2 * voiced + 0.05 * noise) + 1e-4 * noise
    gaps = np.where(np.sin(2 * np.pi * 2.5 * t + phase) > 0, 1.0, 0.0)
    tones = sum(0.1 * np.sin(2 * np.pi * f * t + phase) for f in rng.uniform(60, 7500, 5))
    audio = {
        "white_noise": 0.2 * noise,
        "quiet_noise": 1e-4 * noise,
        "red_noise": 0.02 * np.cumsum(noise - noise.mean()) / math.sqrt(samples) * 20,
        "sine": 0.7 * np.sin(2 * np.pi * high * t + phase),
        "tones": tones,
        "sweep": 0.5 * np.sin(sweep),
        "speechlike": speechlike,
        "gaps": gaps * speechlike,
        "clipped": 3 * speechlike,
        "clicks": np.where(rng.uniform(size=samples) < 0.001, rng.uniform(-1, 1, samples), 0),
    }
    return {name: np.clip(wave, -1, 1 - 2**-15).astype(np.float32) for name, wave in audio.items()}


def make_loud(model, logit):
    """Give a model, in place, activations on the scale of trained transformers.

    A few channels of every norm stand far out, and the queries and keys of a head share a direction, which raises all
    attention logits by about `logit`. In exact arithmetic what all keys have in common changes no softmax.
    """
    generator = torch.Generator().manual_seed(0)
    width, heads = model.config.beats.encoder_embed_dim, model.config.beats.encoder_attention_heads
    with torch.no_grad():
        for layer in model.encoder.beats.layers:
            for norm in (layer.self_attn_layer_norm, layer.final_layer_norm):
                channels = torch.randperm(width, generator=generator)[: max(1, width // 200)]
                norm.weight[channels] *= 12.0
            layer.fc1.weight.mul_(3)
            layer.fc2.weight.mul_(6)
            direction = torch.nn.functional.normalize(torch.randn(heads, width // heads, generator=generator))
            shared = (direction * (logit * (width // heads) ** 0.5) ** 0.5).flatten()
            layer.self_attn.q_proj.bias.add_(shared)
            layer.self_attn.k_proj.bias.add_(shared)
            layer.self_attn.grep_linear.weight.div_(8)  # which sees the queries too
    return model


def scored(path, scores, seconds=2.0, **more):
    """An output row."""
    times = {"start_seconds": 0.0, "end_seconds": seconds, "seconds": seconds}
    kind = {"sample_rate": 16_000, "channels": 1, "truncated": False}
    return {"path": str(path), **dict(zip(AXES, map(float, scores), strict=True)), **times, **kind, **more}


def failed(path, code="not_found"):
    """The output row of a clip that could not be scored."""
    return {"path": str(path), "error": {"code": code, "message": "why"}}


def write_lines(path, rows):
    """Rows as JSON lines, as scoring writes them; the path."""
    with open(path, "w", encoding="utf-8") as file:
        for row in rows:
            write_row(file, row)
    return path


def typed(path_or_model):
    """The graph, and the type of every tensor in it as onnx itself infers it, from inputs and weights alone."""
    proto = copy.deepcopy(path_or_model) if isinstance(path_or_model, onnx.ModelProto) else onnx.load(path_or_model)
    del proto.graph.value_info[:]
    proto = onnx.shape_inference.infer_shapes(proto, check_type=True, strict_mode=True)
    values = (*proto.graph.value_info, *proto.graph.input, *proto.graph.output)
    types = {value.name: value.type.tensor_type.elem_type for value in values}
    return proto.graph, types | {t.name: t.data_type for t in proto.graph.initializer}


def label_of(name, scores=(1.0, 2.0, 3.0, 4.0), path="", system=None, ratings=None):
    """A label; its path is its name unless another is given."""
    return LabelledClip(name, name if path == "" else path, system, tuple(scores), ratings)


def labelled_pairs(clips=40, systems=5, seed=0):
    """Clips of some systems with six ratings each, and scores that follow their means."""
    rng = np.random.default_rng(seed)
    ratings = rng.integers(0, 11, (clips, 4, 6)).astype(float)
    labels = [
        label_of(f"{i:03}.wav", of_clip.mean(axis=1), system=f"s{i % systems}", ratings=of_clip)
        for i, of_clip in enumerate(ratings)
    ]
    scores = ratings.mean(axis=2) * 0.5 + 3 + 0.3 * rng.normal(size=(clips, 4))
    return ScoredClips(labels, scores, missing=0, unused=0)
