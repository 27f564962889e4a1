"""The verbs: `python -m vlbench VERB key=value ...`; each calls one function of one module.

Modules that import torch are imported inside of the functions, after the words have been checked.
"""

from __future__ import annotations

import contextlib
import errno
import io
import logging
import os
import sys
from collections.abc import Callable, Collection, Iterator
from typing import TYPE_CHECKING, NamedTuple

from vlbench.command_line.arguments import (
    ChatArguments,
    CheckArguments,
    CompareArguments,
    EvalArguments,
    ExportArguments,
    ListArguments,
    PackArguments,
    PlanArguments,
    ReportArguments,
    ScoreArguments,
)
from vlbench.command_line.parser import (
    VerbDeclaration,
    declared_arguments,
    parse_arguments,
    split_arguments,
)
from vlbench.errors import EnvironmentFailure, UserError, suggest_name
from vlbench.model.generation.sampling_options import TRANSFORMERS_HINTS
from vlbench.process_settings import preserve_process_settings
from vlbench.text_files import split_lines
from vlbench.text_tables import format_table

if TYPE_CHECKING:
    from vlbench.config.schema import Recipe


class VerbEntry(NamedTuple):
    """A verb: what it does, what runs it, and what it takes."""

    summary: str
    run_verb: Callable[[list[str]], int]
    example: str
    """Words behind the verb that make a whole command."""
    declaration: type[VerbDeclaration] | None = None
    """The verb's own keys; None where it has none."""
    takes_recipe_keys: bool = False


def run_fit(words: list[str]) -> int:
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
        recipe = recipes.load_recipe(words)
        recipes.require_data(recipe)
        check_machine_limits(recipe, is_launched())
    if recipe.trainer.world_size > 1 and not is_launched():
        return launch_processes(["fit", *words], recipe.trainer)
    # Threads of torch that spin for long make a machine with other work 20 times slower, and
    # threads that sleep at once cost a quarter of the speed on an idle one (measured, two cores).
    os.environ.setdefault("GOMP_SPINCOUNT", "20000")
    from vlbench import fit_command  # after the checks, as it imports torch

    return fit_command.fit(resolve_recipe(words))


def run_eval(words: list[str]) -> int:
    """Evaluate a model."""
    arguments = parse_arguments(EvalArguments, words)
    from vlbench.evaluate.eval_command import run_eval as evaluate_model

    return evaluate_model(arguments)


def run_score(words: list[str]) -> int:
    """Score answers to a benchmark."""
    arguments = parse_arguments(ScoreArguments, words)
    from vlbench.evaluate.score_command import run_score as score_answers

    return score_answers(arguments)


def run_chat(words: list[str]) -> int:
    """Talk to a model."""
    arguments = parse_arguments(ChatArguments, words, hints=TRANSFORMERS_HINTS)
    from vlbench.serve.chat_command import run_chat as talk

    return talk(arguments)


def run_export(words: list[str]) -> int:
    """Write a model in a layout that others load."""
    arguments = parse_arguments(ExportArguments, words)
    from vlbench.serve.export_command import run_export as write_model

    return write_model(arguments)


def run_check(words: list[str]) -> int:
    """Check the data of a recipe."""
    from pathlib import Path

    from vlbench.config import recipe as recipes

    arguments, recipe_words = split_arguments(CheckArguments, words, recipe_key_names())
    recipes.require_data(recipes.load_recipe(recipe_words))
    from vlbench.check.check_command import run_check as check_data  # after the checks, as above

    recipe = resolve_recipe(recipe_words)
    return check_data(recipe, Path(arguments.out or f"checks/{recipe.recipe}-{recipe.size}"))


def run_pack(words: list[str]) -> int:
    """Pack a data set into shards."""
    arguments = parse_arguments(PackArguments, words)
    from vlbench.data.write_shards import run_pack as pack_data

    return pack_data(arguments)


def run_compare(words: list[str]) -> int:
    """Train a grid of runs and report."""
    from vlbench.compare.experiment.grid import parse_grid

    grid = parse_grid(words)
    from vlbench.compare.experiment.compare_command import run_compare as compare_recipes

    return compare_recipes(grid)


def run_plan(words: list[str]) -> int:
    """Say what a training needs."""
    from vlbench.planner.options import parse_plan_options

    options = parse_plan_options(words)
    from vlbench.planner.plan_command import run_plan as plan_training

    return plan_training(options)


def run_report(words: list[str]) -> int:
    """Compare finished runs."""
    arguments = parse_arguments(ReportArguments, words)
    from vlbench.compare.report.report_command import run_report as report_runs

    return report_runs(arguments)


def run_show(words: list[str]) -> int:
    """Print a resolved recipe."""
    from vlbench.config import recipe as recipes

    print(recipes.recipe_to_yaml(resolve_recipe(words)), end="")
    return 0


def run_list(words: list[str]) -> int:
    """Print what recipes can name."""
    arguments = parse_arguments(ListArguments, words)
    from vlbench import listing

    print("\n".join(listing.listing_lines(arguments)))
    return 0


def resolve_recipe(words: list[str]) -> Recipe:
    """Return the recipe that `words` describe; what it leaves open is as in its `init`."""
    from vlbench.config import recipe as recipes

    recipe = recipes.load_recipe(words)
    if not recipe.init:
        return recipe
    from vlbench.train.resume import inherited_keys  # it imports torch

    return recipes.load_recipe(words, inherited_keys(recipe))


VERBS = {
    "fit": VerbEntry(
        "train a recipe and evaluate it",
        run_fit,
        "recipe=yivl_llava seed=1",
        takes_recipe_keys=True,
    ),
    "eval": VerbEntry(
        "evaluate a model on its own questions, a file, or a benchmark",
        run_eval,
        "model=RUN task=mmmu,cmmmu limit=100 blank=true",
        EvalArguments,
    ),
    "score": VerbEntry(
        "score answers to MMMU or CMMMU as the benchmarks' own code does",
        run_score,
        "task=mmmu answers=FILE protocol=official",
        ScoreArguments,
    ),
    "chat": VerbEntry(
        "talk to a run, a checkpoint or a released model",
        run_chat,
        "model=RUN image=FILE question='What is it?'",
        ChatArguments,
    ),
    "export": VerbEntry(
        "write a run, a checkpoint or a released model in a layout that others load",
        run_export,
        "model=RUN out=DIR format=hf_llava dtype=bf16",
        ExportArguments,
    ),
    "check": VerbEntry(
        "check all data of a recipe before training: faults, lengths, supervised tokens",
        run_check,
        "recipe=yivl_llava data.train=FILE.json data.images=FOLDER out=DIR",
        CheckArguments,
        takes_recipe_keys=True,
    ),
    "plan": VerbEntry(
        "say what a training needs before it is paid for: memory, time, what fits",
        run_plan,
        "recipe=yivl_llava size=34b trainer.devices=8 trainer.num_nodes=16 price=2",
        PlanArguments,
        takes_recipe_keys=True,
    ),
    "pack": VerbEntry(
        "pack a data set into shards (tar files) that stream from disk",
        run_pack,
        "data=FILE.json images=FOLDER out=DIR",
        PackArguments,
    ),
    "compare": VerbEntry(
        "train every recipe with every seed, and report the differences",
        run_compare,
        "recipe=yivl_llava,yivl_qformer seeds=3 match=params",
        CompareArguments,
        takes_recipe_keys=True,
    ),
    "report": VerbEntry(
        "compare finished runs: intervals, differences, costs",
        run_report,
        "RUN RUN out=FILE.html",
        ReportArguments,
    ),
    "show": VerbEntry(
        "print a resolved recipe",
        run_show,
        "recipe=yivl_llava size=34b",
        takes_recipe_keys=True,
    ),
    "list": VerbEntry(
        "print recipes, sizes, connectors and vision encoders",
        run_list,
        "connectors size=6b",
        ListArguments,
    ),
}
HELP_FLAGS = ("--help", "-h", "help")


def main(argv: list[str] | None = None) -> int:
    """Run the verb in `argv` (default: the command line) and return the exit code.

    The settings of the process are as before when it returns.
    """
    with preserve_process_settings(), escape_unencodable_output(), silence_pil_logging():
        return _run_reporting_errors(argv)


def _run_reporting_errors(argv: list[str] | None) -> int:
    try:
        code = dispatch_verb(sys.argv[1:] if argv is None else argv)
        if sys.stdout is not None:  # None where it is closed
            sys.stdout.flush()  # here, where a closed pipe is handled
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
    """Write a character that the terminal's encoding lacks as its escaped code point."""
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
    """Keep PIL's log messages off the terminal; what is wrong with an image is a UserError."""
    handler = logging.NullHandler()
    logging.getLogger("PIL").addHandler(handler)
    try:
        yield
    finally:
        logging.getLogger("PIL").removeHandler(handler)


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
            "`VERB --help` has the table of all keys of a verb, `list` what they can name.",
        ]
    )


def verb_help(verb_name: str) -> str:
    """Return the help of one verb: its usage, and tables of all keys that it takes."""
    verb = VERBS[verb_name]
    specs = list(declared_arguments(verb.declaration).values()) if verb.declaration else []
    required = [spec.usage for spec in specs if spec.is_required]
    if verb.takes_recipe_keys and "recipe=" not in " ".join(required):
        required.insert(0, "recipe=NAME")
    optional = [spec.metavar for spec in specs if spec.is_positional and not spec.is_required]
    usage = [*required, *(f"[{word} ...]" for word in [*optional, "KEY=VALUE"])]
    lines = [
        f"usage: python -m vlbench {verb_name} {' '.join(usage)}",
        "",
        f"{verb.summary[0].upper()}{verb.summary[1:]}.",
        "",
        f"Example: python -m vlbench {verb_name} {verb.example}",
    ]
    headings = ("key", "type", "default", "meaning")
    if specs:
        lines += ["", *format_table([headings, *(spec.help_row() for spec in specs)])]
    if verb.takes_recipe_keys:
        from vlbench.config.schema import key_rows

        title = f"Keys of recipes, which {verb_name} takes too:" if specs else "Keys of recipes:"
        lines += ["", title, "", *format_table([headings, *key_rows()])]
    return "\n".join(lines)


def recipe_key_names() -> Collection[str]:
    """Return the top-level keys of recipes."""
    from vlbench.config.schema import Recipe, declared_keys

    return declared_keys(Recipe)


if __name__ == "__main__":
    sys.exit(main())
