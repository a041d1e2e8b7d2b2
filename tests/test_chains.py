"""What is seen of an Optax chain, and the warning of clipping that breaks the equivalence."""

import functools
import warnings

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx

from repopt_jax.core.branches import default_branches
from repopt_jax.core.scales import Scales
from repopt_jax.optim import chains
from repopt_jax.optim.reparameterize import reparameterize
from repopt_jax.optim.sgd import clip_by_repopt_global_norm, repopt_mask, repopt_sgd

SCALES = Scales.ones({"conv/kernel": default_branches((3, 3, 2, 2))})
PARAMS = {"conv": {"kernel": jnp.ones((3, 3, 2, 2))}, "head": {"bias": jnp.ones(2)}}


def clip():
    return optax.clip_by_global_norm(1.0)


def mask():
    return repopt_mask(SCALES)


def everywhere(params):
    return jax.tree.map(lambda _: True, params)


def heads_only(params):
    return {"conv": {"kernel": False}, "head": {"bias": True}}


def labels(params):
    return {"conv": {"kernel": "kernel"}, "head": {"bias": "bias"}}


def my_wrapper(inner):
    def update(updates, state, params=None):
        return inner.update(updates, state, params)

    return optax.GradientTransformation(inner.init, update)


# -- names


@pytest.mark.parametrize(
    ("make", "names"),
    [
        (lambda: optax.trace(0.9), ("trace",)),
        (
            lambda: optax.chain(clip(), mask(), optax.add_decayed_weights(0.1), optax.sgd(0.1, 0.9)),
            ("clip_by_global_norm", "repopt_mask", "add_decayed_weights", "trace", "scale"),
        ),
        (
            lambda: repopt_sgd(0.1, SCALES, momentum=None),
            ("repopt_mask", "add_decayed_weights", "identity", "scale"),
        ),
        (lambda: optax.adamw(0.1), ("scale_by_adam", "add_decayed_weights", "scale")),
        (
            lambda: optax.masked(optax.chain(clip(), optax.sgd(0.1)), everywhere),
            ("clip_by_global_norm", "identity", "scale"),
        ),
        (lambda: optax.MultiSteps(optax.sgd(0.1), 2), ("identity", "scale")),
        (
            lambda: optax.MultiSteps(optax.adam(0.1), 2).gradient_transformation(),
            ("scale_by_adam", "scale"),
        ),
        (lambda: optax.apply_if_finite(optax.sgd(0.1, 0.9), 3), ("trace", "scale")),
        (
            lambda: optax.named_chain(("a", clip()), ("b", optax.scale(2.0))),
            ("clip_by_global_norm", "scale"),
        ),
        (
            lambda: optax.partition({"kernel": optax.sgd(0.1, 0.9), "bias": optax.adam(0.1)}, labels),
            ("trace", "scale", "scale_by_adam", "scale"),
        ),
        (lambda: optax.inject_hyperparams(optax.sgd)(learning_rate=0.1, momentum=0.9), ("trace", "scale")),
        (
            lambda: optax.inject_hyperparams(optax.adam)(optax.linear_schedule(0.1, 0.2, 3)),
            ("scale_by_adam", "scale"),
        ),
        (lambda: my_wrapper(optax.sgd(0.1, 0.9)), ("trace", "scale")),
        (lambda: reparameterize(optax.chain(clip(), optax.sgd(0.1)), SCALES), ("reparameterize",)),
        (lambda: optax.chain(optax.zero_nans(), optax.centralize()), ("zero_nans", "centralize")),
    ],
)
def test_names(make, names):
    assert chains.transformations(make()) == names


class Unhelpful:
    """Fails whenever it is looked into."""

    def __getattr__(self, name):
        raise RuntimeError(name)

    def __call__(self):
        return None


@pytest.mark.parametrize(
    "make",
    [
        lambda: None,
        lambda: 3,
        lambda: print,
        Unhelpful,
        lambda: functools.partial(print, 1),
        lambda: my_wrapper(optax.GradientTransformation(Unhelpful(), Unhelpful())),
        lambda: optax.inject_hyperparams(optax.masked)(optax.sgd(0.1), everywhere),
    ],
)
def test_names_never_raise(make):
    assert isinstance(chains.transformations(make()), tuple)


# -- warning


def run(tx, steps=1):
    state = tx.init(PARAMS)
    for _ in range(steps):
        _, state = tx.update(PARAMS, state, PARAMS)


def warned(act):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        act()
    assert all(w.category is chains.ClippingWarning for w in caught)
    return caught


CLIPPED = {
    "before": lambda: optax.chain(clip(), mask(), optax.sgd(0.1)),
    "after": lambda: optax.chain(mask(), optax.sgd(0.1), clip()),
    "inner chain": lambda: optax.chain(clip(), optax.chain(mask(), optax.sgd(0.1))),
    "clip in a chain": lambda: optax.chain(optax.chain(optax.zero_nans(), clip()), mask()),
    "ready-made": lambda: optax.chain(clip(), repopt_sgd(0.1, SCALES)),
    "by entry": lambda: optax.chain(optax.clip(1.0), mask()),
    "by block": lambda: optax.chain(optax.clip_by_block_rms(1.0), mask()),
    "adaptive": lambda: optax.chain(optax.adaptive_grad_clip(0.1), mask()),
    "named": lambda: optax.named_chain(("clip", clip()), ("mask", mask())),
    "masked": lambda: optax.masked(optax.chain(clip(), mask()), everywhere),
    "around masked": lambda: optax.chain(clip(), optax.masked(mask(), everywhere)),
    "around partition": lambda: optax.chain(
        clip(), optax.partition({"kernel": mask(), "bias": optax.sgd(0.1)}, labels)
    ),
    "MultiSteps": lambda: optax.MultiSteps(optax.chain(clip(), mask()), 2),
    "apply_if_finite": lambda: optax.apply_if_finite(optax.chain(clip(), mask()), 2),
    "injected": lambda: optax.inject_hyperparams(lambda rate: optax.chain(clip(), repopt_sgd(rate, SCALES)))(
        rate=0.1
    ),
}


@pytest.mark.parametrize("name", CLIPPED)
def test_clipping_is_warned_about_once(name):
    tx = CLIPPED[name]()
    (warning,) = warned(lambda: run(tx, steps=3))
    text = str(warning.message)
    assert "clip_by_repopt_global_norm(max_norm, scales)" in text
    assert "in one chain with repopt_mask" in text
    assert warned(lambda: run(tx)) == []
    # Another chain of the same parts is another mistake.
    assert len(warned(lambda: run(CLIPPED[name]()))) == 1


def test_the_warning_names_the_clipping_and_the_line():
    tx = optax.chain(clip(), optax.clip(3.0), mask())
    (warning,) = warned(lambda: run(tx))
    assert str(warning.message).startswith("clip_by_global_norm, clip in one chain")
    assert warning.filename == __file__


def test_under_jit_and_in_nnx_optimizer():
    tx = CLIPPED["before"]()
    step = jax.jit(lambda state: tx.update(PARAMS, state, PARAMS))
    state = tx.init(PARAMS)
    assert len(warned(lambda: step(state))) == 1
    assert warned(lambda: step(state)) == []

    model = nnx.Dict(conv=nnx.Conv(2, 2, (3, 3), rngs=nnx.Rngs(0)))
    optimizer = nnx.Optimizer(model, CLIPPED["ready-made"](), wrt=nnx.Param)
    gradients = jax.tree.map(jnp.ones_like, nnx.state(model, nnx.Param))
    assert len(warned(lambda: nnx.jit(lambda m, o: o.update(m, gradients))(model, optimizer))) == 1


@pytest.mark.parametrize(
    "make",
    [
        lambda: repopt_sgd(0.1, SCALES),
        lambda: optax.chain(clip_by_repopt_global_norm(1.0, SCALES), repopt_sgd(0.1, SCALES)),
        lambda: optax.chain(clip(), optax.sgd(0.1)),
        lambda: optax.chain(optax.masked(clip(), heads_only), mask()),
        lambda: optax.chain(optax.partition({"kernel": mask(), "bias": clip()}, labels), optax.sgd(0.1)),
        lambda: reparameterize(optax.chain(clip(), optax.sgd(0.1)), SCALES),
        lambda: optax.chain(optax.zero_nans(), mask(), optax.add_noise(0.1, 0.5, key=0)),
    ],
)
def test_no_warning_without_clipping_of_the_kernels(make):
    assert warned(lambda: run(make(), steps=2)) == []


def test_quiet_uses_no_warning_up():
    tx = CLIPPED["before"]()
    with chains.quiet():
        assert warned(lambda: run(tx)) == []
    assert len(warned(lambda: run(tx))) == 1


def test_an_eager_step_looks_into_a_chain_once(monkeypatch):
    looked = []
    inside = chains._walk
    monkeypatch.setattr(chains, "_walk", lambda *a, **k: looked.append(1) or inside(*a, **k))
    tx = optax.chain(optax.zero_nans(), mask(), optax.sgd(0.1))
    run(tx)
    first = len(looked)
    assert first > 0
    run(tx, steps=3)
    assert len(looked) == first
