"""What all commands share: exit statuses, lines for people on stderr, and one answer to a missing extra."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress

import click

from aesanet.errors import BackendError

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
