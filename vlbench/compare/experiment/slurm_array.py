"""The unfinished runs of a comparison as a Slurm array job: every task of it is a run.

The commands stand in the script itself, and sbatch keeps a copy of it: what is queued stays what it
was when it was submitted, whatever a later call of `compare` writes. A task is one process, which
starts those of its other devices as `fit` does anywhere.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from vlbench.compare.experiment.run_jobs import TrainingJob, count_run_gpus
from vlbench.config.schema import Recipe
from vlbench.text_files import write_atomically


def _core_option(recipes: Sequence[Recipe]) -> str:
    """Return the line that asks for a core for every process and data worker of the largest run.

    For one process the cluster's own number is taken; several would be refused on a single core.
    """
    if all(recipe.trainer.devices == 1 for recipe in recipes):
        return ""
    cores = max(
        recipe.trainer.devices * (1 + max(data.workers for data in recipe.data_by_key.values()))
        for recipe in recipes
    )
    return f"#SBATCH --cpus-per-task={cores}\n"


def write_slurm_script(
    jobs: Sequence[TrainingJob], folder: Path, recipes: Sequence[Recipe] = ()
) -> Path:
    """Write a Slurm array script, array.sh, whose task N runs the N-th job; return it.

    `recipes` are those of the runs to train. No --ntasks is asked for, which is one as it is:
    Lightning takes SLURM_NTASKS for a sign that srun has started the process.
    """
    script = folder / "array.sh"
    commands = "\n".join(
        f"    {number}) exec "
        f"{shlex.join([sys.executable, '-m', 'vlbench', job.verb, *job.overrides])} ;;"
        for number, job in enumerate(jobs, 1)
    )
    write_atomically(
        script,
        f"""#!/bin/bash
#SBATCH --job-name={shlex.quote(f"vlbench-{folder.name}")}
#SBATCH --array=1-{len(jobs)}
#SBATCH --nodes=1
#SBATCH --gpus={count_run_gpus(recipes)}
{_core_option(recipes)}#SBATCH --output={shlex.quote(str(folder).replace("%", "%%"))}/slurm-%a.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:TERM@120
# One run per task. A stopped run has saved; submit again to resume it.
cd {shlex.quote(str(Path.cwd()))} || exit 1
case "${{SLURM_ARRAY_TASK_ID:-}}" in
{commands}
    *)
        echo "vlbench: this array has tasks 1 to {len(jobs)}, none '${{SLURM_ARRAY_TASK_ID:-}}'" >&2
        exit 1
        ;;
esac
""",
    )
    return script
