"""`compare jobs=slurm`: an array job whose tasks stay what they were when they were submitted."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from vlbench.__main__ import main
from vlbench.compare.experiment.run_jobs import TrainingJob
from vlbench.compare.experiment.slurm_array import write_slurm_script
from vlbench.train.run_folder import RunFolder

SHORT = [f"stages.{name}.global_batch_size=2" for name in ("align_224", "align_448", "chat")]
SHORT += [f"stages.{name}.steps=2" for name in ("align_224", "align_448", "chat")]
SHORT += ["log.questions=6", "log.examples=0", "log.tensorboard=false", "log.every_n_steps=1"]


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def read_commands(script: str) -> list[list[str]]:
    """Return the words of every task's command behind `python -m vlbench`."""
    lines = re.findall(r"^    \d+\) exec (.*) ;;$", Path(script).read_text(), re.MULTILINE)
    return [shlex.split(line)[3:] for line in lines]


def run_task(script: str, number: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "SLURM_ARRAY_TASK_ID": number}
    return subprocess.run(["bash", script], env=env, capture_output=True, text=True, check=False)


def test_slurm_gets_a_command_per_run(home, capsys):
    words = ["compare", "recipe=yivl_llava,yivl_qformer", "seeds=2", "run=my grid", "jobs=slurm"]
    assert main([*words, *SHORT]) == 0
    assert "sbatch 'my grid/array.sh'  # 4 runs, one GPU each" in capsys.readouterr().out
    commands = read_commands("my grid/array.sh")
    assert len(commands) == 4
    assert commands[3][:2] == ["fit", "recipe=yivl_qformer"]
    assert commands[3][-2:] == ["seed=1", "run=my grid/yivl_qformer/seed1"]
    script = (home / "my grid/array.sh").read_text()
    assert "#SBATCH --array=1-4\n" in script and "#SBATCH --gpus=1\n" in script


def test_what_is_submitted_stays_what_it_was(home, monkeypatch):
    """sbatch copies the script; nothing that a copy reads may be written by a later call."""
    monkeypatch.setattr("sys.executable", "echo")
    jobs = [TrainingJob(name, (f"run={name} 1",), home / name) for name in "abc"]
    submitted = home / "copy.sh"
    submitted.write_text(write_slurm_script(jobs, home).read_text())
    write_slurm_script(jobs[2:], home)
    assert run_task("copy.sh", "2").stdout == "-m vlbench fit run=b 1\n"
    assert run_task("copy.sh", "3").stdout == "-m vlbench fit run=c 1\n"
    assert run_task("array.sh", "1").stdout == "-m vlbench fit run=c 1\n"


@pytest.mark.parametrize("number", ["3", "0", ""])
def test_a_task_without_a_run_fails_with_a_line(number, home, monkeypatch):
    monkeypatch.setattr("sys.executable", "echo")
    write_slurm_script([TrainingJob(name, (), home / name) for name in "ab"], home)
    ended = run_task("array.sh", number)
    assert ended.returncode == 1 and not ended.stdout
    assert ended.stderr == f"vlbench: this array has tasks 1 to 2, none '{number}'\n"


def test_a_task_gets_what_its_processes_need(home, capsys):
    words = ["compare", "recipe=yivl_llava", "seeds=1", "run=c", "jobs=slurm", "data.workers=2"]
    assert main([*words, "grid=trainer.devices=4 + connector.depth=1 | connector.depth=2"]) == 0
    assert "# 2 runs, 4 GPUs each" in capsys.readouterr().out
    script = (home / "c/array.sh").read_text()
    for option in ("nodes=1", "gpus=4", "cpus-per-task=12"):  # one machine, a task of it
        assert f"#SBATCH --{option}\n" in script
    words[3] = "run=other"
    assert main([*words, "trainer.devices=4", "trainer.accelerator=cpu"]) == 0
    script = (home / "other/array.sh").read_text()
    assert "#SBATCH --gpus=1\n" in script and "#SBATCH --cpus-per-task=12\n" in script


@pytest.mark.parametrize("words", [["jobs=slurm"], ["jobs=slurm", "sweep=0.5,1"], ["jobs=1"]])
def test_runs_over_several_machines_are_refused_before_anything_is_written(words, home, capsys):
    asked = ["compare", "recipe=yivl_llava", "run=c", "trainer.num_nodes=2", *words]
    assert main(asked) == 2
    assert capsys.readouterr().err == (
        "vlbench: row yivl_llava: trainer.num_nodes is 2, and compare trains every run on one "
        "machine; trainer.devices=NUMBER takes several GPUs of it\n"
    )
    assert not list(home.iterdir())


def test_slurm_leaves_out_runs_that_have_diverged(home, capsys):
    """A trial whose rate is too high diverges each time: the comparison goes on without it."""
    words = ["compare", "recipe=yivl_llava", "seeds=2", "run=c", "jobs=slurm", *SHORT]
    assert main([*words, "sweep=0.5,9"]) == 0
    assert "# 2 runs" in capsys.readouterr().out
    low, high = (Path(f"c/sweep/yivl_llava/x{factor}") for factor in ("0.5", "9"))
    for folder in (low, high):
        folder.mkdir(parents=True)
    RunFolder(high).record_divergence("stage chat: the loss was not finite")
    assert main([*words, "sweep=0.5,9"]) == 0
    said = capsys.readouterr()
    assert "# 1 runs" in said.out
    assert "rate x 9: failed: stage chat: the loss was not finite. It is left out" in said.err
    assert f"delete {high / 'diverged.txt'}" in said.err
    RunFolder(low).record_divergence("so was this one")
    assert main([*words, "sweep=0.5,9"]) == 0  # the runs themselves, at the recipe's rates
    assert "# 2 runs" in capsys.readouterr().out
    for seed in (0, 1):
        folder = Path(f"c/yivl_llava/seed{seed}")
        folder.mkdir(parents=True)
        RunFolder(folder).record_divergence("the gradient was not finite")
    assert main([*words, "sweep=0.5,9"]) == 1  # nothing is left to train
    assert "sbatch" not in capsys.readouterr().out
