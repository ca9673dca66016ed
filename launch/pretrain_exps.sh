#!/usr/bin/env bash
# Example experiments: continued pretraining of Qwen2.5 on Q, all weights, the published recipe
# (learning rate 1e-5, 800 steps, a save every 100; configs/full.toml).
#
#   bash launch/pretrain_exps.sh 7b                       # one experiment
#   bash launch/pretrain_exps.sh 7b --data_type raw       # with flags of qloop train
#
# The corpus is data/filtered_train.jsonl and data/filtered_test.jsonl unless flags say otherwise.
# fp32 weights, gradients and two moments take 16 bytes per parameter, without activations: 1.5b 25 GB,
# 3b 50 GB, 7b 122 GB, 14b 236 GB, 32b 524 GB. So 14b and 32b are sharded over 4 GPUs.
set -euo pipefail
cd "$(dirname "$0")/.."

if [ $# -eq 0 ]; then
    echo "usage: bash launch/pretrain_exps.sh 1.5b|3b|7b|14b|32b [flags of qloop train]" >&2
    exit 78
fi
size=$1
shift

on_one_gpu() { # model, flags
    CUDA_VISIBLE_DEVICES=${CUDA_VISIBLE_DEVICES:-0} python launch/run_pretraining.py \
        --config configs/full.toml --model_name "$@"
}

on_four_gpus() { # model, flags
    accelerate launch --config_file launch/fsdp2.yaml --num_processes 4 \
        -m qloop train --config configs/full.toml \
        --batch_size 1 --gradient_accumulation_steps 8 --model_name "$@"
}

case $size in
    1.5b) on_one_gpu Qwen/Qwen2.5-1.5B-Instruct --experiment_name q-1.5b "$@" ;;
    3b) on_one_gpu Qwen/Qwen2.5-3B-Instruct --experiment_name q-3b "$@" ;;
    7b) on_one_gpu Qwen/Qwen2.5-7B-Instruct --experiment_name q-7b "$@" ;;
    14b) on_four_gpus Qwen/Qwen2.5-14B-Instruct --experiment_name q-14b "$@" ;;
    32b) on_four_gpus Qwen/Qwen2.5-32B-Instruct --experiment_name q-32b "$@" ;;
    *)
        echo "unknown size $size; choose 1.5b, 3b, 7b, 14b or 32b" >&2
        exit 78
        ;;
esac
