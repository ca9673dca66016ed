#!/usr/bin/env bash
# Speed and memory on one large GPU (an H200 has room for every row), in under 8 minutes; no hub, no network:
# random weights at the sizes of Qwen2.5, documents of real lengths.
#
#     bash tests/benchmarks/gpu.sh [CORPUS]                   # qloop, row by row, the most wanted first
#     bash tests/benchmarks/gpu.sh [CORPUS] --only peers      # TRL beside it, where it is installed
#
# The table is printed, and its figures are written to $OUT (or the working directory) as gpu-qloop.json; then
# python tests/benchmarks/gpu.py --readme gpu-*.json writes the README's table.
set -euo pipefail
cd "$(dirname "$0")/../.."
export HF_HUB_OFFLINE=1 PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTORCH_CUDA_ALLOC_CONF=${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}
exec python tests/benchmarks/gpu.py "$@"
