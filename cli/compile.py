"""`aesanet compile`: engines for NVIDIA GPUs into a bundle."""

from pathlib import Path
from typing import Literal

import click

from aesanet.cli.notes import note


def _bounds(ctx: click.Context, parameter: click.Parameter, value: str | None) -> list[tuple[float, int]] | None:
    """ "2:128,10:64" to (longest seconds, largest batch) pairs."""
    if value is None:
        return None
    try:
        pairs = [part.split(":") for part in value.split(",")]
        return [(float(seconds), int(batch)) for seconds, batch in pairs]
    except ValueError:
        raise click.BadParameter(f"{value!r}; give longest seconds and largest batch, such as 2:128,10:64") from None


def _number(capability: str) -> tuple[int, str]:
    return len(capability), capability  # 8.9 before 12.0


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "--flavour",
    type=click.Choice(["auto", "tensorrt", "rtx"]),
    default="auto",
    show_default=True,
    help="TensorRT, for the GPU that is here; or TensorRT-RTX, for RTX GPUs, which need not be here. "
    "auto: RTX with --capability, else TensorRT where it and a GPU are.",
)
@click.option(
    "--profiles",
    callback=_bounds,
    help="Longest seconds and largest batch of each, such as 2:128,10:64.  [default: 2 s, the bundle's window, 30 s]",
)
@click.option(
    "--capability", help="RTX: compute capabilities to build for, such as 8.0,8.9,12.0.  [default: the library's own]"
)
@click.option(
    "--workspace", type=click.FloatRange(min=0, min_open=True), help="GiB that a kernel may use.  [default: all]"
)
@click.option(
    "--level", type=click.IntRange(0, 5), help="How long the builder searches, 0 to 5.  [default: the library's own]"
)
def compile(
    bundle: Path,
    flavour: Literal["auto", "tensorrt", "rtx"],
    profiles: list[tuple[float, int]] | None,
    capability: str | None,
    workspace: float | None,
    level: int | None,
) -> None:
    """Compile BUNDLE's FP16 graphs (see `aesanet export --fp16`) and its front end to an engine beside them.

    An engine that was built from the same graphs, by the same library, for the same GPU and with the same options is
    taken as it is; what differs is said. `aesanet score` does not run engines yet.
    """
    from aesanet.bundle import read_manifest
    from aesanet.export.compile import choose_flavour, compile_bundle
    from aesanet.export.engine import Settings
    from aesanet.export.profiles import default_profiles, make_profiles

    try:
        chosen = make_profiles(profiles) if profiles else default_profiles(read_manifest(bundle).window.window_seconds)
    except ValueError as error:
        raise click.UsageError(f"--profiles: {error}") from None
    capabilities = tuple(sorted({part.strip() for part in (capability or "").split(",")} - {""}, key=_number))
    if capabilities and flavour == "auto":
        flavour = "rtx"
    settings = Settings(profiles=chosen, capabilities=capabilities, level=level, workspace=workspace)
    engine, built = compile_bundle(bundle, choose_flavour(flavour), settings, progress=note)
    click.echo(f"{bundle}/engines/{engine.key}: {'built' if built else 'was there'}")
    for name, value in engine.parts.items():
        click.echo(f"  {name}: {value}")
    for name, plan in engine.plans.items():
        activations = ", ".join(f"{size / 2**20:.0f}" for size in plan.activation_bytes)
        click.echo(
            f"  {name}.plan: {plan.size_bytes / 2**20:.1f} MiB in {plan.build_seconds:.1f} s"
            + (f"; activations {activations} MiB, by profile" if activations else "")
        )
