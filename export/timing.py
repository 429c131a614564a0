"""TensorRT's timing cache: how long each kernel took on this GPU, so that the next build need not measure it again."""

import hashlib
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec


class TimingCache:
    """A file for one library version, GPU and platform, in the user's cache folder (`XDG_CACHE_HOME` or `~/.cache`).

    A cache that cannot be read or written only costs time. RTX has none: it measures when an engine first runs.

    machine : the parts of an engine's key that are of the machine
    """

    def __init__(self, machine: Mapping[str, str]) -> None:
        name = hashlib.sha256(msgspec.json.encode(sorted(machine.items()))).hexdigest()[:16]
        base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
        self.path = Path(base, "aesanet", f"timing-{name}.cache")

    def attach(self, config: Any) -> None:
        """Let a build take what was measured before; one that is refused is begun anew."""
        before = b""
        with suppress(OSError):
            before = self.path.read_bytes()
        for content in (before, b""):
            cache = config.create_timing_cache(content)
            if cache is not None and config.set_timing_cache(cache, ignore_mismatch=False):
                return

    def keep(self, config: Any) -> None:
        """Write what a build has measured."""
        if (cache := config.get_timing_cache()) is None:
            return
        with suppress(OSError):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            beside = self.path.with_name(f".{self.path.name}.{os.getpid()}")
            beside.write_bytes(bytes(cache.serialize()))
            beside.replace(self.path)
