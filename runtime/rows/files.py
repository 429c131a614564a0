"""Regular files, opened without ever waiting for a pipe or a device."""

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager

from aesanet.errors import ClipError

# What folders and tars are searched for; other files in them are not audio. A file named outright is opened whatever
# its name.
AUDIO_SUFFIXES = frozenset(
    ".wav .wave .flac .mp3 .ogg .oga .opus .aif .aiff .aifc .au .snd .caf .w64 .rf64"
    " .m4a .m4b .mp4 .aac .wma .webm .mka .ac3 .eac3 .amr .ape .g722 .gsm .mp2 .spx .tta .wv".split()
)


def is_audio(name: str) -> bool:
    """Does a file's name end as audio does?"""
    return os.path.splitext(name)[1].lower() in AUDIO_SUFFIXES


@contextmanager
def open_regular(path: str) -> Iterator[int]:
    """A descriptor of a regular file, to read; raises ClipError where there is none.

    By descriptor, as libsndfile takes no name that is not UTF-8, and nothing can take the file's place after the check.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except OSError as error:
        if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM):
            raise  # not the file's fault
        raise _open_error(path, error) from None
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise ClipError("not_a_file", "a folder, a pipe or a device; only regular files are opened")
        yield descriptor
    finally:
        os.close(descriptor)


def _open_error(path: str, error: OSError) -> ClipError:
    if isinstance(error, FileNotFoundError):
        if os.path.islink(path):
            return ClipError("not_a_file", "a link that leads nowhere")
        return ClipError("not_found", "no such file; relative paths start at the current folder")
    if error.errno in (errno.ELOOP, errno.ENXIO, errno.ENODEV):
        return ClipError("not_a_file", str(error.strerror))
    return ClipError("not_readable", str(error.strerror))
