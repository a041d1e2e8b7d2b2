"""The equivalence, checked on a user's own model: train the CSLA network and the plain one, and compare them.

RepOptimizer's claim is that a plain network whose kernels are re-initialised and whose gradients are
transformed trains exactly as the CSLA network (constant-scale linear addition of branches) does under the
ordinary optimizer. Here both are trained side by side in float64, from the same branch tensors, on the same
batches; where they part, both are looked at for the likely reason.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from repopt_jax import userfile
from repopt_jax.core import paths
from repopt_jax.core.scales import LayerScales, Scales, check_fit
from repopt_jax.nn.merged import Merged
from repopt_jax.optim import chains
from repopt_jax.optim.sgd import repopt_mask
from repopt_jax.surgery.layers import check_aliases, layers_at
from repopt_jax.surgery.modules import join, named_modules
from repopt_jax.surgery.reinitialize import Weights, merge_weights, sample_weights, with_kernels
from repopt_jax.surgery.search import csla_twin
from repopt_jax.verify import reasons

Loss = Callable[[Any, Any], jax.Array]
MakeOptimizer = Callable[[Weights], optax.GradientTransformation]

# Relative, float64. Loss and gradients of the two networks before the first step agree to about 1e-14.
SAME_FUNCTION = 1e-9
# A parameter or statistic that is this much smaller than the network's largest counts as this large.
NEGLIGIBLE = 1e-6
# A gradient that is this much smaller than the largest is what rounding leaves of 0.
ROUNDING = 1e-12
# One program each: a program for every operation and shape takes longer to compile than some trainings.
_sample = jax.jit(sample_weights, static_argnames="dtype")
_merge = jax.jit(merge_weights)


@dataclasses.dataclass(frozen=True)
class Equivalence:
    """Result of `verify_equivalence`.

    Attributes:
      differences: path of a parameter or batch statistic of the plain model -> largest absolute difference
        from its counterpart in the CSLA model, divided by that one's largest absolute value (by a millionth
        of the network's largest where that is more: what is zero but for rounding has nothing to compare).
      losses: loss of the plain model at each step.
      loss_difference: largest relative difference of the two models' losses at a step.
      movement: the largest relative change of a kernel since the start: an equivalence of networks that do
        not move would say nothing.
      steps: number of steps.
      tolerance: what `equivalent` compares with.
      reasons: why they are not equivalent, as sentences, the likeliest first; empty if they are.
      compared: what was compared: steps, and the mode of batch norm.
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
        return float(np.max([self.loss_difference, *self.differences.values()]))  # NaN if any is

    @property
    def equivalent(self) -> bool:
        """False also for NaN, and for networks that moved by no more than they may differ."""
        return self.max_difference <= self.tolerance < self.movement

    def worst(self, count: int | None = None) -> list[tuple[str, float]]:
        """The paths that differ most, NaN first, with their differences; all of them if `count` is None."""
        ordered = sorted(
            self.differences.items(), key=lambda item: (-np.nan_to_num(item[1], nan=np.inf), item[0])
        )
        return ordered[:count]


def nesterov_with_decay(mask: optax.GradientTransformation) -> optax.GradientTransformation:
    """The published recipe's optimizer: `mask`, weight decay 4e-5, SGD with Nesterov momentum 0.9, at a rate
    of 0.05."""
    return optax.chain(mask, optax.add_decayed_weights(4e-5), optax.sgd(0.05, 0.9, nesterov=True))


def cross_entropy(model: Any, batch: Any) -> jax.Array:
    """Mean softmax cross-entropy on `batch`, a mapping of "image" (batch, ...) and "label" (batch,)."""
    logits = model(batch["image"])
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]).mean()


@dataclasses.dataclass(frozen=True)
class Check:
    """The arguments of `verify_equivalence`, as `get_check()` of a file for `repopt verify --check=FILE`
    returns them.

    `batches` may be endless if the number of steps is given on the command line.
    """

    model: nnx.Module
    scales: Scales
    batches: Iterable[Any]
    optimizer: optax.GradientTransformation | MakeOptimizer | None = None
    twin_optimizer: optax.GradientTransformation | None = None
    loss: Loss = cross_entropy
    tolerance: float = 1e-10
    rngs: nnx.Rngs | None = None

    def run(self, *, steps: int | None = None, tolerance: float | None = None) -> Equivalence:
        """`verify_equivalence` on the first `steps` batches (all of them if None)."""
        return verify_equivalence(
            self.model,
            self.scales,
            itertools.islice(self.batches, steps),
            optimizer=self.optimizer,
            twin_optimizer=self.twin_optimizer,
            loss=self.loss,
            tolerance=self.tolerance if tolerance is None else tolerance,
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
    rngs: nnx.Rngs,
) -> Equivalence:
    """Trains the CSLA network and the plain network side by side in float64 and compares them.

        verify_equivalence(
            model,
            scales,
            batches,
            optimizer=repopt_adamw(1e-3, scales, weight_decay=0.05),
            twin_optimizer=optax.adamw(1e-3, weight_decay=0.05),
            rngs=nnx.Rngs(0),
        )

    Modules of the model that compute in a narrower type (an attribute `dtype`) are set to float64; casts
    inside their code cannot be.

    Args:
      model: a plain network, in training mode; untouched. Its own weights stay except in the layers of
        `scales`, whose branches are drawn with `rngs`. Dropout draws the same numbers in both networks.
      scales: the constants.
      batches: one pytree of arrays a step, at least one; floating-point arrays are used in float64.
      optimizer: what the plain network is trained with, re-parameterized; or a function that makes it from
        the branch tensors (path -> branch -> array), which `reparameterize(inner, scales, weights=...)`
        wants. By default `nesterov_with_decay(repopt_mask(scales))`.
      twin_optimizer: its ordinary counterpart, for the CSLA network, whose parameters are the branch tensors
        `.../weights/<branch>` in place of `.../kernel`. By default `nesterov_with_decay(optax.identity())`.
      loss: (model, batch) -> scalar.
      tolerance: largest relative difference that counts as equal.
      rngs: source of the branch draws (stream `params`).

    Returns:
      The differences by path, and where they are above the tolerance the likely reasons.

    Raises:
      ValueError: the scales do not fit the model; `batches` is empty; only one of the two optimizers is
        given; or layers for which there is no equivalence, with the reasons: padding that depends on the
        input's size (`SAME` at stride 2), a class with a `__call__` of its own.
      TypeError: a path of `scales` is not the kernel of an `nnx.Conv` or `nnx.Linear`.
    """
    if (optimizer is None) != (twin_optimizer is None):
        given, other = (
            ("twin_optimizer", "optimizer") if optimizer is None else ("optimizer", "twin_optimizer")
        )
        raise ValueError(f"`{given}` is given without `{other}`: they are counterparts, give both or neither")
    check_aliases(model, scales.entries)
    check_fit(scales, nnx.state(model))  # of any part of the model
    layers_at(model, scales.entries)
    with jax.enable_x64(True), chains.quiet():  # what a warning would say is among the reasons
        model, scales = _as_float64(model), _as_float64(scales)
        data = [_as_float64(jax.tree.map(jnp.asarray, batch)) for batch in batches]
        if not data:
            raise ValueError("`batches` is empty: at least one batch is needed to train on")
        weights = _sample(scales, rngs.params(), dtype=jnp.float64)
        plain = _Network(with_kernels(model, _merge(scales, weights)), loss)
        twin = _Network(csla_twin(model, scales, weights), loss)
        if optimizer is None or twin_optimizer is None:
            tx, twin_tx = nesterov_with_decay(repopt_mask(scales)), nesterov_with_decay(optax.identity())
        else:
            tx = optimizer(weights) if callable(optimizer) else optimizer
            twin_tx = twin_optimizer
        side, twin_side = reasons.Side(tx, plain.params), reasons.Side(twin_tx, twin.params)
        run, twin_run = plain.train(side, data), twin.train(twin_side, data)
        start, end, expected = (_values(m) for m in (plain.model, run.model, twin_run.model))
        # Zero but for rounding, as a bias in front of a batch norm: rounding is all that could be compared.
        sizes = [np.abs(value[np.isfinite(value)]).max(initial=0.0) for value in expected.values()]
        floor = NEGLIGIBLE * float(max(sizes))
        result = Equivalence(
            differences={path: _relative(end[path], expected[path], floor) for path in end},
            losses=run.losses,
            loss_difference=_relative(np.array(run.losses), np.array(twin_run.losses)),
            movement=float(np.max([_relative(end[path], start[path]) for path in scales.entries])),
            steps=len(data),
            tolerance=tolerance,
            compared=_compared(model, len(data)),
        )
        if result.equivalent:
            return result
        found = _reasons(
            result, _Parted(plain, twin, side, twin_side, run, twin_run, scales, data, callable(optimizer))
        )
        return dataclasses.replace(result, reasons=tuple(found))


def load_check(path: str | Path) -> Check:
    """What `get_check()` of the Python file `path` returns.

    Raises:
      FileNotFoundError: no such file.
      ValueError: it is no Python file with a `get_check`.
      TypeError: `get_check` does not return a `Check`.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no check file {path}: give a Python file with a function `get_check`")
    check = userfile.call(path, "get_check", noun="check")
    if not isinstance(check, Check):
        raise TypeError(f"`get_check` of {path} returned {type(check).__name__}, not `verify.Check`")
    return check


class _Run(NamedTuple):
    """A finished training: the model, the loss and the gradient's norm at each step, and the first
    gradient."""

    model: nnx.Module
    losses: list[float]
    norms: list[float]
    gradients: dict[str, np.ndarray]


class _Network:
    """A model and a loss; training gives another model."""

    def __init__(self, model: nnx.Module, loss: Loss):
        self.model = model
        self.graph, self.params, self.rest = nnx.split(model, nnx.Param, ...)
        self.loss = loss

    def value(self, params, rest, batch):
        """The loss, and the variables that are not trained as the forward pass leaves them."""
        # copy=True: without it the statistics that the forward pass writes would escape the trace of grad
        merged = nnx.merge(self.graph, params, rest, copy=True)
        value = self.loss(merged, batch)
        return value, nnx.split(merged, nnx.Param, ...)[2]

    def train(self, side: reasons.Side, batches: list) -> _Run:
        """One step a batch."""

        @jax.jit
        def differentiate(params, rest, batch):
            (value, rest), gradients = jax.value_and_grad(self.value, has_aux=True)(params, rest, batch)
            return value, rest, gradients, optax.tree.norm(gradients)

        params, rest, state = self.params, self.rest, side.tx.init(self.params)
        losses, norms, first = [], [], {}
        for batch in batches:
            value, rest, gradients, norm = differentiate(params, rest, batch)
            if not losses:
                first = {path: np.asarray(g) for path, g in paths.named_leaves(gradients)[0].items()}
            losses.append(float(value))
            norms.append(float(norm))
            _, state, params = side.step(gradients, state, params)
        return _Run(nnx.merge(self.graph, params, rest, copy=True), losses, norms, first)


class _Parted(NamedTuple):
    """Two trainings that did not end alike."""

    plain: _Network
    twin: _Network
    side: reasons.Side
    twin_side: reasons.Side
    run: _Run
    twin_run: _Run
    scales: Scales
    batches: list
    knows_branches: bool


def _reasons(result: Equivalence, parted: _Parted) -> list[str]:
    """Sentences, the likeliest first: what can be shown of the networks, the optimizers and the data; where
    that is nothing, what makes rounding grow."""
    casts = dict(_casts(parted))
    if casts and result.max_difference <= 1e3 * max(casts.values()):
        return list(casts)  # nothing finer can be told apart from their rounding
    found = [*_start_reasons(parted)]
    gradients = parted.run.gradients
    if all(np.isfinite(g).all() for g in gradients.values()):
        # As large as they came to be: a norm may be clipped only later.
        norms = [norm for norm in parted.run.norms if np.isfinite(norm)]
        growth = max(norms) / norms[0] if norms[0] else 1.0
        found += reasons.optimizer_reasons(
            parted.side,
            parted.twin_side,
            parted.scales,
            {path: growth * g for path, g in gradients.items()},
            steps=result.steps,
            knows_branches=parted.knows_branches,
        )
    if result.movement <= result.tolerance:
        still = (
            "the networks did not move by more than the tolerance (no kernel by more than "
            f"{result.movement:.1g} of itself), so nothing was compared: is the learning rate 0, the loss "
            "independent of the kernels, or the tolerance too large?"
        )
        found.insert(0 if result.max_difference <= result.tolerance else len(found), still)
    found += casts
    if not found:
        found += _rounding_reasons(result, parted, gradients)
    found += _number_reasons(parted)
    return found or [
        "no known reason was recognised: optimizers and networks agree when they are probed one by one; is "
        "the tolerance too small, or does the loss keep a state of its own?"
    ]


def _start_reasons(parted: _Parted) -> Iterator[str]:
    """The networks, before any step, on the first batch."""
    value, expected = parted.run.losses[0], parted.twin_run.losses[0]
    if not (np.isfinite(value) and np.isfinite(expected)):
        return
    gradients = reasons.branch_gradients(parted.scales, parted.run.gradients)
    twin_gradients = parted.twin_run.gradients
    floor = ROUNDING * max(np.abs(g).max() for g in twin_gradients.values())
    wrong = [
        path
        for path, g in twin_gradients.items()
        if not np.abs(g - gradients[path]).max() <= SAME_FUNCTION * np.abs(g).max() + floor
    ]
    different_loss = not abs(value - expected) <= SAME_FUNCTION * abs(expected)
    if not different_loss and not wrong:
        return
    own = [
        f"{path} ({type(module).__name__})"
        for path, module in named_modules(parted.plain.model)
        if join(path, "kernel") in parted.scales.entries and type(module) not in (nnx.Conv, nnx.Linear)
    ]
    what = (
        f"loss {value:.6g} and {expected:.6g}" if different_loss else f"the gradient of {paths.listed(wrong)}"
    )
    why = (
        f"the layers {paths.listed(own)} are of classes of their own, and the twin has plain convolutions "
        "there"
        if own
        else "does the loss read the kernels itself (an L2 term), or draw random numbers outside the model?"
    )
    yield f"the two networks differ before the first step ({what}): {why}"


def _casts(parted: _Parted) -> Iterator[tuple[str, float]]:
    """Casts to a narrower type than float64, each with the spacing of that type's numbers."""
    rest, batch, params = parted.plain.rest, parted.batches[0], parted.plain.params
    loss = jax.make_jaxpr(lambda params: parted.plain.value(params, rest, batch)[0])(params)
    if types := set(_narrowed(loss.jaxpr)):
        yield (
            f"model or loss cast to {', '.join(sorted(types))}, so the networks agree only to its precision: "
            "remove the cast for the check, or allow for it in `tolerance`",
            _spacing(types),
        )
    for name, side in (("optimizer", parted.side), ("twin_optimizer", parted.twin_side)):
        state = jax.eval_shape(side.tx.init, side.params)
        update = jax.make_jaxpr(side.tx.update)(side.params, state, side.params)
        if types := set(_narrowed(update.jaxpr)):
            yield (
                f"`{name}` casts to {', '.join(sorted(types))} (mu_dtype, accumulator_dtype?), so the "
                "networks agree only to its precision: leave the narrow type out for the check",
                _spacing(types),
            )


def _spacing(types: Iterable[str]) -> float:
    return max(float(jnp.finfo(t).eps) for t in types)


def _narrowed(jaxpr: Any) -> Iterator[str]:
    """Floating-point types to which a program converts wider numbers."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "convert_element_type":
            before, after = equation.invars[0].aval.dtype, equation.outvars[0].aval.dtype
            floating = all(jnp.issubdtype(t, jnp.floating) for t in (before, after))
            if floating and jnp.finfo(after).bits < jnp.finfo(before).bits:
                yield str(after)
        for parameter in equation.params.values():
            for inner in parameter if isinstance(parameter, (tuple, list)) else (parameter,):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from _narrowed(inner)


def _rounding_reasons(
    result: Equivalence, parted: _Parted, gradients: Mapping[str, np.ndarray]
) -> Iterator[str]:
    """Where everything agrees step by step: what turns rounding into a difference."""
    largest = max(np.abs(g).max() for g in gradients.values())
    largest = largest if np.isfinite(largest) else 0.0
    wrong = [path for path, difference in result.worst() if not difference <= result.tolerance]
    if noise := [p for p in wrong if p in gradients and np.abs(gradients[p]).max() < ROUNDING * largest]:
        yield (
            f"the gradient of {paths.listed(noise)} is zero but for rounding, and the optimizer makes "
            "whole steps of it: a bias in front of batch norm has no effect, leave it out"
        )
    modes = _batch_norm_modes(parted.plain.model)
    if modes.get(True):
        yield (
            f"batch norm is in evaluation mode in {modes[True]} layers, so nothing normalises the "
            "activations and rounding grows: call model.train() before the check, as in training"
        )
    first = _relative(np.array(parted.run.losses[:1]), np.array(parted.twin_run.losses[:1]))
    if not noise and first <= SAME_FUNCTION < result.max_difference and len(parted.batches) > 1:
        yield (
            f"the networks agree at first (losses to {first:.0e}) and part slowly, as an unstable training "
            "amplifies rounding: lower the learning rate, or check fewer steps"
        )


def _number_reasons(parted: _Parted) -> Iterator[str]:
    """NaN and infinity: where they begin."""
    for number, batch in enumerate(parted.batches):
        leaves, _ = paths.named_leaves(batch)
        floats = {p: x for p, x in leaves.items() if jnp.issubdtype(x.dtype, jnp.floating)}
        if bad := [path for path, x in floats.items() if not np.isfinite(x).all()]:
            yield f"batch {number} holds NaN or infinite numbers ({paths.listed(bad)})"
            return
    for name, run in (("plain network", parted.run), ("twin", parted.twin_run)):
        if bad := [i for i, value in enumerate(run.losses) if not np.isfinite(value)]:
            yield (
                f"the loss of the {name} is not finite from step {bad[0]} on: the training diverges, lower "
                "the learning rate or check fewer steps"
            )
            return
    for name, run in (("plain network", parted.run), ("twin", parted.twin_run)):
        if bad := [path for path, value in _values(run.model).items() if not np.isfinite(value).all()]:
            yield f"the last step leaves NaN or infinite numbers in the {name}, at {paths.listed(bad)}"
            return


def _compared(model: nnx.Module, steps: int) -> str:
    names = {False: "training", True: "evaluation"}
    modes = _batch_norm_modes(model)
    norms = " and ".join(f"{names[mode]} mode ({count} layers)" for mode, count in modes.items())
    after = ", one after the sum of the branches" if modes else ""
    return f"{steps} steps in float64, {f'batch norm in {norms}{after}' if modes else 'no batch norm'}"


def _batch_norm_modes(model: nnx.Module) -> dict[bool, int]:
    """Whether batch norm uses its running averages -> number of layers."""
    modes: dict[bool, int] = {}
    for _, module in named_modules(model):
        if isinstance(module, nnx.BatchNorm):
            modes[bool(module.use_running_average)] = modes.get(bool(module.use_running_average), 0) + 1
    return modes


def _values(model: nnx.Module) -> dict[str, np.ndarray]:
    """Parameters and statistics by path; of a CSLA layer, its merged kernel under the plain layer's path."""
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
    """Largest difference, relative to b's largest entry or to `floor` where b is smaller."""
    scale = max(np.abs(b).max(), floor)
    with np.errstate(invalid="ignore"):  # infinite both, so NaN: that is no agreement
        return float(np.abs(a - b).max() / (scale if scale else 1.0))


def _as_float64(tree: Any) -> Any:
    """A copy in which every floating-point array is float64, and every module computes in it."""

    def widen(x):
        return x.astype(jnp.float64) if jnp.issubdtype(x.dtype, jnp.floating) else jnp.array(x)

    if isinstance(tree, nnx.Module):
        graph, state = nnx.split(tree)
        model = nnx.merge(graph, jax.tree.map(widen, state), copy=True)
        for _, module in named_modules(model):
            dtype = getattr(module, "dtype", None)
            if dtype is not None and jnp.issubdtype(dtype, jnp.floating):
                setattr(module, "dtype", jnp.float64)  # noqa: B010  (of modules of any class)
        return model
    return jax.tree.map(widen, tree)
