#!/bin/bash
# Two machines with eight GPUs each, on SLURM: sbatch configs/cluster/slurm.sh, with your own paths and numbers.
#
# srun starts one process per GPU, and Lightning finds the processes. All machines must share the current folder. 90
# seconds before its time limit, the job saves a checkpoint in default_root_dir and queues again. The next job resumes
# from this checkpoint, also in the middle of an epoch. Give each job its own default_root_dir.
#
#SBATCH --job-name=lit-tricks
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --signal=SIGUSR1@90
#SBATCH --requeue
#SBATCH --output=slurm-%j.log
#SBATCH --open-mode=append
set -euo pipefail

srun lit-tricks fit \
    --config recipes/imagenet_efficient \
    --data Streaming --data.root s3://bucket/imagenet --data.num_workers 12 \
    --trainer.num_nodes "$SLURM_NNODES" --trainer.devices 8 \
    --trainer.default_root_dir "runs/$SLURM_JOB_ID" \
    "$@"
