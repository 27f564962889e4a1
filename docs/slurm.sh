#!/usr/bin/env bash
# Trains a recipe on one machine or many; words after the script's name are those of `fit`:
#
#     sbatch docs/slurm.sh recipe=yivl_llava size=6b data.train=/data/shards run=runs/llava-6b
#     sbatch --nodes=16 docs/slurm.sh recipe=yivl_llava size=34b trainer.strategy=fsdp2 data.train=/data/shards
#
# A job that is preempted, or near the end of its time, saves and is queued again by itself.
#SBATCH --job-name=vlbench
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --signal=TERM@300
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
set -u

tasks=$((SLURM_NTASKS / SLURM_NNODES))
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-4}

case " $* " in
    *" run="*) ;;
    *) set -- "$@" "run=runs/${SLURM_JOB_NAME}-${SLURM_JOB_ID}" ;; # a job that is queued again keeps it
esac
# --wait=0: the first task evaluates when the others have ended, for longer than slurm.conf may allow
srun --kill-on-bad-exit=1 --wait=0 python -m vlbench fit "$@" \
    "trainer.devices=$tasks" "trainer.num_nodes=$SLURM_NNODES"
code=$?

case "$code" in
    130 | 143) scontrol requeue "$SLURM_JOB_ID" ;; # stopped from outside: saved, or still at its beginning
esac
exit "$code"
