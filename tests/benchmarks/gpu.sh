#!/usr/bin/env bash
# Speed and memory on one large GPU (every row fits on an H200), in under 8 minutes; no hub, no network:
# random weights at Qwen2.5's sizes, documents of real lengths.
#
#     bash tests/benchmarks/gpu.sh [CORPUS]                   # qloop, row by row, the most important first
#     bash tests/benchmarks/gpu.sh [CORPUS] --only peers      # TRL, if it is installed
#
# Prints the table and writes its figures to $OUT (or the working directory) as gpu-qloop.json. After that,
# python tests/benchmarks/gpu.py --merge gpu-*.json updates gpu.json and RESULTS.md.
set -euo pipefail
cd "$(dirname "$0")/../.."
export HF_HUB_OFFLINE=1 PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTORCH_CUDA_ALLOC_CONF=${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}
exec python tests/benchmarks/gpu.py "$@"
