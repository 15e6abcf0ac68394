#!/usr/bin/env bash
# All that is to be measured on one GPU, in at most nine minutes (LIMIT, in seconds):
#   bash benchmarks/gpu.sh CIFAR10            a Hub id or a folder; IMAGE_COLUMN (image) names its column
#   bash benchmarks/gpu.sh CIFAR10 --rehearse the same at a reduced size, on a CPU too, so that no slip waits for a GPU
# The parts run in this order, each within its own limit and what is left of the nine minutes: a short run of the recipe,
# the recipe, the tests that need a GPU, the pieces of a training step, ViT-B/16 beside its peers, eager and compiled.
# Results and logs go to benchmarks/results/gpu, the last lines of each part to the screen. PARTS chooses some parts.
# benchmarks/peers.py says how to install the peers.
set -uo pipefail
set_name=${1:?usage: bash benchmarks/gpu.sh CIFAR10 [--rehearse]}
[ ! -d "$set_name" ] || set_name=$(realpath "$set_name")
cd "$(dirname "$0")/.."
kept=$PWD/benchmarks/results/gpu runs=$(mktemp -d) failed=
mkdir -p "$kept"
recipe=(train.py recipes/cifar10.yaml --dataset_name "$set_name" --image_column_name "${IMAGE_COLUMN:-image}")
short=(--max_steps 60 --eval_steps 30 --save_steps 40 --logging_steps 10)
epochs=() steps=() peers=(--variants B/16 --batch_sizes 256) compiled=(--backends compiled)
if [ "${2:-}" = --rehearse ]; then
    tiny=(--max_train_samples 300 --max_eval_samples 64 --per_device_train_batch_size 16 --per_device_eval_batch_size 32)
    tiny+=(--torch_compile false --variant Ti/16 --image_size 32)
    kept=$runs/kept short=(--max_steps 4 --eval_steps 2 --save_steps 2 "${tiny[@]}")
    epochs=(--max_steps 6 "${tiny[@]}")
    steps=(--recipe recipes/digits.yaml --batch_sizes 8 --rounds 2 --backends eager) compiled=(--backends eager)
    peers=(--variants Ti/16 --image_sizes 32 --batch_sizes 2 --rounds 2 --modes inference)
    mkdir -p "$kept"
fi

part() { # NAME SECONDS COMMAND ...
    local name=$1 limit=$2 before=$SECONDS left=$((${LIMIT:-540} - SECONDS))
    shift 2
    [[ " ${PARTS:-$name} " == *" $name "* ]] || return 0
    [ "$limit" -lt "$left" ] || limit=$left
    [ "$limit" -ge 10 ] || { failed+=" $name(no time left)" && return 0; }
    echo "== $name: at most $limit s"
    timeout "$limit" "$@" >"$kept/$name.log" 2>&1 || failed+=" $name($?)"
    tr '\r' '\n' <"$kept/$name.log" | tail -n "${LINES_SHOWN:-12}" | cut -c1-400
    echo "== $name took $((SECONDS - before)) s"
}

part smoke 75 python3 "${recipe[@]}" "${short[@]}" --output_dir "$runs/smoke"
part cifar10 340 python3 "${recipe[@]}" "${epochs[@]}" --output_dir "$runs/cifar10"
cp "$runs"/cifar10/{metrics.jsonl,train_config.yaml} "$kept" 2>/dev/null
part device 90 python3 -m pytest -n 0 -q -p no:cacheprovider tests/training/test_step.py -k "gpu or bfloat16"
part step 60 python3 -m benchmarks.step "${steps[@]}" --name "$kept/step"
part peers 75 python3 -m benchmarks.model --dtypes bfloat16 --backends eager "${peers[@]}" --name "$kept/peers"
part compiled 100 python3 -m benchmarks.model --dtypes bfloat16 "${compiled[@]}" "${peers[@]}" --modes training \
    --name "$kept/compiled"
rm -rf "$runs"
[ -z "$failed" ] || { echo "failed:$failed"; exit 1; }
