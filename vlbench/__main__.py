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

from vlbench.files import lines_of
from vlbench.host import kept
from vlbench.mistakes import Mistake, Trouble, nearest

if TYPE_CHECKING:
    from vlbench.schema import Recipe


class Verb(NamedTuple):
    """What a verb does, and what it is called with."""

    usage: str
    meaning: str
    call: Callable[[list[str]], int]


def fit(words: list[str]) -> int:
    """Train a recipe."""
    from vlbench import recipe as recipes
    from vlbench.train.launch import (
        end_with_launcher,
        launch,
        launched,
        let_launcher_speak,
        told_once,
    )
    from vlbench.train.machine import check_machine

    let_launcher_speak()
    end_with_launcher()
    with told_once():
        recipe = recipes.load(words)
        recipes.require_data(recipe)
        check_machine(recipe, launched())
    if recipe.trainer.processes > 1 and not launched():
        return launch(["fit", *words], recipe.trainer)
    # Threads of torch that spin for long make a machine with other work 20 times slower, and
    # threads that sleep at once cost a quarter of the speed on an idle one (measured, two cores).
    os.environ.setdefault("GOMP_SPINCOUNT", "20000")
    from vlbench.train import stages  # after the checks: it takes seconds

    return stages.fit(resolved(words))


def evaluate(words: list[str]) -> int:
    """Evaluate a run."""
    from vlbench.evaluate.run import main as evaluate_run

    return evaluate_run(words)


def score(words: list[str]) -> int:
    """Score answers to a benchmark."""
    from vlbench.evaluate.tasks.score import main as score_answers

    return score_answers(words)


def chat(words: list[str]) -> int:
    """Talk to a model."""
    from vlbench.serve.chat import main as talk

    return talk(words)


def export(words: list[str]) -> int:
    """Write a model in a layout that others load."""
    from vlbench.serve.export import main as write

    return write(words)


def check(words: list[str]) -> int:
    """Look at the data of a recipe."""
    from pathlib import Path

    from vlbench import recipe as recipes

    out = [word.removeprefix("out=") for word in words if word.startswith("out=")]
    words = [word for word in words if not word.startswith("out=")]
    recipes.require_data(recipes.load(words))
    from vlbench.check.run import main as check_data  # after the checks: it takes seconds

    recipe = resolved(words)
    default = f"checks/{recipe.recipe}-{recipe.size}"
    return check_data(recipe, Path(out[-1] if out else default).expanduser())


def pack(words: list[str]) -> int:
    """Pack a data set into shards."""
    from vlbench.data.pack import main as pack_data

    return pack_data(words)


def compare(words: list[str]) -> int:
    """Train a grid of runs and report."""
    from vlbench.compare import grid

    planned = grid.parse(words)
    from vlbench.compare.run import run_grid  # after the checks: it takes seconds

    return run_grid(planned)


def plan(words: list[str]) -> int:
    """Say what a training needs."""
    from vlbench.plan.asked import parse

    asked = parse(words)
    from vlbench.plan.run import main as plan_training  # after the checks: it takes seconds

    return plan_training(asked)


def report(words: list[str]) -> int:
    """Compare finished runs."""
    from vlbench.compare.report import main as compare_runs

    return compare_runs(words)


def show(words: list[str]) -> int:
    """Print a resolved recipe."""
    from vlbench import recipe as recipes

    print(recipes.dump(resolved(words)), end="")
    return 0


def resolved(words: list[str]) -> Recipe:
    """Return the recipe that `words` describe; what it leaves open is as in its `init`."""
    from vlbench import recipe as recipes

    recipe = recipes.load(words)
    if not recipe.init:
        return recipe
    from vlbench.train.restore import inherited  # it imports torch

    return recipes.load(words, inherited(recipe))


def list_(words: list[str]) -> int:
    """Print what there is."""
    from vlbench import listing

    print("\n".join(listing.lines(words)))
    return 0


VERBS = {
    "fit": Verb("recipe=NAME [size=SIZE] [KEY=VALUE ...]", "train a recipe and evaluate it", fit),
    "eval": Verb(
        "run=PATH [data=FILE images=FOLDER]\n"
        "       run=PATH task=mmmu,cmmmu,own [data=DIR] [split=val] [subjects=A,B] [seed=42]\n"
        "       [protocol=yi|official|lmms|strict|raw]\n"
        "       with both: [limit=N] [blank=true] [batch=16] [template=NAME] [out=DIR]",
        "evaluate a run or a released model, on its questions or on a benchmark",
        evaluate,
    ),
    "score": Verb(
        "task=mmmu|cmmmu answers=FILE protocol=official|lmms|strict|raw|yi\n"
        "       [data=DIR|FILE.json [split=val]] [seed=42] [out=DIR]",
        "score answers to MMMU or CMMMU as the benchmarks' own code does",
        score,
    ),
    "chat": Verb(
        "model=PATH [image=FILE|URL ...] [question=TEXT] [template=NAME] [dtype=bf16]\n"
        "       [device=cuda] [max_new_tokens=512] [temperature=0] [top_p=1] [seed=0]",
        "talk to a run, a checkpoint or a released model",
        chat,
    ),
    "export": Verb(
        "run=PATH to=DIR format=yi_vl|hf_llava|vlbench [dtype=bf16] [merge_lora=true]\n"
        "       [template=NAME]",
        "write a run, a checkpoint or a released model in a layout that others load",
        export,
    ),
    "check": Verb(
        "recipe=NAME [size=SIZE] data.train=FILE data.images=FOLDER [out=DIR] [KEY=VALUE ...]",
        "look at all data before training: faults, lengths, what is learned of them",
        check,
    ),
    "plan": Verb(
        "recipe=NAME [size=SIZE] [gpu=A800] [gpus=FILE.yaml] [price=DOLLARS] [mfu=0.4]\n"
        "       [samples=N,...] [text_tokens=N,...] [trainer.devices=8 trainer.num_nodes=16]\n"
        "       [probe=true] [KEY=VALUE ...]",
        "say what a training needs before it is paid for: memory, time, what fits",
        plan,
    ),
    "pack": Verb(
        "data=FILE.json images=FOLDER to=DIR [samples=10000]",
        "pack a data set into shards (tar files) that stream from disk",
        pack,
    ),
    "compare": Verb(
        "recipe=A,B seeds=3 [grid='K=V + K=V | K=V'] [match=params|visual_tokens|flops]\n"
        "       [sweep=0.3,1,3] [freeze=vision] [jobs=N|auto|slurm] [dry_run=true] [run=DIR] "
        "[KEY=VALUE ...]",
        "train every recipe with every seed, and report the differences",
        compare,
    ),
    "report": Verb(
        "DIR ... [to=FILE.md] [to=FILE.html]",
        "compare finished runs: intervals, differences, costs",
        report,
    ),
    "show": Verb("recipe=NAME [size=SIZE] [KEY=VALUE ...]", "print a resolved recipe", show),
    "list": Verb("[recipes|sizes|connectors [size=SIZE]|towers]", "print what there is", list_),
}
HELP = ("--help", "-h", "help")


def main(words: list[str] | None = None) -> int:
    """Run the verb in `words` (default: the command line) and return the exit code.

    A program that calls it finds the settings of its process as they were.
    """
    with kept(), all_letters_shown(), pictures_read_quietly():
        return _main(words)


def _main(words: list[str] | None) -> int:
    try:
        code = run(sys.argv[1:] if words is None else words)
        if sys.stdout is not None:  # it may be closed
            sys.stdout.flush()  # here, so that a reader who has left is noticed here
        return code
    except (Mistake, Trouble) as error:
        for line in lines_of(str(error)):
            print(f"vlbench: {line}", file=sys.stderr)
        return 2 if isinstance(error, Mistake) else 1
    except KeyboardInterrupt:
        if os.environ.get("LOCAL_RANK", "0") == "0":  # one line for all processes of a machine
            print("vlbench: interrupted", file=sys.stderr)
        return 130
    except (OSError, RuntimeError) as error:
        return _code_of(error)


def _code_of(error: OSError | RuntimeError) -> int:
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
def all_letters_shown() -> Iterator[None]:
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
def pictures_read_quietly() -> Iterator[None]:
    """Leave out what PIL logs of a picture between our lines; what matters is a Mistake."""
    nowhere = logging.NullHandler()
    logging.getLogger("PIL").addHandler(nowhere)
    try:
        yield
    finally:
        logging.getLogger("PIL").removeHandler(nowhere)


def run(words: list[str]) -> int:
    """Call the verb that the first word names with the others."""
    if not words or words[0] in HELP:
        print(overview())
        return 0 if words else 2
    if words[0] == "--version":
        from vlbench import __version__

        print(f"vlbench {__version__}")
        return 0
    if words[0] not in VERBS:
        verbs = ", ".join(VERBS)
        raise Mistake(f"no verb '{words[0]}'; verbs: {verbs}.{nearest(words[0], VERBS)}")
    if any(word in HELP[:2] for word in words[1:]):
        print(usage(words[0]))
        return 0
    return VERBS[words[0]].call(words[1:])


def overview() -> str:
    """Return the help of the whole program."""
    verbs = [f"  {name:7} {verb.meaning}" for name, verb in VERBS.items()]
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


def usage(name: str) -> str:
    """Return the help of one verb; `fit` and `show` have the table of all keys."""
    verb = VERBS[name]
    lines = [f"usage: python -m vlbench {name} {verb.usage}", "", f"{verb.meaning}.".capitalize()]
    if name in ("fit", "show"):
        from vlbench import listing

        lines += ["", *listing.keys()]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
