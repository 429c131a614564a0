"""The recordings that come with aesanet: real speech, music and effects, which exports are checked on."""

from pathlib import Path


def samples() -> list[Path]:
    """Eight audio files; where each is from and its licence stand in `SOURCES.md` beside them."""
    return sorted(path for path in Path(__file__).with_name("samples").iterdir() if path.suffix != ".md")
