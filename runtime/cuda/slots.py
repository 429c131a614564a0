"""A batch on its way through a GPU: what is scored, what it holds meanwhile, and what comes of it."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from aesanet.lengths import MIN_SAMPLES
from aesanet.runtime.cuda.arrays import DeviceArray, device_array, on_device, stream_handle
from aesanet.runtime.cuda.device import CudaDevice


@dataclass(frozen=True)
class Batch:
    """Clips on the host or the GPU: waveform float32 [batch, samples], num_samples int64 [batch] on the host.

    `stream` is the CUDA stream that fills a waveform on the GPU, where there is one.
    """

    waveform: np.ndarray | DeviceArray
    num_samples: np.ndarray
    stream: int | None

    @property
    def samples(self) -> int:
        """Of the waveform, padding included."""
        return self.waveform.shape[1]

    def first(self, most: int) -> "Batch":
        """The first clips, `most` of them or fewer."""
        return Batch(self.waveform[:most], self.num_samples[:most], self.stream)

    def after(self, most: int) -> "Batch":
        """The clips that `first` leaves."""
        return Batch(self.waveform[most:], self.num_samples[most:], self.stream)


def checked_batch(waveform: Any, num_samples: np.ndarray, stream: Any, device: CudaDevice, read_on: int) -> Batch:
    """A batch as a caller gave it; raises ValueError or TypeError for what cannot be scored on the device.

    read_on : the stream that will read the waveform
    """
    num_samples = np.asarray(num_samples, np.int64)
    array: np.ndarray | DeviceArray
    if on_device(waveform):
        array = device_array(waveform, read_on, in_order=stream is not None)
        device.check_here(array.address)
        stream = array.stream if stream is None else stream_handle(stream)
    else:
        array, stream = np.asarray(waveform, np.float32), None  # which is complete, whoever fills others
    if len(array.shape) != 2 or num_samples.shape != array.shape[:1] or not len(num_samples):
        raise ValueError(
            f"waveform {list(array.shape)} with num_samples {list(num_samples.shape)}; "
            "give [batch, samples] and [batch]"
        )
    if not MIN_SAMPLES <= num_samples.min() <= num_samples.max() <= array.shape[1]:
        raise ValueError(
            f"num_samples from {num_samples.min()} to {num_samples.max()} in a waveform of {array.shape[1]}; "
            f"each must be from {MIN_SAMPLES} to the waveform's"
        )
    return Batch(array, num_samples, stream)


class Slot:
    """What one batch under way holds for itself: events, and page-locked memory for what is copied."""

    def __init__(self, number: int, device: CudaDevice) -> None:
        self.number = number
        self._device = device
        self.events = tuple(device.event() for _ in range(4))
        self.copied, self.consumed, self.encoded, self.done = self.events
        self.part: Part | None = None
        """The batch under way."""
        self._pinned: dict[str, np.ndarray] = {}

    def host(self, name: str, dtype: type, shape: tuple[int, ...]) -> np.ndarray:
        """Page-locked memory by name, of at least this size; what it held is kept while it does not grow."""
        num_bytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
        if name not in self._pinned or len(self._pinned[name]) < num_bytes:
            self._pinned[name] = self._device.pin(num_bytes)
        return self._pinned[name][:num_bytes].view(dtype).reshape(shape)


@dataclass(eq=False)
class Part:
    """A batch that was given to the streams; its scores are in its slot until another batch takes that."""

    slot: Slot
    num_tokens: np.ndarray
    """Of each clip, int64 [batch]; the slot's memory, as the features are."""
    owner: Any
    """An array of somebody else that is being read."""
    features: np.ndarray | None = None
    """What they are copied to where embeddings are asked for, float32 [rows, tokens, width]."""
    scores: np.ndarray | None = None
    embeddings: np.ndarray = field(default_factory=lambda: np.zeros((0, 0), np.float32))
