#!/usr/bin/env bash
# All that is to be measured on one GPU: `bash benchmarks/gpu.sh SET [model|train|cifar10 ...]`, SET being CIFAR-10 (a Hub
# id or a folder). Without a choice all parts run, in this order; each is made for less than ten minutes of an H200.
# Results go to benchmarks/results and outputs. Peers are named in benchmarks/peers.py; missing ones are said to be so.
set -euo pipefail
cd "$(dirname "$0")/.."
set_name=${1:?usage: bash benchmarks/gpu.sh SET [model|train|cifar10 ...]}
shift
[ $# -gt 0 ] || set -- model train cifar10

for part in "$@"; do
    case $part in
    model)
        python -m benchmarks.model --dtypes bfloat16 --variants B/16 --batch_sizes 256 --ways eager compiled --name gpu-b16
        python -m benchmarks.model --dtypes bfloat16 --variants S/16 L/16 --batch_sizes 1 128 --ways compiled --name gpu-more
        ;;
    train)
        python -m benchmarks.train --dataset_name "$set_name" --variant S/4 --num_train_epochs 1 --bf16 --rounds 1 \
            --per_device_train_batch_size 512 --name gpu-train
        ;;
    cifar10)
        python train.py recipes/cifar10.yaml --dataset_name "$set_name" --output_dir outputs/cifar10-gpu
        ;;
    *)
        echo "expected model, train or cifar10, got $part" >&2
        exit 1
        ;;
    esac
done
