"""Convolutions that XLA's CPU backend could compute faster: each beside the same sum, written another way.

    python scripts/xla_cpu_convolutions.py

It needs JAX alone, and PyTorch for the last column. docs/xla_cpu_convolutions.md has what it printed and what
follows from it. Every line is checked: both ways must agree to 1e-4 of the largest value.
"""

import functools
import importlib.util
import statistics
import time

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.xla_metadata import set_xla_metadata

ROUNDS = 9
NUMBERS = ("NHWC", "HWIO", "NHWC")


def conv(x, w, stride, groups):
    half = w.shape[0] // 2
    return lax.conv_general_dilated(
        x, w, (stride, stride), [(half, half)] * 2, dimension_numbers=NUMBERS, feature_group_count=groups
    )


def padded(x, half):
    return jnp.pad(x, [(0, 0), (half, half), (half, half), (0, 0)])


def sum_over_taps(x, w, stride):
    """A depthwise convolution as a sum of shifted maps times a weight a channel, which is one loop."""
    k, (height, width) = w.shape[0], (-(-n // stride) for n in x.shape[1:3])
    x = padded(x, k // 2)
    return sum(
        x[:, i : i + stride * (height - 1) + 1 : stride, j : j + stride * (width - 1) + 1 : stride]
        * w[i, j, 0]
        for i in range(k)
        for j in range(k)
    )


def group_by_group(x, w, stride, groups):
    parts = zip(jnp.split(x, groups, -1), jnp.split(w, groups, -1))
    return jnp.concatenate([conv(a, b, stride, 1) for a, b in parts], -1)


def product_of_pixels(x, g):
    """The kernel gradient of a layer of 1x1, without its stride."""
    return (x.reshape(-1, x.shape[-1]).T @ g.reshape(-1, g.shape[-1]))[None, None]


def product_of_shifts(x, g, k, images):
    """The kernel gradient of a dense layer: x shifted along the rows, g along the columns, a few images at
    a time."""
    height, width = g.shape[1:3]

    def chunk(total, xg):
        x, g = padded(xg[0], k // 2), jnp.pad(xg[1], [(0, 0), (k - 1, k - 1), (0, 0), (0, 0)])
        x, g = lax.optimization_barrier((x, g))
        a = jnp.concatenate([x[:, :, j : j + width] for j in range(k)], -1)
        b = jnp.concatenate([g[:, k - 1 - i : 2 * k - 2 - i + height] for i in range(k)], -1)
        return total + a.reshape(-1, a.shape[-1]).T @ b.reshape(-1, b.shape[-1]), None

    chunks = [a.reshape(-1, images, *a.shape[1:]) for a in (x, g)]
    c, f = x.shape[-1], g.shape[-1]
    total, _ = lax.scan(chunk, jnp.zeros((k * c, k * f)), chunks)
    return total.reshape(k, c, k, f).transpose(2, 0, 1, 3)


# Images, side of the map, channels in and out, side of the kernel, stride, groups; pass; the other way.
CASES = [
    ((16, 32, 64, 64, 3, 1, 64), "forward", "sum over taps"),
    ((16, 32, 64, 64, 3, 1, 64), "input gradient", "sum over taps, transposed by JAX"),
    ((16, 32, 64, 64, 3, 2, 64), "input gradient", "sum over taps, transposed by JAX"),
    ((16, 32, 64, 64, 3, 1, 16), "input gradient", "group by group"),
    ((16, 32, 64, 64, 3, 1, 16), "kernel gradient", "group by group"),
    ((16, 32, 64, 64, 3, 1, 4), "kernel gradient", "group by group"),
    ((128, 16, 48, 48, 1, 1, 1), "kernel gradient", "product of pixels"),
    ((32, 56, 64, 128, 1, 1, 1), "kernel gradient", "product of pixels"),
    ((128, 32, 16, 16, 3, 1, 1), "kernel gradient", "product of shifts, 8 images at a time"),
    ((128, 16, 64, 64, 3, 1, 1), "kernel gradient", "product of shifts, 8 images at a time"),
    ((32, 56, 64, 64, 3, 1, 1), "kernel gradient", "product of shifts, 1 image at a time"),
]

CHAINS = [2, 8, 16, 32]  # layers


def pass_of(function, name):
    if name == "forward":
        return lambda x, w, g: function(x, w)
    if name == "input gradient":
        return lambda x, w, g: jax.vjp(lambda x: function(x, w), x)[1](g)[0]
    return lambda x, w, g: jax.vjp(lambda w: function(x, w), w)[1](g)[0]


def other(way, name, k, stride, groups):
    if way.startswith("sum over taps"):
        return pass_of(functools.partial(sum_over_taps, stride=stride), name)
    if way == "group by group":
        return pass_of(functools.partial(group_by_group, stride=stride, groups=groups), name)
    if way == "product of pixels":
        return lambda x, w, g: product_of_pixels(x, g)
    images = int(way.split(", ")[1].split(" ")[0])
    return lambda x, w, g: product_of_shifts(x, g, k, images)


def in_torch(x, w, g, name, stride, groups):
    import numpy as np
    import torch

    def tensor(a, order):
        made = torch.from_numpy(np.array(a)).permute(order)
        return made.contiguous(memory_format=torch.channels_last)

    x, g, w = tensor(x, (0, 3, 1, 2)), tensor(g, (0, 3, 1, 2)), tensor(w, (3, 2, 0, 1))
    half, strides = (w.shape[-1] // 2,) * 2, (stride, stride)
    if name == "forward":
        return lambda: torch.nn.functional.conv2d(x, w, None, strides, half, 1, groups)
    mask = [name == "input gradient", name == "kernel gradient", False]
    backward = torch.ops.aten.convolution_backward
    return lambda: backward(g, x, w, None, strides, half, (1, 1), False, (0, 0), groups, mask)


@jax.custom_vjp
def apart(x, w):
    """A convolution of which the operands of the kernel's gradient are results of a call."""
    return conv(x, w, 1, 1)


@jax.jit
def called(x, g):
    return lax.optimization_barrier((x, g))  # of arguments that are returned as they are, JAX drops the call


def gradients_apart(operands, g):
    x, w = operands
    of_x = pass_of(functools.partial(conv, stride=1, groups=1), "input gradient")(x, w, g)
    with set_xla_metadata(inlineable="false"):
        x, g = called(x, g)
    return of_x, pass_of(functools.partial(conv, stride=1, groups=1), "kernel gradient")(x, w, g)


apart.defvjp(lambda x, w: (conv(x, w, 1, 1), (x, w)), gradients_apart)


def chain(convolution):
    """The gradient of layers x <- max(conv(x) + x, 0) with respect to their kernels."""

    def loss(kernels, x):
        for w in kernels:
            x = jnp.maximum(convolution(x, w) + x, 0)
        return jnp.mean(x * x)

    return jax.grad(loss)


def waiting(program, *arguments):
    jax.block_until_ready(program(*arguments))


def milliseconds(candidates):
    """Medians; in each round all candidates run."""
    for run in candidates:
        run()
    times = [[] for _ in candidates]
    for _ in range(ROUNDS):
        for run, taken in zip(candidates, times):
            begin = time.perf_counter()
            run()
            taken.append(1e3 * (time.perf_counter() - begin))
    return [statistics.median(taken) for taken in times]


def main():
    torch = importlib.util.find_spec("torch") is not None
    print(f"jax {jax.__version__}, {jax.devices()[0].device_kind}; medians of {ROUNDS} rounds, ms, float32\n")
    print("| layer | pass | XLA's convolution | another way | | PyTorch |")
    print("|---|---|---|---|---|---|")
    for (n, size, c, f, k, stride, groups), name, way in CASES:
        keys = jax.random.split(jax.random.key(0), 3)
        x, w = (
            jax.random.normal(key, shape)
            for key, shape in zip(keys, [(n, size, size, c), (k, k, c // groups, f)])
        )
        plain = functools.partial(conv, stride=stride, groups=groups)
        g = jax.random.normal(keys[2], jax.eval_shape(plain, x, w).shape)
        programs = [
            jax.jit(function).lower(x, w, g).compile()
            for function in (pass_of(plain, name), other(way, name, k, stride, groups))
        ]
        a, b = (program(x, w, g) for program in programs)
        if not jnp.max(jnp.abs(a - b)) <= 1e-4 * jnp.max(jnp.abs(a)):
            raise AssertionError(f"{way} is another sum than the {name}")
        runs = [functools.partial(waiting, program, x, w, g) for program in programs]
        if torch:
            runs.append(in_torch(x, w, g, name, stride, groups))
        found = [f"{ms:.1f}" for ms in milliseconds(runs)] + ["-"] * (not torch)
        kind = "dense" if groups == 1 else "depthwise" if groups == c else f"{groups} groups"
        layer = f"{kind} {k}x{k}, stride {stride}, {c} to {f} channels, {n} maps of {size}x{size}"
        print(f"| {layer} | {name} | {found[0]} | {found[1]} | {way} | {found[2]} |", flush=True)

    print("\nLayers x <- max(conv(x) + x, 0), 64 channels, 128 maps of 8x8: a step, divided by the layers\n")
    print("| layers | as it is | operands of the kernels' gradients from a call |")
    print("|---|---|---|")
    x = jax.random.normal(jax.random.key(0), (128, 8, 8, 64))
    for layers in CHAINS:
        keys = jax.random.split(jax.random.key(1), layers)
        kernels = [0.02 * jax.random.normal(key, (3, 3, 64, 64)) for key in keys]
        programs = [
            jax.jit(chain(convolution)).lower(kernels, x).compile()
            for convolution in (functools.partial(conv, stride=1, groups=1), apart)
        ]
        for a, b in zip(*(program(kernels, x) for program in programs)):
            if not jnp.max(jnp.abs(a - b)) <= 1e-4 * jnp.max(jnp.abs(a)):
                raise AssertionError("the gradients differ")
        found = milliseconds([functools.partial(waiting, program, kernels, x) for program in programs])
        print(f"| {layers} | {found[0] / layers:.1f} | {found[1] / layers:.1f} |", flush=True)


if __name__ == "__main__":
    main()
