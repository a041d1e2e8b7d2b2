#!/bin/sh
# What `repopt bench` measures on a CPU, for the tables of the README. Nothing else should run on the machine.
#
#     sh scripts/cpu_bench.sh [PATH]
#
# Single convolutions go to PATH_conv.json and so on, everything else to PATH.json. Ten minutes on 2 cores; torch is
# needed for `torch` and for PyTorch's column of `conv`.
set -eu
out=${1:-scripts/results/bench_cpu}
bench() { python -m repopt_jax bench "$@" --out="$out"; }

small="--model=vgg-cifar-small --size=32 --batch=128 --classes=10"
bench update --rounds=15
bench step,inference $small --rounds=9 --networks=plain,repopt,search,repvgg,xla
bench torch $small --rounds=9 --networks=plain,repopt,xla
bench compile $small --networks=plain,repopt,repvgg,xla
bench largest $small --memory=2 --networks=repopt,repvgg
bench step --size=64 --batch=4 --rounds=5 --networks=plain,repopt,search,repvgg,xla
for model in mobileone-s0 repghost-0.5; do
  bench step --model=$model --size=32 --batch=128 --classes=10 --rounds=9 --networks=plain,xla
done
for model in vgg-digits repopt-ghostnet-digits mobileone-digits; do
  bench step --model=$model --size=16 --batch=64 --classes=10 --rounds=9 --networks=plain,xla
done
bench optimizers --rounds=9
bench input --model=repvgg-a0 --batch=4 --rounds=5
out=${out}_conv
bench conv --rounds=9
