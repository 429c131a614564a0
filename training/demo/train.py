"""Trains the demo checkpoint: the whole network, small trunk and full head, from random weights."""

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

import numpy as np
import torch
from torch import nn

from aesanet.hashing import file_sha256
from aesanet.lengths import MIN_SAMPLES, WindowPolicy
from aesanet.models.aesanet import AESANet
from aesanet.models.config import AESANetConfig, BEATsConfig
from aesanet.padding import pad_batch
from aesanet.runtime.audio.decode import clip_blocks
from aesanet.runtime.rows.row import Clip
from aesanet.runtime.windows import split_windows
from aesanet.training.cache import cached_data
from aesanet.training.config import TrainingConfig
from aesanet.training.dataset import Data, Trunk, check_missing, find_audio
from aesanet.training.demo.label import Label
from aesanet.training.demo.plan import SEED, DemoClip, DemoSplit
from aesanet.training.demo.tables import LABELS_FILE, REFERENCES_FILE
from aesanet.training.labels import LabelledClip
from aesanet.training.progress import Progress
from aesanet.training.trainer import train

CHECKPOINT: Final = Path("models/demo/demo.safetensors")

BEATS: Final = BEATsConfig(
    embed_dim=128,
    encoder_layers=4,
    encoder_embed_dim=192,
    encoder_ffn_embed_dim=768,
    encoder_attention_heads=4,
)
CONFIG: Final = TrainingConfig(
    max_seconds=6.0,
    batch_size=32,
    learning_rate=8e-4,
    warmup_steps=200,
    schedule="cosine",
    weight_decay=0.01,
    epochs=4,
    patience=4,
    precision="bf16",
    device="cpu",
    seed=SEED,
)


def new_model(beats: BEATsConfig = BEATS, seed: int = SEED) -> AESANet:
    """The demo's network with random weights, `demo` in its config.

    DeepNorm's own initialisation (arXiv 2203.00555): values, outputs and feed-forward weights are drawn smaller by
    (8 * layers)^(-1/4), which is what lets a post-norm transformer learn from nothing.
    """
    torch.manual_seed(seed)
    model = AESANet(AESANetConfig(beats=beats, window=CONFIG.window, weights="demo"))
    gain = (8 * beats.encoder_layers) ** -0.25
    for name, weight in model.encoder.beats.layers.named_parameters():
        if name.endswith("proj.weight") or name.endswith(("fc1.weight", "fc2.weight")):
            nn.init.xavier_normal_(weight, gain if not name.endswith(("q_proj.weight", "k_proj.weight")) else 1.0)
    nn.init.normal_(model.encoder.beats.relative_bias.table.weight, std=0.02)  # drawn from N(0, 1), it drowns q k^T
    return model


def demo_data(
    model: AESANet,
    trunk: Trunk,
    audio: Path,
    clips: Sequence[DemoClip],
    labels: Sequence[Label],
    split: DemoSplit,
    cache: Path,
    policy: WindowPolicy = CONFIG.window,
) -> Data:
    """The rendered clips of one split, with what the network takes in of them in `cache`."""
    chosen = [
        LabelledClip(
            id=clip.id,
            path=f"{clip.id}.flac",
            system=None,
            scores=one.scores,
            ratings=None,
        )
        for clip, one in zip(clips, labels, strict=True)
        if clip.split == split
    ]
    found, missing = find_audio(chosen, audio, cache, Progress())
    check_missing(missing, len(chosen))
    return cached_data(model, trunk, found, policy, cache, Progress())


def train_demo(
    audio: Path,
    clips: Sequence[DemoClip],
    labels: Sequence[Label],
    run: Path,
    out: Path,
    packages: Mapping[str, str],
    beats: BEATsConfig = BEATS,
) -> None:
    """Train on the rendered clips in `audio`, and put the best checkpoint at `out`, with its account beside it.

    packages : versions of the packages that the audio came from, for the account
    """
    model = new_model(beats)
    training, validation = (
        demo_data(model, "trained", audio, clips, labels, split, run / "cache") for split in ("train", "validation")
    )
    result = train(model, "trained", training, validation, CONFIG, run, Lines())
    shutil.copyfile(result.checkpoint, out)
    for name in ("epochs.csv", "epochs.png"):
        shutil.copyfile(run / name, out.with_name(name))
    account = json.loads((run / "training.json").read_text())
    account |= {
        "checkpoint_sha256": file_sha256(out),
        "labels": {file.name: file_sha256(file) for file in (LABELS_FILE, REFERENCES_FILE)},
        "packages": dict(packages),
    }
    out.with_name("training.json").write_text(json.dumps(account, indent=2) + "\n")


@torch.inference_mode()
def model_scores(model: AESANet, audio: Path, names: Sequence[str]) -> dict[str, np.ndarray]:
    """float [4] a clip: the mean over its windows, weighted by their lengths, as `aesanet score` has it."""
    scores = {}
    for name in names:
        blocks = clip_blocks(Clip(str(audio / f"{name}.flac")))
        windows = [w for w in split_windows(blocks, model.config.window) if len(w) >= MIN_SAMPLES]
        waveform, num_samples = pad_batch(windows)
        each = model(torch.from_numpy(waveform), torch.from_numpy(num_samples)).numpy()
        scores[name] = num_samples @ each / num_samples.sum()
    return scores


class Lines(Progress):
    """Prints the trainer's lines."""

    def note(self, line: str) -> None:
        """One line on stdout."""
        print(line, flush=True)
