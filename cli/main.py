"""The `aesanet` command: each family of commands is imported only when it is called."""

import importlib

import click

from aesanet import __version__
from aesanet.commands import run

_COMMANDS = {
    "export": ("export", "Export a checkpoint to a bundle of ONNX graphs, checked against PyTorch."),
    "compile": ("compile", "Compile a bundle's FP16 graphs to engines for NVIDIA GPUs, with TensorRT or TensorRT-RTX."),
    "build": ("build", "Export with FP16 graphs, compile and verify: checkpoint to engines in one command."),
    "verify": ("verify", "Hold a bundle's scores to its checkpoint's, on every engine that runs here."),
    "bench": ("bench", "Time a bundle here, from cold starts to whole runs, beside its peers, and compare."),
    "score": ("score", "Score audio files with a bundle: CE, CU, PC, PQ a clip."),
    "report": ("report", "Make a page of scores: distributions, correlations, clips to hear, errors."),
    "select": ("select", "Keep the rows of score files that pass: a manifest."),
    "train": ("train", "Train a checkpoint on clips that people have rated; goes on where it was stopped."),
    "evaluate": ("evaluate", "Compare scores with human labels: MSE, LCC, SRCC, KTAU."),
    "calibrate": ("evaluate", "Fit a checkpoint's scores to human labels; ranks stay as they are."),
    "doctor": ("doctor", "Say what works on this machine, and how to get what does not."),
}


class _Commands(click.Group):
    """Lists all commands without importing any of them."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        module = importlib.import_module(f"aesanet.cli.{_COMMANDS[cmd_name][0]}")
        command: click.Command = getattr(module, cmd_name)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, summary) for name, (_, summary) in _COMMANDS.items()])


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="aesanet")
def cli() -> None:
    """Perceptual audio scores from an exported AESA-Net.

    Exit status: 0 all rows were scored, 1 some rows failed, 2 the command could not run, 130 interrupted (Ctrl-C or
    SIGTERM).
    """


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; errors that we raise on purpose become one line and exit status 2."""
    run(cli, "aesanet", arguments)


if __name__ == "__main__":  # `torchrun -m aesanet.cli.main train ...`
    main()
