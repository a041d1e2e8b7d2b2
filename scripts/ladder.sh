#!/usr/bin/env bash
# The ablation ladder on CIFAR-10: one search, then nine rungs with three seeds each, and the table of results.
#
#   scripts/ladder.sh DATA [RUNS]
#
# DATA is an image folder: train/<class>/*, test/<class>/*. RUNS (runs/ladder by default) keeps one folder a run;
# what is finished there is not run again, what was interrupted continues. All rungs of a seed come before the next
# seed, and the table is written after each, so that an early end leaves a whole ladder with fewer seeds.
set -euo pipefail
data=$(realpath "${1:?usage: scripts/ladder.sh DATA [RUNS]}")
runs=$(realpath -m "${2:-runs/ladder}")
cd "$(dirname "$0")/.."
PATH="$PWD/.venv/bin:$PATH" # the README's environment, where there is one
export JAX_COMPILATION_CACHE_DIR="${JAX_COMPILATION_CACHE_DIR:-$runs/compiled}" # seeds share what is compiled
config=configs/ladder.py
rungs=(1-plain 2-init 3-multiplier 4-ones 5-depth 6-means 7-full 8-direct 9-frozen)
searched=" 2-init 3-multiplier 6-means 7-full "
hardware="$(nproc) CPU cores ($(sed -n 's/^model name[^:]*: //p' /proc/cpuinfo | head -n 1))"

repopt search --config="$config:search" --config.data.data_dir="$data" --config.seed=0 --out="$runs/search-0"
for seed in 0 1 2; do
  for rung in "${rungs[@]}"; do
    scales=()
    [[ $searched == *" $rung "* ]] && scales=(--config.scales="$runs/search-0/scales")
    repopt train --config="$config:$rung" --config.data.data_dir="$data" --config.seed="$seed" "${scales[@]}" \
      --out="$runs/$rung-$seed"
  done
  python scripts/summarize_runs.py "$runs" --compare "${rungs[@]}" --title "The ablation ladder on CIFAR-10" \
    --command "scripts/ladder.sh DATA" --hardware "$hardware" --out scripts/results/ladder
done
