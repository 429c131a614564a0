"""What every engine offers, and no more: scores of a padded batch."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal, TypeAlias

import numpy as np

from aesanet.bundle import GraphForm, GraphName, Manifest, graph_file, graph_specs, read_manifest
from aesanet.errors import BackendError
from aesanet.runtime.cuda.kernels import Specialize

Precision = Literal["fp32", "fp16", "bf16"]
Device = Literal["cpu", "cuda"]
CudaGraphs: TypeAlias = bool | Literal["try"] | None

Pending: TypeAlias = Callable[[], np.ndarray]
"""Waits for a batch's scores and returns them, float32 [batch, 4]; may be called again."""
PendingEmbedded: TypeAlias = Callable[[], tuple[np.ndarray, np.ndarray]]
"""The same with the clips' embeddings, float32 [batch, width]."""

_CPU_BATCH_WINDOWS: Final = 4  # enough to fill the cores, and little memory


class Backend(ABC):
    """An engine with a bundle's three graphs loaded."""

    name: str
    """Of the engine, its version, its device and the encoder's precision, for people and reports."""
    kind: str
    """The same without versions, such as "openvino cpu bf16": what `aesanet verify` keeps its findings by."""
    device: Device
    precision: Precision
    form: GraphForm
    """Of the bundle's graphs, that it runs or was compiled from."""

    @abstractmethod
    def scores(self, waveform: np.ndarray, num_samples: np.ndarray) -> np.ndarray:
        """Score one batch; may be called from several threads.

        waveform    : float32 [batch, samples], 16 kHz, padded at the end with zeros
        num_samples : int64 [batch], each at least 2,800
        returns     : float32 [batch, 4], order CE, CU, PC, PQ
        """

    def submit(self, waveform: np.ndarray, num_samples: np.ndarray) -> Pending:
        """Begin to score a batch, as `scores` takes it. An engine of its own memory goes on while the caller does."""
        scores = self.scores(waveform, num_samples)
        return lambda: scores

    def submit_embedded(self, waveform: np.ndarray, num_samples: np.ndarray) -> PendingEmbedded:
        """Begin to score and embed a batch; an embedding is the mean of the encoder's features over a clip's tokens."""
        raise BackendError(f"{self.name} gives no embeddings")

    def features(self, fbank: np.ndarray, num_tokens: np.ndarray) -> np.ndarray:
        """What the encoder alone gives, float32 [batch, tokens, width], for those who measure it.

        fbank      : float32 [batch, frames, 128], as the front end gives it
        num_tokens : int64 [batch]
        """
        raise BackendError(f"{self.name} does not run its encoder alone")

    def batch_seconds(self, window_seconds: float) -> float:
        """Of audio, padding included, in the batches that this engine runs best, for windows of a bundle's length."""
        return _CPU_BATCH_WINDOWS * window_seconds


def mean_over_tokens(features: np.ndarray, num_tokens: np.ndarray) -> np.ndarray:
    """float32 [batch, tokens, width] -> float32 [batch, width]: each clip's mean over its own first `num_tokens`."""
    return np.stack([own[:count].mean(axis=0) for own, count in zip(features, num_tokens, strict=True)])


@dataclass(frozen=True)
class BundleFiles:
    """A bundle as engines take it: what its manifest says, and its files, checked as they are taken."""

    folder: Path
    manifest: Manifest

    @classmethod
    def open(cls, bundle: str | Path) -> "BundleFiles":
        """Read the manifest; raises BundleError."""
        return cls(Path(bundle), read_manifest(bundle))

    def graphs(self, form: GraphForm) -> dict[GraphName, Path]:
        """The three graphs in a form, their hashes checked; raises BundleError."""
        return {name: graph_file(self.folder, spec) for name, spec in graph_specs(self.manifest, form).items()}

    @property
    def forms(self) -> tuple[GraphForm, ...]:
        """In which the bundle has graphs."""
        half = self.manifest.half
        return ("fp32", *(("fp16",) if half else ()), *(("fused",) if half and half.fused else ()))


@dataclass(frozen=True)
class EngineOptions:
    """How an engine runs a bundle, as far as it has a choice.

    threads     : of the processor; None for the engine's own choice
    cuda_graphs : on a GPU, with or without, or "try": with where that can be; None for the engine's own choice
    specialize  : when TensorRT-RTX makes kernels for a shape (see `LateKernels`); other engines have theirs from the
                  start
    """

    device: Device
    precision: Precision
    threads: int | None = None
    cuda_graphs: CudaGraphs = None
    specialize: Specialize = "lazy"


@dataclass(frozen=True)
class Support:
    """What an engine can do on this machine, or why it cannot run at all."""

    version: str | None
    runs: tuple[tuple[Device, Precision], ...]
    detail: str
