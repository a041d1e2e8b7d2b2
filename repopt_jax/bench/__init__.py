"""`repopt bench`: the cost in time and memory of re-parameterization, compared with its alternatives."""

from repopt_jax import extras

extras.require("flax", "grain", by=__name__)

from repopt_jax.bench.settings import Settings
from repopt_jax.bench.suite import PARTS, bench

__all__ = ["PARTS", "Settings", "bench"]
