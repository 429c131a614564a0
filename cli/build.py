"""`aesanet build`: a checkpoint to a bundle with engines, in one command."""

from typing import Any

import click

from aesanet.cli.compile import asked_for, compile, profiles_of
from aesanet.cli.export import export


def _build(**given: Any) -> None:
    from aesanet.engines import load_library
    from aesanet.export.engine import check_capabilities

    # What would fail after minutes fails now.
    flavour, capabilities = asked_for(given["flavour"], given["capability"])
    check_capabilities(load_library(flavour), capabilities)
    profiles_of(given["profiles"], window_seconds=10.0)
    context = click.get_current_context()
    context.invoke(export, fp16=True, **_own(export, given))
    context.invoke(compile, bundle=given["out"], **_own(compile, given))


def _own(command: click.Command, given: dict[str, Any]) -> dict[str, Any]:
    return {param.name: given[param.name] for param in command.params if param.name in given}


build = click.Command(
    "build",
    params=[param for param in (*export.params, *compile.params) if param.name not in ("fp16", "bundle")],
    callback=_build,
    help="""Export CHECKPOINT with FP16 graphs and compile them: `aesanet export --fp16`, then `aesanet compile`.

    Both checks of `export` are made (ONNX against PyTorch, FP16 against FP32) and told, then what was compiled. If
    that fails, the bundle stays, and `aesanet compile` goes on from there.
    """,
)
