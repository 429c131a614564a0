"""What a batch takes of a GPU's memory, by its shape: the sizes of the blocks that the three graphs work in."""

from typing import Final

from aesanet.axes import AXES
from aesanet.lengths import MEL_BINS, num_frames, num_tokens
from aesanet.runtime.cuda.stage import Shapes, Stage

_SIZES_KNOWN: Final = 1024  # of shapes of batches
_FLOAT32: Final = 4  # bytes
_INT64: Final = 8


class Layout:
    """Of front end, encoder and head on one GPU, with so many batches under way.

    width : of the encoder's features
    """

    def __init__(self, frontend: Stage, encoder: Stage, head: Stage, slots: int) -> None:
        self._frontend, self._encoder, self._head, self._slots = frontend, encoder, head, slots
        self.width: int = encoder.engine.get_tensor_shape("features")[2]
        self._sizes: dict[tuple[int, int, int], dict[str, int]] = {}

    def shapes(self, rows: int, samples: int) -> dict[str, Shapes]:
        """Shapes of each graph's inputs."""
        counts = ("num_tokens", (rows,))
        return {
            "frontend": (("waveform", (rows, samples)),),
            "encoder": (("fbank", (rows, num_frames(samples), MEL_BINS)), counts),
            "head": (("features", (rows, num_tokens(samples), self.width)), counts),
        }

    def sizes(self, profile: int, rows: int, samples: int) -> dict[str, int]:
        """Bytes of each block: those of one batch under way have its slot's number, others are used in turns."""
        key = (profile, rows, samples)
        if key not in self._sizes:
            if len(self._sizes) == _SIZES_KNOWN:  # those of lent arrays are in no grid
                self._sizes.clear()
            self._sizes[key] = self._sizes_of(*key)
        return self._sizes[key]

    def _sizes_of(self, profile: int, rows: int, samples: int) -> dict[str, int]:
        shapes = self.shapes(rows, samples)
        frontend, encoder, head = (
            stage.activation_bytes(profile, shapes[stage.name]) for stage in (self._frontend, self._encoder, self._head)
        )
        of_slot = {
            "waveform": rows * samples * _FLOAT32,
            "num_tokens": rows * _INT64,
            "features": rows * num_tokens(samples) * self.width * _FLOAT32,
        }
        return {
            "scores": rows * len(AXES) * _FLOAT32,
            "fbank": rows * num_frames(samples) * MEL_BINS * _FLOAT32,
            "layers": max(frontend, encoder),  # one after the other on one stream
            "head's layers": head,
            **{f"{name} {slot}": size for name, size in of_slot.items() for slot in range(self._slots)},
        }
