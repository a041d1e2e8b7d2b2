"""A training step of ResNet-18 in plain Flax, as it is and after `fast_on_cpu`.

    python scripts/fast_on_cpu.py

Both run in turn in each round; docs/xla_cpu_convolutions.md has what it printed.
"""

import functools

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from repopt_jax import fast_on_cpu
from repopt_jax.bench.timing import Candidate, carrying, measure, memory

IMAGES, SIZE, CLASSES, ROUNDS = 32, 96, 100, 9


class BasicBlock(nnx.Module):
    def __init__(self, inputs, outputs, stride, *, rngs):
        pad = [(1, 1), (1, 1)]
        self.conv1 = nnx.Conv(inputs, outputs, (3, 3), strides=stride, padding=pad, use_bias=False, rngs=rngs)
        self.bn1 = nnx.BatchNorm(outputs, rngs=rngs)
        self.conv2 = nnx.Conv(outputs, outputs, (3, 3), padding=pad, use_bias=False, rngs=rngs)
        self.bn2 = nnx.BatchNorm(outputs, rngs=rngs)
        self.shortcut = nnx.data(None)
        if stride > 1 or inputs != outputs:
            conv = nnx.Conv(inputs, outputs, (1, 1), strides=stride, use_bias=False, rngs=rngs)
            self.shortcut = nnx.Sequential(conv, nnx.BatchNorm(outputs, rngs=rngs))

    def __call__(self, x):
        y = self.bn2(self.conv2(nnx.relu(self.bn1(self.conv1(x)))))
        return nnx.relu(y + (x if self.shortcut is None else self.shortcut(x)))


class ResNet18(nnx.Module):
    def __init__(self, classes, *, rngs):
        self.conv1 = nnx.Conv(3, 64, (7, 7), strides=2, padding=3, use_bias=False, rngs=rngs)
        self.bn1 = nnx.BatchNorm(64, rngs=rngs)
        blocks, inputs = [], 64
        for outputs, stride in ((64, 1), (128, 2), (256, 2), (512, 2)):
            blocks += [BasicBlock(inputs, outputs, stride, rngs=rngs)]
            blocks += [BasicBlock(outputs, outputs, 1, rngs=rngs)]
            inputs = outputs
        self.blocks = nnx.List(blocks)
        self.fc = nnx.Linear(512, classes, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.bn1(self.conv1(x)))
        x = nnx.max_pool(x, (3, 3), (2, 2), padding=[(1, 1), (1, 1)])
        for block in self.blocks:
            x = block(x)
        return self.fc(x.mean((1, 2)))


def stepping(model, tx, images, size, classes):
    """A training step on random numbers, `images` of `size` pixels, from arrays of its own."""
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    batch = jax.random.normal(jax.random.key(0), (images, size, size, 3))
    labels = jnp.arange(images) % classes

    def step(params, rest, state):
        def loss(params):
            model = nnx.merge(graph, params, rest, copy=True)
            value = optax.softmax_cross_entropy_with_integer_labels(model(batch), labels).mean()
            return value, nnx.split(model, nnx.Param, ...)[2]

        (value, rest), gradients = jax.value_and_grad(loss, has_aux=True)(params)
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), rest, state, value

    start = jax.tree.map(jnp.copy, (params, rest, jax.jit(tx.init)(params)))
    compiled = jax.jit(step, donate_argnums=(0, 1, 2)).lower(*start).compile()
    return Candidate(carrying(compiled, start)), memory(compiled)


def main():
    model = ResNet18(CLASSES, rngs=nnx.Rngs(0))
    builders = {
        name: functools.partial(stepping, made, optax.sgd(0.01, 0.9), IMAGES, SIZE, CLASSES)
        for name, made in {"as it is": model, "fast_on_cpu": fast_on_cpu(model)}.items()
    }
    found = measure(builders, ROUNDS, dict.fromkeys(builders, ("as it is",)))
    print(f"ResNet-18, {IMAGES} images of {SIZE} px, {ROUNDS} rounds; jax {jax.__version__}\n")
    print("| | ms | ratio | peak memory, MB |\n|---|---|---|---|")
    for name, facts in found.items():
        ms, ratio = (
            f"{f['median']:.3g} ({f['low']:.3g} to {f['high']:.3g})"
            for f in (facts["ms"], facts["ratios"]["as it is"])
        )
        print(f"| {name} | {ms} | {ratio} | {facts['peak_bytes'] / 1e6:.0f} |")


if __name__ == "__main__":
    main()
