"""What all commands share: how they end, lines for people on stderr, and one answer to a missing extra."""

import errno
import logging
import os
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import NoReturn

import click

from aesanet.errors import AesanetError, BackendError
from aesanet.interrupts import interrupt_on_sigterm

EXIT_ROWS_FAILED, EXIT_COULD_NOT_RUN = 1, 2
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells have it


def note(message: str) -> None:
    """A line for people, on stderr; where nobody reads that any more, the work goes on."""
    with suppress(OSError):
        click.echo(f"aesanet: {message}", err=True)


@contextmanager
def extra(name: str) -> Iterator[None]:
    """Turn a failed import in the block into the command that installs what is missing."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise BackendError(
            f"{error.name} is not installed; this command needs: pip install 'aesanet[{name}]'"
        ) from None


def run(command: click.Command, name: str, arguments: Sequence[str] | None = None) -> NoReturn:
    """Run a command line; errors that we raise on purpose become one line and exit status 2."""
    for stream in ("stdout", "stderr"):
        if getattr(sys, stream) is None:  # closed by whoever started us
            setattr(sys, stream, open(os.devnull, "w"))  # noqa: SIM115  (stays open)
    if sys.stdin is None:
        sys.stdin = open(os.devnull, encoding="utf-8")  # noqa: SIM115  (stays open)
    logging.basicConfig(format="aesanet: %(message)s")
    interrupt_on_sigterm()
    try:
        sys.exit(command.main(args=arguments, prog_name=name, standalone_mode=False) or 0)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        sys.exit(EXIT_INTERRUPTED)
    except AesanetError as error:
        note(str(error))
        sys.exit(EXIT_COULD_NOT_RUN)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            note(f"{error.filename or 'stdout, or a file'}: {error.strerror}")
        else:
            traceback.print_exc()
        sys.exit(EXIT_COULD_NOT_RUN)
    except Exception:  # a fault of ours, which must not look like rows that failed
        traceback.print_exc()
        sys.exit(EXIT_COULD_NOT_RUN)
