"""Every error that this project raises on purpose.

AesanetError
+-- CheckpointError   a checkpoint file that cannot be loaded             (ValueError)
+-- ExportError       a model that could not be exported, or failed its check  (RuntimeError)
+-- CompileError      a bundle that TensorRT cannot compile here          (RuntimeError)
+-- TrainingError     a training run that cannot go on                    (RuntimeError)
+-- BundleError       a bundle folder that is damaged or of another kind  (ValueError)
+-- BackendError      an engine that is missing or cannot run here        (RuntimeError)
|   +-- DeviceMemoryError   a GPU whose memory is full
|   +-- EngineMisfitError   compiled engines that are for other machines
+-- InputError        inputs of a run that cannot be read at all          (ValueError)
+-- ClipError         one clip that cannot be scored; carries a code      (ValueError)
"""

from typing import Final

CLIP_ERROR_CODES: Final = {
    "bad_row": "the manifest row is not an object with a usable `path`, or its tar has several members of this name",
    "bad_segment": "`start_time` or `end_time` is not a number, is negative, or the end is not after the start",
    "not_found": "no such file",
    "not_a_file": "the path is a folder, a pipe, a device or a link that leads nowhere",
    "not_readable": "the file cannot be opened",
    "undecodable": "neither libsndfile nor ffmpeg, where there is one, knows the format, or it is damaged at its start",
    "damaged_tar": "a tar that is none, damaged, cut short or several in one: its members from there on are lost",
    "timeout": "ffmpeg gave nothing for 60 s",
    "no_audio": "the file or the segment holds no samples",
    "too_short": "shorter than 0.175 s, the least that the network can see",
    "non_finite": "samples that are NaN, infinite, or too large for a waveform",
    "bad_score": "the engine gave a score that is not a number",
    "bad_sample_rate": "a sample rate that cannot be brought to 16 kHz",
}
"""The stable codes of `error.code` in output rows, and what each one means."""


class AesanetError(Exception):
    """Base of all errors that aesanet raises on purpose."""


class CheckpointError(AesanetError, ValueError):
    """A checkpoint file that cannot be loaded; the message names the file and the key."""


class ExportError(AesanetError, RuntimeError):
    """A model that could not be exported, or whose export does not give the model's scores."""


class CompileError(AesanetError, RuntimeError):
    """A bundle that TensorRT could not compile; the message has its own reason."""


class TrainingError(AesanetError, RuntimeError):
    """A training run that cannot go on, as its loss is no longer a number."""


class BundleError(AesanetError, ValueError):
    """A bundle folder that is missing, damaged or of another schema."""


class BackendError(AesanetError, RuntimeError):
    """An engine that is not installed, or cannot run this bundle on this machine."""


class DeviceMemoryError(BackendError):
    """A GPU whose memory is full."""


class EngineMisfitError(BackendError):
    """Compiled engines that are all for other machines than this one."""


class InputError(AesanetError, ValueError):
    """Inputs of a run that cannot be read at all, so that no row could be made."""


class ClipError(AesanetError, ValueError):
    """One clip that cannot be scored. `code` is one of `CLIP_ERROR_CODES`; the message is for a person."""

    def __init__(self, code: str, message: str) -> None:
        if code not in CLIP_ERROR_CODES:
            raise KeyError(code)
        super().__init__(message)
        self.code = code
        self.message = message

    def __reduce__(self) -> tuple[type["ClipError"], tuple[str, str]]:
        """Copied and sent between processes as it was made: by itself Python would give back the message alone."""
        return ClipError, (self.code, self.message)
