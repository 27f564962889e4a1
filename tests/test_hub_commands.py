"""Every command of README.md, docs/ and recipes/ that names something real, run against the hub."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from fnmatch import fnmatch
from pathlib import Path

import pytest
from hub import reference_weights
from hub.client import use_hub
from hub.documented_commands import ROOT, documented_commands
from hub.model_repositories import make_repositories
from hub.server import FakeHub, serve_hub
from hub.shallow_encoders import shallow_encoders, shallow_environment
from hub_command_table import (
    DATA,
    ELSEWHERE,
    FIT,
    ROWS,
    TINY,
    UNTRAINED,
    YI_VL,
    CommandFolder,
    HubCommand,
)
from PIL import Image
from test_launcher import SRUN

import vlbench
from vlbench.__main__ import main

OWN = ("README.md", "LICENSE", ".gitattributes")
"""Files of a repository that people alone read."""


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FakeHub]:
    """The hub, and encoders two blocks deep."""
    folder = tmp_path_factory.mktemp("hub")
    with shallow_encoders(), serve_hub(make_repositories(folder)) as hub:
        yield hub
    shutil.rmtree(folder)  # a gigabyte


@pytest.fixture
def desk(
    served: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[CommandFolder]:
    """A folder with a user's data, from which nothing has been fetched yet."""
    for name, value in shallow_environment().items():
        monkeypatch.setenv(name, value)
    path = f"{ROOT}{os.pathsep}{os.environ['PYTHONPATH']}"
    monkeypatch.setenv("PYTHONPATH", path)
    use_hub(monkeypatch, served, tmp_path / "home")
    monkeypatch.chdir(tmp_path)
    write_data(tmp_path)
    yield CommandFolder(tmp_path, served)
    shutil.rmtree(tmp_path, ignore_errors=True)  # runs of the real widths are large


def write_data(folder: Path) -> None:
    """Write FILE.json and FOLDER: eight images with a question and an answer each."""
    (folder / "FOLDER").mkdir()
    records = []
    for number in range(8):
        name = f"{number}.png"
        Image.new("RGB", (64, 48), (number * 30, 90, 200)).save(folder / "FOLDER" / name)
        turns = [{"from": "human", "value": "<image>\nWhat is shown?"}]
        turns.append({"from": "gpt", "value": f"A picture with number {number}."})
        records.append({"id": name, "image": name, "conversations": turns})
    (folder / "FILE.json").write_text(json.dumps(records))


def make_shards(desk: CommandFolder) -> None:
    assert main(["pack", "data=FILE.json", "images=FOLDER", "out=SHARDS"]) == 0


def make_run(desk: CommandFolder) -> None:
    assert main(["fit", "recipe=yivl_llava", "run=RUN", *TINY.split()]) == 0


def make_folder(desk: CommandFolder) -> None:
    (desk.folder / "DIR").symlink_to(desk.hub["MMMU/MMMU"].folder)


def make_mine(desk: CommandFolder) -> None:
    words = f"{FIT} init={YI_VL} only=chat {DATA} run=mine {UNTRAINED}".split()
    assert main(words[3:]) == 0


def take(name: str, file: str, target: str) -> Callable[[CommandFolder], None]:
    """Return what downloads a file of a repository, as people do by hand."""

    def make(desk: CommandFolder) -> None:
        from huggingface_hub import hf_hub_download

        (desk.folder / target).symlink_to(hf_hub_download(name, file))

    return make


MAKE: dict[str, Callable[[CommandFolder], object]] = {
    "SHARDS": make_shards,
    "RUN": make_run,
    "DIR": make_folder,
    "mine": make_mine,
    "blip2.pth": lambda desk: reference_weights.write_lavis(desk.folder / "blip2.pth"),
    "openflamingo.pt": take(
        "openflamingo/OpenFlamingo-3B-vitl-mpt1b", "checkpoint.pt", "openflamingo.pt"
    ),
    "mm_projector.bin": take(
        "liuhaotian/llava-v1.5-mlp2x-336px-pretrain-vicuna-7b-v1.5",
        *("mm_projector.bin", "mm_projector.bin"),
    ),
}


def run(typed: str, desk: CommandFolder, capfd: pytest.CaptureFixture[str]) -> None:
    """Run a command as it is typed, in this process where it is one of vlbench's own."""
    first, *words = shlex.split(typed)
    if first.startswith("vlbench.load("):
        vlbench.load(YI_VL)
        return
    if first == "python":
        code = main(words[2:])
    elif first == "torchrun":
        code = subprocess.run([sys.executable, "-m", "torch.distributed.run", *words]).returncode
    else:
        code = slurm(words, desk.folder)
    told = capfd.readouterr()
    desk.output = told.out
    assert code == 0, told.err[-3000:]
    assert "Traceback" not in told.err


def slurm(words: list[str], folder: Path) -> int:
    """Run docs/slurm.sh as sbatch would, with two tasks on this machine."""
    (folder / "bin").mkdir()
    for name, text in (("srun", SRUN), ("scontrol", "#!/usr/bin/env bash\nexit 1\n")):
        (folder / "bin" / name).write_text(text)
        (folder / "bin" / name).chmod(0o755)
    python = Path(sys.executable).parent
    environment = os.environ | {
        "PATH": f"{folder / 'bin'}:{python}:{os.environ['PATH']}",
        "MASTER_ADDR": "127.0.0.1",
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NAME": "job",
        "SLURM_NNODES": "1",
        "SLURM_NODELIST": "127.0.0.1",
        "SLURM_NTASKS": "2",
        "SLURM_NTASKS_PER_NODE": "2",
    }
    script, *rest = words
    return subprocess.run(["bash", str(ROOT / script), *rest], env=environment).returncode


def cases() -> list[object]:
    """Return the rows as parameters; slow ones are marked."""
    slow = (pytest.mark.slow,)
    return [
        pytest.param(row, marks=slow if row.slow else (), id=row.documented_command[-60:])
        for row in ROWS
    ]


def wanted(hub: FakeHub, name: str, patterns: tuple[str, ...]) -> set[str]:
    """Return the files of a repository that a row means."""
    files = [file for file in hub[name].files if file not in OWN]
    return {file for file in files if any(fnmatch(file, pattern) for pattern in patterns)}


@pytest.mark.parametrize("row", cases())
def test_a_command_fetches_and_loads_what_it_names(row: HubCommand, desk: CommandFolder, capfd):
    for need in row.prerequisite.split():
        MAKE[need](desk)
    capfd.readouterr()
    desk.hub.forget()
    run(row.typed_command, desk, capfd)
    expected = {name: wanted(desk.hub, name, files) for name, files in row.fetched_files.items()}
    assert desk.hub.fetched() == expected
    row.compare(desk)


def test_the_table_has_every_command_that_names_something_real():
    rows = [row.documented_command for row in ROWS]
    assert sorted([*rows, *ELSEWHERE]) == sorted(documented_commands())
    assert len(set(rows)) == len(rows)
