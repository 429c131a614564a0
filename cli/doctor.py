"""`aesanet doctor`: what works on this machine, and how to get what does not."""

import platform
import re
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, requires, version

import click

from aesanet import __version__
from aesanet.engines import Flavour, library_version
from aesanet.errors import BackendError
from aesanet.gpu import list_gpus
from aesanet.machine import processor_name, usable_cores

_EXTRAS = ("", "export", "gpu", "rtx", "parquet")  # as users install them; what engines need is told with these
_REQUIREMENT = re.compile(r"([\w.-]+)(?:\[(\w+)\])?")
_LIBRARIES: dict[str, Flavour] = {"tensorrt": "tensorrt", "tensorrt-rtx": "rtx"}


@click.command()
def doctor() -> None:
    """Say what works on this machine, and how to get what does not.

    Exit status: 0 when at least one engine can score, 2 when none can.
    """
    from aesanet.runtime.backends import supported_backends

    click.echo(f"aesanet {__version__}, Python {platform.python_version()}, {platform.platform()}")
    click.echo(f"processor: {processor_name()}, {usable_cores()} cores for this process")
    for gpu in _gpus():
        click.echo(f"GPU: {gpu}")

    click.echo("\nengines")
    supported = supported_backends()
    for name, support in supported.items():
        runs = ", ".join(f"{device} {precision}" for device, precision in support.runs)
        head = " ".join(filter(None, (name, support.version)))
        click.echo(f"  {head}:{f' {runs}' if runs else ''} ({support.detail})")

    click.echo("\npackages")
    for extra in _EXTRAS:
        install = f"aesanet[{extra}]" if extra else "aesanet"
        found = {package: _version(package) for package in _required(extra)}
        missing = " ".join(package for package, version in found.items() if version is None)
        there = ", ".join(f"{package} {version}" for package, version in found.items() if version is not None)
        remedy = f"{missing} missing: pip install '{install}'" if missing else ""
        click.echo(f"  {install}: {'; '.join(filter(None, (there, remedy)))}")

    click.echo("\naudio")
    for line in _codecs():
        click.echo(f"  {line}")
    if not any(support.runs for support in supported.values()):
        raise BackendError("no engine is installed: pip install 'aesanet[cpu]' or 'aesanet[openvino]'")


def _required(extra: str) -> list[str]:
    """The packages that aesanet, or one of its extras, is installed with; none where it is not installed."""
    try:
        lines = requires("aesanet") or []
    except PackageNotFoundError:
        return []
    found: list[str] = []
    for line in lines:
        requirement, _, marker = line.partition(";")
        of_extra = re.search(r"extra == [\"'](\w+)", marker)
        named = _REQUIREMENT.match(requirement)
        if named is not None and (of_extra[1] if of_extra else "") == extra:
            found += _required(named[2]) if named[1] == "aesanet" else [named[1]]
    return found


def _version(package: str) -> str | None:
    if package in _LIBRARIES:
        return library_version(_LIBRARIES[package])
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _gpus() -> Iterator[str]:
    try:
        gpus = list_gpus()
    except BackendError as error:
        yield str(error)
        return
    yield from map(str, gpus)


def _codecs() -> Iterator[str]:
    """Formats that were encoded and decoded just now, not read from a list."""
    import io

    import numpy as np
    import soundfile

    working: list[str] = []
    failing: list[str] = []
    for name, subtype in (
        ("WAV", "PCM_16"),
        ("FLAC", "PCM_16"),
        ("OGG", "VORBIS"),
        ("OGG", "OPUS"),
        ("MP3", "MPEG_LAYER_III"),
    ):
        label = subtype.lower() if name == "OGG" else name.lower()
        try:
            file = io.BytesIO()
            soundfile.write(file, np.zeros(48_000, np.float32), 48_000, format=name, subtype=subtype)
            file.seek(0)
            (working if len(soundfile.read(file)[0]) else failing).append(label)
        except (soundfile.LibsndfileError, ValueError):
            failing.append(label)
    yield f"libsndfile {soundfile.__libsndfile_version__}: decodes {', '.join(working)}"
    if failing:
        yield f"cannot decode {', '.join(failing)}: install soundfile from PyPI, whose own libsndfile can"
