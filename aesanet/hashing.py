"""The one hash that checkpoints, bundles and engines are known by."""

import hashlib
from pathlib import Path


def file_sha256(*paths: str | Path) -> str:
    """Lower-case hex sha256 of a file's bytes, or of several files' one after the other."""
    digest = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as file:
            hashlib.file_digest(file, lambda: digest)
    return digest.hexdigest()
