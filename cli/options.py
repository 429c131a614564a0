"""Which engine: options that commands share."""

from collections.abc import Callable
from typing import Any, TypeVar

import click

Command = TypeVar("Command", bound=Callable[..., Any])

BACKENDS = ("onnxruntime", "openvino", "tensorrt")


def engine_options(command: Command) -> Command:
    """--backend, --device and --precision, as `Scorer.open` takes them."""
    for option in (
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
