"""Clips that can be heard in a page: the first seconds of each as the network heard them, within the page."""

import base64
import io
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import soundfile

from aesanet.benchmarks.page import text
from aesanet.errors import ClipError
from aesanet.lengths import SAMPLE_RATE
from aesanet.runtime.audio.decode import clip_blocks
from aesanet.runtime.rows.row import Clip, Row


class Players:
    """Makes <audio> elements until a page has `limit_bytes` of them.

    Each plays the first `seconds` of a clip, mono at 16 kHz, which is what was scored, as MP3, which every browser
    plays: about 4 kB a second.
    """

    def __init__(self, seconds: float, limit_bytes: int) -> None:
        self.seconds = seconds
        self.left_bytes = limit_bytes
        self._made: dict[Clip, str] = {}

    def player(self, row: Mapping[str, Any]) -> str:
        """HTML of a player for a row's clip, or of the reason why there is none."""
        try:
            clip = Row(row).clip()
            if clip not in self._made:
                self._made[clip] = f"data:audio/mpeg;base64,{base64.b64encode(self._excerpt(clip)).decode()}"
        except ClipError as error:
            return f"<small class=none title='{text(error.message)}'>no player: {error.code}</small>"
        except soundfile.LibsndfileError as error:
            return f"<small class=none>no player: {text(str(error))}</small>"
        if len(source := self._made[clip]) > self.left_bytes:
            return "<small class=none>no player: the page is full</small>"
        self.left_bytes -= len(source)
        return f"<audio controls src='{source}'></audio>"

    def _excerpt(self, clip: Clip) -> bytes:
        end = (clip.start_seconds or 0.0) + self.seconds
        end = end if clip.end_seconds is None else min(end, clip.end_seconds)
        samples = np.concatenate(list(clip_blocks(replace(clip, end_seconds=end))))
        file = io.BytesIO()
        soundfile.write(file, np.clip(samples, -1, 1), SAMPLE_RATE, format="MP3", subtype="MPEG_LAYER_III")
        return file.getvalue()
