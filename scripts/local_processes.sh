#!/usr/bin/env bash
# One job of several processes on this machine, each with its own devices:
#
#   scripts/local_processes.sh 2 repopt train --config=digits:plain --out=runs/two
#
# The command gets --coordinator, --processes and --process. SIGTERM and Ctrl-C are passed on, so that the run stops with a checkpoint; the
# exit code is that of the first process that failed. PORT names the coordinator's port.
set -uo pipefail
count=${1:?usage: $0 PROCESSES COMMAND ...}
shift
port=${PORT:-$((20000 + RANDOM % 10000))}
pids=()
for ((i = 0; i < count; i++)); do
  "$@" "--coordinator=127.0.0.1:$port" "--processes=$count" "--process=$i" &
  pids+=($!)
done
trap 'kill -TERM "${pids[@]}" 2>/dev/null' TERM INT
code=0
for pid in "${pids[@]}"; do
  wait "$pid"
  ended=$?
  # A signal ends `wait` before the process ends.
  while kill -0 "$pid" 2>/dev/null; do
    wait "$pid"
    ended=$?
  done
  [ "$code" -ne 0 ] || code=$ended
done
exit "$code"
