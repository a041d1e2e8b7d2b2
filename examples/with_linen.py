"""RepOptimizer for a Flax Linen network: search, scales, training with one line changed.

    python examples/with_linen.py

Copy this file and put your own module in place of `Net`; what is kept from it is the order of `main`. The
data are the handwritten digits that scikit-learn carries.
"""

import tempfile
from pathlib import Path

import flax.linen as nn
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


class Net(nn.Module):
    """Two 3x3 convolutions with batch norm, a classifier."""

    @nn.compact
    def __call__(self, x, train: bool = False):
        for name, stride in (("stem", 2), ("body", 1)):
            x = nn.Conv(16, (3, 3), stride, use_bias=False, name=name)(x)
            x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.9)(x))
        return nn.Dense(10, name="head")(x.reshape(x.shape[0], -1))


def loss_of(params, stats, images, labels):
    """Loss, and the batch statistics after it."""
    logits, new = Net().apply(
        {"params": params, "batch_stats": stats}, images, train=True, mutable=["batch_stats"]
    )
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), new["batch_stats"]


def train(params, stats, loss, tx, batches):
    """Your own loop, the same for a search and for a training. Returns parameters, statistics and losses."""

    @jax.jit
    def step(params, stats, state, images, labels):
        (value, stats), grads = jax.value_and_grad(loss, has_aux=True)(params, stats, images, labels)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), stats, state, value

    state, losses = tx.init(params), []
    for images, labels in batches:
        params, stats, state, value = step(params, stats, state, images, labels)
        losses.append(float(value))
    return params, stats, losses


def sgd(steps, mask=None):
    rate = optax.cosine_decay_schedule(0.1, steps)
    return optax.chain(optax.add_decayed_weights(4e-5, mask), optax.sgd(rate, 0.9, nesterov=True))


def main(search_steps=100, steps=300, folder=None):
    images, labels, is_test = digits.load()
    images = images[..., None].astype(np.float32) / 255
    rng = np.random.default_rng(0)

    def batches(count):
        for _ in range(count):
            chosen = rng.choice(np.flatnonzero(~is_test), 64)
            yield images[chosen], labels[chosen]

    # 1. Which kernels are re-parameterized, and by which branches: 3x3 + 1x1, and the identity where there
    #    are as many input as output channels and stride 1. The network is traced once, which tells what each
    #    parameter is: `stem/kernel` and `body/kernel` are found, and `head/kernel`, of one branch, is left.
    fresh = Net().init(jax.random.key(0), images[:1])

    def apply(params, images):
        return Net().apply(fresh | {"params": params}, images)

    start = Scales.ones(find_branches(apply, fresh["params"], images[:1]))

    # 2. Search: train the branches and their scales; `merged` gives the parameters that the network knows.
    #    The scales are not decayed.
    def not_scales(tree):
        return paths.map_named(lambda path, _: not path.startswith("scales/"), tree)

    tree = search_tree(fresh["params"], start, rngs=nnx.Rngs(1))
    tree, _, search_losses = train(
        tree,
        fresh["batch_stats"],
        lambda tree, *rest: loss_of(tree.merged(), *rest),
        sgd(search_steps, not_scales),
        batches(search_steps),
    )

    # 3. The scales go through a file, which later trainings share.
    location = Path(folder or tempfile.mkdtemp()) / "scales"
    save_scales(location, tree.extract_scales())
    scales = load_scales(location, fresh["params"])

    # 4. Training: the plain network, started by the scales, and one line changed: `tx = sgd(steps)` before.
    fresh = Net().init(jax.random.key(2), images[:1])
    params = reinitialize(fresh["params"], scales, rngs=nnx.Rngs(3))
    tx = optax.chain(repopt_mask(scales), sgd(steps))
    params, stats, losses = train(params, fresh["batch_stats"], loss_of, tx, batches(steps))

    logits = jax.jit(Net().apply)({"params": params, "batch_stats": stats}, images[is_test])
    accuracy = float(np.mean(logits.argmax(-1) == labels[is_test]))
    print(f"search: loss {search_losses[0]:.3f} to {search_losses[-1]:.3f}, scales at {location}")
    print(f"training: loss {losses[0]:.3f} to {losses[-1]:.3f}, test accuracy {100 * accuracy:.1f} %")
    return {"search": search_losses, "train": losses, "scales": scales, "params": params}


if __name__ == "__main__":
    main()
