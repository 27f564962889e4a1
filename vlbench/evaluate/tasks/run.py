"""`python -m vlbench eval run=... task=mmmu,cmmmu data=DIR`: a model takes benchmarks."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from vlbench.evaluate.tasks import cmmmu_data, mmmu_data
from vlbench.evaluate.tasks.aggregate import summary
from vlbench.evaluate.tasks.exam import (
    ANSWERS,
    BLANK,
    PROTOCOLS,
    SKIPPED,
    Protocol,
    open_folder,
    questions,
    take,
)
from vlbench.evaluate.tasks.files import find
from vlbench.evaluate.tasks.items import Item
from vlbench.evaluate.tasks.prompts import generation
from vlbench.evaluate.tasks.protocols import protocol_of, score_all
from vlbench.evaluate.tasks.record import Record
from vlbench.evaluate.tasks.score import SEED, published, table, write
from vlbench.files import json_lines, write_whole
from vlbench.mistakes import Mistake, nearest
from vlbench.model.vlm import VLM
from vlbench.serve.load import find as find_model
from vlbench.serve.load import load
from vlbench.train import checkpoint
from vlbench.words import truth, whole

READ = {"mmmu": mmmu_data.read, "cmmmu": cmmmu_data.read}
KEYS = ("task", "data", "split", "protocol", "subjects", "limit", "out", "seed", "batch", "blank")


def main(given: dict[str, str]) -> int:
    """Take every benchmark of `task=`, and report; `given` are the keys of `eval`."""
    tasks = [one for one in given["task"].split(",") if one]
    for task in tasks:
        if task not in READ:
            raise Mistake(f"task is '{task}'; known are {', '.join(READ)}.{nearest(task, READ)}")
    name = given.get("protocol", "yi")
    if name not in PROTOCOLS:
        known = ", ".join(PROTOCOLS)
        raise Mistake(f"protocol is '{name}'; known are {known}.{nearest(name, PROTOCOLS)}")
    if len(tasks) > 1 and ("data" in given or "out" in given):
        raise Mistake("data= and out= belong to one task; give one task=, or leave them out")
    truth(given, "blank")
    numbers = [whole(given, *one) for one in (("batch", 16, 1, 4096), ("seed", SEED, 0, 2**32 - 1))]
    read = {task: _records(task, given) for task in tasks}
    vlm = load(given["run"])
    for task in tasks:
        _take(vlm, task, name, read[task], given, *numbers)
    return 0


HUB = {"mmmu": "MMMU/MMMU", "cmmmu": "m-a-p/CMMMU"}


def _records(task: str, given: dict[str, str]) -> tuple[list[Record], dict[str, Any]]:
    """Return the records of a benchmark that are wanted, and what says which they are."""
    source, split = given.get("data", HUB[task]), given.get("split", "val")
    subjects = given["subjects"].strip("[]").split(",") if "subjects" in given else None
    records = READ[task](source, split, subjects)
    limit = whole(given, "limit", len(records), 1, 10**9)
    if limit < len(records):  # from all over the data, which come subject by subject
        records = [records[number * len(records) // limit] for number in range(limit)]
    about = {
        "task": task,
        "split": split,
        "revision": find(source, split).revision(),
        "subjects": subjects,
        "questions": len(records),
    }
    return records, about


def _take(
    vlm: VLM,
    task: str,
    name: str,
    read: tuple[list[Record], dict[str, Any]],
    given: dict[str, str],
    batch: int,
    seed: int,
) -> None:
    """Take one benchmark, write its scores or the file to submit, and print them."""
    records, about = read
    protocol = PROTOCOLS[name]
    folder = _folder(task, name, about["split"], given)
    model = str(find_model(given["run"], "run"))
    open_folder(folder, {**about, "protocol": name, "model": model, "batch": batch})
    asked, skipped = questions(vlm, records, protocol.prompts[task])
    if not asked:
        raise Mistake(f"{task}: no question can be asked; the first: {skipped[0]}")
    write_whole(folder / SKIPPED, json_lines(skipped))
    items = take(vlm, asked, task, protocol, batch, folder / ANSWERS)
    if any(item.answer is None for item in items):
        print("\n".join(_submit(folder, task, protocol, items)))
        return
    scored = score_all(task, protocol.scoring, items, seed)
    scores: dict[str, Any] = {"task": task, "protocol": name, "seed": seed}
    scores |= {**about, "skipped": len(skipped), **summary(task, scored)}
    report = [*_heading(task, protocol, scores), ""]
    if truth(given, "blank"):
        blind = take(vlm, asked, task, protocol, batch, folder / BLANK, blind=True)
        known = summary(task, score_all(task, protocol.scoring, blind, seed))
        scores["blank"] = known
        report += [f"with blank pictures: {known['accuracy']:.3f}", ""]
    lines = [
        {**one.line, "response": item.response} for one, item in zip(asked, items, strict=True)
    ]
    write(folder, scores, lines, scored)
    shown = protocol_of(task, protocol.scoring).shown
    report += [*table(scores, shown), "", *published(scores)]
    write_whole(folder / "report.txt", "\n".join(report) + "\n")
    print("\n".join([*report, "", f"wrote {folder}"]))


def _folder(task: str, protocol: str, split: str, given: dict[str, str]) -> Path:
    """Return the folder of an exam: `out=`, or one beside a run's results."""
    if "out" in given:
        return Path(given["out"]).expanduser()
    run = Path(given["run"]).expanduser()
    own = checkpoint.holds(run) and (run / "recipe.yaml").is_file()
    return (run if own else Path("evals") / run.name) / "eval" / f"{task}-{split}-{protocol}"


def _heading(task: str, protocol: Protocol, scores: dict[str, Any]) -> list[str]:
    """Say what was asked how, and what was left out."""
    prompts = protocol.prompts[task]
    lines = [
        f"{task} {scores['split']}, {scores['revision']}: prompts of {prompts}, scored as "
        f"{protocol.scoring}; {scores['n']} questions asked, {scores['skipped']} not ({SKIPPED})"
    ]
    differs = generation(task, prompts).differs
    return lines + ([f"not as the reference: {differs}"] if differs else [])


def _submit(folder: Path, task: str, protocol: Protocol, items: list[Item]) -> list[str]:
    """Write the file that the benchmark's server takes, as the answers are withheld here.

    MMMU: `{id: letter or text}`; CMMMU: a line per question with its response.
    """
    if task == "mmmu":
        # a letter does not need the truth to be read; an open answer is read by the server
        blind = [replace(item, answer="") for item in items]
        found = {one.item.id: one for one in score_all(task, protocol.scoring, blind)}
        choice = {one.id: one.type == "multiple-choice" for one in items}
        text = json.dumps(
            {
                item.id: (found[item.id].prediction if choice[item.id] else None) or item.response
                for item in items
            },
            ensure_ascii=False,
            indent=1,
        )
        file = folder / "submission.json"
    else:
        text = json_lines({"id": i.id, "type": i.type, "response": i.response} for i in items)
        file = folder / "submission.jsonl"
    write_whole(file, text)
    return [f"{task}: the answers are withheld; {len(items)} responses to submit in {file}"]
