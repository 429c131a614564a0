"""A bundle folder is written whole or not at all."""

import os
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
    _check_replaceable(out)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        beside = tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent)
    except OSError as error:
        raise ExportError(f"{out}: cannot be written: {error.strerror}; choose another place") from None
    with beside as temporary:
        folder = Path(temporary, "new")
        folder.mkdir()
        yield folder
        _check_replaceable(out)  # minutes may have passed
        old = Path(temporary, "old")
        if out.exists():
            out.rename(old)
        try:
            folder.rename(out)
        except OSError:
            if old.exists():
                old.rename(out)
            raise


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write `bundle.json`, indented for people; an older one is replaced at once."""
    beside = folder / f".{MANIFEST_NAME}.{os.getpid()}"
    beside.write_bytes(msgspec.json.format(msgspec.json.encode(manifest), indent=2) + b"\n")
    beside.replace(folder / MANIFEST_NAME)


def _check_replaceable(out: Path) -> None:
    """Raise ExportError where anything but a bundle or an empty folder stands."""
    is_bundle = out.is_dir() and not out.is_symlink() and ((out / MANIFEST_NAME).is_file() or not any(out.iterdir()))
    if os.path.lexists(out) and not is_bundle:
        raise ExportError(f"{out}: exists and is not a bundle; choose another name or move it away")
