"""AdamW and Lion on the merged kernel end where they end on the branches: 50 steps in float64, scales of both
signs."""

import functools
import os
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiers
from twins import LAYERS, MIXING, assert_close, problem, relative

from repopt_jax.core.published import default_branches
from repopt_jax.core.scales import LayerScales, Scales
from repopt_jax.optim import adaptive
from repopt_jax.optim import sgd as optim

pytestmark = pytest.mark.once

EXACT = 1e-12  # relative, after 50 steps; measured: 1e-15 to 5e-15
WRONG = 1e-2  # measured: 0.02 (eps in the wrong place) to 2

LR, DECAY = 1e-2, 0.1

# Name -> (the ordinary optimizer of the branches, ours of the merged kernel).
RULES = {
    "adamw, eps 1e-8": (
        functools.partial(optax.adamw, LR, weight_decay=DECAY),
        functools.partial(adaptive.repopt_adamw, LR, weight_decay=DECAY),
    ),
    "adamw, eps 1e-3": (
        functools.partial(optax.adamw, LR, eps=1e-3, weight_decay=DECAY),
        functools.partial(adaptive.repopt_adamw, LR, eps=1e-3, weight_decay=DECAY),
    ),
    "nadamw, eps_root 1e-4": (
        functools.partial(optax.adamw, LR, 0.8, 0.95, eps_root=1e-4, nesterov=True),
        lambda scales: adaptive.repopt_adamw(LR, scales, b1=0.8, b2=0.95, eps_root=1e-4, nesterov=True),
    ),
    "lion": (
        functools.partial(optax.lion, LR, weight_decay=DECAY),
        functools.partial(adaptive.repopt_lion, LR, weight_decay=DECAY),
    ),
    "clipped adamw": (
        lambda: optax.chain(optax.clip_by_global_norm(0.3), optax.adamw(LR, eps=1e-3)),
        lambda scales: optax.chain(
            optim.clip_by_repopt_global_norm(0.3, scales), adaptive.repopt_adamw(LR, scales, eps=1e-3)
        ),
    ),
}


@functools.cache
def everything():
    return problem(LAYERS)


@functools.cache
def expected(rule):
    return everything().train_twin(RULES[rule][0]())


# Adam with its options, and Lion. The others have other numbers, and the clipping is in `test_optim`.
@pytest.mark.parametrize("rule", tiers.often(RULES, "nadamw, eps_root 1e-4", "lion"))
def test_every_layer_ends_as_its_branches_do(x64, rule):
    p = everything()
    assert relative({n: k["kernel"] for n, k in p.start().items() if n in p.weights}, expected(rule)) > 0.05
    assert_close(p.train(RULES[rule][1](p.scales)), expected(rule), EXACT)


def test_sign_mask_after_any_sign_rule(x64):
    placed = [name for name in LAYERS if name not in MIXING]
    p = problem(placed)

    def signum(*after):
        return optax.chain(optax.trace(0.9), optax.scale_by_sign(), *after, optax.scale_by_learning_rate(LR))

    end = p.train_twin(signum())
    assert_close(p.train(signum(adaptive.repopt_sign_mask(p.scales))), end, EXACT)
    assert relative(p.train(signum()), end) > WRONG
    assert (
        relative(p.train(signum(optim.repopt_mask(p.scales))), end) > WRONG
    )  # squares instead of absolute values


def eps_in_the_wrong_place(scales):
    """The common approximation: Adam's direction times sum |s|."""
    return optax.chain(
        optax.scale_by_adam(eps=1e-3),
        adaptive.repopt_sign_mask(scales),
        optax.add_decayed_weights(DECAY),
        optax.scale_by_learning_rate(LR),
    )


def mask_before_adam(scales):
    return optax.chain(optim.repopt_mask(scales), optax.adamw(LR, eps=1e-3, weight_decay=DECAY))


def published(scales):
    return adaptive.repopt_adamw(LR, scales, eps=1e-3, weight_decay=DECAY, rule="published")


@pytest.mark.parametrize("wrong", [eps_in_the_wrong_place, mask_before_adam, published])
def test_wrong_rules_are_seen(x64, wrong):
    name = "3x3+1x1+identity"
    p = problem([name])
    end = p.train_twin(RULES["adamw, eps 1e-3"][0]())
    assert relative(p.train(wrong(p.scales)), end) > WRONG


def positive(rng, branches):
    return {name: jnp.asarray(rng.uniform(0.5, 2, branches.vector_shape)) for name in branches.names}


def test_the_published_rule_holds_for_scales_of_one_sign_only(x64):
    """Relative distance to the branches: 1e-7 where all scales are positive, 0.3 where signs differ."""
    name = "3x3+1x1+identity"
    rule = functools.partial(adaptive.repopt_adamw, LR, weight_decay=DECAY, rule="published")
    p = problem([name], draw=positive)
    assert relative(p.train(rule(p.scales)), p.train_twin(RULES["adamw, eps 1e-8"][0]())) < 1e-5
    p = problem([name])
    assert relative(p.train(rule(p.scales)), p.train_twin(RULES["adamw, eps 1e-8"][0]())) > 0.1


def test_the_published_rule_in_its_own_words(x64):
    """g * M into both moments, the direction times M, M = s + [centre] t + [centre diagonal], signed."""
    rng = np.random.default_rng(0)
    branches = default_branches((3, 3, 4, 4))
    vectors = {n: jnp.asarray(rng.normal(size=4)) for n in branches.names}
    big_m = np.broadcast_to(vectors["3x3"], (3, 3, 4, 4)).copy()
    big_m[1, 1] += np.asarray(vectors["1x1"]) + np.eye(4)
    p = jnp.zeros((3, 3, 4, 4))
    ours = adaptive.scale_by_repopt_adam(Scales({"k": LayerScales(branches, vectors)}), rule="published")
    theirs = optax.scale_by_adam()
    state, other = ours.init({"k": p}), theirs.init({"k": p})
    for _ in range(3):
        g = jnp.asarray(rng.normal(size=p.shape))
        found, state = ours.update({"k": g}, state)
        direction, other = theirs.update({"k": g * big_m}, other)
        np.testing.assert_allclose(found["k"], direction["k"] * big_m, rtol=1e-10)


def test_what_has_no_multiplier_is_refused_where_it_must_be():
    scales = problem(["average pooling"], dtype=jnp.float32).scales
    with pytest.raises(
        ValueError, match=r"average pooling/kernel mix taps .* `repopt_lion`, or `reparameterize`"
    ):
        adaptive.repopt_sign_mask(scales)
    with pytest.raises(ValueError, match=r"'published' has no form .* average pooling/kernel"):
        adaptive.repopt_adamw(LR, scales, rule="published")
    with pytest.raises(ValueError, match="`rule` is 'exakt': it must be one of exact, published"):
        adaptive.repopt_adamw(LR, scales, rule="exakt")


def test_plain_leaves_move_as_in_optax(x64):
    params = {"a": jnp.arange(4.0), "b": {"c": jnp.ones((2, 3))}}
    none = Scales({})
    for ours, theirs in ((adaptive.repopt_adamw, optax.adamw), (adaptive.repopt_lion, optax.lion)):
        a, b = ours(LR, none), theirs(LR)
        x, y = a.init(params), b.init(params)
        for _ in range(3):
            grads = jax.tree.map(lambda p: jnp.sin(p + 1), params)
            found, x = a.update(grads, x, params)
            wanted, y = b.update(grads, y, params)
            chex.assert_trees_all_close(found, wanted, rtol=1e-14)


RELEASED = Path(os.environ.get("REPOPT_TEST_DATA", "")) / "scales" / "RepOpt-VGG-B1-scales.pth"


@pytest.mark.skipif(
    not RELEASED.is_file(), reason="REPOPT_TEST_DATA names no folder with the released scales"
)
@pytest.mark.parametrize("rule", ["nesterov", *RULES])
def test_released_scales(x64, rule):
    """RepOpt-VGG-B1's searched scales, every layer, 16 channels each: those where signs differ come first."""
    from repopt_jax.interop import load_torch_scales

    layers, vectors = {}, {}
    for path, entry in load_torch_scales(RELEASED).entries.items():
        names = entry.branches.names
        stacked = np.stack([entry.vectors[n] for n in names])
        order = np.argsort(np.sign(stacked).sum(0), kind="stable")[:16]
        has_identity = "identity" in names
        small = default_branches((3, 3, 16 if has_identity else 3, 16))
        layers[path] = (small, (4, 4))
        vectors[path] = {n: jnp.asarray(v[order], jnp.float64) for n, v in zip(names, stacked)}
        assert small.names == names
    assert len(layers) == 28
    assert sum(int((v["3x3"] < 0).sum()) for v in vectors.values()) >= 50  # of 85
    p = problem(layers, draw=vectors, layers=layers)
    if rule == "nesterov":
        ordinary = functools.partial(optax.chain, optax.add_decayed_weights(1e-2), optax.sgd(0.1, 0.9, True))
        ours = lambda scales: optax.chain(optim.repopt_mask(scales), ordinary())  # noqa: E731
    else:
        ordinary, ours = RULES[rule]
    assert_close(p.train(ours(p.scales)), p.train_twin(ordinary()), EXACT)
