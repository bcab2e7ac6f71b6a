"""``mamba-jax evaluate --task``: asks a trained model, by several methods of reading, and keeps each answer at once."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from train.arguments import count
from train.errors import UsageError
from train.tasks.names import ABLATIONS, METHODS, TASKS

DECIMAMBA_OPTIONS = ("decimamba_layers", "decimamba_length", "decimamba_beta")
"""Options of the method decimamba, None where they are not given."""

_DEFAULT_METHODS = "vanilla"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of ``--task``."""
    parser.epilog = _listed("tasks", TASKS) + "\n" + _listed("methods", METHODS)
    parser.add_argument("--task", metavar="TASK", help="a task, of those below, in place of the loss on held-out text")
    group = parser.add_argument_group("with --task")
    group.add_argument(
        "--methods",
        type=_comma_separated(str),
        default=[_DEFAULT_METHODS],
        metavar="A,B",
        help="ways to read long prompts, of those below (vanilla)",
    )
    group.add_argument("--ablations", action="store_true", help=f"add the methods {', '.join(ABLATIONS)}")
    group.add_argument(
        "--calibration", type=Path, metavar="FILE", help="what 'mamba-jax calibrate' made of this checkpoint"
    )
    group.add_argument(
        "--decay_threshold",
        type=float,
        metavar="TH",
        help="decay above which a channel is global (1e-30 for Mamba-1, 5e-2 for Mamba-2)",
    )
    group.add_argument(
        "--decimamba_layers",
        type=_layers,
        metavar="L,L",
        help="layers in which decimamba leaves out tokens, from 0 (the middle one)",
    )
    group.add_argument(
        "--decimamba_length",
        type=count,
        metavar="N",
        help="tokens that the first of them keeps, of sequences longer than those in training (the training length)",
    )
    group.add_argument(
        "--decimamba_beta",
        type=_share_above_zero,
        metavar="B",
        help="what each of them keeps, as a share of what the one before it does (0.5)",
    )
    group.add_argument(
        "--lengths",
        type=_comma_separated(count),
        metavar="N,N",
        help="tokens of whole sequences, such as 1K,2K,128K (1K to 128K; for perplexity, 1 to 64 training lengths)",
    )
    group.add_argument(
        "--depths",
        type=_comma_separated(_share),
        metavar="D,D",
        help="shares of the text before the key, from 0 to 1 (0,0.25,0.5,0.75,1)",
    )
    group.add_argument(
        "--documents",
        type=_comma_separated(count),
        metavar="N,N",
        help="numbers of documents (10,20,50,100,200,300)",
    )
    group.add_argument(
        "--tries",
        type=count,
        metavar="N",
        help="questions or windows a cell (20; 100 for documents; all of LongBench's)",
    )
    group.add_argument("--text", type=Path, metavar="FILE", help="text to read (the held-out split of the run's data)")
    group.add_argument(
        "--documents_file",
        type=Path,
        metavar="FILE",
        help="lines of JSON with 'question' and 'context', as SQuAD's (pieces of the text)",
    )
    group.add_argument("--data", type=Path, metavar="DIR", help="folder with LongBench's files")
    group.add_argument(
        "--datasets", type=_comma_separated(str), metavar="A,B", help="those of LongBench's to ask (all)"
    )
    group.add_argument(
        "--max_prompt", type=count, metavar="N", help="cut longer prompts of LongBench in the middle (never)"
    )
    group.add_argument(
        "--chunk", type=count, default=1 << 14, metavar="N", help="tokens of a prompt to read at a time (16K)"
    )
    group.add_argument(
        "--tokens_at_a_time",
        type=count,
        default=1 << 18,
        metavar="N",
        help="tokens on the device at a time, which decides how many prompts are read together (256K)",
    )
    group.add_argument("--seed", type=int, default=0, help="decides the questions, the same for each method (0)")
    group.add_argument("--overwrite", action="store_true", help="forget the results that the folder has")


def check(options: argparse.Namespace, given: Sequence[str]) -> None:
    """Checks the options that are given, and puts in the defaults of the others.

    Args:
        options: parsed.
        given: the command line.

    Raises:
        UsageError: a task or method that does not exist, or an option that is of another task or of none.
    """
    from train.settings import did_you_mean
    from train.tasks.plans import TASKS as PLANS

    named = {argument.removeprefix("--").partition("=")[0] for argument in given if argument.startswith("--")}
    if options.task is None:
        if without := sorted(named - {"checkpoint", "output"}):
            raise UsageError(f"--{without[0]} is an option of tasks: name one with --task, of {', '.join(TASKS)}.")
        return
    if options.task not in TASKS:
        hint = did_you_mean(options.task, TASKS)
        raise UsageError(f"--task {options.task}: there is no such task.{hint} There are {', '.join(TASKS)}.")
    takes = PLANS[options.task].options
    of_other_tasks = set().union(*(task.options for task in PLANS.values())) - takes
    if others := sorted(named & of_other_tasks):
        listed = ", ".join(f"--{name}" for name in sorted(takes))
        raise UsageError(f"--{others[0]} is of no use to --task {options.task}, which takes {listed}.")
    options.depths = options.depths or [0.0, 0.25, 0.5, 0.75, 1.0]
    options.documents = options.documents or [10, 20, 50, 100, 200, 300]
    options.methods = [*options.methods, *(ABLATIONS if options.ablations else ())]
    given_of_decimamba = [name for name in DECIMAMBA_OPTIONS if getattr(options, name) is not None]
    if given_of_decimamba and "decimamba" not in options.methods:
        raise UsageError(f"--{given_of_decimamba[0]} is of the method decimamba: add it to --methods.")


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Runs the task, prints its first table and returns all that it writes as JSON.

    Raises:
        UserError: what is asked for does not exist, does not fit the model, or cannot be read or written.
    """
    from train.tasks.evaluation import evaluate

    return evaluate(options)


def _comma_separated[Item](convert: Callable[[str], Item]) -> Callable[[str], list[Item]]:
    def parse(text: str) -> list[Item]:
        items = [convert(part.strip()) for part in text.split(",") if part.strip()]
        if not items:
            raise argparse.ArgumentTypeError("give at least one, separated by commas")
        return list(dict.fromkeys(items))

    return parse


def _share(text: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = -1.0
    if not 0 <= share <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no share from 0 to 1")
    return share


def _share_above_zero(text: str) -> float:
    share = _share(text)
    if share == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no share above 0, at most 1")
    return share


def _layers(text: str) -> list[int]:
    try:
        layers = [int(part) for part in text.split(",")]
    except ValueError:
        layers = []
    if not layers or layers[0] < 0 or layers != sorted(set(layers)):
        raise argparse.ArgumentTypeError(f"{text!r} are no layers: give their numbers, ascending, from 0, such as 2,3")
    return layers


def _listed(title: str, summaries: dict[str, str]) -> str:
    width = max(map(len, summaries))
    return f"{title}:\n" + "".join(f"  {name:{width}}  {summary}\n" for name, summary in summaries.items())
