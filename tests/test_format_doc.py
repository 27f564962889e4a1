"""docs/format.md is true: an exported folder has exactly the files, tensors and keys it names."""

from __future__ import annotations

import json
import re
from fnmatch import fnmatch
from pathlib import Path

import pytest
from golden_release import CHECKPOINT, load_tensors

import vlbench
from vlbench.__main__ import main

PAGE = (Path(__file__).parent.parent / "docs/format.md").read_text(encoding="utf-8")
SHORT = ["only=chat", "stages.chat.steps=1", "stages.chat.global_batch_size=2"]
SHORT += ["log.questions=1", "log.examples=0", "log.tensorboard=false"]
ADAPTERS = ["stages.chat.train={connector: {lr: 1e-3}, language: {lr: 1e-3, lora: {rank: 2}}}"]
CONDITIONS = {
    "release": {"the tokenizer has it", "training began with a released model"},
    "run": {"the tokenizer has it", "the vision encoder is no release's", "a part has adapters"},
}
"""What is so of each folder, by the words of the page, beside "always" and small weights."""


def rows(section: str) -> dict[str, list[str]]:
    """Return the rows of the tables in a section of the page by their first cell."""
    text = re.split(rf"^## {re.escape(section)}$", PAGE, flags=re.MULTILINE)[1]
    text = re.split(r"^## ", text, flags=re.MULTILINE)[0]
    found = re.findall(r"^\| `([^`]+)` \| (.*) \|$", text, re.MULTILINE)
    return {name: [cell.strip() for cell in rest.split(" | ")] for name, rest in found}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Export a release, and a run of the miniatures with an adapter."""
    folder = tmp_path_factory.mktemp("format")
    words = [f"run={folder / 'run'}", *SHORT, *ADAPTERS]
    assert main(["fit", "recipe=yivl_llava", *words]) == 0
    sources = {"release": CHECKPOINT, "run": folder / "run"}
    for name, source in sources.items():
        out = folder / f"to-{name}"
        assert main(["export", f"model={source}", f"out={out}", "format=vlbench"]) == 0
    return {name: folder / f"to-{name}" for name in sources}


@pytest.mark.parametrize("name", CONDITIONS)
def test_a_folder_has_the_files_of_the_page_and_no_other(name: str, folders) -> None:
    folder, table = folders[name], rows("Files")
    found = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    holds = {"always", "weights of at most 5 GB", *CONDITIONS[name]}
    allowed = {pattern for pattern, (when, _) in table.items() if when in holds}
    unnamed = {file for file in found if not any(fnmatch(file, one) for one in allowed)}
    assert unnamed == set()
    optional = {one for one, (when, _) in table.items() if when == "the tokenizer has it"}
    missing = {one for one in allowed - optional if not any(fnmatch(f, one) for f in found)}
    assert missing == set()
    assert {"tokenizer.model", "tokenizer_config.json"} <= found


@pytest.mark.parametrize("name", CONDITIONS)
def test_its_json_has_the_keys_of_the_page(name: str, folders) -> None:
    for file in ("preprocess.json", "position.json"):
        known = json.loads((folders[name] / file).read_text(encoding="utf-8"))
        assert known.keys() == rows(f"`{file}`").keys()
    origins = json.loads((folders[name] / "weights.json").read_text(encoding="utf-8"))
    assert origins.keys() <= rows("Weights").keys()
    assert all(entry.keys() == rows("`weights.json`").keys() for entry in origins.values())


@pytest.mark.parametrize("name", CONDITIONS)
def test_its_tensors_are_those_of_the_three_parts(name: str, folders) -> None:
    stored = load_tensors(folders[name])
    assert {key.partition(".")[0] for key in stored} == rows("Weights").keys()
    vlm = vlbench.load(folders[name], dtype="float32", device="cpu")
    for part, module in vlm.model.named_parts():
        own = {
            key.replace(".base_layer.", ".") for key in module.state_dict() if ".lora_" not in key
        }
        assert {f"{part}.{key}" for key in own} == {
            key for key in stored if key.startswith(f"{part}.")
        }
