"""The triplet term of AESA-Net's loss, against a buffer of recent clips (arXiv 2509.03292; choices marked ours).

Each clip of a batch is an anchor. A positive is a clip of the buffer whose labels differ from the anchor's by less
than epsilon, a negative one whose labels differ by more. Ours: the clip itself, as it was an epoch ago, is neither.
"""

from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from aesanet.axes import AXES

Sampling = Literal["random", "hardest", "none"]
Criterion = Literal["mean", "CE", "CU", "PC", "PQ"]


class TripletCounters:
    """What the triplets of one epoch were made of."""

    def __init__(self) -> None:
        self.anchors = 0
        self.skipped = 0  # anchors for which the buffer held no positive or no negative
        self.active = 0  # triplets whose loss was above zero
        self.clips: dict[str, set[int]] = {"anchor": set(), "positive": set(), "negative": set()}
        self.clusters: set[int] = set()  # bins of width epsilon that any clip of a triplet was in

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers and lists."""
        return {
            "anchors": self.anchors,
            "skipped": self.skipped,
            "active": self.active,
            "clips": {role: sorted(clips) for role, clips in self.clips.items()},
            "clusters": sorted(self.clusters),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on counting from `state_dict()`."""
        self.anchors, self.skipped, self.active = state["anchors"], state["skipped"], state["active"]
        self.clips = {role: set(clips) for role, clips in state["clips"].items()}
        self.clusters = set(state["clusters"])


class TripletBuffer:
    """The newest `capacity` clips that were trained on: detached L2-normalised embeddings, labels, clip indices.

    sampling  : "random" (one positive and one negative, uniform), "hardest" (the farthest positive and the nearest
                negative) or "none" (the term is off)
    criterion : labels differ by the mean absolute difference over the axes that both have, or by that of one axis
    epsilon   : on the labels' own scale
    """

    def __init__(
        self,
        sampling: Sampling,
        criterion: Criterion = "mean",
        *,
        capacity: int = 256,
        margin: float = 0.3,
        epsilon: float = 0.5,
        seed: int = 0,
    ) -> None:
        self.sampling, self.criterion = sampling, criterion
        self.capacity, self.margin, self.epsilon = capacity, margin, epsilon
        # Its own, and on the CPU, so that the draws are the same on every device and in every process.
        self.generator = torch.Generator().manual_seed(seed)
        self.embeddings = torch.zeros(0, 0)
        self.labels = torch.zeros(0, len(AXES))
        self.clips = torch.zeros(0, dtype=torch.int64)
        self.counters = TripletCounters()

    def __len__(self) -> int:
        return len(self.clips)

    def term(self, embeddings: Tensor, labels: Tensor, clips: Tensor) -> Tensor:
        """The mean over anchors of max(0, d(anchor, positive) - d(anchor, negative) + margin), skipped ones as 0.

        embeddings : float [batch, width], before L2 normalisation; the gradient goes to these alone
        labels     : float [batch, 4], nan where an axis has none
        clips      : int64 [batch], which clip of the training set each row is
        returns    : scalar. The buffer is seen as it was before this batch, which is then put into it.
        """
        if self.sampling == "none":
            return embeddings.new_zeros(())
        anchors = F.normalize(embeddings, dim=1)
        if not len(self):
            self.embeddings = anchors.new_zeros(0, anchors.shape[1])
            self.labels, self.clips = self.labels.to(labels), self.clips.to(clips.device)
        loss = self._loss(anchors, labels, clips) if len(self) else None
        self._push(anchors.detach(), labels, clips)
        if loss is None:
            self._count_skipped(len(clips))
            return anchors.sum() * 0.0
        return loss

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values: everything that the next batch depends on."""
        return {
            "embeddings": self.embeddings,
            "labels": self.labels,
            "clips": self.clips,
            "generator": self.generator.get_state(),
            "counters": self.counters.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any], device: torch.device | str = "cpu") -> None:
        """Go on from `state_dict()` exactly, with the tensors on `device`."""
        self.embeddings, self.labels, self.clips = (state[key].to(device) for key in ("embeddings", "labels", "clips"))
        self.generator.set_state(state["generator"].cpu())
        self.counters.load_state_dict(state["counters"])

    def _loss(self, anchors: Tensor, labels: Tensor, clips: Tensor) -> Tensor:
        difference = label_difference(labels, self.labels, self.criterion)  # [batch, buffer]
        others = clips[:, None] != self.clips
        positives = others & (difference < self.epsilon)  # both are false where nothing can be compared
        negatives = others & (difference > self.epsilon)
        valid = positives.any(dim=1) & negatives.any(dim=1)
        with torch.no_grad():
            if self.sampling == "hardest":
                nearness = anchors @ self.embeddings.T  # of unit vectors: the larger, the nearer
                positive = nearness.masked_fill(~positives, torch.inf).argmin(dim=1)
                negative = nearness.masked_fill(~negatives, -torch.inf).argmax(dim=1)
            else:
                positive, negative = self._draw(positives), self._draw(negatives)
        to_positive = (anchors - self.embeddings[positive]).norm(dim=1)
        to_negative = (anchors - self.embeddings[negative]).norm(dim=1)
        losses = F.relu(to_positive - to_negative + self.margin).masked_fill(~valid, 0.0)
        self._count(losses.detach(), valid, labels, clips, positive, negative)
        return losses.mean()

    def _draw(self, candidates: Tensor) -> Tensor:
        """int64 [batch]: for each row, one of its true columns, all of them equally likely."""
        lots = torch.rand(candidates.shape, generator=self.generator).to(candidates.device)
        return lots.masked_fill(~candidates, -1.0).argmax(dim=1)

    def _push(self, anchors: Tensor, labels: Tensor, clips: Tensor) -> None:
        self.embeddings = torch.cat([self.embeddings, anchors])[-self.capacity :]
        self.labels = torch.cat([self.labels, labels])[-self.capacity :]
        self.clips = torch.cat([self.clips, clips])[-self.capacity :]

    def _count_skipped(self, anchors: int) -> None:
        self.counters.anchors += anchors
        self.counters.skipped += anchors

    def _count(
        self, losses: Tensor, valid: Tensor, labels: Tensor, clips: Tensor, positive: Tensor, negative: Tensor
    ) -> None:
        counters, used = self.counters, int(valid.sum())
        counters.anchors += len(valid)
        counters.skipped += len(valid) - used
        counters.active += int((losses > 0).sum())
        positive, negative = positive[valid], negative[valid]
        roles = {"anchor": clips[valid], "positive": self.clips[positive], "negative": self.clips[negative]}
        for role, indices in roles.items():
            counters.clips[role].update(indices.tolist())
        taken = torch.cat([labels[valid], self.labels[positive], self.labels[negative]])
        bins = (criterion_value(taken, self.criterion) / self.epsilon).floor()
        counters.clusters.update(bins[bins.isfinite()].long().tolist())


def label_difference(labels: Tensor, others: Tensor, criterion: Criterion) -> Tensor:
    """labels [a, 4], others [b, 4] -> [a, b] on the labels' scale; nan where no axis of the criterion has both."""
    difference = (labels[:, None] - others).abs()
    return difference.nanmean(dim=2) if criterion == "mean" else difference[:, :, AXES.index(criterion)]


def criterion_value(labels: Tensor, criterion: Criterion) -> Tensor:
    """labels [a, 4] -> [a]: the mean over labelled axes, or the one axis."""
    return labels.nanmean(dim=1) if criterion == "mean" else labels[:, AXES.index(criterion)]
