"""Layers, made-up problems on them, and what training the branches themselves gives: the oracle of every
optimizer.

The twin's kernel is merged entry by entry (`slow_merge`), independently of the package's embeddings, and its
branches are trained by Optax's own optimizer.
"""

import functools
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

from repopt_jax.core.branches import AfterPointwise, Average, BranchSet, Identity, Kernel, Local, Pool
from repopt_jax.core.published import default_branches
from repopt_jax.core.scales import LayerScales, Scales

STEPS = 50
BATCH = 3

_rng = np.random.default_rng(5)

# Name -> branches, spatial shape of the input. Everything up to "average pooling" has an elementwise
# multiplier. Each layer of a stack has a target of its own.
LAYERS = {
    "3x3+1x1+identity": (default_branches((3, 3, 4, 4)), (6, 6)),
    "3x3+1x1": (default_branches((3, 3, 3, 4)), (6, 6)),
    "depthwise": (BranchSet((3, 3, 1, 4), (Kernel((3, 3)), Kernel((1, 1)), Identity()), 4), (6, 6)),
    "grouped": (default_branches((3, 3, 2, 4), groups=2), (6, 6)),
    "5x5": (default_branches((5, 5, 4, 4)), (7, 7)),
    "1-D": (default_branches((5, 4, 4)), (9,)),
    "3-D": (default_branches((3, 3, 3, 2, 2)), (4, 5, 4)),
    "dense": (default_branches((4, 4)), ()),
    "ACNet + dilated": (
        BranchSet(
            (5, 5, 4, 4),
            (Kernel((5, 5)), Kernel((3, 3), (2, 2)), Kernel((1, 5)), Kernel((5, 1)), Identity()),
        ),
        (7, 7),
    ),
    "PyTorch layout": (default_branches((4, 4, 3, 3), layout="oi..."), (6, 6)),
    "stacked": (default_branches((2, 3, 3, 3, 3), stacked=1), (4, 5)),
    "stacked, PyTorch layout": (default_branches((1, 2, 4, 2, 3), groups=2, layout="oi...", stacked=2), (6,)),
    "average pooling": (BranchSet((3, 3, 4, 4), (Kernel((3, 3)), Average(), Identity())), (6, 6)),
    "fixed 1x1, then 3x3": (
        BranchSet(
            (3, 3, 2, 4),
            (Kernel((3, 3)), AfterPointwise((3, 3), _rng.normal(size=(2, 2, 3))), Kernel((1, 1))),
            2,
        ),
        (6, 6),
    ),
    "stacked averages": (BranchSet((2, 3, 3, 2), (Kernel((3,)), Average()), stacked=1), (6,)),
    "inside maps": (
        BranchSet((2, 3, 1, 12), (Kernel((2, 3)), Local((1, 1)), Local((3, 3))), 2),
        (3, 4),
    ),
}
MIXING = ("average pooling", "fixed 1x1, then 3x3", "stacked averages", "inside maps")
# Those that are cheap to train together: one of each kind of layer, and most kinds of branches.
LIGHT = (
    "3x3+1x1+identity",
    "depthwise",
    "dense",
    "PyTorch layout",
    "stacked",
    "average pooling",
    "fixed 1x1, then 3x3",
    "stacked averages",
)


def mixed_signs(rng, branches):
    """Random scales, half of them negative."""
    return {name: jnp.asarray(rng.normal(size=branches.vector_shape)) for name in branches.names}


class Problem(NamedTuple):
    """Independent layers trained side by side: `loss(kernels, batch)`, kernels by layer name."""

    scales: Scales
    weights: dict
    batches: tuple
    loss: object
    bias: jax.Array

    def start(self):
        """Parameters of the plain network: merged kernels, and one leaf that no scales name."""
        kernels = jax.jit(self.merged)(self.weights)
        return {name: {"kernel": kernel} for name, kernel in kernels.items()} | {"other": self.bias}

    def merged(self, weights):
        return {
            name: slow_merge(self.entry(name).branches, weights[name], self.entry(name).vectors)
            for name in self.weights
        }

    def entry(self, name):
        return self.scales.entries[f"{name}/kernel"]

    def path_weights(self):
        """The branch tensors by the kernels' paths, as `reparameterize` takes them."""
        return {f"{name}/kernel": w for name, w in self.weights.items()}

    def train(self, tx):
        """`STEPS` steps of the plain network: its final kernels by layer."""
        end = train(tx, self.start(), self.plain_loss, self.batches)
        return {name: end[name]["kernel"] for name in self.weights}

    def plain_loss(self, params, batch):
        return self.loss({n: params[n]["kernel"] for n in self.weights}, params["other"], batch)

    def train_twin(self, tx):
        """The same of the branches, merged at the end."""

        def loss(params, batch):
            return self.loss(self.merged(params), params["other"], batch)

        end = train(tx, self.weights | {"other": self.bias}, loss, self.batches)
        return jax.jit(self.merged)(end)


def problem(names, *, seed=0, draw=mixed_signs, layers=LAYERS, dtype=jnp.float64) -> Problem:
    """A non-quadratic loss of the merged kernels, on one batch for each step."""
    rng = np.random.default_rng(seed)
    entries, weights, batches = {}, {}, {}
    for name in names:
        branches, size = layers[name]
        vectors = draw(rng, branches) if callable(draw) else draw[name]
        entries[f"{name}/kernel"] = LayerScales(branches, {n: v.astype(dtype) for n, v in vectors.items()})
        # The identity's weight too starts anywhere: signs of moving averages then differ between its
        # branches.
        weights[name] = {n: jnp.asarray(rng.normal(size=s), dtype) / 2 for n, s in branches.shapes().items()}
        inputs, outputs = channels(branches)
        batches[name] = (
            jnp.asarray(rng.normal(size=(STEPS, BATCH, *size, inputs)), dtype),
            jnp.asarray(rng.normal(size=(STEPS, BATCH, *size, outputs)), dtype),
        )

    def loss(kernels, other, batch):
        total = jnp.sum(jnp.tanh(other - 1) ** 2)
        for name, kernel in kernels.items():
            branches, size = layers[name]
            x, y = batch[name]
            for index, one in enumerate(kernel.reshape(-1, *branches.layer.kernel)):
                out = run(branches, size, x, one)
                total = total + jnp.mean((jnp.tanh(out / 2) - jnp.roll(y, index, axis=0)) ** 2)
        return total

    return Problem(Scales(entries), weights, batches, loss, jnp.asarray(rng.normal(size=3), dtype))


def run(branches, size, x, kernel):
    """The layer, or one layer of the stack, at stride 1."""
    if branches.layout == "oi...":
        kernel = jnp.moveaxis(kernel, (0, 1), (-1, -2))
    if not size:
        return x @ kernel
    axes = "DHW"[-len(size) :]
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        (1,) * len(size),
        [((k - 1) // 2, k // 2) for k in kernel.shape[: len(size)]],
        dimension_numbers=(f"N{axes}C", f"{axes}IO", f"N{axes}C"),
        feature_group_count=branches.groups,
    )


def train(tx, params, loss, batches):
    """`STEPS` steps as one compiled scan; returns the final parameters."""

    def step(carry, batch):
        params, state = carry
        updates, state = tx.update(jax.grad(loss)(params, batch), state, params)
        return (optax.apply_updates(params, updates), state), None

    return jax.jit(lambda p, b: jax.lax.scan(step, (p, tx.init(p)), b)[0][0])(params, batches)


def channels(branches):
    *_, inputs, outputs = canonical(branches)
    return inputs * branches.groups, outputs


def slow_merge(branches, weights, scales):
    """K = sum_b s_b * E_b(w_b), from a list of which entry of w_b goes to which entry of K, made entry by
    entry; of a stack, layer by layer."""
    if branches.stacked:
        layers = [
            slow_merge(branches.layer, *jax.tree.map(lambda a, at=at: a[at], (weights, scales)))
            for at in np.ndindex(*branches.kernel[: branches.stacked])
        ]
        return jnp.stack(layers).reshape(branches.kernel)
    kernel = 0.0
    for branch in branches.branches:
        own, factors = matrices(branches, branch)
        part = own @ weights[branch.name].ravel()
        kernel = kernel + (part * (factors @ scales[branch.name]) if branch.has_scale else part)
    return kernel.reshape(branches.kernel).astype(jnp.result_type(*weights.values()))


@functools.cache
def matrices(branches, branch):
    """Which entry of w_b goes to which entry of K, in the layer's own layout, and which scale to which entry
    of K: products with them are compiled sooner than the entries by their numbers."""
    shape = canonical(branches)
    to, source, factor = entries(branches, branch)
    own = np.zeros((np.prod(shape), np.prod(branches.shapes()[branch.name])))
    np.add.at(own, (to, source), factor)
    places = [
        np.ravel_multi_index(canonical_index(branches, at), shape) for at in np.ndindex(*branches.kernel)
    ]
    return own[places], np.eye(branches.out)[np.array(places) % branches.out]


def jacobian(branches, scales):
    """dK/dw for all branch tensors side by side, (size of K, number of branch weights), from that list."""
    one, sizes = branches.layer, {name: np.prod(shape) for name, shape in branches.layer.shapes().items()}
    places = np.zeros(np.prod(one.kernel), int)  # of K's entries in the layer's own layout
    for number, index in enumerate(np.ndindex(*one.kernel)):
        places[np.ravel_multi_index(canonical_index(one, index), canonical(one))] = number
    layers = list(np.ndindex(*branches.kernel[: branches.stacked]))
    parts = []
    for branch in branches.branches:
        size = sizes[branch.name]
        part = np.zeros((len(layers), places.size, len(layers), size))
        to, source, factor = entries(one, branch)
        for layer, at in enumerate(layers):
            s = np.asarray(scales[branch.name])[at] if branch.has_scale else np.ones(branches.out)
            np.add.at(part[layer, :, layer], (places[to], source), s[to % branches.out] * factor)
        parts.append(part.reshape(len(layers) * places.size, len(layers) * size))
    return np.concatenate(parts, axis=1)


def canonical(branches):
    """Shape of the kernel, of one layer of a stack, with the axes (*spatial, in/groups, out)."""
    last = [n - 1 for n in branches.kernel[branches.stacked :]]
    return tuple(n + 1 for n in canonical_index(branches.layer, last))


def canonical_index(branches, index):
    """Where an entry of one layer's kernel is with the axes (*spatial, in/groups, out)."""
    letters = {"...io": "s" * (len(index) - 2) + "io", "oi...": "oi" + "s" * (len(index) - 2)}
    spatial, i, o = [], 0, 0
    for letter, n, at in zip(letters.get(branches.layout, branches.layout), branches.kernel, index):
        if letter == "s":
            spatial.append(at)
        elif letter == "i":
            i = i * n + at
        else:
            o = o * n + at
    return (*spatial, i, o)


@functools.cache
def entries(branches, branch):
    """(entry of K, entry of w_b, factor) for every pair that E_b connects, in plain loops."""
    *window, inputs, out = shape = canonical(branches)
    found = []

    def add(tap, i, o, w_shape, w_index, factor=1.0):
        found.append(
            (np.ravel_multi_index((*tap, i, o), shape), np.ravel_multi_index(w_index, w_shape), factor)
        )

    def centred(tap, size, dilation):
        return tuple(n // 2 + d * (t - k // 2) for n, k, d, t in zip(window, size, dilation, tap))

    if isinstance(branch, Identity):
        for o in range(out):
            add(tuple(n // 2 for n in window), o % inputs, o, (out,), (o,))
    elif isinstance(branch, Pool):
        for *tap, o in np.ndindex(*window, out):
            add(tap, o % inputs, o, (out,), (o,), 1 / np.prod(window))
    elif isinstance(branch, Average):
        ones = (1,) * len(window)
        for *tap, i, o in np.ndindex(*shape):
            add(tap, i, o, (*ones, inputs, out), (*(0 for _ in window), i, o), 1 / np.prod(window))
    elif isinstance(branch, AfterPointwise):
        c = np.asarray(branch.matrix)
        mid = c.shape[-1]
        for *tap, i, m, o in np.ndindex(*branch.size, inputs, mid, out):
            group = o * len(c) // out
            place = centred(tap, branch.size, (1,) * len(window))
            add(place, i, o, (*branch.size, mid, out), (*tap, m, o), c[group, i, m])
    elif isinstance(branch, Local):
        positions = list(np.ndindex(*window))
        for *tap, i, o in np.ndindex(*branch.size, inputs, out):
            position = positions[o % len(positions)]
            place = tuple(p + t - k // 2 for p, t, k in zip(position, tap, branch.size))
            if all(0 <= at < n for at, n in zip(place, window)):
                maps = out // len(positions)
                add(place, i, o, (*branch.size, inputs, maps), (*tap, i, o // len(positions)))
    else:
        for *tap, i, o in np.ndindex(*branch.size, inputs, out):
            place = centred(tap, branch.size, branch.dilation)
            add(place, i, o, (*branch.size, inputs, out), (*tap, i, o))
    to, source, factor = zip(*found)
    return np.array(to), np.array(source), np.array(factor)


def assert_close(found, expected, tolerance):
    """Every leaf of `found` within `tolerance` times the largest entry of the expected leaf."""

    def size(leaf):
        return np.abs(wide(leaf)).max(initial=0.0) or 1e-6

    def wide(leaf):
        return np.asarray(leaf).astype(np.float64)

    scaled = jax.tree.map(lambda e: wide(e) / size(e), expected)
    chex.assert_trees_all_close(
        jax.tree.map(lambda f, e: wide(f) / size(e), found, expected), scaled, rtol=0, atol=tolerance
    )


def distance(found, expected):
    """Largest difference relative to the largest entry, over the layers; and that it is the worst one's
    name."""
    each = {
        name: float(jnp.abs(found[name] - expected[name]).max() / jnp.abs(expected[name]).max())
        for name in expected
    }
    worst = max(each, key=each.get)
    return each[worst], worst


def relative(found, expected):
    return distance(found, expected)[0]
