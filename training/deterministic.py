"""The same numbers run after run, and from wherever a run was interrupted."""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch.utils import deterministic as settings


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seed PyTorch for one step of one process, so that dropout depends on nothing that went before it."""
    state = np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)
    torch.manual_seed(int(state[0]))


@contextmanager
def deterministic(device: torch.device) -> Iterator[None]:
    """The same sums in the same order, run after run; on a GPU only as far as its kernels can."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    fill = settings.fill_uninitialized_memory  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(True, warn_only=device.type == "cuda")
    # Costs time, and finds bugs, not results.
    settings.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        settings.fill_uninitialized_memory = fill  # type: ignore[attr-defined]
