"""Which engine, and numbers: options that commands share."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import click


class Finite(click.types.FloatParamType):
    """A number, and so neither NaN nor infinite."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """As any click type does."""
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value!r} is not a finite number.", param, ctx)
        return number


class FiniteRange(click.FloatRange, Finite):
    """One within bounds."""


Command = TypeVar("Command", bound=Callable[..., Any])

BACKENDS = ("onnxruntime", "openvino", "tensorrt")
PAGE_SUFFIXES = (".html", ".htm")


def positive_numbers(ctx: click.Context, parameter: click.Parameter, value: str) -> list[float]:
    """Positive numbers from text such as 1,8,64."""
    try:
        numbers = [float(part) for part in value.split(",")]
    except ValueError:
        numbers = []
    if not numbers or not all(0 < number < float("inf") for number in numbers):
        raise click.BadParameter(f"{value!r}; give positive numbers, such as 1,8,64")
    return numbers


def whole_batches(batches: Sequence[float]) -> tuple[int, ...]:
    """Numbers of clips; raises UsageError."""
    if any(batch != int(batch) for batch in batches):
        raise click.UsageError("--batches are whole numbers of clips")
    return tuple(map(int, batches))


def engine_options(command: Command) -> Command:
    """--backend, --device, --precision, --threads, --cuda-graphs and --specialize, as `Scorer.open` takes them."""
    for option in (
        click.option(
            "--specialize",
            type=click.Choice(["lazy", "eager", "none"]),
            default="lazy",
            show_default=True,
            help="TensorRT-RTX: make kernels for a batch's shape while others serve it, before it is served, or never. "
            "With lazy a clip's scores may change in their last digits.",
        ),
        click.option(
            "--cuda-graphs/--no-cuda-graphs",
            default=None,
            callback=lambda ctx, param, value: "try" if value is None else value,
            help="On a GPU, replay a batch's shape that comes again as one CUDA graph, not kernel by kernel.  "
            "[default: where that can be]",
        ),
        click.option("--threads", type=click.IntRange(min=1), help="Of the engine.  [default: its own choice]"),
        click.option(
            "--precision",
            type=click.Choice(["auto", "fp32", "fp16", "bf16"]),
            default="auto",
            show_default=True,
            help="bf16 is of the encoder alone, fp16 of encoder and head; the front end is always FP32.",
        ),
        click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True),
        click.option("--backend", type=click.Choice(["auto", *BACKENDS]), default="auto", show_default=True),
    ):
        command = option(command)
    return command


def engine_arguments(engine: Mapping[str, Any]) -> list[str]:
    """What `engine_options` were given, as another process is given them."""
    given = [f"--{name}={value}" for name, value in engine.items() if name != "cuda_graphs" and value is not None]
    graphs = {True: ["--cuda-graphs"], False: ["--no-cuda-graphs"], "try": []}
    return given + graphs[engine["cuda_graphs"]]
