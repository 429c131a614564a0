"""aesanet: perceptual audio scores (CE, CU, PC, PQ) from an exported AESA-Net, fast and exactly."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from aesanet.runtime.scorer import ClipScores, Scorer

__version__ = "0.1.0"
__all__ = ["ClipScores", "Scorer", "__version__"]

# In a checkout the rooms lie beside this folder; there, Python started at the top must find them too.
if (Path(__file__).parent.parent / "setup.py").is_file():
    __path__.append(str(Path(__file__).parent.parent))


def __getattr__(name: str) -> Any:
    # Lazy, so that `import aesanet` and every command start without numpy, codecs and engines.
    if name in ("ClipScores", "Scorer"):
        from aesanet.runtime import scorer

        return getattr(scorer, name)
    raise AttributeError(f"module 'aesanet' has no attribute {name!r}")
