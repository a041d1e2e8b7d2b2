#!/usr/bin/env bash
# A run on all hosts of a TPU pod slice, which exists and has the package installed on every host:
#
#   gcloud compute tpus tpu-vm create NAME --zone=ZONE --accelerator-type=v5litepod-16 --version=v2-alpha-tpuv5-lite
#   scripts/tpu_pod.sh NAME ZONE install
#   scripts/tpu_pod.sh NAME ZONE train --config=imagenet:B1 --config.model.dtype=bfloat16 \
#     --config.data.data_dir=/mnt/data/imagenet --out=/mnt/shared/runs/B1
#
# Every host runs the same command and finds the others by itself. DATA and OUT must be the same folders on all of them.
set -euo pipefail
name=${1:?usage: $0 NAME ZONE install|train|search ...}
zone=${2:?usage: $0 NAME ZONE install|train|search ...}
shift 2
case ${1:-} in
install | train | search) ;;
*)
  echo "$0: ${1:-nothing} is not install, train or search: the other commands are for one host" >&2
  exit 2
  ;;
esac
on_all() { gcloud compute tpus tpu-vm ssh "$name" --zone="$zone" --worker=all --command="$1"; }
if [ "${1:-}" = install ]; then
  tar --exclude=.git --exclude=.venv --exclude=runs -czf - . >/tmp/repopt_jax.tar.gz
  gcloud compute tpus tpu-vm scp /tmp/repopt_jax.tar.gz "$name:/tmp/" --zone="$zone" --worker=all
  on_all 'rm -rf repopt_jax && mkdir repopt_jax && tar -xzf /tmp/repopt_jax.tar.gz -C repopt_jax && cd repopt_jax &&
    { python3 -c "import sys; sys.exit(sys.version_info < (3, 11))" ||
      { echo "needs Python 3.11 or newer; this host has $(python3 --version)" >&2; exit 1; }; } &&
    python3 -m venv .venv && .venv/bin/pip install -q -e . "jax[tpu]"'
else
  on_all "cd repopt_jax && .venv/bin/repopt $(printf '%q ' "$@")"
fi
