"""Checks that a plain network is trained as its multi-branch counterpart."""

from repopt_jax.verify.equivalence import Check as Check
from repopt_jax.verify.equivalence import scale_by_layer_means as scale_by_layer_means
from repopt_jax.verify.equivalence import verify_equivalence as verify_equivalence
