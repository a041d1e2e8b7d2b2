"""Why a plain network and its CSLA twin train differently: sentences for the user, the likeliest first.

The reasons are sought in the two networks before the first step, the optimizers, the dtypes, and the numbers.
The plain network's optimizer is checked by `optim.check`. Then both optimizers are run on corresponding
synthetic gradients, g for the plain network and E_b^T(s_b * g) for the branches, and their moves are
compared.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from repopt_jax.core import paths
from repopt_jax.core.jaxprs import Flat, bodies, flatten
from repopt_jax.core.paths import listed
from repopt_jax.core.scales import LayerScales, Scales
from repopt_jax.optim.check import Reason, find_faults
from repopt_jax.optim.reparameterize import ReparameterizeState
from repopt_jax.surgery.modules import join, named_modules

Named = dict[str, np.ndarray]

# Relative, in float64. Loss and gradients of the two networks before the first step agree to about 1e-14.
SAME_FUNCTION = 1e-9
# Relative, in float64. The moves of two corresponding optimizers agree to about 1e-12.
SAME_MOVE = 1e-8
# Gradients and moves below this fraction of the largest are rounding errors of 0.
ROUNDING = 1e-12
# Gradients that are scaled by this factor are below every clipping threshold in use.
TINY = 1e-6


class Side(NamedTuple):
    """One of the two networks, with its optimizer and its finished training.

    Attributes:
      network: has `model`, `params`, `non_trainable` and `value(params, non_trainable, batch)`.
      tx: its optimizer.
      step: (gradients, state, params) -> (state, params), compiled.
      trained: the model after the last step.
      losses, norms: the loss and the gradient's norm at each step.
      gradients: the first gradients, by path.
    """

    network: Any
    tx: optax.GradientTransformation
    step: Any
    trained: nnx.Module
    losses: list[float]
    norms: list[float]
    gradients: Named


class Pair(NamedTuple):
    """Both sides, with the data that they were trained on.

    Attributes:
      plain, twin: the plain network's side and the CSLA network's.
      scales, batches: scales and data of both trainings, in float64.
      knows_branches: whether the plain network's optimizer was made from the branch tensors.
    """

    plain: Side
    twin: Side
    scales: Scales
    batches: list[Any]
    knows_branches: bool


def explain(
    pair: Pair,
    *,
    difference: float,
    loss_difference: float,
    movement: float,
    tolerance: float,
    wrong: list[str],
) -> list[str]:
    """Returns sentences that say why the two trainings differ by `difference`.

    Args:
      pair: the two trainings.
      difference: the largest of all.
      loss_difference, movement, tolerance: as in `Equivalence`.
      wrong: paths that differ, the worst first.
    """
    casts = dict(_casts(pair))
    noise = _without_effect(pair, wrong, max(casts.values(), default=0.0))
    if noise and len(noise) == len(wrong) and loss_difference <= tolerance:
        return [_noise(noise)]  # it explains all of the difference
    if casts and difference <= 1e3 * max(casts.values()):
        return list(casts)  # their rounding hides smaller differences
    found = list(_networks(pair))
    if all(np.isfinite(g).all() for g in pair.plain.gradients.values()):
        found += _optimizers(pair)
    if movement <= tolerance:
        still = (
            "the networks did not move by more than the tolerance (no kernel by more than "
            f"{movement:.1g} of itself), so nothing was compared: is the learning rate 0, the loss "
            "independent of the kernels, or the tolerance too large?"
        )
        found.insert(0 if difference <= tolerance else len(found), still)
    found += casts
    if not found:
        found += _rounding(pair, difference, noise)
    found += _numbers(pair)
    return found or [
        "no known reason was recognised: optimizers and networks agree when they are probed one by one; is "
        "the tolerance too small, or does the loss keep a state of its own?"
    ]


def batch_norm_modes(model: nnx.Module) -> dict[bool, int]:
    """Counts batch norms by whether they use running averages."""
    modes: dict[bool, int] = {}
    for _, module in named_modules(model):
        if isinstance(module, nnx.BatchNorm):
            modes[bool(module.use_running_average)] = modes.get(bool(module.use_running_average), 0) + 1
    return modes


# --- The networks


def _networks(pair: Pair) -> Iterator[str]:
    """Compares loss and gradients on the first batch before any step."""
    value, expected = pair.plain.losses[0], pair.twin.losses[0]
    if not (np.isfinite(value) and np.isfinite(expected)):
        return
    _, wrong = _differing(
        pair.twin.gradients, _branch_gradients(pair.scales, pair.plain.gradients), SAME_FUNCTION
    )
    different_loss = not abs(value - expected) <= SAME_FUNCTION * abs(expected)
    if not different_loss and not wrong:
        return
    own = [
        f"{path} ({type(module).__name__})"
        for path, module in named_modules(pair.plain.network.model)
        if join(path, "kernel") in pair.scales.entries and type(module) not in (nnx.Conv, nnx.Linear)
    ]
    what = f"loss {value:.6g} and {expected:.6g}" if different_loss else f"the gradient of {listed(wrong)}"
    why = (
        f"the layers {listed(own)} are of classes of their own, and the twin has plain convolutions there"
        if own
        else "does the loss read the kernels itself (an L2 term), or draw random numbers outside the model?"
    )
    yield f"the two networks differ before the first step ({what}): {why}"


# --- The optimizers


def _optimizers(pair: Pair) -> list[str]:
    """Finds faults of `optimizer`, and where `twin_optimizer` is not its counterpart."""
    faults = find_faults(pair.plain.tx, pair.scales, pair.plain.network.params)
    found = [fault.message for fault in faults]
    reasons = {fault.reason for fault in faults}
    probes = _Probes(pair)
    decay = [] if Reason.DECAY_BEFORE_RULE in reasons else probes.decay()
    if not reasons - {Reason.DECAY_BEFORE_RULE}:
        found += probes.gradients(same_decay=not decay and not faults)
    return found + decay


class _Probes:
    """Runs both optimizers from their first states on corresponding gradients."""

    def __init__(self, pair: Pair):
        self.pair = pair
        norms = [norm for norm in pair.plain.norms if np.isfinite(norm)]
        # As large as the gradients became in training, because clipping may begin only later.
        growth = max(norms) / norms[0] if norms[0] else 1.0
        sizes = {
            path: growth * float(np.sqrt(np.mean(np.square(g)))) if g.size else 0.0
            for path, g in pair.plain.gradients.items()
        }
        least = 1e-3 * (float(np.sqrt(np.mean(np.square(list(sizes.values()))))) or 1.0)
        rng = np.random.default_rng(0)
        # Every leaf gets a gradient: one that is zero on this batch may not be on the next.
        self.base = {
            path: max(sizes[path], least) * rng.normal(size=g.shape)
            for path, g in pair.plain.gradients.items()
        }
        # The first steps may have learning rate 0, or only accumulate gradients.
        steps = len(pair.batches)
        moved = (
            np.any([np.any(m) for m in self._plain(count * [1.0]).values()]) for count in range(1, steps + 1)
        )
        self.period = next((i for i, m in enumerate(moved, start=1) if m), steps)

    def decay(self) -> list[str]:
        """Compares weight decay, which is the move without gradients."""
        none = self.period * [0.0]
        by_branch = _moves(self.pair.twin, self._branches(none))
        merged = _merged(self.pair.scales, by_branch)
        kernels, wrong = self._compare(self._plain(none), merged)
        left_out = [path for path in kernels if self._identity_left_out(path, by_branch)]
        found = []
        if left_out:
            found.append(
                "the identity's weight is not decayed in the twin, while the kernel that it is a part of is "
                f"decayed in the plain network, at {listed(left_out)}: a mask by ndim > 1 leaves it out, so "
                "let `twin_optimizer` decay all branch weights, or `optimizer` leave the kernels out"
            )
        if wrong := [path for path in wrong if path not in left_out]:
            found.append(
                f"weight decay (the update without gradients) differs at {listed(wrong)}: give both "
                "optimizers the same coefficient, and masks that treat a kernel and its branches alike"
            )
        return found

    def gradients(self, *, same_decay: bool) -> list[str]:
        """Compares the moves that gradients cause beyond weight decay."""
        # If all steps had one size, clipping would be a constant factor. After the first update, parameters
        # that moved differently are also decayed differently.
        sizes = [1.0] * self.period + ([0.3, 2.5] if same_decay else [])
        kernels, wrong = self._responses(sizes)
        if not wrong:
            return []
        if not self._responses([TINY * size for size in sizes])[1]:
            return [
                "the two optimizers agree on small gradients and differ on large ones: one of them clips, or "
                "clips at another norm; give `optimizer` clip_by_repopt_global_norm(max_norm, scales) and "
                "`twin_optimizer` clip_by_global_norm with the same norm, at the heads of their chains"
            ]
        if others := [path for path in wrong if path not in kernels]:
            return [
                "the two optimizers also move parameters differently that the scales do not name "
                f"({listed(others)}): give `optimizer` and `twin_optimizer` the same learning rate, momentum "
                "and other settings, and let them be counterparts"
            ]
        if not self._responses(sizes, divided=True)[1]:
            return [
                "`optimizer` divides each layer's multiplier by its mean (`normalise`), which is a learning "
                f"rate for each layer, and `twin_optimizer` does not, at {listed(kernels)}: put "
                "verify.scale_by_layer_means(scales) in the twin's chain where `optimizer` has the mask"
            ]
        state = jax.eval_shape(self.pair.plain.tx.init, self.pair.plain.network.params)
        nodes = jax.tree.leaves(state, is_leaf=lambda node: isinstance(node, ReparameterizeState))
        if not self.pair.knows_branches and any(isinstance(node, ReparameterizeState) for node in nodes):
            return [
                "reparameterize was made without the branch tensors and split the kernels by itself, and its "
                "inner optimizer looks at the weights: give `optimizer` as a function of the branch tensors, "
                "lambda weights: reparameterize(inner, scales, weights=weights)"
            ]
        return [
            f"`optimizer` moves the kernels at {listed(kernels)} otherwise than `twin_optimizer` moves their "
            "branches: are the settings of both the same, and is the rule of repopt_adamw 'exact' (the "
            "published one is not, for scales of different signs)?"
        ]

    def _responses(self, sizes: list[float], *, divided: bool = False) -> tuple[list[str], list[str]]:
        """Returns where the moves that gradients of these sizes cause differ, see `_differing`.

        With `divided` the moves of the twin are first divided by the means of the layers' multipliers.
        """
        none = [0.0] * len(sizes)
        plain = _minus(self._plain(sizes), self._plain(none))
        by_branch = _minus(
            _moves(self.pair.twin, self._branches(sizes)), _moves(self.pair.twin, self._branches(none))
        )
        expected = _merged(self.pair.scales, by_branch)
        if divided:
            expected |= {p: expected[p] / _means(e) for p, e in self.pair.scales.entries.items()}
        return self._compare(plain, expected)

    def _compare(self, plain: Named, expected: Named) -> tuple[list[str], list[str]]:
        return _differing(plain, expected, SAME_MOVE, self.pair.scales)

    def _steps(self, sizes: list[float]) -> list[Named]:
        """Returns the gradients of successive steps, with entries that are shifted in each step."""
        return [{path: size * np.roll(g, i) for path, g in self.base.items()} for i, size in enumerate(sizes)]

    def _plain(self, sizes: list[float]) -> Named:
        return _moves(self.pair.plain, self._steps(sizes))

    def _branches(self, sizes: list[float]) -> list[Named]:
        return [_branch_gradients(self.pair.scales, step) for step in self._steps(sizes)]

    def _identity_left_out(self, kernel: str, by_branch: Named) -> bool:
        branches = self.pair.scales.entries[kernel].branches.branches
        moved = {b.has_scale: np.any(by_branch[path_in_twin(kernel, b.name)]) for b in branches}
        return bool(moved.get(True)) and not moved.get(False, True)


def _moves(side: Side, gradients: Iterable[Mapping[str, Any]]) -> Named:
    """Returns the move of each parameter in these steps from the optimizer's first state, by path."""
    start, treedef = paths.named_leaves(side.network.params)
    params, state = side.network.params, side.tx.init(side.network.params)
    for by_path in gradients:
        tree = treedef.unflatten([jnp.asarray(by_path[path]) for path in start])
        state, params = side.step(tree, state, params)
    end, _ = paths.named_leaves(params)
    return {path: np.asarray(end[path]) - np.asarray(start[path]) for path in start}


def _branch_gradients(scales: Scales, gradients: Mapping[str, Any]) -> Named:
    """Converts gradients of the plain network to those of the CSLA network, by its paths."""
    found = {}
    for path, g in gradients.items():
        if (entry := scales.entries.get(path)) is None:
            found[path] = g
        else:
            parts = entry.branches.branch_gradients(jnp.asarray(g), entry.vectors)
            found |= {path_in_twin(path, name): np.asarray(part) for name, part in parts.items()}
    return found


def _merged(scales: Scales, moves: Mapping[str, Any]) -> Named:
    """Converts moves of the CSLA network's parameters to those of the plain network, by its paths."""
    found = dict(moves)
    for path, entry in scales.entries.items():
        parts = {name: jnp.asarray(found.pop(path_in_twin(path, name))) for name in entry.branches.names}
        found[path] = np.asarray(entry.branches.merge(parts, entry.vectors))
    return found


def _means(entry: LayerScales) -> np.ndarray:
    """Returns the mean of a layer's multiplier, for each layer of a stack, with the axes of its kernel."""
    return np.asarray(entry.branches.mean_multiplier(entry.vectors, dtype=jnp.float64, keepdims=True))


def path_in_twin(kernel: str, branch: str) -> str:
    """Returns the path of a branch's tensor in the CSLA network."""
    return join(kernel.rpartition("/")[0], f"weights/{branch}")


def _differing(
    a: Named, b: Named, tolerance: float, scales: Scales | None = None
) -> tuple[list[str], list[str]]:
    """Returns the paths at which a and b differ: those in the scales, and all. NaN is not a difference."""
    floor = ROUNDING * max(np.abs(values[path]).max(initial=0.0) for values in (a, b) for path in a)
    wrong = [
        path
        for path in a
        if np.abs(a[path] - b[path]).max(initial=0.0)
        > tolerance * max(np.abs(v[path]).max(initial=0.0) for v in (a, b)) + floor
    ]
    return [path for path in wrong if scales and path in scales.entries], wrong


def _minus(a: Named, b: Named) -> Named:
    return {path: a[path] - b[path] for path in a}


# --- The numbers


def _casts(pair: Pair) -> Iterator[tuple[str, float]]:
    """Yields casts to narrower dtypes than float64, each with that dtype's machine epsilon."""
    network, batch = pair.plain.network, pair.batches[0]
    loss = jax.make_jaxpr(lambda params, batch: network.value(params, network.non_trainable, batch)[0])(
        network.params, batch
    )
    if types := set(_narrowed(flatten(loss))):
        modules = (module for _, module in named_modules(network.model))
        attention = any(isinstance(module, nnx.MultiHeadAttention) for module in modules)
        yield (
            f"model or loss cast to {', '.join(sorted(types))}, so the networks agree only to its precision: "
            "remove the cast for the check, or allow for it in `tolerance`"
            + (" (nnx.MultiHeadAttention takes its softmax in float32 by itself)" if attention else ""),
            _spacing(types),
        )
    for name, side in (("optimizer", pair.plain), ("twin_optimizer", pair.twin)):
        params = side.network.params
        update = jax.make_jaxpr(side.tx.update)(params, jax.eval_shape(side.tx.init, params), params)
        if types := set(_narrowed(flatten(update))):
            yield (
                f"`{name}` casts to {', '.join(sorted(types))} (mu_dtype, accumulator_dtype?), so the "
                "networks agree only to its precision: leave the narrow type out for the check",
                _spacing(types),
            )


def _spacing(types: Iterable[str]) -> float:
    return max(float(jnp.finfo(t).eps) for t in types)


def _narrowed(flat: Flat) -> Iterator[str]:
    """Yields the floating-point dtypes to which a program converts wider ones; what does not depend on its
    inputs is a constant, which is the same in both networks."""
    data = set(flat.inputs)
    for equation in flat.equations:
        if data.isdisjoint(equation.inputs):
            continue
        data.update(equation.outputs)
        if equation.name == "convert_element_type":
            before, after = equation.inputs[0].aval.dtype, equation.outputs[0].aval.dtype
            floating = all(jnp.issubdtype(t, jnp.floating) for t in (before, after))
            if floating and jnp.finfo(after).bits < jnp.finfo(before).bits:
                yield str(after)
        for body in bodies(equation):
            yield from _narrowed(flatten(body))


def _without_effect(pair: Pair, wrong: list[str], rounding: float) -> list[str]:
    """Returns those of the paths that differ whose gradient is zero but for rounding: in float64 or, where
    the coarsest rounding is another, in float32 (what bfloat16 rounds away may well be a gradient)."""
    gradients = pair.plain.gradients
    largest = max(np.abs(g).max(initial=0.0) for g in gradients.values())
    limit = max(ROUNDING, min(rounding, _spacing(["float32"]))) * (largest if np.isfinite(largest) else 0.0)
    return [path for path in wrong if path in gradients and np.abs(gradients[path]).max() < limit]


def _noise(wrong: list[str]) -> str:
    return (
        f"the gradient of {listed(wrong)} is zero but for rounding, and the optimizer makes whole steps of "
        "it: a bias in front of batch norm, or of an attention's keys, has no effect; leave it out"
    )


def _rounding(pair: Pair, difference: float, noise: list[str]) -> Iterator[str]:
    """Explains how rounding becomes a difference although both agree step by step; `noise` are the paths that
    differ and have no effect."""
    if noise:
        yield _noise(noise)
    if count := batch_norm_modes(pair.plain.network.model).get(True):
        yield (
            f"batch norm is in evaluation mode in {count} layers, so nothing normalises the "
            "activations and rounding grows: call model.train() before the check, as in training"
        )
    value, expected = pair.plain.losses[0], pair.twin.losses[0]
    first = abs(value - expected) / (abs(expected) or 1.0)
    if not noise and first <= SAME_FUNCTION < difference and len(pair.batches) > 1:
        yield (
            f"the networks agree at first (losses to {first:.0e}) and part slowly, as an unstable training "
            "amplifies rounding: lower the learning rate, or check fewer steps"
        )


def _numbers(pair: Pair) -> Iterator[str]:
    """Finds where NaN and infinity begin."""
    for number, batch in enumerate(pair.batches):
        leaves, _ = paths.named_leaves(batch)
        floats = {p: x for p, x in leaves.items() if jnp.issubdtype(x.dtype, jnp.floating)}
        if bad := [path for path, x in floats.items() if not np.isfinite(x).all()]:
            yield f"batch {number} holds NaN or infinite numbers ({listed(bad)})"
            return
    sides = (("plain network", pair.plain), ("twin", pair.twin))
    for name, side in sides:
        if bad := [i for i, value in enumerate(side.losses) if not np.isfinite(value)]:
            yield (
                f"the loss of the {name} is not finite from step {bad[0]} on: the training diverges, lower "
                "the learning rate or check fewer steps"
            )
            return
    for name, side in sides:
        leaves, _ = paths.named_leaves(nnx.state(side.trained, (nnx.Param, nnx.BatchStat)))
        if bad := [path for path, value in leaves.items() if not np.isfinite(value).all()]:
            yield f"the last step leaves NaN or infinite numbers in the {name}, at {listed(bad)}"
            return
