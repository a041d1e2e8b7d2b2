"""What a structure with trainable scales costs a training step: in the weights and in the optimizer.

    python scripts/online_cost.py [OUT.md]

vgg-cifar-small at 128 images of 32 pixels, and ResNet-18 in plain Flax at 4 images of 64, where the weights
outweigh the activations. SGD with momentum; all ways run in turn in each round. Nothing else should run on
the machine. Five minutes on 2 cores.
"""

import datetime
import functools
import sys
from pathlib import Path

import optax
from fast_on_cpu import ResNet18, stepping
from flax import nnx

from repopt_jax import (
    depth_scales,
    fast_on_cpu,
    find_branches,
    find_parametrizations,
    models,
    prepare,
    reinitialize,
    reparameterize,
    to_structure,
)
from repopt_jax.bench.results import machine
from repopt_jax.bench.timing import measure
from repopt_jax.cli import huge_pages

ROUNDS, CLASSES = 9, 10


def describe(found):
    return ", ".join(f"{name} {value}" for name, value in found.items() if name != "repopt_jax")


def sgd():
    return optax.sgd(0.01, 0.9)


def ways(model):
    """Name -> a function that returns the network and its optimizer."""
    several = {path.rpartition("/")[0] for path, b in find_branches(model).items() if len(b.branches) > 1}
    taken = functools.partial(lambda path, module: path in several)
    convolutions = functools.partial(lambda path, module: path in several and len(module.kernel_size) == 2)
    scales = depth_scales(model, taken)
    orepa = find_parametrizations(model, "orepa", convolutions)

    def in_optimizer(structures):
        fresh, theta = reinitialize(model, structures, rngs=nnx.Rngs(1), return_weights=True)
        return fresh, reparameterize(sgd(), structures, weights=theta, trainable_scales=True)

    return {
        "plain": lambda: (model, sgd()),
        "RepVGG's branches, in the weights": lambda: (
            prepare(model, "online", select=taken, rngs=nnx.Rngs(1)).model,
            sgd(),
        ),
        "RepVGG's branches, in the optimizer": lambda: in_optimizer(scales),
        "OREPA's branches, in the weights": lambda: (
            to_structure(model, "orepa", convolutions, rngs=nnx.Rngs(1)),
            sgd(),
        ),
        "OREPA's branches, in the optimizer": lambda: in_optimizer(orepa),
        "RepVGG, branch by branch": lambda: (
            to_structure(model, "repvgg", taken, rngs=nnx.Rngs(1)),
            sgd(),
        ),
    }


def main(out=None):
    networks = {
        "vgg-cifar-small, 128 images of 32 px": (
            models.create("vgg-cifar-small", num_classes=CLASSES, rngs=nnx.Rngs(0)),
            128,
            32,
        ),
        "ResNet-18, 4 images of 64 px": (fast_on_cpu(ResNet18(CLASSES, rngs=nnx.Rngs(0))), 4, 64),
    }
    lines = [
        "# What a structure with trainable scales costs",
        "",
        f"`python scripts/online_cost.py`, {datetime.date.today()}; {describe(machine())};",
        f"{ROUNDS} rounds, in turn. Ratios are medians over the rounds, with quartiles; memory is the",
        "compiler's count for the step.",
    ]
    for title, (model, images, size) in networks.items():
        builders = {
            name: (lambda make=make, shape=(images, size): stepping(*make(), *shape, CLASSES))
            for name, make in ways(model).items()
        }
        found = measure(builders, ROUNDS, dict.fromkeys(builders, ("plain",)))
        lines += ["", f"## {title}", "", "| | ms | of plain | peak memory, MB |", "|---|---|---|---|"]
        for name, facts in found.items():
            ratio = facts["ratios"]["plain"]
            lines.append(
                f"| {name} | {facts['ms']['median']:.1f} | {ratio['median']:.2f} ({ratio['low']:.2f} to "
                f"{ratio['high']:.2f}) | {facts['peak_bytes'] / 1e6:.0f} |"
            )
    text = "\n".join(lines) + "\n"
    if out:
        Path(out).write_text(text)
    sys.stdout.write(text)


if __name__ == "__main__":
    huge_pages.restart()
    main(*sys.argv[1:2])
