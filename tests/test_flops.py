"""Operations by formula against those that PyTorch counts, part by part.

The network runs on PyTorch's meta device, which computes shapes alone: there the LSTM and attention are not fused, and
the counter sees all of their products.
"""

from dataclasses import asdict

import pytest
import torch
from conftest import DEMO_CHECKPOINT, ROOT
from helpers import tiny_config
from torch.utils.flop_counter import FlopCounterMode

from aesanet.lengths import MIN_SAMPLES, num_tokens
from aesanet.models.aesanet import AESANet
from aesanet.models.checkpoint import load_checkpoint
from aesanet.models.config import AESANetConfig
from aesanet.models.flops import clip_flops

CONFIGS = {
    "tiny": tiny_config,
    "equal widths, odd kernel": lambda: tiny_config(embed_dim=32, conv_pos=15),
    "demo": lambda: load_checkpoint(DEMO_CHECKPOINT).config,
    "base": AESANetConfig,
}


def counted(config, num_samples):
    """What PyTorch counts in each module of a network, by parts of `Flops`, and in all of it."""
    with torch.device("meta"):
        model = AESANet(config)
        with torch.inference_mode(), FlopCounterMode(display=False) as counter:
            # Without the front end's autocast, which this device has not.
            fbank = model.frontend.fbank(torch.zeros(1, num_samples))
            tokens = torch.tensor([num_tokens(num_samples)])
            model.head(model.encoder(fbank, tokens), tokens)

    def of(*modules):
        return sum(sum(counter.flop_counts[module].values()) for module in modules)

    layers = [f"Encoder.beats.layers.{number}" for number in range(config.beats.encoder_layers)]
    axes = [f"Head.axes.{axis}" for axis in model.head.axes]
    parts = {
        "frontend": of("KaldiFbank"),
        "patches": of("Encoder.beats.patch_embedding", "Encoder.beats.post_extract_proj"),
        "positions": of("Encoder.beats.positions"),
        "attention": of(*(f"{layer}.self_attn" for layer in layers)),
        "feed_forward": of(*(f"{layer}.{product}" for layer in layers for product in ("fc1", "fc2"))),
        **{name: of(f"Head.{name}") for name in ("adapter", "lstm", "shared")},
        "axes": of(*axes),
    }
    return parts, counter.get_total_flops()


@pytest.mark.parametrize(
    ("name", "num_samples"),
    [
        *((name, samples) for name in list(CONFIGS)[:3] for samples in (MIN_SAMPLES, 5_359, 15_555, 40_000)),
        *(("base", samples) for samples in (MIN_SAMPLES, 33_333)),
    ],
)
def test_each_part_is_what_pytorch_counts(name, num_samples):
    config = CONFIGS[name]()
    flops = clip_flops(config, num_samples)
    assert (asdict(flops), flops.total) == counted(config, num_samples)


def test_ten_seconds_of_the_base_size():
    """102.2 GFLOP, of which the encoder's are 98.6; the README tells them."""
    flops = clip_flops(AESANetConfig(), 160_000)
    assert flops.total == 102_172_935_040
    assert flops.patches + flops.positions + flops.attention + flops.feed_forward == 98_607_824_896
    assert f"({flops.total / 1e9:.1f} GFLOP a 10 s clip of base size" in (ROOT / "README.md").read_text()


def test_what_does_not_fill_a_patch_is_seen_by_the_front_end_alone():
    one, more = (asdict(clip_flops(tiny_config(), samples)) for samples in (MIN_SAMPLES, 5_359))
    assert {part for part in one if one[part] != more[part]} == {"frontend"}
