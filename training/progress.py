"""What long work tells while it runs; a command shows it, a caller that wants silence takes the base class."""


class Progress:
    """Tells nothing."""

    def note(self, line: str) -> None:
        """A line for a person."""

    def start(self, what: str, total: int, done: int = 0) -> None:
        """Work of `total` equal parts begins, of which `done` are done already."""

    def step(self) -> None:
        """One more part is done."""

    def end(self) -> None:
        """The work that was started has ended."""
