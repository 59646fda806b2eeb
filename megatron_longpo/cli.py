"""The command ``megatron-longpo``, and the table of its subcommands.

A command's module is imported when the command is chosen: ``megatron-longpo --help`` imports neither torch nor
transformers.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import tyro


@dataclass(frozen=True)
class Command:
    """A subcommand.

    Attributes:
        summary: its line in the help of the command above it.
        module: where its function is, in ``megatron_longpo.commands``.
        function: called with the arguments after the command's name and, as ``prog``, the name for its help.
    """

    summary: str
    module: str
    function: str


COMMANDS = {
    "train": Command("Train a model: LongPO, DPO or SFT.", "train", "train"),
    "status": Command("Show where a run is; the exit status says whether to run it again.", "status", "status"),
    "watch": Command("Watch a run on the terminal.", "runs", "watch"),
    "compare-runs": Command("Find the first step and metric in which two runs differ.", "runs", "compare_runs"),
    "replay": Command("Compute a step of a run again, and find where a value is not finite.", "replay", "replay"),
    "simulate": Command("Simulate a rank's training step on a GPU that is not there.", "simulate", "simulate"),
    "plan": Command("Plan a run: what fits, how fast, on how many GPUs.", "plan", "plan"),
    "plan calibrate": Command("Measure this machine for the planner.", "calibrate", "calibrate"),
    "doctor": Command("Examine a machine: does it compute right and fast?", "doctor", "doctor"),
    "convert import": Command("Convert a Hugging Face model to a checkpoint.", "convert", "import_"),
    "convert verify": Command("Compare a checkpoint with a Hugging Face model.", "convert", "verify"),
    "convert export": Command("Convert a checkpoint to a verified Hugging Face model.", "convert", "export"),
    "preprocess": Command("Tokenise preference pairs into training data.", "preprocess", "preprocess"),
    "preprocess inspect": Command("Show preprocessed data: counts, lengths, samples as text.", "preprocess", "inspect"),
    "generate": Command("Generate preference pairs from documents.", "generate", "generate"),
    "generate merge": Command("Merge the parts of a generation.", "generate", "merge"),
    "evaluate": Command("Evaluate a model, by one or more suites.", "evaluate", "evaluate"),
    "evaluate compare": Command("Compare evaluations.", "evaluate", "compare"),
    "evolve": Command("Evolve a model through rounds of pairs, training and evaluation.", "evolve", "evolve"),
    "evolve status": Command("Show where an evolution is.", "evolve", "status"),
    "evolve report": Command("Write one page about all rounds.", "evolve", "report"),
}
GROUPS = {"convert": "Convert between Hugging Face models and checkpoints."}
DESCRIPTION = "Short-to-long preference optimization (LongPO) on Megatron-Core."


def main() -> None:
    """Entry point of the console command ``megatron-longpo``."""
    run()


def run(name: str = "", *, prog: str = "megatron-longpo", arguments: Sequence[str] | None = None) -> None:
    """Run a command and exit with its status: 0, 2 on an error that the user can fix, 1 on any other.

    Args:
        name: words of the command, or of a group of commands, that come before the arguments.
        prog: name of the program in the help.
        arguments: the rest of the command line; those of this process by default.
    """
    name, prog, rest = resolve(name, prog, sys.argv[1:] if arguments is None else arguments)
    if name not in COMMANDS:
        explain(name, prog, rest)
        return
    from megatron_longpo.runtime.failure import run_or_fail

    run_or_fail(lambda: function_of(name)(rest, prog=prog))


def resolve(name: str, prog: str, arguments: Sequence[str]) -> tuple[str, str, list[str]]:
    """Take the words of the command's name off the arguments.

    Returns:
        The name of a command or of a group, the program's name in the help, and the other arguments.
    """
    rest = list(arguments)
    while rest and (longer := f"{name} {rest[0]}".strip()) in {*COMMANDS, *GROUPS}:
        name, prog = longer, f"{prog} {rest.pop(0)}"
    return name, prog, rest


def function_of(name: str) -> Callable[..., None]:
    """The function of a command, imported now."""
    command = COMMANDS[name]
    function: Callable[..., None] = getattr(
        importlib.import_module(f"megatron_longpo.commands.{command.module}"), command.function
    )
    return function


def explain(group: str, prog: str, arguments: Sequence[str]) -> None:
    """Print the help of a group of commands and exit, with status 2 unless the help was asked for."""
    prefix = f"{group} ".lstrip()
    below = {**GROUPS, **{name: command.summary for name, command in COMMANDS.items()}}
    choices = {}
    for name in [*COMMANDS, *GROUPS]:
        word = name.removeprefix(prefix).split()[0]
        if name.startswith(prefix) and word not in choices:
            choices[word] = _documented(below[prefix + word])
    tyro.extras.subcommand_cli_from_dict(
        choices, prog=prog, description=GROUPS.get(group, DESCRIPTION), args=list(arguments), sort_subcommands=False
    )


def _documented(summary: str) -> Callable[[], None]:
    """A function for tyro to list, with its help."""

    def command() -> None: ...

    command.__doc__ = summary
    return command


if __name__ == "__main__":
    main()
