#!/bin/bash

# Parameters
#SBATCH --account=my-project
#SBATCH --array=1-3%1
#SBATCH --chdir=/shared/me/runs/gpt
#SBATCH --constraint='a100&ib'
#SBATCH --cpus-per-task=2
#SBATCH --dependency=afterok:1234
#SBATCH --exclude='gpu[7-9]'
#SBATCH --exclusive
#SBATCH --gpus-per-node=8
#SBATCH --job-name=gpt
#SBATCH --mail-type=END
#SBATCH --mem=0
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --open-mode=append
#SBATCH --output=/shared/me/runs/gpt/jobs/0001/%j_0_log.out
#SBATCH --partition=gpu
#SBATCH --qos=long
#SBATCH --requeue
#SBATCH --reservation=maintenance
#SBATCH --signal=USR2@300
#SBATCH --spread-job
#SBATCH --time=2160

# setup
module load cuda/13
export NCCL_DEBUG=WARN

# command
export SUBMITIT_EXECUTOR=slurm
srun --unbuffered --output /shared/me/runs/gpt/jobs/0001/%j_%t_log.out --kill-on-bad-exit=1 --cpu-bind=none /venv/bin/python -P -u -m submitit.core._submit /shared/me/runs/gpt/jobs/0001


# teardown
status=$?
if [ -e /shared/me/runs/gpt/jobs/0001/requeue ]; then
  rm -f /shared/me/runs/gpt/jobs/0001/requeue
  scontrol requeue "$SLURM_JOB_ID" || echo "Slurm refuses to requeue the job; submit it again to go on" >&2
fi
exit "$status"