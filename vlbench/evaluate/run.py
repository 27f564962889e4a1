"""`python -m vlbench eval`: ask a run or a checkpoint questions with known answers."""

from __future__ import annotations

import re
from operator import attrgetter
from pathlib import Path

from vlbench import recipe as recipes
from vlbench.data.llava import LlavaJson
from vlbench.evaluate.ask import accuracy, accuracy_by, ask
from vlbench.evaluate.questions import Question, source_questions
from vlbench.evaluate.results import questions_of
from vlbench.mistakes import Mistake
from vlbench.serve.load import load
from vlbench.train import checkpoint
from vlbench.train.restore import released
from vlbench.words import given_keys


def main(words: list[str]) -> int:
    """Evaluate `run=PATH`, or `model=PATH` (a run, a checkpoint or a released model).

    `data=FILE.json` asks that file's questions; a run has questions of its own as well. `task=`
    asks those of benchmarks: see `tasks.run`.
    """
    words = [re.sub("^model=", "run=", word) for word in words]
    if any(word.startswith("task=") for word in words):
        from vlbench.evaluate.tasks.run import KEYS
        from vlbench.evaluate.tasks.run import main as take_benchmarks

        return take_benchmarks(given_keys("eval", words, ("run",), KEYS))
    return own_questions(given_keys("eval", words, ("run",), ("data", "images")))


def own_questions(given: dict[str, str]) -> int:
    """Ask the questions of a run, or those of a file."""
    given = {key: str(Path(value).expanduser()) for key, value in given.items()}
    sets: dict[str, list[Question]] = {}
    if "data" in given:
        source = LlavaJson(given["data"], given.get("images"))
        sets[source.name] = source_questions(source, len(source) * 100)
    elif not checkpoint.holds(Path(given["run"])):
        released(given["run"], "run")
        raise Mistake(f"{given['run']} is no run: eval needs data=FILE.json (and images=FOLDER)")
    else:
        folder = checkpoint.find(Path(given["run"]))
        asked_of, questions, unseen = questions_of(recipes.load_file(folder / "recipe.yaml"))
        sets = {asked_of: questions, "unseen pairs": unseen}
    vlm = load(given["run"])
    for name, questions in sets.items():
        if not questions and name != "unseen pairs":
            raise Mistake(f"{name} holds no sample with an image that could be asked about")
        if not questions:
            continue
        answers = ask(vlm, questions, name)
        print(f"{name}: {accuracy(questions, answers):.3f} of {len(questions)} questions right")
        for kind in ("type", "language"):
            groups = accuracy_by(questions, answers, attrgetter(kind))
            if groups:
                print(f"  by {kind}: {', '.join(f'{n} {v:.3f}' for n, v in groups.items())}")
    return 0
