"""Runs of a network with marked channels, or with channels that are zero: see `channels`.

A mark is NaN. Every module that is looked into notes the marks at its input, takes them out, and marks its
output as it is told.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from repopt_jax.core import paths
from repopt_jax.surgery.modules import join, replace_modules


class Probe:
    """The network with all modules watched, compiled once."""

    def __init__(
        self, model: nnx.Module, kinds: Mapping[str, str], points: Mapping[str, str], inputs: Sequence[Any]
    ):
        begins = set(points.values())

        def watch(path: str, module: Any) -> nnx.Module | None:
            if path not in kinds:
                return None
            return _Watched(module, passes=path not in (begins if kinds[path] == "norm" else points))

        watched = replace_modules(drawn(model), watch)
        graphdef, settings, noted, rest = nnx.split(watched, _Setting, _Noted, ...)

        def run(settings: Any, inputs: Any) -> tuple[Any, jax.Array]:
            network = nnx.merge(graphdef, settings, noted, rest, copy=True)
            outputs = [
                out for out in jax.tree.leaves(network(*inputs)) if jnp.issubdtype(out.dtype, jnp.inexact)
            ]
            bad = jnp.array([jnp.isnan(out).any() for out in outputs]).any()
            return nnx.split(network, _Setting, _Noted, ...)[2], bad

        self._settings = settings
        self._inputs = [random_inputs(inputs, seed) for seed in (1, 2)]
        with jax.debug_nans(False):
            self._run = compiled(run, settings, self._inputs[0])

    def marks(self, marked: Mapping[str, np.ndarray]) -> tuple[dict[str, np.ndarray], bool]:
        """Marks these channels; returns where marks arrived, and whether any did at the outputs."""
        noted, out = self._once({join(path, "mark"): value for path, value in marked.items()}, 0)
        return dict(_named(noted, "marked")), out

    def ranges(self, zeros: Mapping[str, np.ndarray]) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        """Sets these channels to zero; returns the least and largest values of each module's features."""
        settings = {join(path, "zero"): value for path, value in zeros.items()}
        runs = [self._once(settings, i)[0] for i in range(len(self._inputs))]
        lows, highs = ([dict(_named(noted, name)) for noted in runs] for name in ("low", "high"))
        low = {path: np.min([each[path] for each in lows], axis=0) for path in lows[0]}
        return low, {path: np.max([each[path] for each in highs], axis=0) for path in highs[0]}

    def _once(self, values: Mapping[str, np.ndarray], number: int) -> tuple[dict[str, np.ndarray], bool]:
        settings = paths.map_named(
            lambda path, leaf: jnp.asarray(values[path]) if path in values else leaf, self._settings
        )
        with jax.debug_nans(False):
            noted, bad = jax.device_get(self._run(settings, self._inputs[number]))
        return paths.named_leaves(noted)[0], bool(bad)


def constant_inputs(model: nnx.Module, layers: Sequence[str], inputs: Sequence[Any]) -> dict[str, np.ndarray]:
    """Runs a model and returns the middle of the range of each input of these layers, {path: (in,)}."""
    watched = replace_modules(model, lambda path, m: _Watched(m) if path in layers else None)
    graphdef, noted, rest = nnx.split(watched, _Noted, ...)

    def run(noted: Any, rest: Any, inputs: Any) -> Any:
        network = nnx.merge(graphdef, noted, rest, copy=True)
        network(*inputs)
        return nnx.split(network, _Noted, ...)[1]

    arrays = random_inputs(inputs, 1)
    found = paths.named_leaves(jax.device_get(compiled(run, noted, rest, arrays)(noted, rest, arrays)))[0]
    high = dict(_named(found, "high"))
    return {path: (low + high[path]) / 2 for path, low in _named(found, "low")}


def drawn(model: nnx.Module, seed: int = 0) -> nnx.Module:
    """Returns a copy of a model, also an abstract one, with random parameters and statistics, in evaluation
    mode."""
    rng = np.random.default_rng(seed)

    def draw(path: str, leaf: Any) -> Any:
        shape, dtype = leaf.shape, leaf.dtype
        if jnp.issubdtype(dtype, jax.dtypes.prng_key):
            return jnp.broadcast_to(jax.random.key(0), shape)
        if not jnp.issubdtype(dtype, jnp.floating):
            return jnp.zeros(shape, dtype) if isinstance(leaf, jax.ShapeDtypeStruct) else leaf
        if path.endswith("/var"):
            return jnp.asarray(rng.uniform(0.5, 2, shape), dtype)
        fan_in = max(1, int(np.prod(shape[:-1]))) if len(shape) > 1 else 1
        return jnp.asarray(rng.normal(size=shape) / np.sqrt(fan_in), dtype)

    graphdef, state = nnx.split(model)
    new = nnx.merge(graphdef, paths.map_named(draw, state), copy=True)
    new.eval()
    return new


def random_inputs(inputs: Sequence[Any], seed: int) -> list[jax.Array]:
    """Random arrays of the shapes and dtypes of `inputs`; integers are zero."""
    rng = np.random.default_rng(seed)

    def draw(like: Any) -> jax.Array:
        dtype = jnp.result_type(like.dtype)
        floating = jnp.issubdtype(dtype, jnp.floating)
        return jnp.asarray(rng.normal(size=like.shape) if floating else np.zeros(like.shape), dtype)

    return [jax.tree.map(draw, each) for each in inputs]


def compiled(function: Callable[..., Any], *args: Any) -> Callable[..., Any]:
    """Compiles a function that runs a few times, quickly."""
    options = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
    return jax.jit(function).lower(*args).compile(options if jax.default_backend() == "cpu" else None)


class _Setting(nnx.Variable):
    """What a run is to do: channels that are marked, and channels that are zero."""


class _Noted(nnx.Variable):
    """What a run has seen at the input of a module."""


class _Watched(nnx.Module):
    """A module that notes marks and ranges of its input's features and takes the marks out.

    Its outputs are marked and set to zero by its settings, and marked where the same feature of its input was
    if it is of a kind that `passes` them on.
    """

    def __init__(self, module: Any, *, passes: bool = False):
        self.module: Any = module
        self.passes = passes
        if isinstance(module, nnx.BatchNorm):
            inputs, outputs, dtype = module.num_features, module.num_features, module.var.dtype
        else:
            inputs, outputs, dtype = module.in_features, module.out_features, module.kernel.dtype
        wide = jnp.promote_types(dtype, jnp.float32)
        self.mark = _Setting(jnp.zeros(outputs, bool))
        self.zero = _Setting(jnp.zeros(outputs, bool))
        self.marked = _Noted(jnp.zeros(inputs, bool))
        self.low = _Noted(jnp.full(inputs, jnp.inf, wide))
        self.high = _Noted(jnp.full(inputs, -jnp.inf, wide))

    def __call__(self, x: jax.Array, *args: Any, **options: Any) -> jax.Array:
        marks, axes = jnp.isnan(x), tuple(range(x.ndim - 1))
        x = jnp.where(marks, jnp.zeros_like(x), x)
        marked = marks.any(axes)
        self.marked[...] = self.marked[...] | marked
        self.low[...] = jnp.minimum(self.low[...], x.min(axes).astype(self.low.dtype))
        self.high[...] = jnp.maximum(self.high[...], x.max(axes).astype(self.high.dtype))
        y = self.module(x, *args, **options)
        mark = self.mark[...] | marked if self.passes else self.mark[...]
        over = (1,) * (y.ndim - 1) + mark.shape
        y = jnp.where(self.zero[...].reshape(over), jnp.zeros_like(y), y)
        return jnp.where(mark.reshape(over), jnp.full_like(y, jnp.nan), y)


def _named(noted: Mapping[str, np.ndarray], name: str) -> Iterator[tuple[str, np.ndarray]]:
    for path, value in noted.items():
        module, _, last = path.rpartition("/")
        if last == name:
            yield module, value
