"""A bundle folder is written whole or not at all."""

import logging
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import msgspec

from aesanet.bundle import MANIFEST_NAME, Manifest, read_manifest
from aesanet.errors import ExportError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_log = logging.getLogger("aesanet")


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
        old = Path(temporary, "old")
        with changing(out):
            _check_replaceable(out)  # minutes may have passed
            if out.exists():
                out.rename(old)
            try:
                folder.rename(out)
            except OSError:
                if old.exists():
                    old.rename(out)
                raise


@contextmanager
def changing(bundle: Path) -> Iterator[None]:
    """While this lasts, no other command changes the bundle or puts another in its place; waits until none does.

    Not to be nested. Nobody waits where there is no bundle yet, or where the system or the file system has no locks for
    folders (Windows, NFS).
    """
    lock = _lock(bundle) if fcntl is not None else None
    try:
        yield
    finally:
        if lock is not None:
            os.close(lock)


def _lock(bundle: Path) -> int | None:
    """A descriptor of the folder that is at this place when it is our turn; None where there is none."""
    while True:
        try:
            lock = os.open(bundle, os.O_RDONLY | os.O_DIRECTORY)
        except (FileNotFoundError, NotADirectoryError):
            return None
        try:
            with suppress(OSError):  # a file system without locks
                _wait_for(lock, bundle)
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(lock), os.stat(bundle)):
                    return lock
        except BaseException:
            os.close(lock)
            raise
        os.close(lock)  # another has taken its place meanwhile


def _wait_for(lock: int, bundle: Path) -> None:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        _log.warning("%s: another command is changing it; waiting", bundle)
        fcntl.flock(lock, fcntl.LOCK_EX)


def change_manifest(bundle: Path, change: Callable[[Manifest], Manifest]) -> None:
    """Write `bundle.json` as `change` makes it from what it is now; raises BundleError and OSError."""
    with changing(bundle):
        write_manifest(bundle, change(read_manifest(bundle)))


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
