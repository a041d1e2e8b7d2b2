"""The probes of `check_optimizer`: chains of many shapes that are exact, and chains with each fault."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax import contrib

import repopt_jax
from repopt_jax.core import paths
from repopt_jax.core.branches import AfterPointwise, Average, BranchSet, Identity, Kernel, Local
from repopt_jax.core.parametrization import Parametrization
from repopt_jax.core.published import default_branches, orepa
from repopt_jax.core.scales import LayerScales, Scales
from repopt_jax.core.structure import Geometry
from repopt_jax.optim import check
from repopt_jax.optim.adaptive import repopt_adamw, repopt_lion, repopt_sign_mask, scale_by_repopt_adam
from repopt_jax.optim.check import Reason
from repopt_jax.optim.reparameterize import reparameterize
from repopt_jax.optim.sgd import clip_by_repopt_global_norm, gradient_multipliers, repopt_mask, repopt_sgd

PLACED = {
    "a/kernel": default_branches((3, 3, 4, 4)),
    "b/kernel": default_branches((2, 3, 3, 1, 4), groups=4, stacked=1),
    "c/kernel": default_branches((4, 4)),
}
HEAD = LayerScales(default_branches((4, 3)), {"dense": jnp.ones(3)})
FIXED = AfterPointwise((3, 3), np.arange(1.0, 9).reshape(2, 2, 2))
MIXING = {
    "a/kernel": BranchSet((3, 3, 4, 4), (Kernel((3, 3)), Average(), Identity())),
    "b/kernel": BranchSet((2, 3, 4, 2), (Kernel((3,)), Average()), stacked=1),
    "c/kernel": BranchSet((4, 2, 3, 3), (Kernel((3, 3)), FIXED), groups=2, layout="oi..."),
}


# The outputs of a map share the tensors of its branches: two maps are compared, where there are two.
MAPS = {
    "a/kernel": BranchSet((3, 3, 1, 18), (Kernel((3, 3)), Local((1, 1)), Local((3, 3))), 2),
    "b/kernel": BranchSet((2, 3, 2, 6), (Kernel((3,)), Local((3,))), stacked=1),
    "c/kernel": BranchSet((2, 2, 1, 4), (Kernel((2, 2)), Local((3, 3)))),
}


def scales_of(sets, seed=0):
    """Random scales of both signs."""
    rng = np.random.default_rng(seed)
    return Scales(
        {
            path: LayerScales(
                b, {n: jnp.asarray(rng.normal(size=b.vector_shape) + 0.2, jnp.float32) for n in b.names}
            )
            for path, b in sets.items()
        }
    )


def params_of(scales, *, state):
    """Parameters as a plain dict, or as an `nnx.State`."""
    rng = np.random.default_rng(1)
    kernels = {
        path: jnp.asarray(0.1 * rng.normal(size=entry.branches.kernel), jnp.float32)
        for path, entry in scales.entries.items()
    }
    tree = paths.nested(kernels | {"norm/scale": jnp.ones(4), "head/kernel": jnp.ones((4, 3))})
    if not state:
        return tree
    from flax import nnx

    model = nnx.Dict(
        {part: nnx.Dict({n: nnx.Param(v) for n, v in leaves.items()}) for part, leaves in tree.items()}
    )
    return nnx.state(model, nnx.Param)


SETTINGS = {
    "dict": (scales_of(PLACED), False),
    "State": (scales_of(PLACED), True),
    "mixing": (scales_of(MIXING), False),
    "mixing State": (scales_of(MIXING), True),
    "maps": (scales_of(MAPS), False),
    "without a search": (Scales.ones(PLACED), False),
}


def kernels(params):
    return paths.map_named(lambda path, _: path[0] in "abc", params)


def rest(params):
    return paths.map_named(lambda path, _: path[0] not in "abc", params)


def labels(params):
    return paths.map_named(lambda path, _: "kernel" if path[0] in "abc" else "rest", params)


def matrices(params):
    return jax.tree.map(lambda p: p.ndim > 1, params)


def warm_up(peak=0.1):
    return optax.linear_schedule(0.0, peak, 4)


def decayed(*transformations):
    return optax.chain(*transformations, optax.add_decayed_weights(1e-3), optax.sgd(0.1, 0.9, nesterov=True))


def own_mask(scales):
    """The mask of somebody who writes it with `gradient_multipliers`."""

    def update(updates, state, params=None):
        return jax.tree.map(jnp.multiply, updates, gradient_multipliers(updates, scales)), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


GOOD = {
    "sgd": lambda s: optax.chain(repopt_mask(s), optax.sgd(0.1)),
    "momentum and decay": lambda s: optax.chain(
        repopt_mask(s), optax.add_decayed_weights(5e-2), optax.sgd(1e-3, 0.9, accumulator_dtype=jnp.bfloat16)
    ),
    "Nesterov": lambda s: decayed(repopt_mask(s)),
    "momentum first": lambda s: optax.chain(optax.trace(0.9), repopt_mask(s), optax.scale(-0.1)),
    "repopt_sgd": lambda s: repopt_sgd(warm_up(), s, weight_decay=1e-2, mask=matrices),
    "repopt_adamw": lambda s: repopt_adamw(1e-3, s, weight_decay=0.1),
    "repopt_adamw, eps": lambda s: repopt_adamw(1e-3, s, eps=0.1, mu_dtype=jnp.bfloat16, nesterov=True),
    "adam by hand": lambda s: optax.chain(
        scale_by_repopt_adam(s),
        optax.add_decayed_weights(1e-2, matrices),
        optax.scale_by_learning_rate(warm_up(1e-3)),
    ),
    "repopt_lion": lambda s: repopt_lion(1e-4, s),
    "clipped sgd": lambda s: decayed(clip_by_repopt_global_norm(1.0, s), repopt_mask(s)),
    "clipped adam": lambda s: optax.chain(clip_by_repopt_global_norm(0.1, s), repopt_adamw(1e-3, s)),
    "clipped lion": lambda s: optax.chain(clip_by_repopt_global_norm(0.1, s), repopt_lion(1e-3, s)),
    "reparameterize(sgd)": lambda s: reparameterize(decayed(), s),
    "reparameterize(adam)": lambda s: reparameterize(optax.chain(optax.clip(0.1), optax.adamw(1e-3)), s),
    "reparameterize(lamb)": lambda s: reparameterize(optax.lamb(1e-3, weight_decay=0.1), s),
    "reparameterize(adafactor)": lambda s: reparameterize(optax.adafactor(1e-3), s),
    "reparameterize(muon)": lambda s: reparameterize(contrib.muon(1e-3), s),
    "reparameterize(prodigy)": lambda s: reparameterize(contrib.prodigy(), s),
    "decay after reparameterize": lambda s: optax.chain(
        reparameterize(optax.scale_by_adam(), s, keep_weights=False),
        optax.add_decayed_weights(1e-2),
        optax.scale_by_learning_rate(1e-3),
    ),
    "masked": lambda s: optax.chain(optax.masked(repopt_mask(s), kernels), optax.sgd(0.1, 0.9)),
    "partly masked": lambda s: decayed(
        optax.masked(repopt_mask(s), lambda p: paths.map_named(lambda path, _: path[0] != "a", p))
    ),
    "clipping of the rest": lambda s: optax.chain(
        optax.masked(optax.clip_by_global_norm(1.0), rest), decayed(repopt_mask(s))
    ),
    "partition": lambda s: optax.partition(
        {"kernel": repopt_adamw(1e-3, s), "rest": optax.chain(optax.clip(0.1), optax.adam(1e-3))}, labels
    ),
    "frozen": lambda s: optax.partition({"rest": repopt_sgd(0.1, s), "kernel": optax.set_to_zero()}, labels),
    "MultiSteps": lambda s: optax.MultiSteps(repopt_adamw(warm_up(), s), 3).gradient_transformation(),
    "inject_hyperparams": lambda s: optax.inject_hyperparams(repopt_sgd)(
        warm_up(), scales=s, weight_decay=0.1
    ),
    "apply_if_finite": lambda s: optax.apply_if_finite(repopt_lion(1e-3, s), 3),
    "named chain": lambda s: optax.named_chain(
        ("clip", clip_by_repopt_global_norm(1.0, s)), ("mask", repopt_mask(s)), ("sgd", optax.sgd(0.1, 0.9))
    ),
    "zeros, noise": lambda s: optax.chain(
        optax.zero_nans(), repopt_mask(s), optax.add_noise(0.1, 0.5, key=0)
    ),
    "schedule-free": lambda s: optax.chain(
        repopt_mask(s), contrib.schedule_free(optax.sgd(0.1), learning_rate=0.1, b1=0.9)
    ),
    # These have no form for branches that mix taps.
    "own mask": lambda s: decayed(own_mask(s)),
    "signum": lambda s: optax.chain(
        optax.trace(0.9), optax.scale_by_sign(), repopt_sign_mask(s), optax.scale_by_learning_rate(1e-3)
    ),
    "published": lambda s: repopt_adamw(1e-3, s, rule="published"),
}


def clip_all(*transformations):
    return optax.chain(optax.clip_by_global_norm(1.0), *transformations)


before, after = Reason.DECAY_BEFORE_RULE, Reason.NONLINEAR
clipping, none = Reason.CLIPPING, Reason.NO_RULE

BAD = {
    "decay first": (
        lambda s: optax.chain(optax.add_decayed_weights(1e-4), repopt_mask(s), optax.sgd(0.1, 0.9)),
        before,
    ),
    "decay and momentum first": (
        lambda s: optax.chain(
            optax.add_decayed_weights(1e-4), optax.trace(0.9), repopt_mask(s), optax.scale(-0.1)
        ),
        before,
    ),
    "decay first, of matrices": (
        lambda s: optax.chain(
            optax.add_decayed_weights(1e-4, matrices), repopt_sgd(warm_up(), s, weight_decay=1e-4)
        ),
        before,
    ),
    "L2 in Adam": (lambda s: optax.chain(optax.add_decayed_weights(1e-4), repopt_adamw(1e-3, s)), before),
    "L2 in Lion": (lambda s: optax.chain(optax.add_decayed_weights(1e-4), repopt_lion(1e-3, s)), before),
    "decay before reparameterize": (
        lambda s: optax.chain(optax.add_decayed_weights(1e-4), reparameterize(optax.adam(1e-3), s)),
        before,
    ),
    "decay first, MultiSteps": (
        lambda s: optax.MultiSteps(optax.chain(optax.add_decayed_weights(1e-4), repopt_sgd(0.1, s)), 2),
        before,
    ),
    "adam": (lambda s: optax.chain(repopt_mask(s), optax.adam(1e-3)), after),
    "adamw": (lambda s: optax.chain(repopt_mask(s), optax.adamw(warm_up(), weight_decay=0.1)), after),
    "adam before": (lambda s: optax.chain(optax.scale_by_adam(), repopt_mask(s), optax.scale(-1e-3)), after),
    "lion": (lambda s: optax.chain(repopt_mask(s), optax.lion(1e-3)), after),
    "sign": (lambda s: optax.chain(repopt_mask(s), optax.scale_by_sign(), optax.scale(-0.1)), after),
    "rmsprop": (lambda s: optax.MultiSteps(optax.chain(repopt_mask(s), optax.rmsprop(1e-3)), 2), after),
    "adafactor": (lambda s: optax.chain(repopt_mask(s), optax.adafactor(1e-3)), after),
    "lamb": (lambda s: optax.chain(repopt_mask(s), optax.lamb(1e-3)), after),
    "lars": (lambda s: optax.chain(repopt_mask(s), optax.lars(1e-3)), after),
    "injected adam": (
        lambda s: optax.inject_hyperparams(lambda rate: optax.chain(repopt_mask(s), optax.adam(rate)))(
            rate=0.1
        ),
        after,
    ),
    "partitioned adam": (
        lambda s: optax.chain(
            repopt_mask(s), optax.partition({"kernel": optax.adam(0.1), "rest": optax.sgd(0.1)}, labels)
        ),
        after,
    ),
    "normalised": (
        lambda s: optax.chain(repopt_mask(s), optax.normalize_by_update_norm(), optax.sgd(0.1)),
        after,
    ),
    "clip": (lambda s: clip_all(repopt_sgd(0.1, s)), clipping),
    "clip, momentum": (lambda s: clip_all(repopt_mask(s), optax.sgd(0.1, 0.9)), clipping),
    "clip before adam": (lambda s: clip_all(repopt_adamw(1e-3, s)), clipping),
    "clip before lion": (lambda s: clip_all(repopt_lion(1e-3, s)), clipping),
    "clip before reparameterize": (lambda s: clip_all(reparameterize(optax.adam(1e-3), s)), clipping),
    "clip after sgd": (lambda s: optax.chain(repopt_sgd(0.1, s), optax.clip_by_global_norm(0.1)), clipping),
    "clip after adam": (
        lambda s: optax.chain(repopt_adamw(1e-3, s), optax.clip_by_global_norm(1.0)),
        clipping,
    ),
    "clip between": (
        lambda s: optax.chain(repopt_mask(s), optax.clip_by_global_norm(35.0), optax.sgd(0.1)),
        clipping,
    ),
    "clip by value": (lambda s: optax.chain(optax.clip(1.0), repopt_sgd(0.1, s)), clipping),
    "clip by value before adam": (lambda s: optax.chain(optax.clip(1.0), repopt_adamw(1e-3, s)), clipping),
    "clip by value after": (lambda s: optax.chain(repopt_sgd(0.1, s), optax.clip(1.0)), clipping),
    "clip by block": (lambda s: optax.chain(optax.clip_by_block_rms(1.0), repopt_sgd(0.1, s)), clipping),
    "adaptive clip": (lambda s: optax.chain(optax.adaptive_grad_clip(0.01), repopt_sgd(0.1, s)), clipping),
    "adaptive clip after": (
        lambda s: optax.chain(repopt_mask(s), optax.adaptive_grad_clip(0.01), optax.sgd(0.1)),
        clipping,
    ),
    "clip, masked": (lambda s: optax.masked(clip_all(repopt_sgd(0.1, s)), kernels), clipping),
    "clip, MultiSteps": (lambda s: optax.MultiSteps(clip_all(repopt_sgd(warm_up(), s)), 2), clipping),
    "clip around partition": (
        lambda s: clip_all(optax.partition({"kernel": repopt_sgd(0.1, s), "rest": optax.sgd(0.1)}, labels)),
        clipping,
    ),
    "clip, injected": (
        lambda s: optax.inject_hyperparams(lambda rate: clip_all(repopt_sgd(rate, s)))(rate=0.1),
        clipping,
    ),
    "clip, named": (
        lambda s: optax.named_chain(("clip", optax.clip_by_global_norm(1.0)), ("sgd", repopt_sgd(0.1, s))),
        clipping,
    ),
    "no mask": (lambda s: optax.sgd(0.1, 0.9), none),
    "no mask, decay": (lambda s: decayed(), none),
    "no mask, adam": (lambda s: optax.adamw(1e-3), none),
    "clip without mask": (lambda s: optax.chain(clip_by_repopt_global_norm(1.0, s), optax.sgd(0.1)), none),
    "hidden by masked": (lambda s: decayed(optax.masked(repopt_mask(s), rest)), none),
    "hidden by partition": (
        lambda s: optax.partition({"rest": repopt_sgd(0.1, s), "kernel": optax.sgd(0.1)}, labels),
        none,
    ),
    "other scales": (lambda s: repopt_sgd(0.1, jax.tree.map(lambda v: 1.1 * v, s)), Reason.OTHER_SCALES),
    "other scales, clip": (
        lambda s: optax.chain(
            clip_by_repopt_global_norm(1.0, jax.tree.map(lambda v: 1.1 * v, s)), repopt_sgd(0.1, s)
        ),
        Reason.OTHER_SCALES,
    ),
    "more scales": (
        lambda s: repopt_sgd(0.1, Scales({**s.entries, "head/kernel": HEAD})),
        Reason.OTHER_SCALES,
    ),
    "mask twice": (lambda s: optax.chain(repopt_mask(s), repopt_sgd(0.1, s)), Reason.WRONG_MULTIPLE),
    "own decay first": (
        lambda s: optax.chain(optax.add_decayed_weights(1e-4), own_mask(s), optax.sgd(0.1)),
        before,
    ),
    "sign mask without a sign": (
        lambda s: optax.chain(repopt_sign_mask(s), optax.sgd(0.1)),
        Reason.WRONG_MULTIPLE,
    ),
    "mask after a sign": (
        lambda s: optax.chain(optax.scale_by_sign(), repopt_mask(s), optax.scale(-0.1)),
        after,
    ),
}


# In the other settings, one chain of each kind.
SOME_GOOD = ("Nesterov", "repopt_adamw", "clipped lion", "reparameterize(lamb)", "partition", "MultiSteps")
SOME_BAD = (
    *(
        "decay first",
        "L2 in Adam",
        "adam",
        "lamb",
        "clip",
        "clip before lion",
        "clip after adam",
        "clip by value",
    ),
    *("adaptive clip", "no mask", "hidden by partition", "mask twice"),
)


# A tree of Flax's and branches that mix taps, each without the other: both at once are in "mixing State".
SELDOM = ("State", "mixing")


def cases(names, some):
    return [
        pytest.param(
            setting,
            name,
            id=f"{name}, {setting}",
            marks=[pytest.mark.long] if setting in SELDOM else [],
        )
        for setting in SETTINGS
        for name in names
        if setting == "dict" or name in some
    ]


@functools.cache
def setting_of(name):
    scales, state = SETTINGS[name]
    return scales, params_of(scales, state=state)


@pytest.mark.parametrize(("setting", "name"), cases(GOOD, SOME_GOOD))
def test_exact_optimizers_pass(setting, name):
    scales, params = setting_of(setting)
    check.check_optimizer(GOOD[name](scales), scales, params)


@pytest.mark.parametrize(("setting", "name"), cases(BAD, SOME_BAD))
def test_faults_are_found(setting, name):
    scales, params = setting_of(setting)
    make, reason = BAD[name]
    with pytest.raises(ValueError) as info:
        check.check_optimizer(make(scales), scales, params)
    assert isinstance(info.value, check.OptimizerError)
    assert info.value.reasons == (reason,)
    (fault,) = info.value.faults
    # An adaptive clipping takes a stack's first axis for channels, and may leave one of its kernels alone.
    assert set(fault.paths) <= {*scales.entries, "head/kernel"}
    assert fault.message in str(info.value)
    assert any(path in fault.message for path in fault.paths)


def test_several_faults_are_all_named():
    scales, params = setting_of("dict")
    tx = clip_all(optax.add_decayed_weights(1e-4), repopt_sgd(0.1, jax.tree.map(lambda v: 2 * v, scales)))
    faults = check.find_faults(tx, scales, params)
    assert [fault.reason for fault in faults] == [
        Reason.OTHER_SCALES,
        Reason.DECAY_BEFORE_RULE,
        Reason.CLIPPING,
    ]
    for fault, words in zip(
        faults, ("with the same scales", "after repopt_mask", "clip_by_repopt_global_norm")
    ):
        assert words in fault.message
        assert set(fault.paths) == set(scales.entries)


def test_only_the_kernels_with_the_fault_are_named():
    scales, params = setting_of("dict")
    by_layer = {"a": optax.adam(1e-3), "b": optax.sgd(0.1), "c": optax.sgd(0.1)}
    tx = optax.chain(
        repopt_mask(scales),
        optax.partition(
            by_layer | {"rest": optax.sgd(0.1)},
            lambda p: paths.map_named(lambda path, _: path[0] if path[0] in by_layer else "rest", p),
        ),
    )
    (fault,) = check.find_faults(tx, scales, params)
    assert fault.reason is Reason.NONLINEAR
    assert fault.paths == ("a/kernel",)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float64])
def test_parameters_of_any_precision(dtype):
    with jax.enable_x64(dtype == jnp.float64):
        scales, params = setting_of("dict")
        params = jax.tree.map(lambda p: p.astype(dtype), params)
        check.check_optimizer(repopt_adamw(1e-3, scales), scales, params)
        (fault,) = check.find_faults(clip_all(repopt_sgd(0.1, scales)), scales, params)
        assert fault.reason is Reason.CLIPPING


def test_sharded_parameters():
    mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:2])
    scales, params = setting_of("dict")

    def along_outputs(p):
        spec = (*(None,) * (p.ndim - 1), "x") if p.shape[-1] % 2 == 0 else ()
        return jax.device_put(p, jax.NamedSharding(mesh, jax.P(*spec)))

    params = jax.tree.map(along_outputs, params)
    check.check_optimizer(decayed(repopt_mask(scales)), scales, params)
    (fault,) = check.find_faults(clip_all(repopt_sgd(0.1, scales)), scales, params)
    assert fault.reason is Reason.CLIPPING


def test_what_is_given_is_not_changed_and_what_never_moves_is_not_accused():
    scales, params = setting_of("dict")
    before = jax.tree.map(jnp.copy, (scales, params))
    check.check_optimizer(repopt_sgd(0.0, scales), scales, params)
    check.check_optimizer(optax.set_to_zero(), scales, params)
    check.check_optimizer(optax.sgd(0.1), Scales({}), params)
    chex.assert_trees_all_equal(before, (scales, params))
    with pytest.raises(ValueError, match="do not fit the model"):
        check.check_optimizer(repopt_sgd(0.1, scales), scales, {"a": params["a"]})


def test_extra_arguments_reach_the_optimizer():
    scales, params = setting_of("dict")
    tx = optax.chain(repopt_sgd(0.1, scales), contrib.reduce_on_plateau())
    check.check_optimizer(tx, scales, params, value=1.0)


def test_the_check_is_part_of_the_package():
    assert repopt_jax.check_optimizer is check.check_optimizer


def test_structures_that_are_trained_have_no_such_check():
    structures = {"kernel": Parametrization(orepa(Geometry((3, 3), 4, 4)))}
    tx = reparameterize(optax.sgd(0.1), structures, trainable_scales=True)
    with pytest.raises(
        TypeError, match=r"`scales` are structures .* no such check: .*put decay and clipping inside"
    ):
        check.check_optimizer(tx, structures, {"kernel": jnp.ones((3, 3, 4, 4))})
