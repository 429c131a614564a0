"""Which engine, and numbers: options that commands share."""

import math
from collections.abc import Callable
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


def engine_options(command: Command) -> Command:
    """--backend, --device, --precision, --cuda-graphs and --specialize, as `Scorer.open` takes them."""
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
