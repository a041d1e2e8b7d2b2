"""Convolutions one by one: the library's forms beside XLA's and, where it is installed, PyTorch's.

The rules of `nn.convolution.choose` rest on these tables.
"""

import importlib.metadata
import importlib.util
import logging
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from repopt_jax.bench.results import Section
from repopt_jax.bench.settings import Settings
from repopt_jax.bench.timing import Builder, Candidate, Facts, measure, memory
from repopt_jax.nn.convolution import conv_general_dilated, xla_convolutions

LOG = logging.getLogger(__name__)


class Case(NamedTuple):
    """A square convolution: images, side of the map, channels, side of the kernel, stride, groups."""

    images: int
    size: int
    inputs: int
    outputs: int
    window: int = 3
    stride: int = 1
    groups: int = 1

    def __str__(self) -> str:
        kind = {1: "dense", self.inputs: "depthwise"}.get(self.groups, f"{self.groups} groups")
        stride = f", stride {self.stride}" if self.stride > 1 else ""
        channels = f"{self.inputs} to {self.outputs} channels"
        maps = f"{self.images} of {self.size}x{self.size}"
        return f"{self.window}x{self.window} {kind}{stride}, {channels}, {maps}"


CASES = (
    Case(128, 32, 16, 16),
    Case(128, 32, 16, 16, stride=2),
    Case(128, 16, 64, 64),
    Case(128, 8, 128, 128),
    Case(16, 32, 64, 64, groups=64),
    Case(16, 32, 64, 64, stride=2, groups=64),
    Case(16, 16, 64, 64, window=5, groups=64),
    Case(16, 16, 128, 128, groups=32),
    Case(16, 32, 64, 64, groups=16),
    Case(16, 32, 64, 64, stride=2, groups=16),
    Case(16, 32, 64, 64, groups=4),
    Case(16, 14, 256, 256, groups=4),
)
PASSES = ("forward", "input gradient", "kernel gradient")


def bench_conv(settings: Settings) -> list[Section]:
    """Measures the three passes of each of `CASES`, in each dtype of the settings."""
    return [convolution(case, dtype, settings.rounds) for dtype in settings.dtypes for case in CASES]


def convolution(case: Case, dtype: str, rounds: int) -> Section:
    """Measures one convolution; ratios are to XLA's program for the same pass."""
    LOG.info("conv: %s, %s", case, dtype)
    torch = importlib.util.find_spec("torch") is not None and jax.default_backend() == "cpu"
    builders: dict[str, Builder] = {}
    for name in PASSES:
        facts: Facts = {"baseline": f"{name}, XLA"}
        builders[f"{name}, XLA"] = lambda name=name: of_jax(case, dtype, name, xla=True)
        builders[name] = lambda name=name, facts=facts: of_jax(case, dtype, name, **facts)
        if torch:
            builders[f"{name}, PyTorch"] = lambda name=name, facts=facts: of_torch(case, dtype, name, **facts)
    versions = {"torch": importlib.metadata.version("torch")} if torch else {}
    found = measure(builders, rounds, {name: (f"{name.partition(',')[0]}, XLA",) for name in builders})
    return Section(
        part="conv",
        title=f"Convolution {case}, {dtype}",
        settings={"dtype": dtype, **versions},
        rounds=rounds,
        candidates=found,
    )


def arrays(case: Case) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns a map (n, h, w, in), a kernel (h, w, in/groups, out) and a gradient of the output, float32."""
    rng = np.random.default_rng(0)
    side = (case.size - 1) // case.stride + 1
    shapes = (
        (case.images, case.size, case.size, case.inputs),
        (case.window, case.window, case.inputs // case.groups, case.outputs),
        (case.images, side, side, case.outputs),
    )
    x, w, g = (rng.standard_normal(shape, np.float32) for shape in shapes)
    return x, w, g


def of_jax(case: Case, dtype: str, name: str, *, xla: bool = False, **facts: Any) -> tuple[Candidate, Facts]:
    """Compiles one pass, by the forms for a CPU or by XLA's own convolutions."""
    x, w, g = (jnp.asarray(a, dtype) for a in arrays(case))
    half = case.window // 2

    def conv(x: jax.Array, w: jax.Array) -> jax.Array:
        return conv_general_dilated(
            x,
            w,
            (case.stride,) * 2,
            ((half, half),) * 2,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=case.groups,
        )

    run: dict[str, tuple[Callable[..., Any], tuple[jax.Array, ...]]] = {
        "forward": (conv, (x, w)),
        "input gradient": (lambda x, w, g: jax.vjp(lambda x: conv(x, w), x)[1](g)[0], (x, w, g)),
        "kernel gradient": (lambda x, w, g: jax.vjp(lambda w: conv(x, w), w)[1](g)[0], (x, w, g)),
    }
    function, operands = run[name]
    if xla:
        with xla_convolutions():
            compiled = jax.jit(function).lower(*operands).compile()
    else:
        compiled = jax.jit(function).lower(*operands).compile()
    return Candidate(lambda: compiled(*operands)), {**facts, **memory(compiled)}


def of_torch(case: Case, dtype: str, name: str, **facts: Any) -> tuple[Candidate, Facts]:
    """Runs one pass in PyTorch on the CPU, channels last."""
    from repopt_jax.bench.torch_step import convolving

    x, w, g = arrays(case)
    return convolving(x, w, g, dtype, name, stride=case.stride, groups=case.groups), facts
