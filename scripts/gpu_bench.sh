#!/bin/sh
# What `repopt bench` measures on a GPU, for the tables of the README: RepOpt-VGG-B1 on images of 224 pixels.
#
#     sh scripts/gpu_bench.sh [PATH] [all | NUMBER]
#
# Each numbered command takes less than nine minutes on a data centre's GPU and adds its part to PATH.json,
# PATH.md and PATH.png, so that they may run one at a time, in any order. torch is needed for number 3 only.
set -eu
out=${1:-scripts/results/bench_gpu}
which=${2:-all}

# PyTorch takes its memory beside JAX; the largest batch is asked of nearly all there is.
share() { XLA_PYTHON_CLIENT_MEM_FRACTION=$1; export XLA_PYTHON_CLIENT_MEM_FRACTION; }
wanted() { [ "$which" = all ] || [ "$which" = "$1" ]; }
bench() { python -m repopt_jax bench "$@" --model=repopt-vgg-b1 --size=224 --out="$out"; }

share 0.6
if wanted 1; then bench update --rounds=50; fi
if wanted 2; then bench step --dtype=float32,bfloat16 --batch=32 --rounds=20; fi
if wanted 3; then bench torch --dtype=float32,bfloat16 --batch=32,256 --rounds=15 --networks=plain,repopt; fi
if wanted 4; then bench step --dtype=float32,bfloat16 --batch=256 --rounds=15; fi
if wanted 5; then bench inference --dtype=float32,bfloat16 --batch=1,32,256 --rounds=20; fi
if wanted 6; then bench compile --batch=32 --networks=plain,repopt,repvgg,search; fi
share 0.95
if wanted 7; then bench largest --dtype=bfloat16 --batch=512 --networks=repopt,repvgg; fi
if wanted 8; then bench largest --dtype=float32 --batch=256 --networks=repopt,repvgg; fi
share 0.6
if wanted 9; then bench optimizers --rounds=20; fi
if wanted 10; then bench input --dtype=bfloat16 --batch=32 --rounds=5; fi
