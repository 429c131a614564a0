"""Ctrl-C, and SIGTERM, with which schedulers, containers and `timeout` end a process: the same to every command."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Final

_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM)


def interrupt_on_sigterm() -> None:
    """Have SIGTERM raise KeyboardInterrupt, too, so that temporary files go; where nobody else has a use for it."""
    if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=_end_on_sigterm)


def _end_on_sigterm() -> None:
    """As it was: a pool of processes ends its workers so, which would take an interrupt for their work's error."""
    with suppress(ValueError):  # forked by another thread than the main one
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


@contextmanager
def interrupts_kept() -> Iterator[None]:
    """Raise KeyboardInterrupt at once, as always, and at the block's end if it was dropped or made another error of.

    Python drops it in callbacks of weak references, of which PyTorch's exporter has many.
    """
    pressed = False

    def press() -> None:
        nonlocal pressed
        pressed = True
        raise KeyboardInterrupt

    try:
        with on_interrupt(press):
            yield
    except Exception:
        if pressed:
            raise KeyboardInterrupt from None
        raise
    if pressed:
        raise KeyboardInterrupt


@contextmanager
def on_interrupt(press: Callable[[], None]) -> Iterator[None]:
    """Call `press` in the main thread whenever one of both would raise KeyboardInterrupt, until the block ends.

    Signals that are ignored, as Ctrl-C is in the background of a shell, or that somebody else handles are left alone.
    """

    def handle(signum: int, frame: FrameType | None) -> None:
        press()

    ours = []
    if threading.current_thread() is threading.main_thread():  # which alone may ask for signals, and gets them
        ours = [number for number in _SIGNALS if signal.getsignal(number) is signal.default_int_handler]
    try:
        for number in ours:
            signal.signal(number, handle)
        yield
    finally:
        for number in ours:
            signal.signal(number, signal.default_int_handler)
