"""A bundle folder is written whole or not at all."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec

from aesanet.bundle import MANIFEST_NAME, Manifest
from aesanet.errors import ExportError


@contextmanager
def new_bundle(out: str | Path) -> Iterator[Path]:
    """Yield an empty folder beside `out`; it takes `out`'s place when the block ends without an error.

    An older bundle at `out` stays whole until then. Raises ExportError when `out` is anything else.
    """
    out = Path(out).absolute()
    if out.is_symlink() or (out.exists() and not _replaceable(out)):
        raise ExportError(f"{out}: exists and is not a bundle; choose another name or move it away")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as beside:
        folder = Path(beside, "new")
        folder.mkdir()
        yield folder
        if out.exists():
            out.rename(Path(beside, "old"))
        folder.rename(out)


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write `bundle.json`, indented for people."""
    (folder / MANIFEST_NAME).write_bytes(msgspec.json.format(msgspec.json.encode(manifest), indent=2) + b"\n")


def _replaceable(out: Path) -> bool:
    return out.is_dir() and ((out / MANIFEST_NAME).is_file() or not any(out.iterdir()))
