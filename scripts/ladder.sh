#!/usr/bin/env bash
# The ablation ladder on CIFAR-10: one search, then nine rungs with three seeds each, and the table of results.
#
#   scripts/ladder.sh DATA [RUNS]
#
# DATA is an image folder: train/<class>/*, test/<class>/*. RUNS (runs/ladder by default) keeps the runs; what is finished
# there is not run again, what was interrupted continues.
set -euo pipefail
data=$(realpath "${1:?usage: scripts/ladder.sh DATA [RUNS]}")
runs=$(realpath -m "${2:-runs/ladder}")
cd "$(dirname "$0")/.."
PATH="$PWD/.venv/bin:$PATH" # the README's environment, where there is one

repopt compare --config=configs/ladder.py --config.data.data_dir="$data" --out="$runs" \
  --results=scripts/results/ladder --named="scripts/ladder.sh DATA"
