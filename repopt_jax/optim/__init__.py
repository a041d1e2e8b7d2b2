"""Optax transformations that train a plain network as its multi-branch counterpart would be trained."""

from repopt_jax.optim.adaptive import repopt_adamw as repopt_adamw
from repopt_jax.optim.adaptive import repopt_lion as repopt_lion
from repopt_jax.optim.adaptive import repopt_sign_mask as repopt_sign_mask
from repopt_jax.optim.adaptive import scale_by_repopt_adam as scale_by_repopt_adam
from repopt_jax.optim.check import OptimizerError as OptimizerError
from repopt_jax.optim.check import Reason as Reason
from repopt_jax.optim.check import check_optimizer as check_optimizer
from repopt_jax.optim.reparameterize import decay_mask as decay_mask
from repopt_jax.optim.reparameterize import reparameterize as reparameterize
from repopt_jax.optim.resrep import get_masks as get_masks
from repopt_jax.optim.resrep import masks_are_due as masks_are_due
from repopt_jax.optim.resrep import resrep as resrep
from repopt_jax.optim.resrep import resrep_masks as resrep_masks
from repopt_jax.optim.resrep import row_norms as row_norms
from repopt_jax.optim.resrep import scale_by_resrep as scale_by_resrep
from repopt_jax.optim.resrep import set_masks as set_masks
from repopt_jax.optim.sgd import clip_by_repopt_global_norm as clip_by_repopt_global_norm
from repopt_jax.optim.sgd import gradient_multipliers as gradient_multipliers
from repopt_jax.optim.sgd import repopt_mask as repopt_mask
from repopt_jax.optim.sgd import repopt_sgd as repopt_sgd
