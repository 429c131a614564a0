"""Maps the rooms at the top of the repository to the one import name `aesanet`; the rest is in pyproject.toml."""

from setuptools import setup

ROOMS = (
    "models",
    "models.demo",
    "export",
    "runtime",
    "runtime.audio",
    "runtime.backends",
    "runtime.cuda",
    "runtime.rows",
    "benchmarks",
    "benchmarks.experiments",
    "training",
    "training.demo",
    "cli",
)

setup(
    packages=["aesanet", *(f"aesanet.{room}" for room in ROOMS)],
    package_dir={"aesanet": "aesanet", **{f"aesanet.{room}": room.replace(".", "/") for room in ROOMS}},
    package_data={"aesanet": ["py.typed"], "aesanet.models.demo": ["samples/*"]},
)
