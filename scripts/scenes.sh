#!/usr/bin/env bash
# A detector on scenes of handwritten digits: search, plain SGD, RepOpt and RepVGG with three seeds, deployed and compared.
#
#   scripts/scenes.sh [OUT]
#
# OUT (runs/scenes by default) gets the report; what is finished there is not run again, what was interrupted continues.
set -euo pipefail
out=$(realpath -m "${1:-runs/scenes}")
cd "$(dirname "$0")/.."
PATH="$PWD/.venv/bin:$PATH" # the README's environment, where there is one

repopt quickstart --config=configs/scenes.py --seeds=3 --out="$out" --results=scripts/results/scenes \
  --named="scripts/scenes.sh"
cp "$out/report/found.png" scripts/results/scenes_found.png
