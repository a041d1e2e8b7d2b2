"""Networks for tests: counted without being made, filled with random numbers, and checked against loops."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from repopt_jax import fuse, models, prepare
from repopt_jax.core import paths
from repopt_jax.nn.rngs import counted_in_python
from repopt_jax.surgery.modules import named_modules

TINY_DETECTOR = models.DetectorVariant(
    "tiny",
    models.BackboneVariant("tiny", (4, 4, 6, 6, 8), (0, 0, 0, 1)),
    channels=6,
    maps=2,
    levels=2,
    tower=1,
)


def abstract(build, *args, **options):
    """The shapes of `build(*args, rngs=..., **options)`; nothing is drawn."""

    def counted():
        with counted_in_python(nnx.Rngs(0)) as rngs:
            return build(*args, **options, rngs=rngs)

    return nnx.eval_shape(counted)


def made_ready(build, mode, *args, **options):
    """The shapes of what `build(*args, rngs=..., **options)` becomes in a mode of `prepare`."""
    return abstract(lambda rngs: prepare(build(*args, **options, rngs=rngs), mode, rngs=rngs).model)


def values(model):
    """Path -> array, of everything in a model or a tree."""
    tree = nnx.state(model) if isinstance(model, nnx.Module) else model
    return {path: np.asarray(leaf) for path, leaf in paths.named_leaves(tree)[0].items()}


def count(model):
    return sum(int(np.prod(p.shape)) for p in jax.tree.leaves(nnx.state(model, nnx.Param)))


def deployed_count(model, **options):
    def deploy(model):
        model.eval()
        return fuse(model, **options)

    return count(nnx.eval_shape(deploy, model))


def parameter_shapes(model):
    return {path: p.shape for path, p in paths.named_leaves(nnx.state(model, nnx.Param))[0].items()}


def randomised(model, seed=0, dtype=jnp.float64):
    """The abstract `model` filled with random numbers, in evaluation mode.

    Statistics included: those of a fresh batch norm, mean 0 and variance 1, hide mistakes. Some variances are
    as small as eps, so that it matters.
    """
    rng = np.random.default_rng(seed)

    def draw(path, v):
        if path.endswith("/var"):
            return jnp.asarray(10 ** rng.uniform(-4, 0.5, v.shape), dtype)
        if v.ndim > 1:
            return jnp.asarray(rng.normal(size=v.shape) / np.sqrt(np.prod(v.shape[:-1])), dtype)
        return jnp.asarray(rng.normal(size=v.shape), dtype)

    nnx.update(model, paths.map_named(draw, nnx.state(model, nnx.Not(nnx.RngState))))
    model.eval()
    return model


def settled_statistics(model, seed=0, dtype=jnp.float64):
    """`randomised` with batch norms that let through what the input brings about: variances and scales near 1
    in absolute value, and shifts that are small beside them. In a deep network of other ones, maps grow
    without bound, or an image hardly changes the output."""
    rng = np.random.default_rng(seed)
    randomised(model, seed, dtype)
    for _, norm in named_modules(model):
        if isinstance(norm, nnx.BatchNorm):
            scale = rng.choice([-1, 1], norm.var.shape) * rng.uniform(0.5, 1.5)
            norm.var.set_value(jnp.asarray(rng.uniform(0.5, 2.0, norm.var.shape), dtype))
            norm.scale.set_value(jnp.asarray(scale, dtype))
            for shift in (norm.mean, norm.bias):
                shift.set_value(jnp.asarray(rng.normal(size=norm.var.shape) / 10, dtype))
    return model


def settled(model, images, seed=0):
    """`model` with batch statistics near those of `images`, and never equal to them; in evaluation mode.

    In a deep network with statistics of pure chance the maps grow without bound, and one channel hides what
    is wrong with the others.
    """
    rng = np.random.default_rng(seed)
    norms = [m for _, m in named_modules(model) if isinstance(m, nnx.BatchNorm)]
    model.train()
    for norm in norms:
        norm.momentum = 0.0
    run(model, images)
    for norm in norms:
        norm.momentum = 0.9
        var = np.asarray(norm.var[...])
        norm.mean[...] += jnp.asarray(rng.normal(size=var.shape) * np.sqrt(var) / 2, var.dtype)
        norm.var[...] = jnp.asarray(var * 10 ** rng.uniform(-0.5, 0.5, var.shape), var.dtype)
    model.eval()
    return model


@nnx.jit
def run(model, images):
    """What a model gives for `images`, compiled once for models of one structure."""
    return model(images)


def random_input(*shape):
    return np.random.default_rng(1).normal(size=shape)


def relative(a, b):
    return float(np.abs(np.asarray(a) - np.asarray(b)).max() / np.abs(np.asarray(b)).max())


def assert_close(found, expected, tolerance):
    """Two trees of one structure, each leaf within `tolerance` of its largest expected entry."""
    chex.assert_trees_all_equal_structs(found, expected)
    sizes = jax.tree.map(lambda leaf: max(float(np.abs(leaf).max()), 1e-300), expected)
    found, expected = (
        jax.tree.map(lambda a, size: np.asarray(a) / size, tree, sizes) for tree in (found, expected)
    )
    chex.assert_trees_all_close(found, expected, rtol=0, atol=tolerance)


def conv_by_hand(x, kernel, *, stride=1, groups=1, bias=0.0):
    """A convolution with zeros around the map, size // 2 wide, tap by tap, in NumPy."""
    kernel = np.asarray(kernel)
    (kh, kw, inputs, outputs), (n, h, w, _) = kernel.shape, x.shape
    padded = np.pad(x, ((0, 0), (kh // 2, kh // 2), (kw // 2, kw // 2), (0, 0)))
    rows, columns = (h - 1) // stride + 1, (w - 1) // stride + 1
    y = np.zeros((n, rows, columns, outputs))
    each = outputs // groups
    for i in range(kh):
        for j in range(kw):
            window = padded[:, i::stride, j::stride][:, :rows, :columns]
            for o in range(outputs):
                first = o // each * inputs
                y[..., o] += window[..., first : first + inputs] @ kernel[i, j, :, o]
    return y + np.asarray(bias)


def norm_by_hand(x, bn, eps=1e-5):
    """A batch norm with its running statistics, in NumPy."""
    scale, bias, mean, var = (np.asarray(v[...]) for v in (bn.scale, bn.bias, bn.mean, bn.var))
    return (x - mean) / np.sqrt(var + eps) * scale + bias
