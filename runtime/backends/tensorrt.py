"""TensorRT and TensorRT-RTX: a compiled engine, kept busy.

Three streams carry a batch: one copies it in; one runs front end and encoder; one runs the head, beside the next
batch's encoder, and copies the scores out. A batch has a slot, which holds all that the streams hand each other; a slot
is used again when its last scores have arrived. Within a stream order is enough; between them, events are.
"""

import logging
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from threading import RLock
from typing import Any, Final

import numpy as np

from aesanet.axes import AXES
from aesanet.bundle import GraphForm, GraphName
from aesanet.errors import BackendError, DeviceMemoryError
from aesanet.lengths import SAMPLE_RATE, TOKENS_PER_PATCH, num_tokens
from aesanet.runtime.backends.base import (
    Backend,
    Device,
    Pending,
    PendingEmbedded,
    Precision,
    mean_over_tokens,
)
from aesanet.runtime.cuda.arrays import DeviceArray
from aesanet.runtime.cuda.device import Blocks, CudaDevice
from aesanet.runtime.cuda.kernels import LateKernels
from aesanet.runtime.cuda.layout import Layout
from aesanet.runtime.cuda.shapes import CAPTURED_SAMPLES, GRAPHS_KEPT, Profile, choose_profile, with_at_most
from aesanet.runtime.cuda.slots import Batch, Part, Slot, checked_batch
from aesanet.runtime.cuda.stage import Run, Stage

_SLOTS: Final = 3  # batches under way: one copied in, one in the encoder, one in the head
_CLOSING_SECONDS: Final = 5.0
_ALIGNMENT: Final = 256  # bytes, that TensorRT asks of every address
_FLOAT32: Final = 4

_log = logging.getLogger("aesanet")


class TensorRTBackend(Backend):
    """A bundle's three plans on one GPU.

    plans       : of each graph, as `aesanet compile` wrote them
    trt         : the module that built them, `tensorrt` or `tensorrt_rtx`
    graphs_kept : CUDA graphs of each plan; 0 for none
    kernels     : as TensorRT-RTX makes them

    Raises BackendError where a plan cannot run here.
    """

    kind = "tensorrt cuda fp16"
    device: Device = "cuda"
    precision: Precision = "fp16"
    form: GraphForm = "fp16"

    def __init__(
        self,
        plans: Mapping[GraphName, bytes],
        trt: Any,
        device: CudaDevice,
        graphs_kept: int = GRAPHS_KEPT,
        kernels: LateKernels | None = None,
    ) -> None:
        kernels = kernels or LateKernels()
        self._device, self._blocks, self._lock = device, Blocks(device), RLock()
        self._stages: list[Stage] = []
        self._slots: list[Slot] = []
        self._turn = 0
        with device.current():
            self._copying, self._encoding, self._scoring = used = tuple(device.stream() for _ in range(3))
            weakref.finalize(self, _close, self._lock, device, used, self._slots, self._stages, self._blocks, kernels)
            streams: dict[GraphName, Any] = {
                "frontend": self._encoding,
                "encoder": self._encoding,
                "head": self._scoring,
            }
            for name, stream in streams.items():
                self._stages.append(Stage(trt, plans[name], name, device, stream, graphs_kept, kernels))
            self._slots += (Slot(number, device) for number in range(_SLOTS))
        self._frontend, self._encoder, self._head = self._stages
        graphs = "" if graphs_kept else " without CUDA graphs"
        self.name = f"{trt.__name__} {trt.__version__} cuda fp16{graphs}{kernels.name}"
        self.profiles = engine_profiles(self._frontend.engine)
        self._fitting = self.profiles  # with as many clips as the GPU's memory was seen to hold
        self._layout = Layout(self._frontend, self._encoder, self._head, _SLOTS)

    def scores(self, waveform: np.ndarray, num_samples: np.ndarray) -> np.ndarray:
        """As `Backend.scores`."""
        return self.submit(waveform, num_samples)()

    def submit(self, waveform: Any, num_samples: np.ndarray, stream: Any = None) -> Pending:
        """Begin to score a batch of any size, in pieces that the engine and the GPU's memory take.

        waveform    : float32 [batch, samples], 16 kHz, padded at the end; an array on the host, which is copied before
                      this returns, or one on this GPU (`__cuda_array_interface__` or DLPack; contiguous), which is read
                      where it is
        num_samples : int64 [batch], on the host, each at least 2,800
        stream      : the CUDA stream that fills `waveform` on the GPU (an integer, or an object of PyCUDA, CuPy,
                      PyTorch or cuda.core). What is given to it later waits until the waveform was read. Without a
                      stream, and where its library neither names one nor lends by DLPack, the array must be complete;
                      it must stay as it is until the scores are there

        Raises BackendError, or DeviceMemoryError where not even the fewest clips fit into the GPU's memory.
        """
        parts = self._submit(waveform, num_samples, stream, embedded=False)
        return lambda: np.concatenate([self._wait(part)[0] for part in parts])

    def submit_embedded(self, waveform: Any, num_samples: np.ndarray, stream: Any = None) -> PendingEmbedded:
        """As `submit`, with embeddings; the features that they are the means of are copied to the host."""
        parts = self._submit(waveform, num_samples, stream, embedded=True)

        def wait() -> tuple[np.ndarray, np.ndarray]:
            scores, embeddings = zip(*(self._wait(part) for part in parts), strict=True)
            return np.concatenate(scores), np.concatenate(embeddings)

        return wait

    def batch_seconds(self, window_seconds: float) -> float:
        """As `Backend.batch_seconds`: the batch that the profile of a bundle's windows was compiled for."""
        samples = round(window_seconds * SAMPLE_RATE)
        most = max(profile.max_batch for profile in self.profiles)
        return choose_profile(self.profiles, samples, most).max_batch * window_seconds

    def _submit(self, waveform: Any, num_samples: np.ndarray, stream: Any, embedded: bool) -> list[Part]:
        with self._lock, self._device.current():
            batch = checked_batch(waveform, num_samples, stream, self._device, int(self._encoding))
            parts: list[Part] = []
            try:
                while count := len(batch.num_samples):
                    profile = choose_profile(self._fitting, batch.samples, count)
                    part = self._launch_or_shrink(profile, batch.first(profile.max_batch), embedded)
                    if part is not None:
                        parts.append(part)
                        batch = batch.after(profile.max_batch)
            except BaseException:
                with suppress(BackendError):  # which may be the same once more
                    self._drain()
                raise
        return parts

    def _launch_or_shrink(self, profile: Profile, batch: Batch, embedded: bool) -> Part | None:
        """Launch a batch; where memory is full, first give all of ours back, then take half as many clips."""
        try:
            return self._launch(profile, batch, embedded)
        except DeviceMemoryError:
            self._give_back()
        try:
            return self._launch(profile, batch, embedded)
        except DeviceMemoryError as error:
            self._halve(profile, batch, error)
            return None

    def _launch(self, profile: Profile, batch: Batch, embedded: bool) -> Part:
        """Give one batch to the streams; the scores of the one whose slot it takes are brought to safety first."""
        slot = self._slots[self._turn]
        self._finish(slot)
        lent = isinstance(batch.waveform, DeviceArray)
        count = len(batch.num_samples)
        rows, samples = profile.padded(count, batch.samples)
        if lent:
            rows, samples = max(count, profile.min_batch), batch.samples
        sizes = self._layout.sizes(profile.index, rows, samples)
        if not self._blocks.hold(sizes):
            self._drain()  # growing is rare
            self._blocks.grow(sizes)
        blocks, memory = self._blocks, (self._blocks["layers"], self._blocks.size("layers"))
        waveform, tokens, features = (
            blocks[f"{name} {slot.number}"] for name in ("waveform", "num_tokens", "features")
        )

        counted = slot.host("num_tokens", np.int64, (rows,))
        counted[:count], counted[count:] = num_tokens(batch.num_samples), TOKENS_PER_PATCH
        self._device.copy_in(tokens, counted, self._copying)
        if not isinstance(batch.waveform, DeviceArray):
            staged = slot.host("waveform", np.float32, (rows, samples))
            staged[:count, : batch.samples] = batch.waveform
            staged[:count, batch.samples :] = staged[count:] = 0
            self._device.copy_in(waveform, staged, self._copying)
        self._device.record(slot.copied, self._copying)

        if batch.stream is not None:
            self._device.record(slot.consumed, batch.stream)
            self._device.wait(self._encoding, slot.consumed)
        self._device.wait(self._encoding, slot.copied)
        if isinstance(batch.waveform, DeviceArray):
            if rows == count and batch.waveform.address % _ALIGNMENT == 0:
                waveform = batch.waveform.address
            else:  # a batch that is too small over and over
                size = samples * _FLOAT32
                for row in range(0, rows, count):
                    num_bytes = min(count, rows - row) * size
                    self._device.copy(waveform + row * size, batch.waveform.address, num_bytes, self._encoding)
        capture = rows * samples <= CAPTURED_SAMPLES
        shapes = self._layout.shapes(rows, samples)
        fbank = ("fbank", blocks["fbank"])
        counts, encoded = ("num_tokens", tokens), ("features", features)
        self._frontend.run(Run(profile.index, shapes["frontend"], (("waveform", waveform), fbank), memory), capture)
        if batch.stream is not None:
            self._device.record(slot.consumed, self._encoding)
            self._device.wait(batch.stream, slot.consumed)
        self._encoder.run(Run(profile.index, shapes["encoder"], (fbank, counts, encoded), memory), capture)
        self._device.record(slot.encoded, self._encoding)

        self._device.wait(self._scoring, slot.encoded)
        memory = (blocks["head's layers"], blocks.size("head's layers"))
        # However large the batch: the LSTM's kernels are many, and as many as tokens in a clip.
        self._head.run(Run(profile.index, shapes["head"], (encoded, counts, ("scores", blocks["scores"])), memory))
        found = slot.host("scores", np.float32, (rows, len(AXES)))
        self._device.copy_out(found, blocks["scores"], self._scoring)
        kept = None
        if embedded:
            kept = slot.host("features", np.float32, (rows, num_tokens(samples), self._layout.width))
            self._device.copy_out(kept, features, self._scoring)
        self._device.record(slot.done, self._scoring)

        slot.part = Part(slot, counted[:count], batch.waveform if lent else None, kept)
        self._turn = (self._turn + 1) % len(self._slots)
        return slot.part

    def _halve(self, profile: Profile, batch: Batch, error: DeviceMemoryError) -> None:
        """Give all memory back, and take half as many clips of that length from now on, in profiles that can."""
        self._give_back()
        rows = max(len(batch.num_samples), profile.min_batch)
        fitting = with_at_most(self._fitting, profile.max_samples, rows // 2)
        if not any(other.min_samples <= batch.samples <= other.max_samples for other in fitting):
            raise DeviceMemoryError(
                f"the GPU's memory, of which {self._device.free_bytes() / 2**20:.0f} MiB are free, does not hold "
                f"{rows} clip{'s' * (rows > 1)} of up to {profile.max_samples / SAMPLE_RATE:g} s, the fewest that this "
                f"engine takes: {error}; free some, or {'score shorter' if rows == 1 else 'compile for fewer'} ones"
            ) from None
        self._fitting = fitting
        most = choose_profile(fitting, batch.samples, rows).max_batch
        _log.warning("the GPU's memory is full with %d clips a batch; taking %d from now on", rows, most)

    def _drain(self) -> None:
        """Wait for all work, take the scores, and forget what was bound to addresses."""
        for stream in (self._copying, self._encoding, self._scoring):
            self._device.synchronize_stream(stream)
        for slot in self._slots:
            self._finish(slot)
        for stage in self._stages:
            stage.forget_graphs()

    def _give_back(self) -> None:
        """Give back all memory of the GPU that a next batch can do without, or have anew."""
        self._drain()
        for stage in self._stages:
            stage.forget_contexts()
        self._blocks.clear()

    def _wait(self, part: Part) -> tuple[np.ndarray, np.ndarray]:
        """A part's scores, and its embeddings or nothing."""
        if part.scores is None:
            with self._device.current():
                self._device.synchronize(part.slot.done)  # without the lock, so that others can submit meanwhile
                with self._lock:
                    if part.slot.part is part:
                        self._finish(part.slot)
        assert part.scores is not None
        return part.scores, part.embeddings

    def _finish(self, slot: Slot) -> None:
        """Wait for a slot's batch, if it has one, and take its scores out."""
        if (part := slot.part) is not None:
            self._device.synchronize(slot.done)
            if part.features is not None:
                part.embeddings = mean_over_tokens(part.features[: len(part.num_tokens)], part.num_tokens)
            # Last: who waits in another thread takes these as the sign that all is there.
            part.scores = slot.host("scores", np.float32, (len(part.num_tokens), len(AXES))).copy()
            part.owner = part.features = slot.part = None


def _close(
    lock: RLock,
    device: CudaDevice,
    streams: Sequence[Any],
    slots: Sequence[Slot],
    stages: Sequence[Stage],
    blocks: Blocks,
    kernels: LateKernels,
) -> None:
    """Give back all that a backend held, as far as it can be.

    When Python ends while another thread still scores, nothing is: the system takes it all.
    """
    if not lock.acquire(timeout=_CLOSING_SECONDS):
        return  # and never released: who comes after at that time finds nothing here
    steps: list[Callable[[], object]] = [
        *(partial(device.synchronize_stream, stream) for stream in streams),
        kernels.keep,
        *(stage.close for stage in stages),
        blocks.clear,
        *(partial(device.destroy_event, event) for slot in slots for event in slot.events),
        *(partial(device.destroy_stream, stream) for stream in streams),
    ]
    with suppress(BackendError), device.current():
        for step in steps:
            with suppress(BackendError):
                step()


def engine_profiles(frontend: Any) -> tuple[Profile, ...]:
    """The profiles of an engine, by length."""
    profiles = []
    for index in range(frontend.num_optimization_profiles):
        shortest, _, largest = frontend.get_tensor_profile_shape("waveform", index)
        profiles.append(Profile(index, shortest[1], largest[1], shortest[0], largest[0]))
    return tuple(profiles)
