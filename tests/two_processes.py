"""One of the processes of some training runs; test_processes starts them, as torchrun would.

python two_processes.py FOLDER
"""

import sys
from pathlib import Path

import torch

from aesanet.training.processes import started_processes
from aesanet.training.trainer import train

if __name__ == "__main__":
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    torch.optim.Adam = torch.optim.SGD  # Adam would hide a gradient of another scale
    with started_processes(torch.device("cpu")) as processes:
        for run in torch.load(folder / "runs.pt", weights_only=False):
            train(*run, folder / f"{run[1]}-two", processes=processes)
