#!/usr/bin/env bash
# One search, three seeds of plain SGD, of RepOpt and of RepVGG on CIFAR-10, then the table of results.
#
#   scripts/cifar10_small.sh DATA [RUNS]
#
# DATA is an image folder: train/<class>/*, test/<class>/*. RUNS (runs/cifar10_small by default) keeps the runs; what is
# finished there is not run again, what was interrupted continues.
set -euo pipefail
data=$(realpath "${1:?usage: scripts/cifar10_small.sh DATA [RUNS]}")
runs=$(realpath -m "${2:-runs/cifar10_small}")
cd "$(dirname "$0")/.."
PATH="$PWD/.venv/bin:$PATH" # the README's environment, where there is one

repopt compare --config=configs/cifar10_small.py --config.data.data_dir="$data" --out="$runs" \
  --results=scripts/results/cifar10_small --named="scripts/cifar10_small.sh DATA"
