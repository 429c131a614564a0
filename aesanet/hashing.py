"""The one hash that checkpoints, bundles and engines are known by."""

import hashlib
from pathlib import Path


def file_sha256(path: str | Path) -> str:
    """Lower-case hex sha256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
