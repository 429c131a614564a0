"""`aesanet verify`: are a bundle's scores the checkpoint's?"""

import os
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from aesanet.cli.options import BACKENDS, PAGE_SUFFIXES
from aesanet.commands import EXIT_ROWS_FAILED, extra, note
from aesanet.errors import BackendError, BundleError, EngineMisfitError, InputError
from aesanet.files import replacing

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    import numpy as np

    from aesanet.benchmarks.reference import Reference
    from aesanet.bundle import Manifest
    from aesanet.models.config import AESANetConfig
    from aesanet.runtime.backends.base import Backend, BundleFiles, Precision

_LAYERS_SECONDS = 4  # that layers are compared on: all tensors of a graph are kept


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "--checkpoint",
    required=True,
    type=click.Path(path_type=Path),
    help="The checkpoint that the bundle was exported from.",
)
@click.option("--beats", type=click.Path(path_type=Path), help="The public BEATs file of a head-only checkpoint.")
@click.option(
    "--audio",
    multiple=True,
    type=click.Path(),
    help="Files, folders or manifests to score.  [default: eight recordings that come with aesanet]",
)
@click.option(
    "--backend",
    type=click.Choice(["all", *BACKENDS]),
    default="all",
    show_default=True,
    help="all: every engine and precision that runs here.",
)
@click.option("--layers", is_flag=True, help="Compare every graph layer by layer too, and name the first that differs.")
@click.option("--html", type=click.Path(path_type=Path), help="Write a page with tables and plots to this file.")
def verify(
    bundle: Path,
    checkpoint: Path,
    beats: Path | None,
    audio: tuple[str, ...],
    backend: str,
    layers: bool,
    html: Path | None,
) -> None:
    """Hold BUNDLE's scores of real audio to those of its checkpoint in PyTorch.

    Every engine and precision that runs here scores every window alone, among others and twice. Differences are at
    most 1e-4 in FP32 and .02 in FP16 and bf16, on the scale of 0-10; what was found is kept in the bundle.

    Exit status: 0 all passed, 1 some failed, 2 the check could not run.
    """
    with extra("export,cpu"):
        from aesanet.benchmarks.parity import not_opened
        from aesanet.benchmarks.parity import verify as hold
        from aesanet.benchmarks.reference import read_windows, reference_scores
        from aesanet.models.checkpoint import load_checkpoint
    from aesanet.models import demo
    from aesanet.runtime.backends.base import BundleFiles
    from aesanet.runtime.rows.inputs import read_rows

    check_asked(bundle, backend, html)
    files = BundleFiles.open(bundle)
    for form in files.forms:
        files.graphs(form)  # what is damaged is told before anything is scored
    manifest = files.manifest
    _check_source(bundle, manifest, checkpoint, beats)
    note(f"loading {checkpoint}")
    model = load_checkpoint(checkpoint, beats)
    _check_config(bundle, manifest, model.config)
    windows = read_windows(read_rows(audio or [str(path) for path in demo.samples()]), manifest.window)
    if not windows:
        raise InputError(f"no audio in {', '.join(audio)} that is long enough to be scored")
    note(f"scoring {len(windows)} windows with PyTorch")
    reference = reference_scores(model, windows)
    found = {}
    for announced, precision, open_engine in _engines(files, backend):
        kind = announced
        try:
            engine = open_engine()
        except EngineMisfitError as error:
            if backend != "all":
                raise
            note(f"the bundle's compiled engines are left out: {error}")
            continue
        except Exception as error:  # engines raise what they like
            result, scores = not_opened(kind, manifest, precision, str(error)), None
        else:
            kind = engine.kind
            if kind in found:  # CUDA graphs were tried, and there are none
                continue
            note(f"scoring them with {engine.name}")
            result, scores = hold(engine, manifest, reference)
            if engine.kind != kind:  # its CUDA graphs failed on the way, and it went on without
                continue
        found[kind] = (result, scores)
        _keep(bundle, kind, result, announced)
        click.echo(_line(kind, result))
    if not found:
        raise BackendError("no engine here runs this bundle; see `aesanet doctor`")
    lines = []
    if layers:
        with extra("export,cpu"):
            from aesanet.benchmarks.layers import compare_layers
        samples = windows[_worst(reference, [scores for _, scores in found.values()])].samples
        for compared in compare_layers(model, files, samples[: _LAYERS_SECONDS * manifest.sample_rate]):
            lines.append(str(compared))
            click.echo(str(compared))
    if html is not None:
        from aesanet.benchmarks.parity_page import parity_page
        from aesanet.engines import read_engine

        engines = []
        for key in manifest.engines:
            try:
                engines.append(read_engine(bundle, manifest, key))
            except BundleError as error:
                note(f"left out of the page: {error}")
        page = parity_page(str(bundle), manifest, reference, found, lines, engines)
        try:
            with replacing(html.resolve()) as beside:  # a link stays one
                beside.write_text(page, encoding="utf-8")
        except OSError as error:
            raise InputError(f"{html}: {error.strerror}") from None
    if any(result.failures for result, _ in found.values()):
        raise SystemExit(EXIT_ROWS_FAILED)


def check_asked(bundle: Path, backend: str, html: Path | None) -> None:
    """Raise InputError for a page where none can be, and BackendError for an engine that does not run here."""
    from aesanet.runtime.backends import supported_backends

    if html is not None:
        if html.suffix.lower() not in PAGE_SUFFIXES:
            raise InputError(f"{html}: a page is {' or '.join(PAGE_SUFFIXES)}; give it such a name")
        folder = html.absolute().parent
        inside = bundle.resolve() in html.resolve().parents
        if (html.exists() and not html.is_file()) or inside or not os.access(folder, os.W_OK):
            raise InputError(
                f"{html}: not a place for a page; give a file in a folder that is there, outside the bundle, and that "
                "can be written"
            )
    if backend != "all":
        for name, support in supported_backends().items():
            if backend == name and not support.runs:
                raise BackendError(f"{name}: {support.detail}")


def _worst(reference: "Reference", all_scores: "Sequence[np.ndarray | None]") -> int:
    """The window whose scores are furthest from PyTorch's, as a share of its limit, on any engine."""
    import numpy as np

    from aesanet.benchmarks.parity import allowed
    from aesanet.limits import SCORES_LIMIT

    limits = allowed(reference, SCORES_LIMIT["fp32"])
    shares = [
        np.nan_to_num(np.abs(scores - reference.scores), nan=np.inf).max(axis=1) / limits
        for scores in all_scores
        if scores is not None
    ]
    return int(np.max(shares, axis=0).argmax()) if shares else 0


def _check_config(bundle: Path, manifest: "Manifest", config: "AESANetConfig") -> None:
    """Raise InputError where the manifest says otherwise than the checkpoint, in what scores depend on."""
    import msgspec

    head = config.head
    for field, says, expected in (
        ("window", manifest.window, config.window),
        ("weights", manifest.weights, config.weights),
        ("score_range", tuple(manifest.score_range), tuple(head.score_range)),
        ("calibration", manifest.calibration, msgspec.to_builtins(head.calibration)),
    ):
        if says != expected:
            raise InputError(
                f"{bundle}: {field} is {says}, but the checkpoint's is {expected}; export the checkpoint again"
            )


def _check_source(bundle: Path, manifest: "Manifest", checkpoint: Path, beats: Path | None) -> None:
    """Raise InputError where the bundle was made from other files: their scores have no reason to agree."""
    from aesanet.hashing import file_sha256

    for path, expected in ((checkpoint, manifest.source.sha256), (beats, manifest.source.beats_sha256)):
        if path is not None and expected is None:
            raise InputError(f"{checkpoint}: holds its own BEATs weights, so the BEATs file {path} must be left out")
        if path is not None and path.is_file() and (found := file_sha256(path)) != expected:
            raise InputError(
                f"{path}: sha256 is {found}, but {bundle} was exported from {manifest.source.checkpoint} "
                f"with {expected}"
            )


def _engines(files: "BundleFiles", backend: str) -> "Iterator[tuple[str, Precision, Callable[[], Backend]]]":
    """Kind, precision and opener of all that runs here; what this bundle or machine has no means for is told."""
    from aesanet.benchmarks.rounded_half import RoundedHalf
    from aesanet.runtime.backends import lacking, open_exactly, supported_backends
    from aesanet.runtime.backends.base import EngineOptions

    for name, support in supported_backends().items():
        if backend not in ("all", name):
            continue
        if not support.runs and name == "tensorrt" and files.manifest.engines:
            note(f"the bundle's compiled engines are left out: {support.detail}")
        for device, precision in support.runs:
            kind = f"{name} {device} {precision}"
            if (reason := lacking(files, name, precision)) is not None:
                note(f"{kind} is left out: {reason}")
                continue
            yield kind, precision, partial(open_exactly, files, name, EngineOptions(device, precision))
            if name == "onnxruntime" and device == "cuda":
                options = EngineOptions(device, precision, cuda_graphs="try")
                yield f"{kind} with CUDA graphs", precision, partial(open_exactly, files, name, options)
        if name == "onnxruntime" and support.runs and "fp16" in files.forms:
            yield RoundedHalf.kind, RoundedHalf.precision, partial(RoundedHalf, files)


def _line(name: str, result: Any) -> str:
    if result.failures:
        return f"{name}: {'; '.join(('FAILED', *result.failures))}"
    largest = max(parity.max_abs for parity in result.axes.values())
    return (
        f"{name}: passed ({result.windows} windows, {result.seconds:.0f} s: differs by up to {largest:.1e}, "
        f"{result.worst_of_limit:.0%} of what is allowed there; among others {result.batch_max_abs:.1e}, "
        f"again {result.repeat_max_abs:.1e}; limit {result.limit:.0e} but where FP32 itself is uncertain)"
    )


def _keep(bundle: Path, kind: str, result: Any, announced: str) -> None:
    """Enter a result into the manifest as it is now; a bundle that cannot be written is told and goes without.

    announced : what the engine was called before it was opened, as which it may once have failed to be
    """
    import msgspec

    from aesanet.export.writer import change_manifest

    def enter(manifest: "Manifest") -> "Manifest":
        others = {name: old for name, old in manifest.verified.items() if name != announced or old.windows}
        return msgspec.structs.replace(manifest, verified=others | {kind: result})

    try:
        change_manifest(bundle, enter)
    except OSError as error:
        note(f"{bundle}: what was found cannot be kept in it: {error.strerror}")
