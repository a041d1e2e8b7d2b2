"""`repopt bench`: what the rule costs in time and memory, beside what it is compared with."""

from repopt_jax.bench.settings import Settings
from repopt_jax.bench.suite import PARTS, bench

__all__ = ["PARTS", "Settings", "bench"]
