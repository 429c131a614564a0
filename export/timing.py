"""TensorRT's timing cache: how long each kernel took on this GPU, so that the next build need not measure it again."""

from collections.abc import Mapping
from typing import Any

from aesanet.files import CacheFile


class TimingCache:
    """A file for one library version, GPU and platform. RTX has none: it measures when an engine first runs.

    machine : the parts of an engine's key that are of the machine
    """

    def __init__(self, machine: Mapping[str, str]) -> None:
        self.file = CacheFile("timing", machine)

    def attach(self, config: Any) -> None:
        """Let a build take what was measured before; one that is refused is begun anew."""
        for content in (self.file.read(), b""):
            cache = config.create_timing_cache(content)
            if cache is not None and config.set_timing_cache(cache, ignore_mismatch=False):
                return

    def keep(self, config: Any) -> None:
        """Write what a build has measured."""
        if (cache := config.get_timing_cache()) is not None:
            self.file.write(bytes(cache.serialize()))
