"""Winograd's algorithm F(2x2, 3x3) in JAX beside XLA's forward convolution on a CPU.

    python scripts/winograd_on_cpu.py

Sixteen batched products of matrices between sums of strided slices: 4 products an output in place of 9
(arXiv 1509.09308). docs/xla_cpu_convolutions.md has what it printed.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from repopt_jax.bench.timing import Candidate, measure
from repopt_jax.cli import huge_pages

ROUNDS = 11
LAYERS = [
    (128, 32, 16),
    (128, 16, 32),
    (128, 16, 64),
    (128, 8, 64),
    (128, 8, 128),
    (32, 56, 64),
    (32, 28, 128),
]
KERNEL = np.array([[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]], np.float32)


def winograd(x, kernel):
    """A 3x3 convolution with padding 1: x (n, h, w, c) with even h and w, kernel (3, 3, c, out)."""
    n, h, w, c = x.shape
    x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    rows = to_tiles([lax.slice_in_dim(x, i, i + h - 1, 2, axis=1) for i in range(4)])
    columns = [to_tiles([lax.slice_in_dim(r, j, j + w - 1, 2, axis=2) for j in range(4)]) for r in rows]
    tiles = jnp.stack([tile for row in columns for tile in row]).reshape(16, -1, c)
    kernels = jnp.einsum("ai,bj,ijco->abco", KERNEL, KERNEL, kernel).reshape(16, c, -1)
    products = lax.dot_general(tiles, kernels, (((2,), (1,)), ((0,), (0,))))
    products = products.reshape(4, 4, n, h // 2, w // 2, -1)
    out = [jnp.stack(from_tiles(row), axis=3) for row in from_tiles(products)]
    return jnp.stack(out, axis=2).reshape(n, h, w, -1)


def to_tiles(d):
    return [d[0] - d[2], d[1] + d[2], d[2] - d[1], d[1] - d[3]]


def from_tiles(m):
    return [m[0] + m[1] + m[2], m[1] - m[2] - m[3]]


def direct(x, kernel):
    return lax.conv_general_dilated(
        x, kernel, (1, 1), ((1, 1), (1, 1)), dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def running(fn, x, kernel):
    compiled = jax.jit(fn).lower(x, kernel).compile()
    return Candidate(lambda: compiled(x, kernel)), {}


def main():
    print(f"jax {jax.__version__}; medians of {ROUNDS} rounds, ms, float32\n")
    print("| 3x3 | XLA's convolution | Winograd | ratio |\n|---|---|---|---|")
    for images, size, channels in LAYERS:
        x = jax.random.normal(jax.random.key(0), (images, size, size, channels))
        kernel = jax.random.normal(jax.random.key(1), (3, 3, channels, channels))
        expected = direct(x, kernel)
        if not jnp.allclose(winograd(x, kernel), expected, rtol=0, atol=1e-5 * jnp.abs(expected).max()):
            raise SystemExit(f"the two differ at {x.shape}")
        builders = {fn.__name__: functools.partial(running, fn, x, kernel) for fn in (direct, winograd)}
        found = measure(builders, ROUNDS, dict.fromkeys(builders, ("direct",)))
        ms = [found[name]["ms"]["median"] for name in builders]
        ratio = found["winograd"]["ratios"]["direct"]["median"]
        layer = f"{images} maps of {size}x{size}, {channels} channels"
        print(f"| {layer} | {ms[0]:.1f} | {ms[1]:.1f} | {ratio:.2f} |", flush=True)


if __name__ == "__main__":
    huge_pages.restart()
    main()
