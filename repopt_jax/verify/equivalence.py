"""Checks the equivalence on a user's own model: trains the CSLA network and the plain one and compares them.

RepOptimizer's claim is that a plain network whose kernels are re-initialised and whose gradients are
transformed trains exactly as the CSLA network (constant-scale linear addition of branches) does under the
ordinary optimizer. Here both are trained in float64, from the same branch tensors, on the same batches. If
they differ, `reasons` says why.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from repopt_jax import userfile
from repopt_jax.arguments import check_items, check_number
from repopt_jax.core import paths
from repopt_jax.core.scales import LayerScales, Scales, check_fit, check_scales
from repopt_jax.nn.merged import Merged
from repopt_jax.nn.rngs import check_rngs
from repopt_jax.optim.reparameterize import OtherKernelsError
from repopt_jax.optim.sgd import repopt_mask
from repopt_jax.surgery.layers import check_aliases, layers_at
from repopt_jax.surgery.modules import check_model, join, named_modules
from repopt_jax.surgery.reinitialize import Weights, merge_weights, sample_weights, with_kernels
from repopt_jax.surgery.search import csla_twin
from repopt_jax.surgery.trained import Keep, branches_of
from repopt_jax.verify import reasons

Loss = Callable[[Any, Any], jax.Array]
MakeOptimizer = Callable[[Weights], optax.GradientTransformation]

# A parameter or statistic that is this much smaller than the network's largest counts as this large.
NEGLIGIBLE = 1e-6
# One program each: compiling one for every operation and shape takes longer than some trainings.
_sample = jax.jit(sample_weights, static_argnames="dtype")
_merge = jax.jit(merge_weights)


@dataclasses.dataclass(frozen=True)
class Equivalence:
    """Result of `verify_equivalence`.

    Attributes:
      differences: path of a parameter or batch statistic of the plain model -> largest absolute difference
        from its counterpart in the CSLA model, divided by the counterpart's largest absolute value (or by a
        millionth of the network's largest value, if that is more, so that values that are zero up to rounding
        are not compared).
      losses: loss of the plain model at each step.
      loss_difference: largest relative difference of the two models' losses at a step.
      movement: the largest relative change of a kernel since the start. If the networks do not move, their
        equivalence means nothing.
      steps: number of steps.
      tolerance: the largest difference of equivalent models.
      reasons: likely reasons of a difference, as sentences, the likeliest first; empty if equivalent.
      compared: the number of steps and the mode of batch norm, as text.
    """

    differences: dict[str, float]
    losses: list[float]
    loss_difference: float
    movement: float
    steps: int
    tolerance: float
    reasons: tuple[str, ...] = ()
    compared: str = ""

    @property
    def max_difference(self) -> float:
        """The largest of the differences of losses and parameters; NaN if any is NaN."""
        return float(np.max([self.loss_difference, *self.differences.values()]))

    @property
    def equivalent(self) -> bool:
        """Whether the models agree; False for NaN, and if they did not move more than the tolerance."""
        return self.max_difference <= self.tolerance < self.movement

    def worst(self, count: int | None = None) -> list[tuple[str, float]]:
        """Returns the `count` largest differences with their paths, NaN first; all if `count` is None."""
        ordered = sorted(
            self.differences.items(), key=lambda item: (-np.nan_to_num(item[1], nan=np.inf), item[0])
        )
        return ordered[:count]

    def __str__(self) -> str:
        """The result, the largest differences and the reasons, in lines."""
        if self.equivalent:
            result = f"equivalent: no difference above {self.tolerance:g}"
        else:
            result = f"NOT equivalent: the largest difference is {self.max_difference:.1e}, the tolerance "
            result += f"{self.tolerance:g}"
        worst = [("loss", self.loss_difference), *self.worst(5)]
        width = max(len(path) for path, _ in worst)
        return "\n".join(
            [
                result,
                *(f"likely reason: {reason}" for reason in self.reasons),
                f"compared: {self.compared}; kernels moved by {self.movement:.2%}",
                f"largest relative differences, of {len(self.differences)} parameters and statistics:",
                *(f"  {path:<{width}}  {difference:.1e}" for path, difference in worst),
            ]
        )


DECAY = optax.add_decayed_weights(4e-5)
NESTEROV = optax.sgd(0.05, 0.9, nesterov=True)


def nesterov_with_decay(mask: optax.GradientTransformation) -> optax.GradientTransformation:
    """Returns the published recipe: `mask`, decay 4e-5, SGD with Nesterov momentum 0.9 at rate 0.05."""
    return optax.chain(mask, DECAY, NESTEROV)


def scale_by_layer_means(scales: Scales) -> optax.GradientTransformation:
    """Returns what stands in a twin's optimizer for `repopt_mask(scales, normalise=True)`, at the same place.

    The gradients of each layer's branch tensors, `.../weights/<branch>`, are divided by the mean of the
    layer's multiplier; others pass unchanged::

        optimizer = optax.chain(repopt_mask(scales, normalise=True), optax.add_decayed_weights(4e-5), ...)
        twin_optimizer = optax.chain(scale_by_layer_means(scales), optax.add_decayed_weights(4e-5), ...)

    Behind it decay and momentum are the ordinary ones: a learning rate for each layer that does not apply to
    its decay.
    """
    check_scales(scales)

    layers = {
        reasons.path_in_twin(path, name): entry
        for path, entry in scales.entries.items()
        for name in entry.branches.names
    }

    def divided(path, g):
        if (entry := layers.get(path)) is None:
            return g
        wide = jnp.promote_types(g.dtype, jnp.float32)
        mean = entry.branches.mean_multiplier(entry.vectors, dtype=wide)
        return (g / mean.reshape(mean.shape + (1,) * (g.ndim - mean.ndim))).astype(g.dtype)

    def update(updates, state, params=None):
        del params
        return paths.map_named(divided, updates), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def cross_entropy(model: Any, batch: Any) -> jax.Array:
    """Returns the mean softmax cross-entropy of `batch`: "image" (batch, ...) and "label" (batch,).

    Raises:
      TypeError: the batch has other entries, or is no mapping.
    """
    if not isinstance(batch, Mapping) or not {"image", "label"} <= batch.keys():
        has = f"has the entries {', '.join(map(str, batch))}" if isinstance(batch, Mapping) else "has none"
        raise TypeError(
            "`loss` is not given, and the default, a cross-entropy, is of batches with the entries 'image' "
            f"and 'label', while this one (a {type(batch).__name__}) {has}: give the loss of your training, "
            "loss=loss_of, a function of the model and a batch"
        )
    logits = model(batch["image"])
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]).mean()


@dataclasses.dataclass(frozen=True)
class Check:
    """The arguments of `verify_equivalence`, as `get_check()` returns them for `repopt verify --check=FILE`.

    `batches` may be infinite if the command line gives the number of steps.
    """

    model: nnx.Module
    scales: Scales
    batches: Iterable[Any]
    optimizer: optax.GradientTransformation | MakeOptimizer | None = None
    twin_optimizer: optax.GradientTransformation | None = None
    loss: Loss = cross_entropy
    tolerance: float = 1e-10
    keep: Keep = None
    normalise: bool = False
    rngs: nnx.Rngs | None = None

    def run(self, *, steps: int | None = None, tolerance: float | None = None) -> Equivalence:
        """Runs `verify_equivalence` on the first `steps` batches (all of them if None)."""
        return verify_equivalence(
            self.model,
            self.scales,
            itertools.islice(self.batches, steps),
            optimizer=self.optimizer,
            twin_optimizer=self.twin_optimizer,
            loss=self.loss,
            tolerance=self.tolerance if tolerance is None else tolerance,
            keep=self.keep,
            normalise=self.normalise,
            rngs=self.rngs or nnx.Rngs(0),
        )


def verify_equivalence(
    model: nnx.Module,
    scales: Scales,
    batches: Iterable[Any],
    *,
    optimizer: optax.GradientTransformation | MakeOptimizer | None = None,
    twin_optimizer: optax.GradientTransformation | None = None,
    loss: Loss = cross_entropy,
    tolerance: float = 1e-10,
    keep: Keep = None,
    normalise: bool = False,
    rngs: nnx.Rngs,
) -> Equivalence:
    """Trains the CSLA network and the plain network in float64 and compares them.

        verify_equivalence(
            model,
            scales,
            batches,
            optimizer=repopt_adamw(1e-3, scales, weight_decay=0.05),
            twin_optimizer=optax.adamw(1e-3, weight_decay=0.05),
            rngs=nnx.Rngs(0),
        )

    Modules of the model that compute in a narrower dtype (an attribute `dtype`) are set to float64. Casts in
    their code remain.

    Args:
      model: a plain network, in training mode; a copy is trained. It keeps its weights except in the layers
        of `scales`, whose branches are drawn with `rngs`. Dropout draws the same numbers in both networks.
      scales: the constant scales.
      batches: one pytree of arrays for each step, at least one; floating-point arrays are used in float64.
      optimizer: the re-parameterized optimizer of the plain network; or a function that makes it from the
        branch tensors (path -> branch -> array), which are drawn here:
        `lambda weights: reparameterize(inner, scales, weights=weights)`. By default
        `nesterov_with_decay(repopt_mask(scales))`.
      twin_optimizer: the ordinary counterpart for the CSLA network, whose parameters are the branch tensors
        `.../weights/<branch>` in place of `.../kernel`. By default `nesterov_with_decay(optax.identity())`.
      loss: (model, batch) -> scalar, that of your training; by default the cross-entropy of "image" and
        "label" of a batch.
      tolerance: largest relative difference that counts as equal.
      keep: "split" checks training on from the kernels that the model has: the CSLA network's branches are
        those of least norm that merge into them (`branches_of`), and nothing is drawn.
      normalise: whether the mask of the default `optimizer` divides each layer's multiplier by its mean; the
        default `twin_optimizer` then begins with `scale_by_layer_means(scales)`, as one of your own would
        have to: it trains each layer's branches at a learning rate of their own.
      rngs: `nnx.Rngs` with the stream `params`, from which branches are drawn.

    Returns:
      The differences by path and, if they are above the tolerance, the likely reasons.

    Raises:
      ValueError: the scales do not fit the model, or name no layer; `batches` is empty; only one of the two
        optimizers is given, or both with `normalise`; `optimizer` is made from other branch tensors; or layers
        for which there is no equivalence, with the reasons: a padding that shifts the window (`CAUSAL`), a
        class with a `__call__` of its own.
      TypeError: a path of `scales` is not the kernel of a layer (`surgery.layers.LAYERS`); or an argument is
        of another type; or the default `loss` is given batches of other entries.
    """
    check_model(model)
    check_scales(scales)
    if not scales.entries:
        raise ValueError("`scales` name no layer, so there is nothing to compare: give those of the network")
    check_rngs(rngs)
    check_number("tolerance", tolerance, at_least=0)
    check_items("batches", batches, "batches")
    if (optimizer is None) != (twin_optimizer is None):
        given, other = (
            ("twin_optimizer", "optimizer") if optimizer is None else ("optimizer", "twin_optimizer")
        )
        raise ValueError(f"`{given}` is given without `{other}`: they are counterparts, give both or neither")
    if normalise and optimizer is not None:
        raise ValueError(
            "`normalise` is for the default optimizers, and `optimizer` and `twin_optimizer` are given: make "
            "the first with repopt_mask(scales, normalise=True), and the second with "
            "scale_by_layer_means(scales) at its place"
        )
    check_aliases(model, scales.entries)
    check_fit(scales, nnx.state(model))  # of any part of the model
    layers_at(model, scales.entries)
    with jax.enable_x64(True):
        model, scales = _as_float64(model), _as_float64(scales)
        nnx.pop(model, nnx.Intermediate)  # of the copy, sown before
        data = [_as_float64(jax.tree.map(jnp.asarray, batch)) for batch in batches]
        if not data:
            raise ValueError("`batches` is empty: at least one batch is needed to train on")
        if keep not in (None, "split"):
            raise ValueError(f"`keep` is {keep!r}: it must be 'split' or None")
        drawn = _sample(scales, rngs.params(), dtype=jnp.float64)
        weights = branches_of(model, scales) if keep else drawn
        if optimizer is None or twin_optimizer is None:
            tx = nesterov_with_decay(repopt_mask(scales, normalise))
            means = scale_by_layer_means(scales) if normalise else optax.identity()
            twin_tx = nesterov_with_decay(means)
        else:
            tx = optimizer(weights) if callable(optimizer) else optimizer
            twin_tx = twin_optimizer
        network = _Network(with_kernels(model, _merge(scales, weights)), loss)
        try:
            plain = network.train(tx, data)
        except OtherKernelsError as error:
            raise ValueError(
                "`optimizer` was made from other branch tensors than those of the check, which draws its "
                "own: give it as a function of them, such as optimizer=lambda weights: "
                "reparameterize(inner, scales, weights=weights)"
            ) from error
        twin = _Network(csla_twin(model, scales, weights), loss).train(twin_tx, data)
        result = _compared(network.model, plain, twin, scales, tolerance)
        if result.equivalent:
            return result
        sentences = reasons.explain(
            reasons.Pair(plain, twin, scales, data, knows_branches=callable(optimizer)),
            difference=result.max_difference,
            loss_difference=result.loss_difference,
            movement=result.movement,
            tolerance=tolerance,
            wrong=[path for path, difference in result.worst() if not difference <= tolerance],
        )
        return dataclasses.replace(result, reasons=tuple(sentences))


def load_check(path: str | Path) -> Check:
    """Returns the result of `get_check()` in the Python file `path`.

    Raises:
      FileNotFoundError: no such file.
      ValueError: it is not a Python file with a `get_check`.
      TypeError: `get_check` does not return a `Check`.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no check file {path}: give a Python file with a function `get_check`")
    check = userfile.call(path, "get_check", noun="check")
    if not isinstance(check, Check):
        raise TypeError(f"`get_check` of {path} returned {type(check).__name__}, not `verify.Check`")
    return check


class _Network:
    """A model and a loss."""

    def __init__(self, model: nnx.Module, loss: Loss):
        self.model = model
        self.graph, self.params, self.non_trainable = nnx.split(model, nnx.Param, ...)
        self.loss = loss

    def value(self, params, non_trainable, batch):
        """Returns the loss, and the non-trainable variables after the forward pass."""
        # Without copy=True the statistics that the forward pass writes would escape the trace of grad.
        merged = nnx.merge(self.graph, params, non_trainable, copy=True)
        value = self.loss(merged, batch)
        nnx.pop(merged, nnx.Intermediate)  # what the model sows is no state that the next step begins with
        return value, nnx.split(merged, nnx.Param, ...)[2]

    def train(self, tx: optax.GradientTransformation, batches: list) -> reasons.Side:
        """Trains a copy, one step for each batch."""

        @jax.jit
        def differentiate(params, non_trainable, batch):
            (value, non_trainable), gradients = jax.value_and_grad(self.value, has_aux=True)(
                params, non_trainable, batch
            )
            return value, non_trainable, gradients, optax.tree.norm(gradients)

        @jax.jit
        def step(gradients, state, params):
            updates, state = tx.update(gradients, state, params)
            return state, optax.apply_updates(params, updates)

        params, non_trainable, state = self.params, self.non_trainable, tx.init(self.params)
        losses, norms, first = [], [], {}
        for batch in batches:
            value, non_trainable, gradients, norm = differentiate(params, non_trainable, batch)
            if not losses:
                first = {path: np.asarray(g) for path, g in paths.named_leaves(gradients)[0].items()}
            losses.append(float(value))
            norms.append(float(norm))
            state, params = step(gradients, state, params)
        trained = nnx.merge(self.graph, params, non_trainable, copy=True)
        return reasons.Side(self, tx, step, trained, losses, norms, first)


def _compared(
    model: nnx.Module, plain: reasons.Side, twin: reasons.Side, scales: Scales, tolerance: float
) -> Equivalence:
    """Compares the two trainings; `model` is the plain network before the first step."""
    start, end, expected = (_values(m) for m in (model, plain.trained, twin.trained))
    # For values that are zero up to rounding, as a bias before a batch norm, rounding would be compared.
    sizes = [np.abs(value[np.isfinite(value)]).max(initial=0.0) for value in expected.values()]
    floor = NEGLIGIBLE * float(max(sizes))
    names = {False: "training", True: "evaluation"}
    modes = reasons.batch_norm_modes(model)
    norms = " and ".join(f"{names[mode]} mode ({count} layers)" for mode, count in modes.items())
    norms = f"batch norm in {norms}, one after the sum of the branches" if modes else "no batch norm"
    return Equivalence(
        differences={path: _relative(end[path], expected[path], floor) for path in end},
        losses=plain.losses,
        loss_difference=_relative(np.array(plain.losses), np.array(twin.losses)),
        movement=float(np.max([_relative(end[path], start[path]) for path in scales.entries])),
        steps=len(plain.losses),
        tolerance=tolerance,
        compared=f"{len(plain.losses)} steps in float64, {norms}",
    )


def _values(model: nnx.Module) -> dict[str, np.ndarray]:
    """Returns parameters and statistics by path; those of CSLA layers as merged kernels of plain layers."""
    leaves, _ = paths.named_leaves(nnx.state(model, (nnx.Param, nnx.BatchStat)))
    values = {path: np.asarray(leaf) for path, leaf in leaves.items()}
    layers = {path: layer for path, layer in named_modules(model) if isinstance(layer, Merged)}
    entries, weights = {}, {}
    for path, layer in layers.items():
        inside = (join(path, "weights/"), join(path, "scales/"))
        values = {p: v for p, v in values.items() if not p.startswith(inside)}
        kernel = join(path, "kernel")
        entries[kernel] = LayerScales(layer.branch_set(), layer.vectors())
        weights[kernel] = {name: w[...] for name, w in layer.weights.items()}
    kernels = _merge(Scales(entries), weights) if layers else {}
    return values | {path: np.asarray(kernel) for path, kernel in kernels.items()}


def _relative(a: np.ndarray, b: np.ndarray, floor: float = 0.0) -> float:
    """Returns the largest difference, relative to b's largest entry or to `floor` if b is smaller."""
    scale = max(np.abs(b).max(initial=0.0), floor)
    with np.errstate(invalid="ignore"):  # the difference of two infinities is NaN, which counts as different
        return float(np.abs(a - b).max(initial=0.0) / (scale if scale else 1.0))


def _as_float64(tree: Any) -> Any:
    """Returns a copy in which every floating-point array is float64, and every module computes in float64."""

    def widen(x):
        return x.astype(jnp.float64) if jnp.issubdtype(x.dtype, jnp.floating) else jnp.array(x)

    if isinstance(tree, nnx.Module):
        graph, state = nnx.split(tree)
        model = nnx.merge(graph, jax.tree.map(widen, state), copy=True)
        for _, module in named_modules(model):
            for name in ("dtype", "param_dtype"):  # in the latter a recurrent cell starts
                dtype = getattr(module, name, None)
                if dtype is not None and jnp.issubdtype(dtype, jnp.floating):
                    setattr(module, name, jnp.float64)
        return model
    return jax.tree.map(widen, tree)
