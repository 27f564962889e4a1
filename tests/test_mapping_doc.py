"""The page on data formats tells the truth of mappings: tables as declared, examples as read."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from vlbench.data.annotation_mapping import (
    AnnotationMapping,
    BoxText,
    FileRecords,
    JoinedRecords,
    read_mapping,
)
from vlbench.data.conversation_files import ConversationFiles
from vlbench.data.mapped_sources import mapping_files
from vlbench.data.mapping_texts import TEXT_FORMS
from vlbench.listing import file_summary, mapping_needs

PAGE = (Path(__file__).parent.parent / "docs/reference/data_formats.md").read_text("utf-8")
EXAMPLES = re.findall(
    r"^```yaml\n(.*?)^```\n^```\w+\n(.*?)^```\n^```json\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL
)


def mapping_rows() -> list[str]:
    rows = []
    for name, file in mapping_files().items():
        files, splits = mapping_needs(read_mapping(file))
        needed = ", ".join(f"`{one}`" for one in files)
        rows.append(f"| `{name}` | {needed} | {', '.join(splits)} | {file_summary(file)} |")
    return rows


def key_rows() -> list[str]:
    rows = []
    kinds = (("", AnnotationMapping), ("join.NAME.", JoinedRecords), ("box.", BoxText))
    for prefix, section in kinds:
        for name, field in section.model_fields.items():
            if not prefix or name not in FileRecords.model_fields:
                rows.append(f"| `{prefix}{name}` | {field.description} |")
    return rows


def form_rows() -> list[str]:
    rows = [f"| `{name}` | {meaning} |" for name, meaning in TEXT_FORMS.items()]
    return [*rows, "| digits, as `012` | a whole number, filled up with zeros to so many digits |"]


@pytest.mark.parametrize("rows", [mapping_rows, key_rows, form_rows])
def test_a_table_is_as_declared(rows) -> None:
    assert "\n".join(rows()) in PAGE


def test_there_are_examples() -> None:
    assert len(EXAMPLES) == PAGE.count("```yaml") == 4


@pytest.mark.parametrize("number", range(len(EXAMPLES)))
def test_an_example_is_read_as_the_page_says(number: int, tmp_path: Path) -> None:
    mapping, records, expected = EXAMPLES[number]
    (tmp_path / "my_set.yaml").write_text(mapping)
    name = re.search("^records: (.*)$", mapping, re.MULTILINE)
    assert name
    (tmp_path / name[1]).write_text(records)
    source = ConversationFiles(f"{tmp_path / 'my_set.yaml'}:{tmp_path}")
    assert [source.read_record(index) for index in range(len(source))] == [json.loads(expected)]
    assert source[0].turns
