"""Why a plain network and its CSLA twin part: the optimizers, probed.

Both optimizers are run on made-up gradients that correspond to one another: g for the plain network,
E_b^T(s_b * g) for the branches. The twin's moves, merged, must be the plain network's. Where they are not,
further probes (no gradient at all, twice the gradient, one entry changed, ten orders of magnitude) tell which
part is to blame. Names of transformations make a reason more definite; on their own they are none.
"""

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from repopt_jax.core import paths
from repopt_jax.core.paths import listed
from repopt_jax.core.scales import Scales
from repopt_jax.optim import chains
from repopt_jax.surgery.modules import join

Named = dict[str, np.ndarray]

# In float64 a right pair of optimizers agrees to about 1e-12; a wrong one differs in some leaf by far more.
AGREES = 1e-8
# Powers of ten from where clipping does nothing to where nothing is left but its threshold.
MAGNITUDES = range(-8, 9, 2)
# What is smaller than this share of the largest move is rounding.
ROUNDING = 1e-14
# Rules for optimizers that are not linear.
ADAPTIVE = frozenset({"scale_by_repopt_adam", "repopt_sign_mask"})


class Side:
    """An optimizer and the parameters that it starts from, as a compiled step (gradients, state, parameters)
    -> (updates, state, parameters) that training and probing share."""

    def __init__(self, tx: optax.GradientTransformation, params: Any):
        self.tx, self.params = tx, params
        self.names = chains.transformations(tx)
        self.start, self.treedef = paths.named_leaves(params)

        @jax.jit
        def step(gradients, state, params):
            updates, state = tx.update(gradients, state, params)
            return updates, state, optax.apply_updates(params, updates)

        self.step = step

    def updates(self, gradients: Iterable[Mapping[str, Any]]) -> Iterator[Named]:
        """The updates of successive steps, from a fresh state, by path."""
        params, state = self.params, self.tx.init(self.params)
        for by_path in gradients:
            tree = self.treedef.unflatten([jnp.asarray(by_path[path]) for path in self.start])
            updates, state, params = self.step(tree, state, params)
            yield {path: np.asarray(u) for path, u in paths.named_leaves(updates)[0].items()}

    def move(self, gradients: Iterable[Mapping[str, Any]]) -> Named:
        """The sum of the updates, by path."""
        return functools.reduce(lambda a, b: {p: a[p] + b[p] for p in a}, self.updates(gradients))


def optimizer_reasons(
    plain: Side,
    twin: Side,
    scales: Scales,
    gradients: Mapping[str, np.ndarray],
    *,
    steps: int,
    knows_branches: bool,
) -> list[str]:
    """Sentences that say what makes the two optimizers differ, the surest first; none if they agree.

    Args:
      plain: optimizer and parameters of the plain network; float64.
      twin: those of the CSLA network.
      scales: the scales, float64.
      gradients: of the plain network, by path: they give the made-up ones their size.
      steps: number of steps after which the optimizer must have moved something.
      knows_branches: whether the plain network's optimizer was given the branch tensors.
    """
    pair = _Pair(plain, twin, scales, gradients, steps)
    misplaced, unequal = _decay_reasons(pair)
    if misplaced or unequal:
        pair.shorten()
    return [*misplaced, *_gradient_reasons(pair, knows_branches), *unequal]


def branch_gradients(scales: Scales, gradients: Mapping[str, Any]) -> dict[str, Any]:
    """Gradients of the CSLA network's parameters, by its paths, from those of the plain network."""
    found = {}
    for path, g in gradients.items():
        if (entry := scales.entries.get(path)) is None:
            found[path] = g
        else:
            parts = entry.branches.branch_gradients(jnp.asarray(g), entry.vectors)
            found |= {_in_twin(path, name): np.asarray(part) for name, part in parts.items()}
    return found


def merged(scales: Scales, moves: Mapping[str, Any]) -> dict[str, Any]:
    """Moves of the plain network's parameters, by its paths, from those of the CSLA network: sum_b s_b *
    E_b(w_b)."""
    found = dict(moves)
    for path, entry in scales.entries.items():
        parts = {name: jnp.asarray(found.pop(_in_twin(path, name))) for name in entry.branches.names}
        found[path] = np.asarray(entry.branches.merge(parts, entry.vectors))
    return found


class _Gradients(NamedTuple):
    """Gradients of successive steps, by path, and those of the twin that correspond to them."""

    plain: list[Named]
    twin: list[Named]

    def times(self, factor: float) -> "_Gradients":
        return _Gradients(
            *([{path: factor * g for path, g in step.items()} for step in steps] for steps in self)
        )

    def first(self, count: int) -> "_Gradients":
        return _Gradients(self.plain[:count], self.twin[:count])


class _Pair:
    """The two sides, asked about corresponding gradients; answers are by the plain network's paths."""

    def __init__(self, plain: Side, twin: Side, scales: Scales, gradients: Mapping[str, Any], steps: int):
        self.plain, self.twin, self.scales = plain, twin, scales
        self.kernels = [path for path in self.plain.start if path in scales.entries]
        rng = np.random.default_rng(0)
        sizes = {path: float(np.sqrt(np.mean(np.square(g)))) for path, g in gradients.items()}
        mean_size = float(np.sqrt(np.mean(np.square(list(sizes.values()))))) or 1.0
        directions = {path: rng.normal(size=np.shape(g)) for path, g in gradients.items()}
        # No leaf without a gradient: one that is dead on this batch may be alive on the next.
        base = {path: d * max(sizes[path], 1e-3 * mean_size) for path, d in directions.items()}
        # The first step may have the rate 0, or only collect gradients.
        moved = (any(np.any(v) for v in u.values()) for u in self.plain.updates([base] * steps))
        self.until_moved = next((i for i, m in enumerate(moved, start=1) if m), steps)
        length = self.until_moved + 2
        # Of equal norms, clipping would be a constant factor.
        self.gradients = self.paired(
            [
                {path: np.roll(g, i) * (1.0, 0.3, 2.5)[i % 3] for path, g in base.items()}
                for i in range(length)
            ]
        )
        self.even = self.paired([{path: np.sign(d) * mean_size for path, d in directions.items()}] * length)
        self.none = self.gradients.times(0.0)
        self._rest()

    def paired(self, gradients: list[Named]) -> _Gradients:
        known: dict[int, Named] = {}
        for step in gradients:
            if id(step) not in known:
                known[id(step)] = branch_gradients(self.scales, step)
        return _Gradients(gradients, [known[id(step)] for step in gradients])

    def shorten(self) -> None:
        """Leaves out the steps after the first update: there, parameters that moved differently are decayed
        differently."""
        self.gradients, self.even, self.none = (
            g.first(self.until_moved) for g in (self.gradients, self.even, self.none)
        )
        self._rest()

    def _rest(self) -> None:
        self.at_rest = self.plain.move(self.none.plain)
        self.twin_at_rest_by_branch = self.twin.move(self.none.twin)
        self.twin_at_rest = merged(self.scales, self.twin_at_rest_by_branch)

    def response(self, gradients: _Gradients) -> Named:
        """What the gradients, and not the decay, do to the plain network."""
        return _minus(self.plain.move(gradients.plain), self.at_rest)

    def twin_response(self, gradients: _Gradients) -> Named:
        return _minus(merged(self.scales, self.twin.move(gradients.twin)), self.twin_at_rest)

    def precondition(self, path: str, g: Any) -> np.ndarray:
        """P(g), or g itself where the scales name no kernel."""
        if (entry := self.scales.entries.get(path)) is None:
            return g
        return np.asarray(entry.branches.precondition(jnp.asarray(g), entry.vectors))

    def differing(self, a: Named, b: Named) -> tuple[list[str], list[str]]:
        """Paths at which a and b differ: kernels that the scales name, and others."""
        floor = ROUNDING * max(
            np.abs(move).max() for moves in (a, b, self.at_rest) for move in moves.values()
        )
        wrong = [path for path in a if not _agree(a[path], b[path], floor)]
        return [p for p in wrong if p in self.kernels], [p for p in wrong if p not in self.kernels]


def _decay_reasons(pair: _Pair) -> tuple[list[str], list[str]]:
    """From what both do when there is no gradient: decay in a wrong place, and decay that is merely unequal,
    as with another learning rate."""
    kernels, others = pair.differing(pair.at_rest, pair.twin_at_rest)
    left_out = [path for path in kernels if _leaves_identity_out(pair, path)]
    rest = [path for path in kernels if path not in left_out]
    misplaced = []
    if rest and (_decays_multiplied(pair, rest) or _decay_comes_first(pair.plain.names)):
        misplaced.append(
            f"weight decay comes before the multiplier, which multiplies it too, at {listed(rest)}: put "
            "add_decayed_weights after repopt_mask"
        )
        rest = []
    if left_out:
        misplaced.append(
            "the identity's weight is not decayed in the twin, while the kernel that it is a part of is "
            f"decayed in the plain network, at {listed(left_out)}: a mask of vectors (ndim > 1) leaves it "
            "out, so let `twin_optimizer` decay all branch weights, or `optimizer` leave the kernels out"
        )
    if not rest and not others:
        return misplaced, []
    return misplaced, [
        "weight decay (the update that is left where gradients are zero) differs at "
        f"{listed([*rest, *others])}: give both optimizers the same coefficient, and masks that treat a "
        "kernel and its branches alike"
    ]


def _leaves_identity_out(pair: _Pair, path: str) -> bool:
    moves = {
        b: pair.twin_at_rest_by_branch[_in_twin(path, b.name)]
        for b in pair.scales.entries[path].branches.branches
    }
    unscaled = [np.any(move) for b, move in moves.items() if not b.has_scale]
    scaled = [np.any(move) for b, move in moves.items() if b.has_scale]
    return bool(unscaled) and not any(unscaled) and all(scaled) and bool(np.any(pair.at_rest[path]))


def _decays_multiplied(pair: _Pair, kernels: Sequence[str]) -> bool:
    """Whether the first decay is a multiple of P(K), and somewhere none of K."""
    for update in pair.plain.updates(pair.none.plain):
        if all(np.any(update[path]) for path in kernels):
            starts = {path: np.asarray(pair.plain.start[path]) for path in kernels}
            multiplied = [_parallel(update[path], pair.precondition(path, starts[path])) for path in kernels]
            plain = [_parallel(update[path], starts[path]) for path in kernels]
            return all(multiplied) and not all(plain)
    return False


def _decay_comes_first(names: Sequence[str]) -> bool:
    rules = [i for i, name in enumerate(names) if name == "repopt_mask"]
    return bool(rules) and "add_decayed_weights" in names[: rules[0]]


def _gradient_reasons(pair: _Pair, knows_branches: bool) -> list[str]:
    """From what both do beyond that when there is a gradient."""
    response, expected = pair.response(pair.gradients), pair.twin_response(pair.gradients)
    kernels, others = pair.differing(response, expected)
    if not kernels and not others:
        return []
    linear = _is_linear(pair.response, pair.gradients)
    twin_linear = _is_linear(pair.twin_response, pair.gradients)
    names = frozenset(pair.plain.names)
    if found := _clipping_reasons(pair, linear, twin_linear):
        hidden = "repopt_mask" in names and not _has_threshold(pair, pair.response)
        return [*found, _not_linear(pair.plain.names)] if hidden and not linear else found
    if linear and not twin_linear:
        return [
            "`twin_optimizer` is not linear in the gradient and `optimizer` is: they are of different "
            "kinds, so give the ordinary counterpart of `optimizer`"
        ]
    coupled = not linear and _is_coupled(pair)
    found = []
    if others and not (coupled and kernels):
        found.append(
            "the two optimizers also move parameters differently that the scales do not name "
            f"({listed(others)}): give `optimizer` and `twin_optimizer` the same learning rate, momentum and "
            "other settings"
        )
    if kernels and linear:
        found.append(_other_multiplier(pair, kernels, expected))
    elif kernels and "reparameterize" in names and not knows_branches:
        found.append(
            "reparameterize was made without the branch tensors and split the kernels by itself, and its "
            "inner optimizer looks at the weights: give `optimizer` as a function of the branch tensors, "
            "lambda weights: reparameterize(inner, scales, weights=weights)"
        )
    elif kernels and names & ADAPTIVE and not others:
        found.append(
            f"{listed(sorted(names & ADAPTIVE))} moves the kernels at {listed(kernels)} otherwise than "
            "their branches would move them: are its scales those that are checked, is its rule 'exact' "
            "(the published one is not, for scales of different signs), and is it applied to the plain "
            "gradient?"
        )
    elif kernels and not names & (ADAPTIVE | {"reparameterize"}):
        found.append(_not_elementwise(pair.plain.names) if coupled else _not_linear(pair.plain.names))
    return found or [
        f"`optimizer` moves the kernels at {listed(kernels)} otherwise than `twin_optimizer` moves their "
        "branches: are the settings of both and the scales the same?"
    ]


def _not_linear(names: Sequence[str]) -> str:
    return (
        f"the optimizer{_after_mask(names)} is not linear in the gradient: twice the gradient does not give "
        "twice the update, so it undoes a multiplier before it, as Adam does; use repopt_adamw, "
        "repopt_lion or reparameterize(inner, scales)"
    )


def _not_elementwise(names: Sequence[str]) -> str:
    return (
        f"the optimizer{_after_mask(names)} is not elementwise: changing one entry of a gradient changes "
        "the update of others, as layer-wise ratios, orthogonalised or factored moments (LAMB, Muon, "
        "Adafactor) do, and the branches would be normalised one by one; use reparameterize(inner, scales)"
    )


def _after_mask(names: Sequence[str]) -> str:
    """The transformations after `repopt_mask`, in brackets, if it is there."""
    if "repopt_mask" not in names:
        return ""
    return f" after repopt_mask ({', '.join(names[names.index('repopt_mask') + 1 :])})"


def _clipping_reasons(pair: _Pair, linear: bool, twin_linear: bool) -> list[str]:
    named = [name for name in pair.plain.names if name in chains.CLIPPING]
    twin_named = [name for name in pair.twin.names if name in chains.CLIPPING]
    by_branches = "clip_by_repopt_global_norm" in pair.plain.names
    clips = not linear and (bool(named) or by_branches or _has_threshold(pair, pair.response))
    twin_clips = not twin_linear and (bool(twin_named) or _has_threshold(pair, pair.twin_response))
    advice = "clip_by_repopt_global_norm(max_norm, scales) at the head of the chain"
    if clips and (named or not by_branches):
        what = (
            listed(named)
            or "the update follows the gradient up to a size and no further, as clipping makes it"
        )
        return [
            f"ordinary clipping ({what}) goes by the plain gradient, whose norm is not that of the branches: "
            f"clip with {advice}"
        ]
    if clips and not twin_clips:
        return [
            "only `optimizer` clips: give `twin_optimizer` clip_by_global_norm with the same norm, at the "
            "head of its chain"
        ]
    if twin_clips and not clips:
        what = f" ({listed(twin_named)})" if twin_named else ""
        return [f"only `twin_optimizer` clips{what}: give `optimizer` {advice}"]
    return []


def _other_multiplier(pair: _Pair, kernels: Sequence[str], expected: Named) -> str:
    gradients = [
        {path: pair.precondition(path, g) for path, g in step.items()} for step in pair.gradients.plain
    ]
    multiplied = pair.response(_Gradients(gradients, []))
    if all(_agree(multiplied[path], expected[path]) for path in kernels):
        return (
            f"`optimizer` does not multiply the gradients at {listed(kernels)}: repopt_mask(scales) is "
            "missing, or a mask hides these kernels from it"
        )
    return (
        f"`optimizer` moves the kernels at {listed(kernels)} by another multiple of their gradient than "
        "these scales give: is repopt_mask made of the scales that are checked, and is it there once?"
    )


def _is_linear(response: Callable[[_Gradients], Named], gradients: _Gradients) -> bool:
    """Whether twice the gradients give twice the response."""
    once, twice = response(gradients), response(gradients.times(2.0))
    return all(_agree(twice[path], 2 * once[path]) for path in once)


def _has_threshold(pair: _Pair, response: Callable[[_Gradients], Named]) -> bool:
    """Whether one entry's response is proportional to the gradients' size up to some size, and then constant:
    clipping. Adam's bends over many orders of magnitude."""
    reference = response(pair.even)
    path = max(reference, key=lambda p: np.abs(reference[p]).max())
    entry = np.unravel_index(np.argmax(np.abs(reference[path])), reference[path].shape)
    sizes = [10.0**k for k in MAGNITUDES]
    values = [float(response(pair.even.times(size))[path][entry]) for size in sizes]
    near = 1e-6  # the decay that was subtracted leaves 1e-7 of the smallest
    follows = [
        abs(v - values[0] * s / sizes[0]) <= near * abs(values[0] * s / sizes[0])
        for v, s in zip(values, sizes)
    ]
    stays = [abs(v - values[-1]) <= near * abs(values[-1]) for v in values]
    return sum(follows) > 1 and sum(stays) > 1 and all(f or s for f, s in zip(follows, stays))


def _is_coupled(pair: _Pair) -> bool:
    """Whether changing one entry of each kernel's gradient changes the move of other entries."""
    changed = []
    for by_path in pair.gradients.plain:
        by_path = {path: g.copy() for path, g in by_path.items()}
        for path in pair.kernels:
            by_path[path].flat[0] += 3 * np.linalg.norm(by_path[path])
        changed.append(by_path)
    before, after = pair.plain.move(pair.gradients.plain), pair.plain.move(changed)
    for path in before:
        if path in pair.kernels:
            after[path].flat[0] = before[path].flat[0]
    return any(not _agree(after[path], before[path]) for path in before)


def _in_twin(kernel: str, branch: str) -> str:
    """The path of a branch's tensor in the CSLA network."""
    return join(kernel.rpartition("/")[0], f"weights/{branch}")


def _agree(a: np.ndarray, b: np.ndarray, floor: float = 0.0) -> bool:
    """Equal up to rounding. Where a number is not finite nothing is said."""
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        return True
    return bool(np.abs(a - b).max() <= AGREES * max(np.abs(a).max(), np.abs(b).max()) + floor)


def _parallel(a: np.ndarray, b: np.ndarray) -> bool:
    return _agree(a, b * (np.vdot(a, b) / np.vdot(b, b)))


def _minus(a: Named, b: Named) -> Named:
    return {path: a[path] - b[path] for path in a}
