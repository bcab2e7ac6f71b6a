"""The command line: ``mamba-jax train|evaluate|generate|calibrate|inspect|prepare|benchmark|configs``.

Each command imports what it needs when it runs, so that help comes at once. What a user can mend is one line on stderr.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from mamba_jax import __version__
from train.arguments import count
from train.errors import UsageError, UserError

_BINDING = "--gin."


@dataclasses.dataclass(frozen=True)
class _Command:
    summary: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], None]


_RESUMING = {
    "train": " Run the same command again to go on from the last checkpoint.",
    "benchmark": " Run the same command again to go on from the last measurement.",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns the exit status: 0, 1 for an error, 2 for wrong usage, 130 after Ctrl-C."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    _configure_logging()
    try:
        options = _parse(arguments)
        COMMANDS[options.command].run(options)
        sys.stdout.flush()
    except UserError as error:
        print(f"mamba-jax: error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print(f"\nmamba-jax: interrupted.{_RESUMING.get(arguments[0], '')}", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader (head, less) has seen enough. Nothing more may be written, not even when the interpreter ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return 0


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="mamba-jax", description="Trains and runs selective state-space models.")
    parser.add_argument("--version", action="version", version=f"mamba-jax {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, command in COMMANDS.items():
        subparser = commands.add_parser(
            name,
            help=command.summary,
            description=command.summary,
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        if name in arguments[:1]:
            command.add_arguments(subparser)
    if arguments[:1] != ["train"]:
        options = parser.parse_args(arguments)
        options.arguments = arguments
        return options
    # argparse cannot know the names of settings; what is wrong with them is said when they are bound.
    bindings = [argument for argument in arguments if argument.startswith(_BINDING)]
    if "-h" in arguments or "--help" in arguments:
        commands.choices["train"].epilog = _settings_summary()
    if without_value := next((binding for binding in bindings if "=" not in binding), None):
        raise UsageError(f"{without_value} has no value: write --gin.NAME=VALUE, without spaces around the =.")
    options = parser.parse_args([argument for argument in arguments if argument not in bindings])
    options.bindings = [binding.removeprefix(_BINDING) for binding in bindings]
    return options


def _configure_logging() -> None:
    logging.basicConfig(format="mamba-jax: %(message)s", stream=sys.stderr, force=True)
    logging.getLogger("train").setLevel(logging.INFO)
    # Orbax speaks through absl; what users need to know of it, train.checkpoint says in their terms.
    logging.getLogger("absl").setLevel(logging.CRITICAL)


def _settings_summary() -> str:
    from train.settings import describe

    settings = describe()
    width = max(len(setting.name) for setting in settings)
    lines = (f"  {setting.name:{width}}  {setting.type} = {setting.default}" for setting in settings)
    return (
        "settings, in a file or as --gin.NAME=VALUE, which wins ('mamba-jax configs' says what they mean):\n"
        + "\n".join(lines)
    )


def _add_train_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = "mamba-jax train [--gin_file FILE] [--gin.NAME=VALUE] --workdir DIR [--overwrite]"
    parser.add_argument(
        "--gin_file",
        action="append",
        default=[],
        metavar="FILE",
        help="file of settings, such as configs/quickstart.gin; may be given again, later files win",
    )
    parser.add_argument(
        "--workdir",
        type=Path,
        required=True,
        metavar="DIR",
        help="folder for checkpoints and metrics; the same command with the same folder resumes the run",
    )
    parser.add_argument("--overwrite", action="store_true", help="delete the run that the folder holds, and start anew")


def _train(options: argparse.Namespace) -> None:
    from jax.errors import JaxRuntimeError

    from train import gin, loop

    experiment = gin.load(options.gin_file, options.bindings)
    try:
        loop.run(experiment, options.workdir, overwrite=options.overwrite)
    except JaxRuntimeError as error:
        if not str(error).startswith("RESOURCE_EXHAUSTED"):
            raise
        raise UserError(
            "the devices have too little memory for this run: raise Train.gradient_accumulation, lower "
            "Data.global_batch_size, set LanguageModel.remat to 'full', or shard the model with Mesh.fsdp."
        ) from error


def _add_evaluate_arguments(parser: argparse.ArgumentParser) -> None:
    _add_checkpoint_argument(parser)
    parser.add_argument(
        "--output",
        type=Path,
        metavar="PATH",
        help="write the loss there too, as JSON; with --task, the folder for results (evaluations/TASK in the workdir)",
    )
    from train.tasks import command

    command.add_arguments(parser)


def _evaluate(options: argparse.Namespace) -> None:
    from train.tasks import command

    command.check(options, options.arguments)
    if options.task is not None:
        command.run(options)
        return
    from train import evaluate

    evaluate.run(options.checkpoint, output=options.output)


def _add_generate_arguments(parser: argparse.ArgumentParser) -> None:
    _add_checkpoint_argument(parser)
    parser.add_argument(
        "--prompt",
        action="append",
        default=[],
        metavar="TEXT",
        help="text to continue; may be given again. Without any, a text is begun from nothing",
    )
    parser.add_argument(
        "--prompt_file",
        action="append",
        type=Path,
        default=[],
        metavar="FILE",
        help="file whose whole text is to be continued; may be given again",
    )
    parser.add_argument("--max_new_tokens", type=int, default=256, metavar="N", help="tokens to add at most (256)")
    parser.add_argument(
        "--temperature", type=float, default=1.0, metavar="T", help="divides the logits; 0 takes the likeliest (1.0)"
    )
    parser.add_argument("--top_k", type=int, metavar="K", help="draw from the K likeliest tokens (all)")
    parser.add_argument(
        "--top_p", type=float, metavar="P", help="draw from the fewest tokens whose probabilities reach P (all)"
    )
    parser.add_argument("--seed", type=int, default=0, help="decides the draws (0)")
    parser.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="end before this text; may be given again"
    )


def _generate(options: argparse.Namespace) -> None:
    from train import generate

    try:
        prompts = options.prompt + [path.read_text(encoding="utf-8") for path in options.prompt_file]
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--prompt_file: {error}.") from None
    generate.run(
        options.checkpoint,
        prompts or [""],
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        seed=options.seed,
        stop=options.stop,
    )


def _add_calibrate_arguments(parser: argparse.ArgumentParser) -> None:
    _add_checkpoint_argument(parser)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="calibration to write, such as c.npz")
    parser.add_argument("--length", type=count, metavar="N", help="tokens of a sequence (the run's training length)")
    parser.add_argument("--count", type=int, default=10, metavar="N", help="sequences to measure (10)")
    parser.add_argument("--seed", type=int, default=0, help="decides which sequences of the training split (0)")
    parser.add_argument(
        "--clamp",
        type=float,
        metavar="SHARE",
        help="cut this share of the largest steps off first (0.05 for Mamba-2, as published, and 0 for the others)",
    )


def _calibrate(options: argparse.Namespace) -> None:
    from train import calibrate

    calibrate.run(
        options.checkpoint,
        options.out,
        length=options.length,
        count=options.count,
        seed=options.seed,
        clamp=options.clamp,
    )


def _add_inspect_arguments(parser: argparse.ArgumentParser) -> None:
    _add_checkpoint_argument(parser)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for figures and arrays")
    parser.add_argument(
        "--calibration",
        type=Path,
        metavar="FILE",
        help="what 'mamba-jax calibrate' wrote for this checkpoint (measured anew with its defaults)",
    )
    parser.add_argument(
        "--length",
        type=count,
        metavar="N",
        help="tokens of the extended sequence, such as 16K (8 times the training length)",
    )
    parser.add_argument("--layer", type=int, metavar="N", help="layer that figures 1, 7 and 8 show (the middle one)")
    parser.add_argument(
        "--decay_threshold",
        type=float,
        metavar="TH",
        help="decay above which a channel is global (1e-30 for Mamba-1, 5e-2 for Mamba-2 and Mamba-3)",
    )


def _inspect(options: argparse.Namespace) -> None:
    from train import inspection

    inspection.run(
        options.checkpoint,
        options.out,
        calibration=options.calibration,
        length=options.length,
        layer=options.layer,
        decay_threshold=options.decay_threshold,
    )


def _add_checkpoint_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--checkpoint",
        type=Path,
        required=True,
        metavar="DIR",
        help="a run's workdir (its newest checkpoint), or the folder of one of its checkpoints",
    )


def _add_prepare_arguments(parser: argparse.ArgumentParser) -> None:
    from train.data import prepare

    prepare.add_arguments(parser)


def _prepare(options: argparse.Namespace) -> None:
    from train.data import prepare

    prepare.run(options)


def _add_benchmark_arguments(parser: argparse.ArgumentParser) -> None:
    from benchmarks import command

    command.add_arguments(parser)


def _benchmark(options: argparse.Namespace) -> None:
    from benchmarks import command

    command.run(options)


def _configs(options: argparse.Namespace) -> None:
    from train.settings import describe

    group = ""
    for setting in describe():
        if setting.name.partition(".")[0] != group:
            group = setting.name.partition(".")[0]
            print(f"\n{group}")
        print(f"  {setting.name}: {setting.type} = {setting.default}\n      {setting.doc}")
    print("\nSet them in a gin file (NAME = VALUE, a line each), or with --gin.NAME=VALUE.")


COMMANDS = {
    "train": _Command("Train a model, or go on with a run.", _add_train_arguments, _train),
    "evaluate": _Command(
        "Evaluate a trained model on held-out text, or on a task.", _add_evaluate_arguments, _evaluate
    ),
    "generate": _Command("Continue texts with a trained model.", _add_generate_arguments, _generate),
    "calibrate": _Command("Measure a model's step sizes, to extend its context.", _add_calibrate_arguments, _calibrate),
    "inspect": _Command("Draw how far each layer of a model sees.", _add_inspect_arguments, _inspect),
    "prepare": _Command("Turn text files into token files to train on.", _add_prepare_arguments, _prepare),
    "benchmark": _Command("Time the operators and check their results.", _add_benchmark_arguments, _benchmark),
    "configs": _Command("List every setting with its type, default and meaning.", lambda parser: None, _configs),
}
