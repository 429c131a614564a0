"""Networks with random weights, for demonstrations and measurements of speed and agreement."""

import msgspec
import torch

from aesanet.models.aesanet import AESANet
from aesanet.models.config import AESANetConfig


def untrained_model(config: AESANetConfig, seed: int) -> AESANet:
    """An AESA-Net of any size with seeded random weights, in eval mode, marked `untrained`.

    PyTorch's own initialisation gives every clip nearly the same scores, which would make any comparison of two
    engines look good; weights are made larger until scores of unlike sounds lie whole points apart.
    """
    torch.manual_seed(seed)
    model = AESANet(msgspec.structs.replace(config, weights="untrained"))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim > 1:
                weight.mul_(8.0 if name.endswith("score.weight") else 2.0 if name.startswith("head.") else 1.5)
    return model.eval()
