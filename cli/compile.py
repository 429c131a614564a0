"""`aesanet compile`: engines for NVIDIA GPUs into a bundle."""

from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click

from aesanet.cli.options import FiniteRange
from aesanet.commands import note
from aesanet.errors import BackendError

if TYPE_CHECKING:
    from aesanet.engines import Flavour
    from aesanet.export.profiles import Profile
    from aesanet.gpu import Gpu
    from aesanet.lengths import WindowPolicy


Bounds = list[tuple[float, int, int, int]]


def _bounds(ctx: click.Context, parameter: click.Parameter, value: str | None) -> Bounds | None:
    """Longest seconds, smallest, best and largest batch from text such as 2:128,10:64@16,30:4-20."""
    if value is None:
        return None
    found: Bounds = []
    try:
        for seconds, batches in (part.split(":") for part in value.split(",")):
            batches, at, best = batches.partition("@")
            smallest, dash, largest = batches.rpartition("-")
            found.append((float(seconds), int(smallest if dash else 1), int(best if at else largest), int(largest)))
    except ValueError:
        raise click.BadParameter(
            f"{value!r}; give longest seconds and largest batch, such as 2:128,10:64; before a dash the smallest, if "
            "it is not one clip: 10:32-64; after an @ the batch that kernels are chosen for, if it is another: 10:64@16"
        ) from None
    return found


def asked_for(flavour: Literal["auto", "tensorrt", "rtx"], capability: str | None) -> "tuple[Flavour, tuple[str, ...]]":
    """Which library, and the compute capabilities each once and in order; only RTX can build for some."""
    from aesanet.export.compile import choose_flavour

    names = set() if capability is None else {name.strip() for name in capability.split(",")} - {""}
    if capability is not None and not names:
        raise click.UsageError(f"--capability: {capability!r} names none; give some, such as 8.0,8.9,12.0")
    capabilities = tuple(sorted(names, key=lambda name: (len(name), name)))  # 8.9 before 12.0
    return ("rtx" if capabilities and flavour == "auto" else choose_flavour(flavour)), capabilities


def profiles_of(bounds: Bounds | None, window: "WindowPolicy", memory_mib: int | None = None) -> "tuple[Profile, ...]":
    """The profiles asked for, which must take a window, or those that suit it and a GPU's memory; raises UsageError."""
    from aesanet.export.profiles import default_profiles, make_profiles
    from aesanet.lengths import SAMPLE_RATE

    try:
        profiles = make_profiles(bounds) if bounds else default_profiles(window.window_seconds, memory_mib)
    except ValueError as error:
        raise click.UsageError(f"--profiles: {error}") from None
    if round((longest := profiles[-1].max_seconds) * SAMPLE_RATE) < window.window_samples:
        raise click.UsageError(
            f"--profiles: the longest is {longest:g} s, and this bundle's windows have {window.window_seconds:g} s: "
            f"add one of these, such as {window.window_seconds:g}:{profiles[-1].max_batch}"
        )
    return profiles


def _gpu_here() -> "Gpu | None":
    """The GPU that CUDA takes first, where there is one."""
    from aesanet.gpu import cuda_gpu, load_cuda

    try:
        return cuda_gpu(load_cuda())
    except BackendError:
        return None


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
    help="Longest seconds and largest batch of each: 2:128,10:64. Kernels are chosen for the largest, or for another: "
    "10:64@16. The smallest is one clip, or another to which fewer are padded: 10:64-64. A length may come twice, as "
    "in 10:1,10:64 for single clips.  [default: 2 s, the bundle's window, 30 s, in batches that the GPU's "
    "memory holds]",
)
@click.option(
    "--capability", help="RTX: compute capabilities to build for, such as 8.0,8.9,12.0.  [default: the library's own]"
)
@click.option(
    "--workspace",
    type=FiniteRange(min=0, min_open=True, max=1024),
    help="GiB that a kernel may use.  [default: all]",
)
@click.option(
    "--level",
    type=click.IntRange(0, 5),
    help="How long TensorRT searches for kernels, 0 to 5; of little effect with RTX.  [default: the library's own]",
)
@click.option("--prune", is_flag=True, help="Then remove the bundle's other engines, whatever they were built for.")
def compile(
    bundle: Path,
    flavour: Literal["auto", "tensorrt", "rtx"],
    profiles: Bounds | None,
    capability: str | None,
    workspace: float | None,
    level: int | None,
    prune: bool,
) -> None:
    """Compile BUNDLE's FP16 graphs (see `aesanet export --fp16`) and its front end to an engine beside them.

    An engine that was built from the same graphs, by the same library, for the same GPU and with the same options is
    taken as it is; what differs is said. `aesanet score` takes the last engine that fits the GPU that it runs on.
    """
    from aesanet.bundle import read_manifest
    from aesanet.engines import load_library, runs_on
    from aesanet.export.compile import compile_bundle, prune_engines
    from aesanet.export.engine import BuildSettings

    library, capabilities = asked_for(flavour, capability)
    gpu = None if capabilities else _gpu_here()
    memory_mib = None if gpu is None else int(gpu.memory)
    chosen = profiles_of(profiles, read_manifest(bundle).window, memory_mib)
    if library == "rtx" and gpu is not None and not runs_on(load_library(library), gpu):
        note(f"TensorRT-RTX does not run on {gpu}: this engine is for other GPUs; TensorRT is for this one")
    settings = BuildSettings(profiles=chosen, capabilities=capabilities, level=level, workspace_gib=workspace)
    engine, built = compile_bundle(bundle, library, settings, progress=note)
    click.echo(f"{bundle}/engines/{engine.key}: {'built' if built else 'was there'}")
    for name, value in engine.parts.items():
        click.echo(f"  {name}: {value}")
    for name, plan in engine.plans.items():
        activations = ", ".join(f"{size / 2**20:.0f}" for size in plan.activation_bytes)
        click.echo(
            f"  {name}.plan: {plan.size_bytes / 2**20:.1f} MiB in {plan.build_seconds:.1f} s"
            + (f"; activations {activations} MiB, by profile" if activations else "")
        )
    if prune:
        count, size = prune_engines(bundle, kept=engine.key)
        click.echo(f"{count} other engine{'s' * (count != 1)} removed, {size / 2**20:.1f} MiB")
