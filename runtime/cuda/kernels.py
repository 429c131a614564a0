"""Kernels that TensorRT-RTX makes on the GPU that an engine runs on: when, and where they are kept."""

from typing import Any, Literal

from aesanet.files import CacheFile

Specialize = Literal["lazy", "eager", "none"]


class LateKernels:
    """What the engines of one bundle share; with TensorRT, whose kernels are all in its plans, it does nothing.

    specialize : when kernels are made for one shape of a batch: while others, made for any shape, already serve it
                 (lazy), before it is served (eager), or never (none). Only the last two give a clip the same bytes
                 each time
    file       : keeps all kernels for the processes to come
    """

    def __init__(self, specialize: Specialize = "lazy", file: CacheFile | None = None) -> None:
        self._specialize, self._file = specialize, file
        self._cache: Any = None
        self._kept = b""
        self.name = ""
        """What an engine's name says of this, where it is not as usual."""

    def configure(self, trt: Any, config: Any) -> None:
        """Have contexts that are made with `config` (an IRuntimeConfig) make kernels so, and keep them here."""
        if not hasattr(config, "create_runtime_cache"):
            return
        strategies = trt.DynamicShapesKernelSpecializationStrategy
        if self._specialize != "lazy":
            self.name = f" specialize={self._specialize}"
        config.dynamic_shapes_kernel_specialization_strategy = getattr(strategies, self._specialize.upper())
        if self._cache is None:
            self._cache = config.create_runtime_cache()
            if self._file is not None and (content := self._file.read()) and self._cache.deserialize(content):
                self._kept = content  # and else it is of another GPU, driver or version, or damaged
        config.set_runtime_cache(self._cache)

    def keep(self) -> None:
        """Write the kernels that were made since they were read."""
        if self._cache is None or self._file is None:
            return
        content = self._cache.serialize()
        if content is not None and bytes(content) != self._kept:
            self._kept = bytes(content)
            self._file.write(self._kept)
