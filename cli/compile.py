"""`aesanet compile`: engines for NVIDIA GPUs into a bundle."""

from pathlib import Path

import click

from aesanet.cli.notes import extra, note


def _bounds(ctx: click.Context, parameter: click.Parameter, value: str | None) -> list[tuple[float, int]] | None:
    """ "2:128,10:64" to (longest seconds, largest batch) pairs."""
    if value is None:
        return None
    try:
        pairs = [part.split(":") for part in value.split(",")]
        return [(float(seconds), int(batch)) for seconds, batch in pairs]
    except ValueError:
        raise click.BadParameter(f"{value!r}; give longest seconds and largest batch, such as 2:128,10:64") from None


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "--flavour",
    type=click.Choice(["auto", "tensorrt", "rtx"]),
    default="auto",
    show_default=True,
    help="TensorRT, for the GPU that is here; or TensorRT-RTX, for RTX GPUs, which need not be here. "
    "auto: TensorRT where it and a GPU are.",
)
@click.option(
    "--profiles",
    callback=_bounds,
    help="Longest seconds and largest batch of each, such as 2:128,10:64.  [default: 2 s, the bundle's window, 30 s]",
)
@click.option("--capability", help="RTX: compute capabilities to build for, such as 8.0,8.9,12.0.")
@click.option("--workspace", type=click.FloatRange(min=0, min_open=True), help="GiB that a kernel may use.")
@click.option("--level", type=click.IntRange(0, 5), help="How long the builder searches, 0 to 5.")
def compile(
    bundle: Path,
    flavour: str,
    profiles: list[tuple[float, int]] | None,
    capability: str | None,
    workspace: float | None,
    level: int | None,
) -> None:
    """Compile BUNDLE's FP16 graphs (see `aesanet export --fp16`) and its front end to an engine beside them.

    An engine that was built from the same graphs, by the same library, for the same GPU and with the same options is
    taken as it is; what differs is said.
    """
    with extra("export,cpu"):
        from aesanet.export.compile import choose_flavour, compile_bundle
        from aesanet.export.engine import Settings
        from aesanet.export.profiles import default_profiles, make_profiles

    from aesanet.bundle import read_manifest

    try:
        chosen = make_profiles(profiles) if profiles else default_profiles(read_manifest(bundle).window.window_seconds)
    except ValueError as error:
        raise click.UsageError(f"--profiles: {error}") from None
    capabilities = tuple(part.strip() for part in capability.split(",")) if capability else ()
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
