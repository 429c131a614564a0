"""A run as people watch it: a progress bar that says where the time goes, and what is said at the end."""

import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any, Self

from tqdm import tqdm

from aesanet.runtime.pipeline import Pipeline
from aesanet.runtime.rows.output import Tally


class Watch:
    """Watches a pipeline whose rows are counted in a tally; as a context, it shows a bar on a terminal's stderr."""

    def __init__(self, pipeline: Pipeline[Any], tally: Tally, total: int | None, workers: int) -> None:
        self._pipeline, self._tally, self._workers = pipeline, tally, workers
        self._before = replace(tally)  # of an earlier run that is gone on with
        self._began = time.monotonic()
        self._bar = tqdm(
            total=total, initial=tally.rows, unit=" clip", disable=None, leave=False, file=sys.stderr, smoothing=0
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._seconds = time.monotonic() - self._began
        self._bar.close()

    def quiet(self) -> AbstractContextManager[None]:
        """While something else is written to the terminal."""
        return tqdm.external_write_mode(file=sys.stdout)  # type: ignore[no-any-return]

    def tell(self) -> None:
        """A row was written."""
        if self._bar.disable:
            return
        seconds = time.monotonic() - self._began
        hours = (self._tally.seconds - self._before.seconds) / 3600
        engine, waiting, decoding = (f"{share:.0%}" for share in self._shares(seconds))
        self._bar.set_postfix_str(
            f"{hours / seconds:.3f} h of audio/s; engine {engine}, waiting {waiting}, decoders {decoding}",
            refresh=False,
        )
        self._bar.update()

    def speed(self) -> str:
        """What was scored, and how fast."""
        audio = self._tally.seconds - self._before.seconds
        return f"{audio:.1f} s of audio in {self._seconds:.1f} s ({audio / self._seconds:.0f} x real time)"

    def profile(self) -> Iterator[str]:
        """Where the time went, in lines."""
        spent = self._pipeline.spent
        engine, waiting, decoding = self._shares(self._seconds)
        rest = self._seconds - spent.engine - spent.waiting
        yield f"engine {spent.engine:.2f} s ({engine:.1%}), in {spent.batches} batches with {spent.padding:.1%} padding"
        yield f"waiting for decoded audio {spent.waiting:.2f} s ({waiting:.1%})"
        yield f"planning, writing and the rest {rest:.2f} s ({rest / self._seconds:.1%})"
        yield f"decoders, beside all that, {spent.decoding:.2f} s ({decoding:.1%} of {self._workers} threads)"

    def _shares(self, seconds: float) -> tuple[float, float, float]:
        """Of a run of so many seconds: in the engine, waiting for decoders, and of the decoders at work."""
        spent = self._pipeline.spent
        return spent.engine / seconds, spent.waiting / seconds, spent.decoding / seconds / self._workers
