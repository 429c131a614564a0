"""Why TensorRT refuses something: its own words, by way of its error recorder.

A logger in Python takes the interpreter's lock for every line of each of the library's threads: also of those that make
kernels while another thread, which has that lock, waits for them. So the logger is the library's own and almost silent;
and it is one for the whole process, as the library goes on with the first that it was given.
"""

from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

from aesanet.errors import BackendError, DeviceMemoryError

_loggers: "WeakKeyDictionary[Any, Any]" = WeakKeyDictionary()


def process_logger(trt: Any) -> Any:
    """The library's own logger, which tells of nothing but its internal errors, on stderr."""
    if trt not in _loggers:
        _loggers[trt] = trt.Logger(trt.ILogger.Severity.INTERNAL_ERROR)
    return _loggers[trt]


class Complaints:
    """What the library says is wrong, for one of its objects and those made of it.

    trt : the module
    """

    def __init__(self, trt: Any) -> None:
        self._library = f"{trt.__name__} {trt.__version__}"
        self._lines: list[str] = []
        self._recorder = _recorder(trt, self._lines)

    def of(self, made: Any) -> Any:
        """Hear what an object of the library complains of; returns it."""
        made.error_recorder = self._recorder
        return made

    def ask(self, what: str, call: Callable[..., Any], *arguments: Any) -> Any:
        """What a call returns; raises BackendError, or DeviceMemoryError, where that is nothing, or the call raises."""
        found, raised = self._call(call, *arguments)
        if found is None or found is False:
            raise self._refusal(what, raised)
        return found

    def tell(self, what: str, call: Callable[..., Any], *arguments: Any) -> Any:
        """The same for a call whose return says nothing of success: it failed if there was a complaint."""
        found, raised = self._call(call, *arguments)
        if self._lines or raised:
            raise self._refusal(what, raised)
        return found

    def _call(self, call: Callable[..., Any], *arguments: Any) -> tuple[Any, str]:
        self._recorder.clear()
        try:
            return call(*arguments), ""
        except (RuntimeError, TypeError) as error:  # as pybind11 has it for some refusals
            return None, str(error) or type(error).__name__

    def _refusal(self, what: str, raised: str) -> BackendError:
        reason = "; ".join(self._lines) or raised or "no reason was given"
        memory = "out of memory" in reason.lower() or "outofmemory" in reason.lower()
        return (DeviceMemoryError if memory else BackendError)(f"{self._library} refused {what}: {reason}")


def _recorder(trt: Any, lines: list[str]) -> Any:
    class Recorder(trt.IErrorRecorder):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IErrorRecorder.__init__(self)
            self._codes: list[Any] = []

        def report_error(self, code: Any, desc: str) -> bool:
            self._codes.append(code)
            lines.append(f"out of memory: {desc}" if code.name == "FAILED_ALLOCATION" else desc)
            return True

        def clear(self) -> None:
            self._codes.clear()
            lines.clear()

        def num_errors(self) -> int:
            return len(lines)

        def get_error_code(self, error_idx: int) -> Any:
            return self._codes[error_idx]

        def get_error_desc(self, error_idx: int) -> str:
            return lines[error_idx]

        def has_overflowed(self) -> bool:
            return False

    return Recorder()
