"""Optax transformations that train a plain network as its multi-branch counterpart would be trained."""

from repopt_jax.optim.adaptive import repopt_adamw, repopt_lion, repopt_sign_mask, scale_by_repopt_adam
from repopt_jax.optim.check import OptimizerError, Reason, check_optimizer
from repopt_jax.optim.reparameterize import decay_mask, reparameterize
from repopt_jax.optim.resrep import (
    get_masks,
    masks_are_due,
    resrep,
    resrep_masks,
    row_norms,
    scale_by_resrep,
    set_masks,
)
from repopt_jax.optim.sgd import clip_by_repopt_global_norm, gradient_multipliers, repopt_mask, repopt_sgd

__all__ = [
    "OptimizerError",
    "Reason",
    "check_optimizer",
    "clip_by_repopt_global_norm",
    "decay_mask",
    "get_masks",
    "gradient_multipliers",
    "masks_are_due",
    "reparameterize",
    "repopt_adamw",
    "repopt_lion",
    "repopt_mask",
    "repopt_sgd",
    "repopt_sign_mask",
    "resrep",
    "resrep_masks",
    "row_norms",
    "scale_by_repopt_adam",
    "scale_by_resrep",
    "set_masks",
]
