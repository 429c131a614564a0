"""The loss: whose it is, its terms, and axes without labels."""

import copy
import math

import numpy as np
import pytest
import torch
from helpers import random_model, tiny_config
from runs import CONFIG, changed

from aesanet.training.losses import clip_outputs, training_loss
from aesanet.training.triplet import TripletBuffer


@pytest.fixture(scope="module")
def head_batch():
    """A float64 head in eval mode, features of five unequal clips, labels and a buffer with something in it."""
    model = random_model(tiny_config(), seed=7).double()
    generator = torch.Generator().manual_seed(2)
    tokens = torch.tensor([24, 8, 16, 40, 32])
    features = torch.randn(5, 40, 32, generator=generator, dtype=torch.float64)
    labels = 10 * torch.rand(5, 4, generator=generator, dtype=torch.float64)
    buffer = TripletBuffer("hardest", epsilon=1.5)
    held = torch.randn(30, 16, generator=generator, dtype=torch.float64).abs()
    buffer.term(held, 10 * torch.rand(30, 4, generator=generator, dtype=torch.float64), torch.arange(100, 130))
    return model.head, features, tokens, labels, buffer


def loss_and_gradient(head, features, tokens, labels, buffer, rows):
    head.zero_grad()
    longest = int(tokens[rows].max())
    outputs = clip_outputs(head, features[rows, :longest], tokens[rows], labels[rows])
    loss = training_loss(outputs, labels[rows], torch.tensor(rows), copy.deepcopy(buffer), CONFIG)
    loss.total.backward()
    gradient = {name: value.grad.clone() for name, value in head.named_parameters()}
    return loss, gradient


def test_a_batch_is_the_mean_of_its_clips(head_batch):
    whole, gradient = loss_and_gradient(*head_batch, [0, 1, 2, 3, 4])
    alone = [loss_and_gradient(*head_batch, [row]) for row in range(5)]
    for name in ("total", "clip", "frame", "triplet"):
        assert getattr(whole, name).item() == pytest.approx(np.mean([getattr(a, name).item() for a, _ in alone]))
        assert getattr(whole, name) > 0
    for name, value in gradient.items():
        assert torch.allclose(value, torch.stack([g[name] for _, g in alone]).mean(0), rtol=1e-9, atol=1e-12), name


def test_the_terms_are_those_of_the_specification(head_batch):
    head, features, tokens, labels, buffer = head_batch
    labels = labels.clone()
    labels[0], labels[3, 1] = math.nan, math.nan
    outputs = clip_outputs(head, features, tokens, labels)
    loss = training_loss(outputs, labels, torch.arange(5), copy.deepcopy(buffer), changed(frame_weight=0.7))
    clip, frame = [], []
    with torch.no_grad():
        for row in range(5):
            own = features[row : row + 1, : tokens[row]]
            shared = head.shared_output(own, tokens[row : row + 1])
            scores = head.token_scores(shared, tokens[row : row + 1])[0]
            assert torch.allclose(outputs.embeddings[row], shared[0].mean(0))
            for axis in range(4):
                if not math.isnan(label := labels[row, axis].item()):
                    clip.append((scores[:, axis].mean().item() - label) ** 2)
                    frame.append(((scores[:, axis] - label) ** 2).mean().item())
    assert len(clip) == 15
    assert loss.clip.item() == pytest.approx(np.mean(clip))
    assert loss.frame.item() == pytest.approx(np.mean(frame))
    assert loss.total.item() == pytest.approx(np.mean(clip) + 0.7 * np.mean(frame) + 0.2 * loss.triplet.item())


def test_an_axis_without_labels_is_not_trained(head_batch):
    head, features, tokens, labels, buffer = head_batch
    labels = labels.clone()
    labels[:, 2] = math.nan
    loss, gradient = loss_and_gradient(head, features, tokens, labels, buffer, [0, 1, 2])
    assert loss.total.isfinite()
    for name, value in gradient.items():
        assert value.isfinite().all()
        assert value.any() != name.startswith("axes.PC."), name
