"""Names in messages, as people and terminals can take them."""

from collections.abc import Sequence


def printable(text: str) -> str:
    """Text with escapes for what cannot be printed: control characters, bytes that are not UTF-8."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def some(names: Sequence[str]) -> str:
    """The first five of several names."""
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
