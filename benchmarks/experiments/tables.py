"""CSVs of measurements, and the machine that they were made on."""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from aesanet.machine import processor_name


def provenance() -> dict[str, str]:
    """What every measurement says of its machine and its main library."""
    return {"processor": processor_name(), "torch": torch.__version__}


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """A CSV with the first row's keys as its header."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
