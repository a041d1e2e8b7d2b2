"""Drawing the keys of many parameters in one trace."""

import contextlib
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from flax import nnx


def check_rngs(rngs: Any) -> None:
    """Raises TypeError if an argument `rngs` is no `nnx.Rngs`."""
    if not isinstance(rngs, nnx.Rngs):
        seed = "seed" if not isinstance(rngs, int) else rngs
        raise TypeError(
            f"`rngs` is of type {type(rngs).__name__}: it must be `nnx.Rngs`, such as nnx.Rngs({seed})"
        )


@contextlib.contextmanager
def counted_in_python(rngs: nnx.Rngs) -> Iterator[nnx.Rngs]:
    """Gives `rngs` whose streams draw the same keys in the same order, and updates their counts at the end.

    `nnx.RngStream` counts its keys in a variable. In a trace (`nnx.eval_shape`, `jax.jit`) every count is a
    traced addition to the one before; Flax asks for its sharding, and JAX before 0.12 then looks through all
    operations so far: with hundreds of layers that was two thirds of the time in which a network is made.
    A stream that a layer keeps counts as Flax does afterwards.
    """
    check_rngs(rngs)
    counted = nnx.Rngs()
    streams = {name: _Stream(stream.key.get_value(), tag=stream.tag) for name, stream in rngs.items()}
    for name, stream in streams.items():
        stream.count.set_value(rngs[name].count.get_value())
        stream.drawn = 0
        setattr(counted, name, stream)
    yield counted
    for name, stream in streams.items():
        count = stream.count.get_value() + np.uint32(stream.drawn or 0)
        rngs[name].count.set_value(count)
        stream.count.set_value(count)
        stream.drawn = None


class _Stream(nnx.RngStream):
    # Keys since the count was updated; None, also in streams made from this one: counted as Flax does.
    drawn: int | None = None

    def __call__(self) -> jax.Array:
        if self.drawn is None:
            return super().__call__()
        self.drawn += 1
        return jax.random.fold_in(self.key.get_value(), self.count.get_value() + np.uint32(self.drawn - 1))
