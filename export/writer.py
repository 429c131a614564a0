"""A bundle folder is written whole or not at all."""

import logging
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

import msgspec

from aesanet.bundle import GRAPH_NAMES, MANIFEST_NAME, Manifest, read_manifest
from aesanet.engines import ENGINES_FOLDER
from aesanet.errors import ExportError
from aesanet.files import lock, locks_folders, replacing

_log = logging.getLogger("aesanet")

# What may go when a bundle is replaced: its files, and what a process that was killed or a file manager has left.
_OF_BUNDLES = re.compile(
    rf"{re.escape(MANIFEST_NAME)}|\.{re.escape(MANIFEST_NAME)}\.([0-9a-f]{{16}}|\d+)|{ENGINES_FOLDER}|({'|'.join(GRAPH_NAMES)})(\.fp16|\.fused)?\.(onnx|weights)"
    r"|\.DS_Store|desktop\.ini|Thumbs\.db|\.nfs.*"
)
_OF_ENGINES = re.compile(r"[0-9a-f]{64}|build\.log|\.[0-9a-f]{8}\..*")


@contextmanager
def new_bundle(out: str | Path) -> Iterator[Path]:
    """Yield an empty folder beside `out`; it takes `out`'s place when the block ends without an error.

    An older bundle at `out` stays whole until then. Raises ExportError when `out` is anything else, or holds a file of
    somebody's, which would go with it.
    """
    out = Path(out).absolute()
    _check_replaceable(out)
    try:
        str(out).encode()
    except UnicodeEncodeError:
        raise ExportError(f"{str(out)!a}: not all of this is UTF-8, as engines want it; choose another name") from None
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        beside = tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent)
    except OSError as error:
        raise ExportError(f"{out}: cannot be written: {error.strerror}; choose another place") from None
    with beside as temporary:
        folder = Path(temporary, "new")
        try:
            folder.mkdir()
            yield folder
            _put_in_place(folder, out, old=Path(temporary, "old"))
        except OSError as error:  # of a disk that is full, what writes graphs does not say which file it was
            raise ExportError(f"{out}: cannot be written: {error.strerror or error}") from None


def _put_in_place(folder: Path, out: Path, old: Path) -> None:
    """Move a new bundle to its place, and what was there to `old`."""
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
    descriptor = _locked(bundle) if locks_folders() else None
    try:
        yield
    finally:
        if descriptor is not None:
            os.close(descriptor)


def _locked(bundle: Path) -> int | None:
    """A descriptor of the folder that is at this place when it is our turn; None where there is none."""
    while True:
        try:
            descriptor = os.open(bundle, os.O_RDONLY | os.O_DIRECTORY)
        except (FileNotFoundError, NotADirectoryError):
            return None
        try:
            lock(descriptor, partial(_log.warning, "%s: another command is changing it; waiting", bundle))
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(descriptor), os.stat(bundle)):
                    return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # another has taken its place meanwhile


def change_manifest(bundle: Path, change: Callable[[Manifest], Manifest]) -> None:
    """Write `bundle.json` as `change` makes it from what it is now; raises BundleError and OSError."""
    with changing(bundle):
        write_manifest(bundle, change(read_manifest(bundle)))


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write `bundle.json`, indented for people; an older one is replaced at once."""
    with replacing(folder / MANIFEST_NAME) as beside:
        beside.write_bytes(msgspec.json.format(msgspec.json.encode(manifest), indent=2) + b"\n")


def _check_replaceable(out: Path) -> None:
    """Raise ExportError where anything but a bundle or an empty folder stands, or somebody stands in it."""
    if not os.path.lexists(out):
        return
    if out.is_symlink():
        raise ExportError(f"{out}: is a link; give the folder itself, {os.readlink(out)}")
    names = {path.name for path in out.iterdir()} if out.is_dir() else {""}
    if names and not _is_manifest(out / MANIFEST_NAME):
        raise ExportError(f"{out}: exists and is not a bundle; choose another name or move it away")
    strange = [name for name in sorted(names) if not _OF_BUNDLES.fullmatch(name)]
    if (engines := out / ENGINES_FOLDER).is_dir():
        entries = sorted(path.name for path in engines.iterdir())
        strange += [f"{ENGINES_FOLDER}/{name}" for name in entries if not _OF_ENGINES.fullmatch(name)]
    if strange:
        raise ExportError(
            f"{out}: would be replaced, but holds what is no bundle's: {', '.join(strange[:3])}"
            f"{' and more' * (len(strange) > 3)}; move that away, or choose another name"
        )
    with suppress(OSError):  # where no folder is the current one any more
        if Path.cwd().resolve().is_relative_to(out.resolve()):
            raise ExportError(f"{out}: would be replaced, but is the folder that this runs in; run it from outside")


def _is_manifest(path: Path) -> bool:
    """Whether a file is, or once was, some version of `bundle.json`, and not another program's."""
    try:
        content = msgspec.json.decode(path.read_bytes())
    except (OSError, ValueError, msgspec.MsgspecError, RecursionError):
        return False
    return isinstance(content, dict) and {"schema_version", "graphs"} <= content.keys()
