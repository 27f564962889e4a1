"""Types, options and right answers by id, for files of answers that hold ids alone. No torch."""

from __future__ import annotations

from pathlib import Path

from vlbench.errors import UserError
from vlbench.evaluate.tasks import cmmmu_data, mmmu_data
from vlbench.evaluate.tasks.answer_formats import AnswerRecord, read_answer_records
from vlbench.evaluate.tasks.subject_domains import subject_or_category

RECORD_READERS = {"mmmu": mmmu_data.read_records, "cmmmu": cmmmu_data.read_records}
TRUTH_KEYS = ("type", "options", "answer", "subject")


def read_truths(task: str, data: str, split: str) -> dict[str, AnswerRecord]:
    """Return what is known of every question: of a file of JSON, or of a split of the benchmark.

    `data` is MMMU's answer_dict_val.json, any file of answers with the right ones beside, or a
    folder or hub id of the benchmark. Raises a Mistake when two questions have one id.
    """
    file = Path(data).expanduser()
    if file.is_file() and file.suffix in (".json", ".jsonl"):
        found = [one for _, one in read_answer_records(file) if isinstance(one, dict)]
    else:
        found = [
            {
                "id": record.id,
                "type": record.type,
                "options": list(record.options),
                "answer": list(record.answer)
                if isinstance(record.answer, tuple)
                else record.answer,
                "subject": subject_or_category(task, record.subject, record.category),
            }
            for record in RECORD_READERS[task](data, split)
        ]
    truths: dict[str, AnswerRecord] = {}
    for one in found:
        name = str(one.get("id"))
        known = {key: one[key] for key in TRUTH_KEYS if key in one}
        if truths.setdefault(name, known) != known:
            raise UserError(
                f"data={data} has several questions of the id {name}: whose answer is it?"
            )
    if not any("answer" in known for known in truths.values()):
        raise UserError(f"data={data} has no questions with id, type and answer")
    return truths
