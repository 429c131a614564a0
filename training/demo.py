"""Makes the demo checkpoint: random weights from a seed, small, and said to be untrained wherever it goes.

python -m aesanet.training.demo models/demo/demo.safetensors
"""

import sys

import torch

from aesanet.models.aesanet import AESANet
from aesanet.models.checkpoint import save_checkpoint
from aesanet.models.config import AESANetConfig, BEATsConfig, HeadConfig

SEED = 2509
CONFIG = AESANetConfig(
    beats=BEATsConfig(
        embed_dim=128,
        encoder_layers=4,
        encoder_embed_dim=128,
        encoder_ffn_embed_dim=512,
        encoder_attention_heads=4,
    ),
    head=HeadConfig(adapter_width=128, lstm_hidden=64, shared_width=128),
    weights="untrained",
)


def untrained_model() -> AESANet:
    """An AESA-Net of demo size with seeded random weights, in eval mode.

    PyTorch's own initialisation gives every clip nearly the same scores, which would make any comparison of two
    engines look good; weights are made larger until scores of unlike sounds lie whole points apart.
    """
    torch.manual_seed(SEED)
    model = AESANet(CONFIG)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim > 1:
                weight.mul_(8.0 if name.endswith("score.weight") else 2.0 if name.startswith("head.") else 1.5)
    return model.eval()


if __name__ == "__main__":
    save_checkpoint(untrained_model(), sys.argv[1])
