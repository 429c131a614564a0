"""The one hash that checkpoints, bundles and engines are known by."""

import hashlib
from collections.abc import Mapping
from pathlib import Path

import msgspec


def file_sha256(*paths: str | Path) -> str:
    """Lower-case hex sha256 of a file's bytes, or of several files' one after the other."""
    digest = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as file:
            hashlib.file_digest(file, lambda: digest)
    return digest.hexdigest()


def parts_sha256(parts: Mapping[str, str]) -> str:
    """Lower-case hex sha256 over parts in words, in the order of their names."""
    return hashlib.sha256(msgspec.json.encode(sorted(parts.items()))).hexdigest()
