#!/bin/bash
# Machines without a scheduler. Run the same command on each machine, with the address of the first machine and your
# paths.
#
#   MACHINES=2 FIRST=10.0.0.1 bash configs/cluster/torchrun.sh
#
# torchrun starts one process per GPU, and Lightning finds the processes. All machines must share the current folder.
# Further options are passed to lit-tricks: bash configs/cluster/torchrun.sh --ckpt_path runs/.../last.ckpt
set -euo pipefail

torchrun --nnodes "$MACHINES" --nproc-per-node 8 \
    --rdzv-backend c10d --rdzv-endpoint "$FIRST:29500" --rdzv-id lit-tricks \
    -m lit_tricks fit \
    --config recipes/imagenet_efficient \
    --data Streaming --data.root s3://bucket/imagenet --data.num_workers 12 \
    --trainer.num_nodes "$MACHINES" --trainer.devices 8 \
    "$@"
