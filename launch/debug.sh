#!/usr/bin/env bash
# One deterministic process that raises every error where it happens: to step through a run.
#
#     bash launch/debug.sh --config configs/demo.toml                 # stops at the first line in pdb
#     bash launch/debug.sh --config configs/demo.toml --max_steps 20  # takes the flags of qloop train
#     PDB=0 bash launch/debug.sh --config configs/demo.toml           # runs without pdb; breakpoint() works
#
# In pdb, `b qloop/train.py:100` sets a breakpoint in the loop and `c` continues to it; every quantity of
# a step is a local variable there. This is much slower than a normal run: anomaly detection keeps the
# stack trace of every forward operation, to name it if its backward pass returns NaN.
set -euo pipefail

export CUDA_VISIBLE_DEVICES=${CUDA_VISIBLE_DEVICES:-0}
export CUDA_LAUNCH_BLOCKING=1         # a GPU error is raised where it happens
export TORCHDYNAMO_DISABLE=1          # nothing is compiled
export WANDB_MODE=${WANDB_MODE:-disabled}

# Anomaly detection is a switch of torch, not a flag of qloop, so a small program turns it on.
program='import sys, torch
torch.autograd.set_detect_anomaly(True)
from qloop.cli import main
sys.argv[0] = "qloop"
main()'
if [ "${PDB:-1}" = 0 ]; then
    exec python -c "$program" train "$@" --deterministic true
fi
file=$(mktemp -t qloop-debug-XXXXXX.py)
trap 'rm -f "$file"' EXIT
printf '%s\n' "$program" > "$file"
python -m pdb "$file" train "$@" --deterministic true
