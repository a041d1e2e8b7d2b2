"""Checks that a plain network is trained as its multi-branch counterpart."""

from repopt_jax import extras

extras.require("flax", by=__name__)

from repopt_jax.verify.equivalence import Check, scale_by_layer_means, verify_equivalence

__all__ = [
    "Check",
    "scale_by_layer_means",
    "verify_equivalence",
]
