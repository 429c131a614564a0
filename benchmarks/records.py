"""Measurements as CSV files: each row says what it was measured on, and files are added to."""

import csv
import os
import platform
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from aesanet import __version__
from aesanet.bundle import MANIFEST_NAME
from aesanet.errors import BackendError, InputError
from aesanet.gpu import gpu_clocks_mhz, list_gpus
from aesanet.hashing import file_sha256
from aesanet.machine import processor_clock_mhz, processor_name, usable_cores
from aesanet.runtime.scorer import Scorer

MACHINE: Final = "date aesanet processor cores load gpu python".split()
CLOCKS: Final = "processor_mhz gpu_mhz".split()
WHERE: Final = [*MACHINE, "bundle_sha256", "weights", "engine", "threads"]
TIMED: Final = [*WHERE, *CLOCKS]
"""Of what takes time. `load` is before anything is measured; clocks are right after, when they are still the same."""


def machine() -> dict[str, Any]:
    """What every row says of its machine before anything is measured on it."""
    try:
        gpu = "; ".join(map(str, list_gpus()))
    except BackendError:
        gpu = ""
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%dT%H:%MZ"),
        "aesanet": __version__,
        "processor": processor_name(),
        "cores": usable_cores(),
        "load": f"{os.getloadavg()[0]:.2f}" if hasattr(os, "getloadavg") else "",
        "gpu": gpu,
        "python": platform.python_version(),
    }


def measured_on(row: Mapping[str, str]) -> str:
    """The GPU of a row that was measured on one, and else the processor."""
    device = row.get("device") or row.get("engine", "")
    return row["gpu"] if "cuda" in device.split() and row["gpu"] else row["processor"]


def clocks() -> dict[str, Any]:
    """`CLOCKS`, in MHz: to be asked as soon as something has been measured."""
    try:
        gpu = "; ".join(gpu_clocks_mhz())
    except BackendError:
        gpu = ""
    processor = processor_clock_mhz()
    return {"processor_mhz": "" if processor is None else round(processor), "gpu_mhz": gpu}


def provenance(scorer: Scorer, bundle: Path, threads: int | None) -> dict[str, Any]:
    """What rows say of one bundle on one engine, and of the machine.

    threads : of the processor, that the engine was opened with; nothing for its own choice
    """
    return machine() | {
        "bundle_sha256": file_sha256(bundle / MANIFEST_NAME)[:16],
        "weights": scorer.manifest.weights,
        "engine": scorer.backend.name,
        "threads": threads or "",
    }


def append_rows(path: Path, columns: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> None:
    """Add rows to a CSV, or begin it; raises InputError where it has other columns."""
    begun = check_columns(path, columns)
    try:
        with open(path, "a", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, columns, lineterminator="\n")
            if not begun:
                writer.writeheader()
            writer.writerows(rows)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None


def check_columns(path: Path, columns: Sequence[str]) -> bool:
    """Has the CSV been begun? Best called before minutes of measuring.

    Raises InputError where it has other columns, or cannot be added to.
    """
    begun = os.path.isfile(path) and os.path.getsize(path) > 0
    if begun and list(read_rows_of(path)[0]) != list(columns):
        raise InputError(f"{path}: has other columns; give --out another name")
    if path.is_dir() or not os.access(path if path.exists() else path.absolute().parent, os.W_OK):
        raise InputError(f"{path}: cannot be written; give --out a file in a folder that is there")
    return begun


def read_rows_of(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV; raises InputError where there is none."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:  # as spreadsheets may write it
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: {getattr(error, 'strerror', None) or error}") from None
    if not rows:
        raise InputError(f"{path}: has no rows")
    for number, row in enumerate(rows, 1):
        if None in row or None in row.values():  # as csv has it for more cells than columns, and for fewer
            raise InputError(f"{path}: row {number} has not as many cells as there are columns; is it cut off?")
    return rows
