#!/usr/bin/env bash
# All that is to be measured on one GPU: `bash benchmarks/gpu.sh SET [b16|more|cifar10|seeds|train ...]`, SET being CIFAR-10
# (a Hub id or a folder) with the column IMAGE_COLUMN (image). Without a choice all parts run, in this order. Results go to
# benchmarks/results and outputs. `cifar10` holds 5,000 training images out, for the choice of hyper-parameters; `seeds`
# trains on all of them, once for each of SEEDS (0 1 2), and keeps log, recipe, card and pictures. benchmarks/peers.py
# names the peers; `train` needs torchvision.
set -euo pipefail
set_name=${1:?usage: bash benchmarks/gpu.sh SET [b16|more|cifar10|seeds|train ...]}
[ ! -d "$set_name" ] || set_name=$(realpath "$set_name")
shift
cd "$(dirname "$0")/.."
[ $# -gt 0 ] || set -- b16 more cifar10 seeds train
columns=(--dataset_name "$set_name" --image_column_name "${IMAGE_COLUMN:-image}")

for part in "$@"; do
    case $part in
    b16)
        python -m benchmarks.model --dtypes bfloat16 --variants B/16 --batch_sizes 256 --backends eager compiled --name gpu-b16
        ;;
    more)
        python -m benchmarks.model --dtypes bfloat16 --variants S/16 L/16 --batch_sizes 1 128 --backends compiled --name gpu-more
        ;;
    cifar10)
        python train.py recipes/cifar10.yaml "${columns[@]}" --output_dir outputs/cifar10-validated
        ;;
    seeds)
        for seed in ${SEEDS:-0 1 2}; do
            run=outputs/cifar10-$seed kept=benchmarks/results/cifar10/seed-$seed
            python train.py recipes/cifar10.yaml "${columns[@]}" --train_val_split 0 --seed "$seed" --output_dir "$run"
            mkdir -p "$kept"
            cp "$run"/{metrics.jsonl,train_config.yaml,README.md} "$run"/*.png "$kept"
        done
        ;;
    train)
        python -m benchmarks.train "${columns[@]}" --variant S/4 --num_train_epochs 1 --bf16 --rounds 1 \
            --per_device_train_batch_size 512 --name gpu-train
        ;;
    *)
        echo "expected b16, more, cifar10, seeds or train, got $part" >&2
        exit 1
        ;;
    esac
done
