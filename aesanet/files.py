"""Files that are there whole or not at all, whenever the process is killed."""

import os
import secrets
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

from aesanet.errors import InputError
from aesanet.hashing import parts_sha256

LEFT_OVER_SECONDS: Final = 24 * 3600.0
"""After which what a process was writing is taken for what it left when it was killed."""

_CACHED_FILES: Final = 32  # of a kind: one for each engine and GPU, or GPU and version, that is still in use


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """An OSError of the block that names no file, as those of writing do, names `path`."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


def check_output(path: Path, read: Iterable[str | Path]) -> None:
    """Raise InputError where a file that is to be written is one of those that are read, or its folder is not there."""
    if not path.absolute().parent.is_dir():
        raise InputError(f"{path}: there is no folder {path.parent}; make it, or give another name")
    if path.exists() and any(os.path.exists(name) and os.path.samefile(name, path) for name in read):
        raise InputError(f"{path}: is one of the inputs; give another name for what is written")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A name beside `path` to write to; it takes the path's place when the block ends, and goes if the block fails."""
    beside = path.with_name(f".{path.name}.{secrets.token_hex(8)}")  # several processes may write the same cache
    try:
        with naming(path):
            yield beside
        os.replace(beside, path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


def lock(descriptor: int, busy: Callable[[], None]) -> bool:
    """Lock a file or folder for this process until the descriptor is closed; waits where another has it locked.

    busy : is called before it waits, and may raise instead

    False where the system or the file system has no locks.
    """
    if fcntl is None:
        return False
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            busy()
            fcntl.flock(descriptor, fcntl.LOCK_EX)
    except OSError:
        return False
    return True


def locks_folders() -> bool:
    """Whether the system has locks, and folders that can be opened for them."""
    return fcntl is not None


@contextmanager
def alone_in(folder: Path) -> Iterator[bool]:
    """While this lasts, no other process is in this with the same folder; raises InputError where one is.

    Yields whether that is so: not where there are no locks.
    """
    if not locks_folders():
        yield False
        return

    def busy() -> None:
        raise InputError(f"{folder}: another run is writing it; wait for its end, or give another name") from None

    descriptor = os.open(folder, os.O_RDONLY)
    try:
        yield lock(descriptor, busy)
    finally:
        os.close(descriptor)


def sweep(folder: Path, older_seconds: float, names: str = "*") -> None:
    """Remove what `replacing` left in a folder where a process was killed, if nobody has written it for so long.

    names : of the files that were to be replaced, as a glob
    """
    for file in folder.glob(f".{names}.{'[0-9a-f]' * 16}"):
        with suppress(OSError):  # what is another's, or gone, is let be
            if time.time() - file.stat().st_mtime >= older_seconds:
                file.unlink()


class CacheFile:
    """A file in the user's cache folder (`XDG_CACHE_HOME` or `~/.cache`), one for all that its content depends on.

    What cannot be read or written only costs the time to make it again. Of files of one name the 32 last used are kept.

    name  : what the file begins with
    parts : what its content depends on, in words
    """

    def __init__(self, name: str, parts: Mapping[str, str]) -> None:
        number = parts_sha256(parts)[:16]
        base = os.environ.get("XDG_CACHE_HOME", "")
        if not os.path.isabs(base):  # as its standard says
            base = os.path.expanduser("~/.cache")
        self._name = name
        self.path = Path(base, "aesanet", f"{name}-{number}.cache")

    def read(self) -> bytes:
        """What was written last, or nothing."""
        with suppress(OSError):
            content = self.path.read_bytes()
            with suppress(OSError):
                os.utime(self.path)  # used now
            return content
        return b""

    def write(self, content: bytes) -> None:
        """Put `content` in the place of what was there."""
        if not self.path.is_absolute():  # this user has no home
            return
        with suppress(OSError):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(self.path) as beside:
                beside.write_bytes(content)
            files = sorted(self.path.parent.glob(f"{self._name}-*.cache"), key=lambda file: file.stat().st_mtime)
            for unused in files[:-_CACHED_FILES]:
                unused.unlink(missing_ok=True)
            sweep(self.path.parent, LEFT_OVER_SECONDS, f"{self._name}-*.cache")
