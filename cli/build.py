"""`aesanet build`: a checkpoint to a bundle with engines that were held to it, in one command."""

from typing import Any

import click

from aesanet.cli.compile import asked_for, compile, profiles_of
from aesanet.cli.export import export
from aesanet.cli.verify import check_asked, verify
from aesanet.commands import extra


def _build(**given: Any) -> None:
    from aesanet.engines import load_library
    from aesanet.export.engine import check_capabilities

    with extra("export,cpu"):
        from aesanet.models.checkpoint import read_config

    # What would fail after minutes fails now.
    flavour, capabilities = asked_for(given["flavour"], given["capability"])
    check_capabilities(load_library(flavour), capabilities)
    profiles_of(given["profiles"], read_config(given["checkpoint"]).window)
    check_asked(given["out"], given["backend"], given["html"])
    context = click.get_current_context()
    context.invoke(export, fp16=True, **_own(export, given))
    context.invoke(compile, bundle=given["out"], **_own(compile, given))
    context.invoke(verify, bundle=given["out"], **_own(verify, given))


def _own(command: click.Command, given: dict[str, Any]) -> dict[str, Any]:
    return {param.name: given[param.name] for param in command.params if param.name in given}


_PARAMS = {param.name: param for command in (verify, compile, export) for param in command.params}

build = click.Command(
    "build",
    params=[param for name, param in _PARAMS.items() if name not in ("fp16", "bundle", "prune")],
    callback=_build,
    help="""Export CHECKPOINT with FP16 graphs, compile them and verify the bundle: `aesanet export --fp16`, `aesanet
    compile` and `aesanet verify`.

    What each of them measures is told. If the second fails, the bundle stays, and `aesanet compile` goes on from there.
    Exit status: 0 all engines that run here passed, 1 some failed, 2 something could not be done.
    """,
)
