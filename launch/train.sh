#!/usr/bin/env bash
# All GPUs of this machine:  launch/train.sh --config vit_small_simpool --data.root IMAGES --run.out OUT
set -euo pipefail
gpus=$(nvidia-smi --list-gpus | wc -l)
exec torchrun --standalone --nproc_per_node "$gpus" -m dino_simpool train "$@"
