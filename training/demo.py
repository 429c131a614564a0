"""Makes the demo checkpoint: random weights from a seed, small, and said to be untrained wherever it goes.

python -m aesanet.training.demo models/demo/demo.safetensors
"""

import sys

from aesanet.models.checkpoint import save_checkpoint
from aesanet.models.config import AESANetConfig, BEATsConfig, HeadConfig
from aesanet.models.untrained import untrained_model

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
)


if __name__ == "__main__":
    save_checkpoint(untrained_model(CONFIG, SEED), sys.argv[1])
