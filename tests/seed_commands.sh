#!/usr/bin/env bash
# The commands that qloop was asked for, as they were written, each in a short form: a tiny trained
# model in the base's place, three steps instead of hundreds.
#
#   bash tests/seed_commands.sh MODEL        # a folder, such as output/demo/checkpoints/checkpoint-120
set -euo pipefail
model=$(realpath "$1")
root=$(realpath "$(dirname "$0")/..")
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export WANDB_MODE=offline HF_HUB_OFFLINE=1
cd "$work"

# data/<data_type>_train.jsonl and _test.jsonl, made of the embedded corpus.
python - "$root/qloop/demo/corpus" <<'PYTHON'
import json
import pathlib
import sys

files = sorted(pathlib.Path(sys.argv[1]).rglob("*.q"))
folder = pathlib.Path("data")
folder.mkdir()
for data_type in ("raw", "filtered", "described_filtered"):
    for name, part in (("train", files[5:45]), ("test", files[:5])):
        rows = [json.dumps({"text": file.read_text()}) + "\n" for file in part]
        (folder / f"{data_type}_{name}.jsonl").write_text("".join(rows))
PYTHON
mkdir launch
cp "$root"/launch/run_pretraining.py launch/

short="--model_name $model --max_seq_length 256 --gradient_accumulation_steps 2 --max_steps 3
    --warmup_steps 1 --num_samples 1 --sample_tokens 8"
run() { # name of the run, flags
    name=$1
    shift
    echo "== launch/run_pretraining.py $*"
    # shellcheck disable=SC2086
    python launch/run_pretraining.py $short --experiment_name "$name" "$@" >"$name.log" 2>&1 || {
        cat "$name.log"
        exit 1
    }
    grep -h "^model \|^held-out loss" "$name.log"
}

run basic --data_type filtered --training_method lora
run lora --training_method lora
run qlora --training_method qlora
run full --training_method full
run raw --data_type raw
run filtered --data_type filtered
run described --data_type described_filtered
run my_experiment --wandb --wandb_project q-pretraining
for path in checkpoints/checkpoint-3 logs/training_log.txt logs/eval_results.json config.yaml; do
    test -e "output/my_experiment/$path"
done

# The block of config.yaml, unchanged but for the model; without --experiment_name, the run is named
# after the model: output/[model_name].
cat >config.yaml <<YAML
model:
  base_model: "$model"
  max_seq_length: 2048
  learning_rate: 2.0e-5
  batch_size: 1
  gradient_accumulation_steps: 8
  warmup_steps: 100
  max_steps: 1000
  save_steps: 50

  # LoRA settings
  lora_rank: 16
  lora_alpha: 32
  lora_dropout: 0.1
YAML
echo "== qloop train --config config.yaml"
qloop train --config config.yaml --max_steps 2 --warmup_steps 1 --num_samples 0 >config.log 2>&1 || {
    cat config.log
    exit 1
}
grep "lora_rank and 2 more: not used" config.log
test -e "output/$(basename "$model")/checkpoints/checkpoint-2"
echo "all commands ran"
