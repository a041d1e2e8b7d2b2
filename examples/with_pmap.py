"""RepOptimizer in a data-parallel loop of your own, with `jax.pmap`.

    python examples/with_pmap.py

Copy this file and put your own network in place of `init` and `apply`. `repopt_mask` multiplies gradients and
exchanges nothing: it is the same line in the chain as on one device, behind the mean over the devices. The
data are the handwritten digits that scikit-learn carries; on a machine with one device, try
JAX_NUM_CPU_DEVICES=4.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from repopt_jax import Scales, find_branches, reinitialize, repopt_mask
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


def chain(scales, steps):
    """The optimizer, with the one line that makes it a RepOptimizer."""
    decayed = functools.partial(jax.tree.map, lambda leaf: leaf.ndim > 1)
    return optax.chain(
        repopt_mask(scales),
        optax.add_decayed_weights(1e-4, decayed),
        optax.sgd(optax.cosine_decay_schedule(0.1, steps), momentum=0.9, nesterov=True),
    )


def train(params, tx, batches, devices):
    """Every device holds parameters and optimizer state, and takes its part of each batch. Returns the
    parameters and the losses."""

    @functools.partial(jax.pmap, axis_name="devices", devices=devices)
    def step(params, state, images, labels):
        loss, grads = jax.value_and_grad(loss_of)(params, images, labels)
        # Before the chain, as for every optimizer: then all devices make the same step.
        loss, grads = jax.lax.pmean((loss, grads), "devices")
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    def copies(tree):
        return jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (len(devices), *leaf.shape)), tree)

    def parts(array):
        return array.reshape(len(devices), -1, *array.shape[1:])

    params, state = copies(params), copies(tx.init(params))
    losses = []
    for images, labels in batches:
        params, state, loss = step(params, state, parts(images), parts(labels))
        losses.append(float(loss[0]))
    return jax.tree.map(lambda leaf: leaf[0], params), losses


def main(steps=300, devices=None):
    devices = jax.devices() if devices is None else devices
    images, labels, is_test = digits.load()
    images = images[..., None].astype(np.float32) / 255
    rng = np.random.default_rng(0)

    def batches(count):
        size = len(devices) * (64 // len(devices))
        for _ in range(count):
            chosen = rng.choice(np.flatnonzero(~is_test), size)
            yield images[chosen], labels[chosen]

    # The scales that the depth of a layer gives; those of a search are found as in `with_dicts.py` and loaded
    # by `load_scales`. The network is traced once, which tells what each parameter is.
    params = init(jax.random.key(0))
    branch_sets = find_branches(apply, params, images[:1])
    scales = Scales.depth_rule(branch_sets, {"stem/kernel": 0, "body/kernel": 1})

    params = reinitialize(params, scales, rngs=nnx.Rngs(1))
    params, losses = train(params, chain(scales, steps), batches(steps), devices)

    accuracy = float(np.mean(apply(params, images[is_test]).argmax(-1) == labels[is_test]))
    print(f"{len(devices)} devices: loss {losses[0]:.3f} to {losses[-1]:.3f}, test accuracy {accuracy:.1%}")
    return {"losses": losses, "params": params, "scales": scales}


if __name__ == "__main__":
    main()
