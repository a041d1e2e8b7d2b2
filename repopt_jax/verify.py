"""The equivalence, checked on a user's own model: train the CSLA network and the plain one, and compare them.

RepOptimizer's claim is that a plain network whose kernels are re-initialised and whose gradients are
transformed trains exactly as the CSLA network (constant-scale linear addition of branches) does under the
ordinary optimizer. Here both are trained side by side in float64, from the same branch tensors, on the same
batches.
"""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from repopt_jax import paths
from repopt_jax.nn.csla import CSLAConv
from repopt_jax.nn.modules import join, named_modules
from repopt_jax.optim import repopt_mask
from repopt_jax.scales import Scales, check_fit
from repopt_jax.surgery import csla_twin, merge_weights, sample_weights, with_kernels

Loss = Callable[[Any, Any], jax.Array]
MakeOptimizer = Callable[[optax.GradientTransformation], optax.GradientTransformation]


@dataclasses.dataclass(frozen=True)
class Equivalence:
    """Result of `verify_equivalence`.

    Attributes:
      differences: path of a parameter or batch statistic of the plain model -> largest absolute difference
        from its counterpart in the CSLA model, divided by that one's largest absolute value.
      losses: loss of the plain model at each step.
      loss_difference: largest relative difference of the two models' losses at a step.
      movement: the largest relative change of a kernel since the start: an equivalence of networks that do
        not move would say nothing.
      steps: number of steps.
      tolerance: what `equivalent` compares with.
    """

    differences: dict[str, float]
    losses: list[float]
    loss_difference: float
    movement: float
    steps: int
    tolerance: float

    @property
    def max_difference(self) -> float:
        return float(np.max([self.loss_difference, *self.differences.values()]))  # NaN if any is

    @property
    def equivalent(self) -> bool:
        """False also for NaN."""
        return self.max_difference <= self.tolerance


def nesterov_with_decay(mask: optax.GradientTransformation) -> optax.GradientTransformation:
    """The published recipe's optimizer: `mask`, weight decay 4e-5, SGD with Nesterov momentum 0.9, at a rate
    of 0.05."""
    return optax.chain(mask, optax.add_decayed_weights(4e-5), optax.sgd(0.05, 0.9, nesterov=True))


def cross_entropy(model: Any, batch: Any) -> jax.Array:
    """Mean softmax cross-entropy on `batch`, a mapping of "image" (batch, ...) and "label" (batch,)."""
    logits = model(batch["image"])
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]).mean()


def verify_equivalence(
    model: nnx.Module,
    scales: Scales,
    batches: Iterable[Any],
    *,
    optimizer: MakeOptimizer = nesterov_with_decay,
    loss: Loss = cross_entropy,
    tolerance: float = 1e-10,
    rngs: nnx.Rngs,
) -> Equivalence:
    """Trains the CSLA network and the plain network with `repopt_mask` side by side in float64 and compares
    them.

    Args:
      model: a plain network, in training mode; untouched. Its own weights stay except in the layers of
        `scales`, whose branches are drawn with `rngs`.
      scales: the constants.
      batches: one pytree of arrays a step, at least one; floating-point arrays are used in float64.
      optimizer: makes the optimizer from the transformation that takes the place of `repopt_mask`:
        `repopt_mask(scales)` for the plain network, `optax.identity()` for its twin.
      loss: (model, batch) -> scalar.
      tolerance: largest relative difference that counts as equal.
      rngs: source of the branch draws (stream `params`).

    Raises:
      ValueError: the scales do not fit the model, or `batches` is empty.
    """
    check_fit(scales, model)
    with jax.enable_x64(True):
        model, scales = _as_float64(model), _as_float64(scales)
        weights = sample_weights(scales, rngs.params(), dtype=jnp.float64)
        plain = with_kernels(model, merge_weights(scales, weights))
        twin = csla_twin(model, scales, weights)
        start = _values(plain)
        data = [_as_float64(jax.tree.map(jnp.asarray, batch)) for batch in batches]
        if not data:
            raise ValueError("`batches` is empty: at least one batch is needed to train on")
        losses = _train(plain, optimizer(repopt_mask(scales)), loss, data)
        twin_losses = _train(twin, optimizer(optax.identity()), loss, data)
        end, expected = _values(plain), _values(twin)
        return Equivalence(
            differences={path: _relative(end[path], expected[path]) for path in end},
            losses=losses,
            loss_difference=_relative(np.array(losses), np.array(twin_losses)),
            movement=float(np.max([_relative(end[path], start[path]) for path in scales.entries])),
            steps=len(data),
            tolerance=tolerance,
        )


def _train(model: nnx.Module, tx: optax.GradientTransformation, loss: Loss, batches: list) -> list[float]:
    """Trains `model` in place, one step a batch; returns the losses."""
    graph, params, rest = nnx.split(model, nnx.Param, ...)

    @jax.jit
    def step(params, rest, opt_state, batch):
        def of_params(params):
            # copy=True: without it the statistics that the forward pass writes would escape the trace of grad
            merged = nnx.merge(graph, params, rest, copy=True)
            value = loss(merged, batch)
            return value, nnx.split(merged, nnx.Param, ...)[2]

        (value, rest), gradients = jax.value_and_grad(of_params, has_aux=True)(params)
        updates, opt_state = tx.update(gradients, opt_state, params)
        return optax.apply_updates(params, updates), rest, opt_state, value

    opt_state = tx.init(params)
    losses = []
    for batch in batches:
        params, rest, opt_state, value = step(params, rest, opt_state, batch)
        losses.append(float(value))
    nnx.update(model, params, rest)
    return losses


def _values(model: nnx.Module) -> dict[str, np.ndarray]:
    """Parameters and statistics by path; of a CSLA layer, its merged kernel under the plain layer's path."""
    leaves, _ = paths.named_leaves(nnx.state(model, (nnx.Param, nnx.BatchStat)))
    values = {path: np.asarray(leaf) for path, leaf in leaves.items()}
    for path, layer in named_modules(model):
        if isinstance(layer, CSLAConv):
            inside = (join(path, "weights/"), join(path, "scales/"))
            values = {p: v for p, v in values.items() if not p.startswith(inside)}
            values[join(path, "kernel")] = np.asarray(layer.merged_kernel())
    return values


def _relative(a: np.ndarray, b: np.ndarray) -> float:
    scale = np.abs(b).max()
    return float(np.abs(a - b).max() / (scale if scale else 1.0))


def _as_float64(tree: Any) -> Any:
    """A copy in which every floating-point array is float64."""

    def widen(x):
        return x.astype(jnp.float64) if jnp.issubdtype(x.dtype, jnp.floating) else jnp.array(x)

    if isinstance(tree, nnx.Module):
        graph, state = nnx.split(tree)
        return nnx.merge(graph, jax.tree.map(widen, state), copy=True)
    return jax.tree.map(widen, tree)
