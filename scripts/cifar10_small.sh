#!/usr/bin/env bash
# One search, three seeds of plain SGD and of RepOpt, one of RepVGG on CIFAR-10, then the table of results.
#
#   scripts/cifar10_small.sh DATA [RUNS]
#
# DATA is an image folder: train/<class>/*, test/<class>/*. RUNS (runs/cifar10_small by default) keeps one folder a run;
# what is finished there is not run again, what was interrupted continues.
set -euo pipefail
data=$(realpath "${1:?usage: scripts/cifar10_small.sh DATA [RUNS]}")
runs=$(realpath -m "${2:-runs/cifar10_small}")
cd "$(dirname "$0")/.."
PATH="$PWD/.venv/bin:$PATH" # the README's environment, where there is one
config=configs/cifar10_small.py

repopt search --config="$config:search" --config.data.data_dir="$data" --config.seed=0 --out="$runs/search-0"
for seed in 0 1 2; do
  repopt train --config="$config:plain" --config.data.data_dir="$data" --config.seed="$seed" --out="$runs/plain-$seed"
  repopt train --config="$config:repopt" --config.data.data_dir="$data" --config.seed="$seed" \
    --config.scales="$runs/search-0/scales" --out="$runs/repopt-$seed"
done
repopt train --config="$config:repvgg" --config.data.data_dir="$data" --config.seed=0 --out="$runs/repvgg-0"
python scripts/summarize_runs.py "$runs" --compare plain repopt --command "scripts/cifar10_small.sh DATA" \
  --out scripts/results/cifar10_small
