"""The verbs: `python -m vlbench VERB key=value ...`; each calls one function of one module."""

from __future__ import annotations

import contextlib
import errno
import io
import logging
import os
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, NamedTuple

from vlbench.errors import EnvironmentFailure, UserError, suggest_name
from vlbench.process_settings import preserve_process_settings
from vlbench.text_files import split_lines

if TYPE_CHECKING:
    from vlbench.config.schema import Recipe


class VerbEntry(NamedTuple):
    """What a verb does, and what it is called with."""

    usage: str
    summary: str
    run_verb: Callable[[list[str]], int]


def run_fit(overrides: list[str]) -> int:
    """Train a recipe."""
    from vlbench.config import recipe as recipes
    from vlbench.distributed.launcher import (
        end_with_launcher,
        exit_silently_on_ctrl_c,
        is_launched,
        launch_processes,
        report_error_once,
    )
    from vlbench.distributed.machine_limits import check_machine_limits

    exit_silently_on_ctrl_c()
    end_with_launcher()
    with report_error_once():
        recipe = recipes.load_recipe(overrides)
        recipes.require_data(recipe)
        check_machine_limits(recipe, is_launched())
    if recipe.trainer.world_size > 1 and not is_launched():
        return launch_processes(["fit", *overrides], recipe.trainer)
    # Threads of torch that spin for long make a machine with other work 20 times slower, and
    # threads that sleep at once cost a quarter of the speed on an idle one (measured, two cores).
    os.environ.setdefault("GOMP_SPINCOUNT", "20000")
    from vlbench import fit_command  # after the checks: it takes seconds

    return fit_command.fit(resolve_recipe(overrides))


def run_eval(overrides: list[str]) -> int:
    """Evaluate a run."""
    from vlbench.evaluate.eval_command import run_eval as evaluate_run

    return evaluate_run(overrides)


def run_score(overrides: list[str]) -> int:
    """Score answers to a benchmark."""
    from vlbench.evaluate.score_command import run_score as score_answers

    return score_answers(overrides)


def run_chat(overrides: list[str]) -> int:
    """Talk to a model."""
    from vlbench.serve.chat_command import run_chat as talk

    return talk(overrides)


def run_export(overrides: list[str]) -> int:
    """Write a model in a layout that others load."""
    from vlbench.serve.export_command import run_export as write

    return write(overrides)


def run_check(overrides: list[str]) -> int:
    """Look at the data of a recipe."""
    from pathlib import Path

    from vlbench.config import recipe as recipes

    out = [word.removeprefix("out=") for word in overrides if word.startswith("out=")]
    overrides = [word for word in overrides if not word.startswith("out=")]
    recipes.require_data(recipes.load_recipe(overrides))
    from vlbench.check.check_command import (
        run_check as check_data,  # after the checks: it takes seconds
    )

    recipe = resolve_recipe(overrides)
    default = f"checks/{recipe.recipe}-{recipe.size}"
    return check_data(recipe, Path(out[-1] if out else default).expanduser())


def run_pack(overrides: list[str]) -> int:
    """Pack a data set into shards."""
    from vlbench.data.write_shards import run_pack as pack_data

    return pack_data(overrides)


def run_compare(overrides: list[str]) -> int:
    """Train a grid of runs and report."""
    from vlbench.compare.experiment import grid

    planned = grid.parse_grid(overrides)
    from vlbench.compare.experiment.compare_command import (
        run_compare,  # after the checks: it takes seconds
    )

    return run_compare(planned)


def run_plan(overrides: list[str]) -> int:
    """Say what a training needs."""
    from vlbench.planner.options import parse_plan_options

    asked = parse_plan_options(overrides)
    from vlbench.planner.plan_command import (
        run_plan as plan_training,  # after the checks: it takes seconds
    )

    return plan_training(asked)


def run_report(arguments: list[str]) -> int:
    """Compare finished runs."""
    from vlbench.compare.report.report_command import run_report as compare_runs

    return compare_runs(arguments)


def run_show(overrides: list[str]) -> int:
    """Print a resolved recipe."""
    from vlbench.config import recipe as recipes

    print(recipes.recipe_to_yaml(resolve_recipe(overrides)), end="")
    return 0


def resolve_recipe(overrides: list[str]) -> Recipe:
    """Return the recipe that `words` describe; what it leaves open is as in its `init`."""
    from vlbench.config import recipe as recipes

    recipe = recipes.load_recipe(overrides)
    if not recipe.init:
        return recipe
    from vlbench.train.resume import inherited_keys  # it imports torch

    return recipes.load_recipe(overrides, inherited_keys(recipe))


def run_list(arguments: list[str]) -> int:
    """Print what there is."""
    from vlbench import listing

    print("\n".join(listing.listing_lines(arguments)))
    return 0


VERBS = {
    "fit": VerbEntry(
        "recipe=NAME [size=SIZE] [KEY=VALUE ...]", "train a recipe and evaluate it", run_fit
    ),
    "eval": VerbEntry(
        "run=PATH [data=FILE images=FOLDER]\n"
        "       run=PATH task=mmmu,cmmmu,own [data=DIR] [split=val] [subjects=A,B] [seed=42]\n"
        "       [protocol=yi|official|lmms|strict|raw]\n"
        "       with both: [limit=N] [blank=true] [batch=16] [template=NAME] [out=DIR]",
        "evaluate a run or a released model, on its questions or on a benchmark",
        run_eval,
    ),
    "score": VerbEntry(
        "task=mmmu|cmmmu answers=FILE protocol=official|lmms|strict|raw|yi\n"
        "       [data=DIR|FILE.json [split=val]] [seed=42] [out=DIR]",
        "score answers to MMMU or CMMMU as the benchmarks' own code does",
        run_score,
    ),
    "chat": VerbEntry(
        "model=PATH [image=FILE|URL ...] [question=TEXT] [template=NAME] [dtype=bf16]\n"
        "       [device=cuda] [max_new_tokens=512] [temperature=0] [top_p=1] [seed=0]",
        "talk to a run, a checkpoint or a released model",
        run_chat,
    ),
    "export": VerbEntry(
        "run=PATH to=DIR format=yi_vl|hf_llava|vlbench [dtype=bf16] [merge_lora=true]\n"
        "       [template=NAME]",
        "write a run, a checkpoint or a released model in a layout that others load",
        run_export,
    ),
    "check": VerbEntry(
        "recipe=NAME [size=SIZE] data.train=FILE data.images=FOLDER [out=DIR] [KEY=VALUE ...]",
        "look at all data before training: faults, lengths, what is learned of them",
        run_check,
    ),
    "plan": VerbEntry(
        "recipe=NAME [size=SIZE] [gpu=A800] [gpus=FILE.yaml] [price=DOLLARS] [mfu=0.4]\n"
        "       [samples=N,...] [text_tokens=N,...] [trainer.devices=8 trainer.num_nodes=16]\n"
        "       [probe=true] [KEY=VALUE ...]",
        "say what a training needs before it is paid for: memory, time, what fits",
        run_plan,
    ),
    "pack": VerbEntry(
        "data=FILE.json images=FOLDER to=DIR [samples=10000]",
        "pack a data set into shards (tar files) that stream from disk",
        run_pack,
    ),
    "compare": VerbEntry(
        "recipe=A,B seeds=3 [grid='K=V + K=V | K=V'] [match=params|visual_tokens|flops]\n"
        "       [sweep=0.3,1,3] [freeze=vision] [jobs=N|auto|slurm] [dry_run=true] [run=DIR] "
        "[KEY=VALUE ...]",
        "train every recipe with every seed, and report the differences",
        run_compare,
    ),
    "report": VerbEntry(
        "DIR ... [to=FILE.md] [to=FILE.html]",
        "compare finished runs: intervals, differences, costs",
        run_report,
    ),
    "show": VerbEntry(
        "recipe=NAME [size=SIZE] [KEY=VALUE ...]", "print a resolved recipe", run_show
    ),
    "list": VerbEntry(
        "[recipes|sizes|connectors [size=SIZE]|towers]", "print what there is", run_list
    ),
}
HELP_FLAGS = ("--help", "-h", "help")


def main(argv: list[str] | None = None) -> int:
    """Run the verb in `words` (default: the command line) and return the exit code.

    A program that calls it finds the settings of its process as they were.
    """
    with preserve_process_settings(), escape_unencodable_output(), silence_pil_logging():
        return _run_reporting_errors(argv)


def _run_reporting_errors(argv: list[str] | None) -> int:
    try:
        code = dispatch_verb(sys.argv[1:] if argv is None else argv)
        if sys.stdout is not None:  # it may be closed
            sys.stdout.flush()  # here, so that a reader who has left is noticed here
        return code
    except (UserError, EnvironmentFailure) as error:
        for line in split_lines(str(error)):
            print(f"vlbench: {line}", file=sys.stderr)
        return 2 if isinstance(error, UserError) else 1
    except KeyboardInterrupt:
        if os.environ.get("LOCAL_RANK", "0") == "0":  # one line for all processes of a machine
            print("vlbench: interrupted", file=sys.stderr)
        return 130
    except (OSError, RuntimeError) as error:
        return _exit_code_of(error)


def _exit_code_of(error: OSError | RuntimeError) -> int:
    """Return the exit code for what the system refuses to a user; any other error goes on."""
    if isinstance(error, RuntimeError):
        if "home directory" not in str(error):  # pathlib's, of a path that begins with ~NAME
            raise error
        print("vlbench: a path begins with ~NAME, and there is no such user here", file=sys.stderr)
        return 2
    if isinstance(error, BrokenPipeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # nothing is left to be written at exit
        return 1
    # a name that is too long: whatever looks for a file raises it, so it is refused in one place
    if not isinstance(error, PermissionError) and error.errno != errno.ENAMETOOLONG:
        raise error
    print(f"vlbench: {str(error.filename):.300}: {error.strerror}", file=sys.stderr)
    return 2


@contextlib.contextmanager
def escape_unencodable_output() -> Iterator[None]:
    """Let a letter that the terminal does not know be shown as its number."""
    streams = [s for s in (sys.stdout, sys.stderr) if isinstance(s, io.TextIOWrapper)]
    before = [stream.errors for stream in streams]
    for stream in streams:
        stream.reconfigure(errors="backslashreplace")
    try:
        yield
    finally:
        for stream, errors in zip(streams, before, strict=True):
            if not stream.closed:
                stream.reconfigure(errors=errors)


@contextlib.contextmanager
def silence_pil_logging() -> Iterator[None]:
    """Leave out what PIL logs of a picture between our lines; what matters is a Mistake."""
    nowhere = logging.NullHandler()
    logging.getLogger("PIL").addHandler(nowhere)
    try:
        yield
    finally:
        logging.getLogger("PIL").removeHandler(nowhere)


def dispatch_verb(argv: list[str]) -> int:
    """Call the verb that the first word names with the others."""
    if not argv or argv[0] in HELP_FLAGS:
        print(program_help())
        return 0 if argv else 2
    if argv[0] == "--version":
        from vlbench import __version__

        print(f"vlbench {__version__}")
        return 0
    if argv[0] not in VERBS:
        verbs = ", ".join(VERBS)
        raise UserError(f"no verb '{argv[0]}'; verbs: {verbs}.{suggest_name(argv[0], VERBS)}")
    if any(word in HELP_FLAGS[:2] for word in argv[1:]):
        print(verb_help(argv[0]))
        return 0
    return VERBS[argv[0]].run_verb(argv[1:])


def program_help() -> str:
    """Return the help of the whole program."""
    verbs = [f"  {name:7} {verb.summary}" for name, verb in VERBS.items()]
    return "\n".join(
        [
            "usage: python -m vlbench VERB [KEY=VALUE ...]",
            "",
            "Train vision-language models with any connector, and compare connectors fairly.",
            "",
            *verbs,
            "",
            "Start with: python -m vlbench fit recipe=yivl_llava",
            "`fit --help` has the table of all keys, `list` what they can name.",
        ]
    )


def verb_help(verb_name: str) -> str:
    """Return the help of one verb; `fit` and `show` have the table of all keys."""
    verb = VERBS[verb_name]
    lines = [
        f"usage: python -m vlbench {verb_name} {verb.usage}",
        "",
        f"{verb.summary}.".capitalize(),
    ]
    if verb_name in ("fit", "show"):
        from vlbench import listing

        lines += ["", *listing.recipe_key_lines()]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
