"""What callers of the Python interface choose: the command line checks its own options."""

from aesanet.errors import InputError


def one_of(name: str, value: object, *allowed: object) -> None:
    """Raise InputError for a value that is none of those allowed."""
    if not any(value is choice or (isinstance(value, str) and value == choice) for choice in allowed):
        raise InputError(f"{name} is {value!r}; give one of {', '.join(map(repr, allowed))}")
