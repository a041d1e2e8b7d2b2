"""One training in PyTorch and here: what the tests of equal training share."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
from flax import nnx
from torch_forms import CLASSES, compiled

from repopt_jax import repopt_mask
from repopt_jax.core.paths import map_named

STEPS, RATE, MOMENTUM, DECAY = 20, 0.05, 0.9, 1e-2


def training_batches(classes=CLASSES, size=(7, 8)):
    rng = np.random.default_rng(1)
    return [(rng.normal(size=(4, *size, 3)), rng.integers(0, classes, 4)) for _ in range(STEPS)]


def decayed(name, array):
    """Kernels, OREPA's scales, and the trainable weight of the identity, which in RepVGG is that of its batch
    norm, by the published name; no bias, other batch norm or constant scale."""
    identity = ("weights/identity", "scale_identity.weight", "rbr_identity.weight")
    return array.ndim > 1 or name.endswith(identity)


def train_torch(network, batches, masks):
    """Returns, step by step, the biased variances of every batch norm's inputs, and of how many numbers."""
    network.train()
    named = dict(network.named_parameters())
    for name, p in named.items():
        p.requires_grad_("scale_conv" not in name and "scale_1x1" not in name)
    groups = [
        {
            "params": [p for n, p in named.items() if p.requires_grad and decayed(n, p) == with_decay],
            "weight_decay": DECAY if with_decay else 0,
        }
        for with_decay in (True, False)
    ]
    optimizer = torch.optim.SGD(groups, lr=RATE, momentum=MOMENTUM, nesterov=True)
    seen = {}

    def note(key):
        def hook(module, inputs):
            (x,) = inputs
            variance = x.detach().var((0, 2, 3), unbiased=False).numpy()
            seen.setdefault(key, []).append((variance, x.numel() // x.shape[1]))

        return hook

    for name, module in network.named_modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.register_forward_pre_hook(note(name))
    for x, labels in batches:
        optimizer.zero_grad()
        logits = network(torch.from_numpy(x.transpose(0, 3, 1, 2)))
        torch.nn.functional.cross_entropy(logits, torch.from_numpy(labels)).backward()
        for parameter, mask in masks.items():
            parameter.grad.mul_(mask)
        optimizer.step()
    return seen


def train_ours(model, batches, tx):
    model.train()
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    state = tx.init(nnx.to_pure_dict(params))

    @compiled
    def step(params, rest, state, x, labels):
        def loss(params):
            merged = nnx.merge(graph, params, rest, copy=True)
            logits = merged(x)
            after = nnx.split(merged, nnx.Param, ...)[2]
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), after

        grads, after = jax.grad(loss, has_aux=True)(params)
        updates, state = tx.update(nnx.to_pure_dict(grads), state, nnx.to_pure_dict(params))
        moved = optax.apply_updates(nnx.to_pure_dict(params), updates)
        nnx.replace_by_pure_dict(params, moved)
        return params, after, state

    for x, labels in batches:
        params, rest, state = step(params, rest, state, jnp.asarray(x), jnp.asarray(labels))
    return nnx.merge(graph, params, rest)


def recipe(scales=None):
    mask = [] if scales is None else [repopt_mask(scales)]
    decay = optax.add_decayed_weights(DECAY, mask=lambda params: map_named(decayed, params))
    return optax.chain(*mask, decay, optax.sgd(RATE, MOMENTUM, nesterov=True))


def running_variance(start, seen, *, unbiased):
    for variance, n in seen:
        start = 0.9 * start + 0.1 * variance * (n / (n - 1) if unbiased else 1)
    return start
