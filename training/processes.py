"""One process or several that train one model: each computes its share, and all know the whole batch.

Started by `torchrun`, whose environment variables say how many there are.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import numpy as np
import torch
from torch import Tensor, distributed

from aesanet.errors import InputError

WAIT = timedelta(days=1)
"""For the slowest process: decoding a data set can take hours."""


@dataclass(frozen=True)
class Processes:
    """This process's number among all; the default is one alone."""

    rank: int = 0
    size: int = 1

    def share(self, batch: int) -> list[int]:
        """Rows of a batch that this process computes: equally many in all, the last row again where there are no more.

        No process is ever left without a row, as it would never answer the others.
        """
        each = -(-batch // self.size)
        return [min(row, batch - 1) for row in range(self.rank * each, (self.rank + 1) * each)]

    def gather(self, rows: Tensor, batch: int) -> Tensor:
        """[each, width] of every process -> [batch, width] in the batch's order; only this one's own have a gradient.

        Rows that were computed again are cut off, and so have a gradient of 0.
        """
        if self.size == 1:
            return rows
        all_rows = [torch.empty_like(rows) for _ in range(self.size)]
        distributed.all_gather(all_rows, rows.detach().contiguous())
        all_rows[self.rank] = rows
        return torch.cat(all_rows)[:batch]

    def add(self, values: np.ndarray, device: torch.device) -> np.ndarray:
        """The sum over processes, in all of them."""
        if self.size == 1:
            return values
        total = torch.from_numpy(values).to(device)
        distributed.all_reduce(total)
        summed: np.ndarray = total.cpu().numpy()
        return summed

    def refuse(self, reason: InputError | None, device: torch.device) -> None:
        """Raise in all processes where any of them has a reason: its own there, and in the others that there is one."""
        if self.add(np.array([int(reason is not None)]), device)[0]:
            raise reason or InputError("another of this run's processes cannot go on, and says why")

    def wait(self) -> None:
        """Until all are here."""
        if self.size > 1:
            distributed.barrier()

    @contextmanager
    def first_alone(self) -> Iterator[None]:
        """The first process does the block, then the others, which find what it left on disk."""
        if self.rank > 0:
            self.wait()
        try:
            yield
        finally:  # else the others would see a closed connection, and not what the first one found wrong
            if self.rank == 0:
                self.wait()


@contextmanager
def started_processes(device: torch.device) -> Iterator[Processes]:
    """The processes that torchrun started, joined; one alone where it did not."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield Processes()
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    distributed.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=WAIT)
    try:
        yield Processes(distributed.get_rank(), size)
    finally:
        distributed.destroy_process_group()


def own_device(device: str) -> torch.device:
    """What "auto", "cpu" or "cuda" means here: under torchrun, each process has a GPU of its own."""
    if device == "cpu" or (device == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    number = int(os.environ.get("LOCAL_RANK", "0"))
    if number >= (gpus := torch.cuda.device_count()):
        raise InputError(f"process {number} has no GPU: PyTorch sees {gpus}; give the device cpu, or fewer processes")
    # Without it cuBLAS sums in an order that changes from run to run; it is read when cuBLAS starts.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    return torch.device("cuda", number)
