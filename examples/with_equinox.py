"""RepOptimizer for an Equinox network: search, scales, training with one line changed.

    python examples/with_equinox.py

Copy this file and put your own module in place of `Net`; what is kept from it is the order of `main`. The
data are the handwritten digits that scikit-learn carries.
"""

import tempfile
from pathlib import Path

import equinox as eqx
import jax
import numpy as np
import optax
from flax import nnx

from repopt_jax import (
    Scales,
    find_branches,
    load_scales,
    reinitialize,
    repopt_mask,
    save_scales,
    search_tree,
)
from repopt_jax.core import paths
from repopt_jax.data import digits


class Net(eqx.Module):
    """Two 3x3 convolutions with group norm, a classifier; of one image (1, 8, 8)."""

    convs: list
    norms: list
    head: eqx.nn.Linear

    def __init__(self, key):
        stem, body, head = jax.random.split(key, 3)
        self.convs = [
            eqx.nn.Conv2d(1, 16, 3, stride=2, padding=1, use_bias=False, key=stem),
            eqx.nn.Conv2d(16, 16, 3, padding=1, use_bias=False, key=body),
        ]
        self.norms = [eqx.nn.GroupNorm(1, 16), eqx.nn.GroupNorm(1, 16)]
        self.head = eqx.nn.Linear(256, 10, key=head)

    def __call__(self, x):
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = jax.nn.relu(norm(conv(x)))
        return self.head(x.reshape(-1))


def loss_of(model, images, labels):
    logits = jax.vmap(model)(images)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def train(params, loss, tx, batches):
    """Your own loop, the same for a search and for a training. Returns the parameters and the losses."""

    @jax.jit
    def step(params, state, images, labels):
        value, grads = jax.value_and_grad(loss)(params, images, labels)
        updates, state = tx.update(grads, state, params)
        return eqx.apply_updates(params, updates), state, value

    state, losses = tx.init(params), []
    for images, labels in batches:
        params, state, value = step(params, state, images, labels)
        losses.append(float(value))
    return params, losses


def sgd(steps, mask=None):
    rate = optax.cosine_decay_schedule(0.1, steps)
    return optax.chain(optax.add_decayed_weights(4e-5, mask), optax.sgd(rate, 0.9, nesterov=True))


def main(search_steps=100, steps=300, folder=None):
    images, labels, is_test = digits.load()
    images = images[:, None].astype(np.float32) / 255
    rng = np.random.default_rng(0)

    def batches(count):
        for _ in range(count):
            chosen = rng.choice(np.flatnonzero(~is_test), 64)
            yield images[chosen], labels[chosen]

    # 1. Which kernels are re-parameterized, and by which branches: 3x3 + 1x1, and the identity where there
    #    are as many input as output channels and stride 1. The network is traced once, which tells what each
    #    parameter is and how its axes lie: `convs/0/weight` and `convs/1/weight` are found, `head/weight`, of
    #    one branch, is left.
    params, static = eqx.partition(Net(jax.random.key(0)), eqx.is_inexact_array)

    def apply(params, images):
        return jax.vmap(eqx.combine(params, static))(images)

    start = Scales.ones(find_branches(apply, params, images[:1]))

    def plain_loss(params, *batch):
        return loss_of(eqx.combine(params, static), *batch)

    # 2. Search: train the branches and their scales; `merged` gives the parameters that the network knows.
    #    The scales are not decayed.
    def not_scales(tree):
        return paths.map_named(lambda path, _: not path.startswith("scales/"), tree)

    tree = search_tree(params, start, rngs=nnx.Rngs(1))
    tree, search_losses = train(
        tree,
        lambda tree, *batch: plain_loss(tree.merged(), *batch),
        sgd(search_steps, not_scales),
        batches(search_steps),
    )

    # 3. The scales go through a file, which later trainings share.
    location = Path(folder or tempfile.mkdtemp()) / "scales"
    save_scales(location, tree.extract_scales())
    scales = load_scales(location, params)

    # 4. Training: the plain network, started by the scales, and one line changed: `tx = sgd(steps)` before.
    params, static = eqx.partition(Net(jax.random.key(2)), eqx.is_inexact_array)
    params = reinitialize(params, scales, rngs=nnx.Rngs(3))
    tx = optax.chain(repopt_mask(scales), sgd(steps))
    params, losses = train(params, plain_loss, tx, batches(steps))

    model = eqx.combine(params, static)
    accuracy = float(np.mean(jax.vmap(model)(images[is_test]).argmax(-1) == labels[is_test]))
    print(f"search: loss {search_losses[0]:.3f} to {search_losses[-1]:.3f}, scales at {location}")
    print(f"training: loss {losses[0]:.3f} to {losses[-1]:.3f}, test accuracy {100 * accuracy:.1f} %")
    return {"search": search_losses, "train": losses, "scales": scales, "params": params}


if __name__ == "__main__":
    main()
