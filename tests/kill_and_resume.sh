#!/usr/bin/env bash
# On real Q files: trains each method, trains it again with a kill -9 in the middle and a restart, and
# compares losses and saved tensors bit by bit. Writes tests/benchmarks/real_q.json and RESULTS.md.
#
#   bash tests/kill_and_resume.sh CORPUS [STEPS [MAX_SEQ_LENGTH]]   # a folder of .q and .k files; 60, 2048
#
# The base of lora and qlora is the model that the full run trains first, from the embedded config.
set -euo pipefail
corpus=$(realpath "$1")
steps=${2:-60}
length=${3:-2048}
cd "$(dirname "$0")/.."
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT
export HF_HUB_OFFLINE=1
keys="--config configs/demo.toml --output_dir $out --train_file $corpus --max_steps $steps
    --save_steps 10 --eval_steps 0 --num_samples 0 --max_seq_length $length --batch_size 1
    --learning_rate 2e-3"

# Adapters need a base; demo.toml starts from random weights, so its lines on that are removed.
grep -v '^model_config_file\|^tokenizer_name' configs/demo.toml >"$out/adapters.toml"

train() { # method, name
    local method_keys="--training_method $1"
    [ "$1" = full ] || method_keys="$method_keys --model_name $out/full/checkpoints/checkpoint-$steps"
    local file=configs/demo.toml
    [ "$1" = full ] || file="$out/adapters.toml"
    # shellcheck disable=SC2086
    exec qloop train ${keys/configs\/demo.toml/$file} $method_keys --experiment_name "$2"
}

for method in full lora qlora; do
    (train $method $method) >"$out/$method.log"
    (train $method killed-$method) >"$out/killed-$method.log" &
    pid=$!
    until [ -e "$out/killed-$method/checkpoints/checkpoint-20" ]; do sleep 0.05; done
    sleep 1
    kill -9 $pid
    wait $pid 2>/dev/null || true
    (train $method killed-$method) >>"$out/killed-$method.log"
    grep "going on from" "$out/killed-$method.log" | sed "s|$out/||"
done

python - "$out" "$steps" "$corpus" <<'PYTHON'
import hashlib
import json
import os
import pathlib
import statistics
import sys

sys.path.insert(0, "tests/benchmarks")
from render import format_real_q, save

out, steps = pathlib.Path(sys.argv[1]), sys.argv[2]
report = json.loads((out / "full/logs/data_report.json").read_text())
rows = []
for method in ("full", "lora", "qlora"):
    records, tensors = [], []
    for name in (method, f"killed-{method}"):
        lines = (out / name / "logs/metrics.jsonl").read_text().splitlines()
        records.append([json.loads(line) for line in lines])
        folder = out / name / f"checkpoints/checkpoint-{steps}"
        files = sorted(folder.glob("*.safetensors"))
        tensors.append([(file.name, hashlib.sha256(file.read_bytes()).digest()) for file in files])
    kept = ("step", "loss", "grad_norm", "tokens_seen")
    curves = [[[record[key] for key in kept] for record in one] for one in records]
    is_same = curves[0] == curves[1] and tensors[0] == tensors[1]
    result = json.loads((out / method / "results/evaluation.json").read_text())
    speed = statistics.median(record["tokens_per_second"] for record in records[0])
    rows.append(
        {
            "method": method,
            "first_bits_per_byte": result["first"]["bits_per_byte"],
            "last_bits_per_byte": result["final"]["bits_per_byte"],
            "tokens_per_second": speed,
            "same_after_kill": is_same,
        }
    )
results = {
    "corpus": f"`.q` and `.k` files of {pathlib.Path(sys.argv[3]).name}",
    "machine": f"{os.cpu_count()} CPU cores",
    "steps": int(steps),
    "ledger": {side: report[side] for side in ("train", "held_out")},
    "rows": rows,
}
print(format_real_q(results))
save("real_q", results)
sys.exit(0 if all(row["same_after_kill"] for row in rows) else 1)
PYTHON
