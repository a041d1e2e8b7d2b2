"""The normalised mask: each layer's multiplier over its mean, and what it is equal to."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiers
from flax import nnx
from training import tiny_config
from twins import LAYERS, MIXING, assert_close, jacobian, problem, relative

from repopt_jax import check_optimizer, depth_scales, gradient_multipliers, train, verify_equivalence
from repopt_jax.core.branches import Branch, BranchSet, Frequency, Kernel
from repopt_jax.core.scales import LayerScales, Scales
from repopt_jax.models import VGGVariant, vgg
from repopt_jax.optim import OptimizerError, Reason
from repopt_jax.optim.sgd import clip_by_repopt_global_norm, repopt_mask, repopt_sgd
from repopt_jax.train.build import config_check
from repopt_jax.train.optimizer import make_optimizer
from repopt_jax.verify import scale_by_layer_means

pytestmark = pytest.mark.once

EXACT = 1e-12  # relative, float64, 50 steps; measured: 9e-16 at most
WRONG = 1e-2  # measured: without the division at least 0.029, with the decay divided as well at least 0.43
RATE, DECAY = 0.2, 1e-2


def small(rng, branches):
    """Scales of both signs, of means well below 1, but not so small that training becomes unstable."""

    def vector():
        shape = branches.vector_shape
        return jnp.asarray(rng.uniform(0.3, 0.7, shape) * rng.choice([-1, 1], shape))

    return {name: vector() for name in branches.names}


def ordinary(*first):
    return optax.chain(*first, optax.add_decayed_weights(DECAY), optax.sgd(RATE, 0.9, nesterov=True))


def slow_mean(branches, vectors):
    """trace(J J^T) / size of K, of each layer of a stack, from the Jacobian made entry by entry."""
    squares = np.square(jacobian(branches, vectors)).sum(axis=1)
    return squares.reshape(*branches.stack, -1).mean(axis=-1)


def along(mean, leaf):
    return np.asarray(mean).reshape(np.shape(mean) + (1,) * (leaf.ndim - np.ndim(mean)))


@functools.cache
def setting(name):
    p = problem([name], draw=small)
    return p, slow_mean(p.entry(name).branches, p.entry(name).vectors)


def divided(name, mean):
    """The branches' gradients over the mean of their layer."""

    def update(updates, state, params=None):
        return updates | {name: {b: g / along(mean, g) for b, g in updates[name].items()}}, state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


# Every kind of branch is among these, and three axes, none, dilation, groups, stacks and both layouts.
OFTEN = (
    *("3-D", "dense", "ACNet + dilated", "stacked, PyTorch layout", "fixed 1x1, then 3x3"),
    *("stacked averages", "inside maps"),
)


@pytest.mark.parametrize("name", tiers.often(LAYERS, *OFTEN))
def test_it_is_a_learning_rate_for_each_layer(x64, name):
    p, mean = setting(name)
    expected = p.train_twin(ordinary(divided(name, mean)))
    assert_close(p.train(ordinary(repopt_mask(p.scales, normalise=True))), expected, EXACT)
    assert relative(p.train(ordinary(repopt_mask(p.scales))), expected) > WRONG


@pytest.mark.parametrize("name", ["3x3+1x1+identity", "average pooling"])
def test_the_decay_is_not_divided(x64, name):
    """lr / c and decay * c on the branches; with lr / c alone the decay would be divided as well."""
    p, mean = setting(name)
    found = p.train(repopt_sgd(RATE, p.scales, weight_decay=DECAY, normalise=True))

    def rates(decay):
        own = optax.chain(optax.add_decayed_weights(decay), optax.sgd(RATE / float(mean), 0.9, nesterov=True))
        return optax.multi_transform({"layer": own, "rest": ordinary()}, {name: "layer", "other": "rest"})

    assert_close(found, p.train_twin(rates(DECAY * float(mean))), EXACT)
    assert relative(found, p.train_twin(rates(DECAY))) > WRONG


@pytest.mark.parametrize("name", ["3x3+1x1+identity", "inside maps"])
def test_it_is_the_ordinary_optimizer_on_scales_over_the_root(x64, name):
    """Scales s / sqrt(c), the identity's too, on weights that are sqrt(c) times as large."""
    p, mean = setting(name)
    root = float(np.sqrt(mean))
    scaled = p._replace(weights={name: {b: root * w for b, w in p.weights[name].items()}})

    class Scaled(type(p)):
        def merged(self, weights):
            return super().merged({name: {b: w / root for b, w in weights[name].items()}})

    expected = Scaled(*scaled).train_twin(ordinary())
    assert_close(p.train(ordinary(repopt_mask(p.scales, normalise=True))), expected, EXACT)


@pytest.mark.parametrize("name", tiers.often(LAYERS, *OFTEN))
def test_the_mean_is_that_of_the_multiplier(x64, name):
    """Of the dense multipliers where there are any, else of the trace of P; one for each layer of a stack."""
    p, mean = setting(name)
    branches, vectors = p.entry(name).branches, p.entry(name).vectors
    np.testing.assert_allclose(branches.mean_multiplier(vectors, dtype=jnp.float64), mean, rtol=EXACT)
    if name in MIXING:
        with pytest.raises(ValueError, match="`power` is 1"):
            branches.mean_multiplier(vectors, power=1)
        return
    params = {name: {"kernel": jnp.zeros(branches.kernel)}}
    for power in (1, 2):
        m = gradient_multipliers(params, p.scales, power)[name]["kernel"]
        axes = tuple(range(branches.stacked, m.ndim))
        found = gradient_multipliers(params, p.scales, power, normalise=True)[name]["kernel"]
        np.testing.assert_allclose(found, m / m.mean(axes, keepdims=True), rtol=EXACT)


def test_energy_is_known_without_embedding():
    """What branches say of themselves against every basis vector embedded; the general form serves a class
    that says nothing."""
    sets = [bs for bs, _ in LAYERS.values()]
    sets += [BranchSet((3, 3, 2, 4), (Kernel((3, 3)), Frequency()))]
    for branches in sets:
        for branch in branches.branches:
            known = branch.energy(branches.canonical)
            np.testing.assert_allclose(known, Branch.energy(branch, branches.canonical), rtol=1e-5)
            assert known.shape == (branches.out,)

    class TwiceTheKernel(Kernel):
        places = False
        energy = Branch.energy

        def embed(self, w, kernel):
            return 2 * super().embed(w, kernel)

    branches = BranchSet((3, 2, 2), (TwiceTheKernel((1,)),))
    vectors = {"1": jnp.array([1.0, 3.0])}

    @jax.jit  # the numbers are found while an update is traced
    def mean(vectors):
        return branches.mean_multiplier(vectors)

    np.testing.assert_allclose(mean(vectors), 4 * (2 * 1 + 2 * 9) / 12, rtol=1e-6)


def test_nothing_but_the_vectors_is_stored():
    p = problem(["3x3+1x1+identity"], dtype=jnp.float32)
    states = [repopt_mask(p.scales, normalise=n).init(p.start()) for n in (False, True)]
    assert jax.tree.structure(states[0]) == jax.tree.structure(states[1])
    assert all(leaf.shape == (4,) for leaf in jax.tree.leaves(states[1]))


def test_half_precision_keeps_its_dtype():
    p = problem(["3x3+1x1+identity"], draw=small, dtype=jnp.float32)
    g = {"3x3+1x1+identity": {"kernel": jnp.full((3, 3, 4, 4), 1e-3, jnp.bfloat16)}, "other": jnp.zeros(3)}
    tx = repopt_mask(p.scales, normalise=True)
    (found, _) = tx.update(g, tx.init(p.start()))
    kernel = found["3x3+1x1+identity"]["kernel"]
    assert kernel.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(kernel, np.float32).mean(), 1e-3, rtol=0.01)


def test_check_optimizer_knows_it():
    """It passes as it is; what is wrong with another mask is wrong with this one."""
    p = problem(["3x3+1x1+identity", "stacked", "average pooling"], draw=small, dtype=jnp.float32)
    mask = repopt_mask(p.scales, normalise=True)
    clip = clip_by_repopt_global_norm(1.0, p.scales)
    for tx in (ordinary(mask), ordinary(clip, mask), optax.MultiSteps(ordinary(mask), 2)):
        check_optimizer(tx, p.scales, p.start())
    wrong = {
        Reason.DECAY_BEFORE_RULE: optax.chain(optax.add_decayed_weights(DECAY), mask, optax.sgd(RATE)),
        Reason.CLIPPING: optax.chain(optax.clip_by_global_norm(1.0), mask, optax.sgd(RATE)),
        Reason.NONLINEAR: optax.chain(mask, optax.adam(RATE)),
    }
    for reason, tx in wrong.items():
        with pytest.raises(OptimizerError) as error:
            check_optimizer(tx, p.scales, p.start())
        assert reason in error.value.reasons


@pytest.fixture(scope="module")
def network():
    variant = VGGVariant("small", (2, 1, 1, 1), (4, 4, 4, 4, 4), (1, 1, 2, 1, 2))
    model = vgg(variant, num_classes=3, in_channels=2, rngs=nnx.Rngs(0))
    rng = np.random.default_rng(0)
    scales = jax.tree.map(
        lambda v: v * jnp.asarray(rng.uniform(0.3, 1, v.shape), jnp.float32), depth_scales(model)
    )
    batches = [
        {"image": rng.normal(size=(8, 8, 8, 2)).astype(np.float32), "label": rng.integers(0, 3, 8)}
        for _ in range(4)
    ]
    return model, scales, batches


class TestVerify:
    def test_the_default_optimizers(self, network):
        model, scales, batches = network
        result = verify_equivalence(model, scales, batches, normalise=True, rngs=nnx.Rngs(0))
        assert result.equivalent, result.reasons
        assert result.max_difference < EXACT

    def test_own_optimizers(self, network):
        """The twin's part comes behind the clipping; without it the reason is named."""
        model, scales, batches = network

        def run(*twin):
            return verify_equivalence(
                model,
                scales,
                batches,
                optimizer=optax.chain(
                    clip_by_repopt_global_norm(0.5, scales),
                    repopt_sgd(0.05, scales, weight_decay=DECAY, normalise=True),
                ),
                twin_optimizer=optax.chain(
                    optax.clip_by_global_norm(0.5),
                    *twin,
                    optax.add_decayed_weights(DECAY),
                    optax.sgd(0.05, 0.9, nesterov=True),
                ),
                rngs=nnx.Rngs(0),
            )

        result = run(scale_by_layer_means(scales))
        assert result.equivalent, result.reasons
        missing = run()
        assert missing.max_difference > WRONG
        assert "verify.scale_by_layer_means(scales)" in missing.reasons[0]

    def test_normalise_is_not_for_own_optimizers(self, network):
        model, scales, batches = network
        with pytest.raises(ValueError, match="`normalise` is for the default optimizers"):
            verify_equivalence(
                model,
                scales,
                batches,
                optimizer=repopt_sgd(0.1, scales),
                twin_optimizer=optax.sgd(0.1),
                normalise=True,
                rngs=nnx.Rngs(0),
            )


def config(**fields):
    given = train.Config(scales="depth", batch_size=16, normalise=True, **fields)
    given.model.mode = "repopt"
    return given


class TestTrainer:
    def test_where_it_means_something(self):
        train.validate(config())
        train.validate(config(rules="multiplier"))
        adam, plain = config(), config()
        adam.optim.name = "adamw"
        plain.model.mode, plain.scales = "plain", ""
        for wrong, where in (
            (adam, "`optim.name`='adamw'"),
            (plain, "`model.mode`='plain'"),
            (config(rules="init"), "`rules`='init'"),
        ):
            with pytest.raises(ValueError, match=f"`normalise`=True does nothing with {where}"):
                train.validate(wrong)

    def test_a_config_is_verified_with_its_clipping(self, digits):
        given = tiny_config("repopt", digits, scales="depth", normalise=True, optim__clip_norm=0.5)
        result = config_check(given).run(steps=3)
        assert result.equivalent, result.reasons

    def test_the_optimizer_of_a_run_divides(self):
        p = problem(["3x3+1x1+identity"], draw=small, dtype=jnp.float32)
        kernel = p.start()["3x3+1x1+identity"]
        scales = Scales({"kernel": LayerScales(*vars(p.entry("3x3+1x1+identity")).values())})
        moves = []
        for normalise in (False, True):
            tx = make_optimizer(
                train.OptimConfig(weight_decay=0.0),
                lambda step: 0.1,
                batch_size=16,
                decayed=None,
                scales=scales,
                normalise=normalise,
            )
            update, _ = tx.update(jax.tree.map(jnp.ones_like, kernel), tx.init(kernel), kernel)
            moves.append(float(update["kernel"].mean()))
        mean = scales.entries["kernel"].branches.mean_multiplier(scales.entries["kernel"].vectors)
        np.testing.assert_allclose(moves[0] / moves[1], mean, rtol=1e-5)
        np.testing.assert_allclose(moves[1], -0.1 * 1.9, rtol=1e-5)
