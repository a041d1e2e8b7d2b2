"""RepOptimizer for plain functions on plain dicts: search, scales, training with one line changed.

    python examples/with_dicts.py

Copy this file and put your own network in place of `init` and `apply`; what is kept from it is the order of
`main`. The data are the handwritten digits that scikit-learn carries.
"""

import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
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


def init(key):
    """Two 3x3 convolutions and a classifier, as nested dicts. Names and nesting are yours."""
    stem, body, head = jax.random.split(key, 3)
    return {
        "stem": {"kernel": jax.random.normal(stem, (3, 3, 1, 16)) / 3},
        "body": {"kernel": jax.random.normal(body, (3, 3, 16, 16)) / 12},
        "head": {"kernel": jax.random.normal(head, (256, 10)) / 16, "bias": jnp.zeros(10)},
    }


def apply(params, images):
    x = block(images, params["stem"]["kernel"], stride=2)
    x = block(x, params["body"]["kernel"], stride=1)
    return x.reshape(x.shape[0], -1) @ params["head"]["kernel"] + params["head"]["bias"][None]


def block(x, kernel, stride):
    """A convolution, normalised over each image, and a ReLU."""
    x = jax.lax.conv_general_dilated(
        x, kernel, (stride, stride), ((1, 1), (1, 1)), dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    return jax.nn.relu(jax.nn.standardize(x, axis=(1, 2, 3)))


def loss_of(params, images, labels):
    logits = apply(params, images)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def train(params, loss, tx, batches):
    """Your own loop, the same for a search and for a training. Returns the parameters and the losses."""

    @jax.jit
    def step(params, state, images, labels):
        value, grads = jax.value_and_grad(loss)(params, images, labels)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

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
    images = images[..., None].astype(np.float32) / 255
    rng = np.random.default_rng(0)

    def batches(count):
        for _ in range(count):
            chosen = rng.choice(np.flatnonzero(~is_test), 64)
            yield images[chosen], labels[chosen]

    # 1. Which kernels are re-parameterized, and by which branches: 3x3 + 1x1, and the identity where there
    #    are as many input as output channels and stride 1. The function is traced once, which tells what each
    #    parameter is: `stem/kernel` and `body/kernel` are found, and `head/kernel`, of one branch, is left.
    params = init(jax.random.key(0))
    start = Scales.ones(find_branches(apply, params, images[:1]))

    # 2. Search: train the branches and their scales; `merged` gives the parameters that the network knows.
    #    The scales are not decayed.
    def not_scales(tree):
        return paths.map_named(lambda path, _: not path.startswith("scales/"), tree)

    tree = search_tree(params, start, rngs=nnx.Rngs(1))
    tree, search_losses = train(
        tree,
        lambda tree, *batch: loss_of(tree.merged(), *batch),
        sgd(search_steps, not_scales),
        batches(search_steps),
    )

    # 3. The scales go through a file, which later trainings share.
    location = Path(folder or tempfile.mkdtemp()) / "scales"
    save_scales(location, tree.extract_scales())
    scales = load_scales(location, params)

    # 4. Training: the plain network, started by the scales, and one line changed: `tx = sgd(steps)` before.
    params = reinitialize(init(jax.random.key(2)), scales, rngs=nnx.Rngs(3))
    tx = optax.chain(repopt_mask(scales), sgd(steps))
    params, losses = train(params, loss_of, tx, batches(steps))

    accuracy = float(np.mean(apply(params, images[is_test]).argmax(-1) == labels[is_test]))
    print(f"search: loss {search_losses[0]:.3f} to {search_losses[-1]:.3f}, scales at {location}")
    print(f"training: loss {losses[0]:.3f} to {losses[-1]:.3f}, test accuracy {100 * accuracy:.1f} %")
    return {"search": search_losses, "train": losses, "scales": scales, "params": params}


if __name__ == "__main__":
    main()
