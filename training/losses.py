"""AESA-Net's loss: clip MSE, frame MSE and the triplet term (arXiv 2509.03292; the frame term as in HAAQI-Net).

A mean runs over labelled (clip, axis) entries, each of the same weight however long the clip is, so that a batch of N
fully labelled clips gives the mean of N batches of one.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from aesanet.models.aesanet import Head, clip_mean
from aesanet.training.config import TrainingConfig
from aesanet.training.triplet import TripletBuffer


@dataclass(frozen=True)
class ClipOutputs:
    """All that the loss needs to know of each clip.

    scores       : [batch, 4], uncalibrated
    frame_errors : [batch, 4], the mean over the clip's tokens of (token's score - clip's label)^2; of no meaning where
                   there is no label
    embeddings   : [batch, shared width], the mean over the clip's tokens of the shared layer's output
    """

    scores: Tensor
    frame_errors: Tensor
    embeddings: Tensor

    def rows(self) -> Tensor:
        """[batch, 4 + 4 + shared width]: one tensor, to be sent between processes."""
        return torch.cat([self.scores, self.frame_errors, self.embeddings], dim=1)

    @classmethod
    def of_rows(cls, rows: Tensor) -> "ClipOutputs":
        """The same from `rows()`."""
        return cls(rows[:, :4], rows[:, 4:8], rows[:, 8:])


@dataclass(frozen=True)
class Loss:
    """Scalars; `total` is the weighted sum that is minimised, the others its parts before their weights."""

    total: Tensor
    clip: Tensor
    frame: Tensor
    triplet: Tensor


def clip_outputs(head: Head, features: Tensor, num_tokens: Tensor, labels: Tensor) -> ClipOutputs:
    """features [batch, tokens, width], num_tokens int64 [batch], labels [batch, 4] with nan for none."""
    shared = head.shared_output(features, num_tokens)
    # Half-precision sums over hundreds of tokens would lose what the last epochs are about.
    token_scores = head.token_scores(shared, num_tokens).to(labels.dtype)
    # nan would come back as a gradient even through a mask, so it goes before the difference is taken.
    errors = (token_scores - labels.nan_to_num()[:, None]).square()
    means = (clip_mean(values, num_tokens) for values in (token_scores, errors, shared.to(labels.dtype)))
    return ClipOutputs(*means)


def training_loss(
    outputs: ClipOutputs, labels: Tensor, clips: Tensor, buffer: TripletBuffer, config: TrainingConfig
) -> Loss:
    """The loss of a whole batch; its clips then stand in the buffer.

    labels : [batch, 4], nan where an axis has none
    clips  : int64 [batch], which clip of the training set each is
    """
    clip = labelled_mean((outputs.scores - labels.nan_to_num()).square(), labels)
    frame = labelled_mean(outputs.frame_errors, labels)
    triplet = buffer.term(outputs.embeddings, labels, clips)
    return Loss(clip + config.frame_weight * frame + config.triplet_weight * triplet, clip, frame, triplet)


def labelled_mean(values: Tensor, labels: Tensor) -> Tensor:
    """Mean of values [batch, 4] where labels [batch, 4] are not nan; 0 where there are none."""
    labelled = ~labels.isnan()
    return values.masked_fill(~labelled, 0.0).sum() / labelled.sum().clamp_min(1)
