"""The trained part of the network, from what the cache holds to what the loss and the validation need."""

import numpy as np
import torch
from torch import Tensor, nn

from aesanet.models.aesanet import AESANet
from aesanet.training.background import ahead
from aesanet.training.batches import load_batch, validation_batches
from aesanet.training.dataset import Data, Trunk
from aesanet.training.losses import ClipOutputs, clip_outputs
from aesanet.training.processes import Processes


class Learner(nn.Module):
    """An AESANet behind its front end (trunk trained), or behind its trunk, which then gets no gradient (frozen).

    With `bf16`, under bfloat16 autocast: weights stay FP32, and so do losses. The front end is not in here.
    """

    def __init__(self, model: AESANet, trunk: Trunk, bf16: bool) -> None:
        super().__init__()
        self.encoder, self.head, self.trunk, self.bf16 = model.encoder, model.head, trunk, bf16
        self.encoder.beats.requires_grad_(trunk == "trained")

    def forward(self, inputs: Tensor, num_tokens: Tensor, labels: Tensor) -> Tensor:
        """As `Batch` has them -> float32 [batch, 8 + shared width]: `ClipOutputs.rows()`."""
        with torch.autocast(inputs.device.type, torch.bfloat16, enabled=self.bf16):
            if self.trunk == "trained":
                features = self.encoder(inputs, num_tokens)
            else:
                features = self.encoder.mix(list(inputs.float().unbind(0)))
            return clip_outputs(self.head, features, num_tokens, labels).rows()

    def train(self, mode: bool = True) -> "Learner":
        """Dropout on or off; never in a frozen trunk."""
        super().train(mode)
        if self.trunk == "frozen":
            self.encoder.beats.eval()
        return self


@torch.no_grad()
def whole_clips(
    learner: Learner, data: Data, batch_size: int, device: torch.device, processes: Processes
) -> tuple[np.ndarray, np.ndarray]:
    """float64 scores [clips, 4], uncalibrated, and embeddings [clips, shared width], in the order of `data`.

    A clip's are the means over all its windows weighted by their samples, which is what `runtime.scorer` does.
    """
    learner.eval()
    batches = validation_batches(data, batch_size)
    counts = [len(windows) for windows in data.windows]
    first = np.cumsum([0, *counts])
    width = 8 + learner.head.shared.out_features
    rows = np.zeros((first[-1], width))
    mine = batches[processes.rank :: processes.size]
    for parts, batch in zip(mine, ahead(mine, lambda one: load_batch(data, one, learner.trunk)), strict=True):
        out = learner(*(value.to(device) for value in (batch.inputs, batch.num_tokens, batch.labels)))
        rows[[first[clip] + window for clip, window in parts]] = out.double().cpu().numpy()
    rows = processes.add(rows, device)
    weights = np.array([window.num_samples for windows in data.windows for window in windows], np.float64)
    sums = np.add.reduceat(rows * weights[:, None], first[:-1])
    means = ClipOutputs.of_rows(torch.from_numpy(sums / np.add.reduceat(weights, first[:-1])[:, None]))
    return means.scores.numpy(), means.embeddings.numpy()
