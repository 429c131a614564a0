"""Prints what scripts/gpu wants to be installed, a requirement a line: all that the extras say but PyTorch."""

import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

project = tomllib.loads(Path(__file__).parents[1].joinpath("pyproject.toml").read_text(encoding="utf-8"))
EXTRAS = ("gpu", "rtx", "openvino", "export", "parquet")
TESTS = ("hypothesis", "kaldi-native-fbank", "pytest", "pytest-xdist")
# PyTorch is there, and TensorRT may be: pip cannot get it everywhere.
NOT_ASKED_FOR = ("torch", "tensorrt")


def name_of(requirement: str) -> str:
    """The package's name alone."""
    return re.match(r"[\w.-]+", requirement)[0]  # type: ignore[index]


def of_extra(extra: str) -> Iterator[str]:
    """Requirements of an extra, those of the extras that it names among them."""
    for requirement in project["project"]["optional-dependencies"][extra]:
        if named := re.match(r"aesanet\[(.*)\]", requirement):
            for other in named[1].split(","):
                yield from of_extra(other)
        else:
            yield requirement


wanted = [
    *project["build-system"]["requires"],
    *project["project"]["dependencies"],
    *(requirement for extra in EXTRAS for requirement in of_extra(extra)),
    *(requirement for requirement in of_extra("dev") if name_of(requirement) in TESTS),
]
print("\n".join(dict.fromkeys(line for line in wanted if name_of(line) not in NOT_ASKED_FOR)))
