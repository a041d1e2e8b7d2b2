"""What every optimizer of the package must do in other people's loops: one battery, run on each of them."""

import functools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiers
from twins import assert_close

from repopt_jax.core.branches import Average, BranchSet, Identity, Kernel
from repopt_jax.core.scales import LayerScales, Scales
from repopt_jax.optim import adaptive
from repopt_jax.optim import sgd as optim
from repopt_jax.optim.reparameterize import reparameterize

CLOSE = 1e-5  # relative, float32, the same arithmetic in another order; measured: 3e-7
COARSE = 5e-2  # relative, bfloat16 against float32: 8 bits; measured: 8e-3

OPTIMIZERS = {
    "repopt_mask": optim.repopt_mask,
    "clip_by_repopt_global_norm": lambda s, n=0.5: optim.clip_by_repopt_global_norm(n, s),
    "repopt_sgd": lambda s, lr=0.1: optim.repopt_sgd(lr, s, weight_decay=1e-2),
    "scale_by_repopt_adam": lambda s, eps=1e-8: adaptive.scale_by_repopt_adam(s, eps=eps),
    "repopt_adamw": lambda s, lr=0.1: adaptive.repopt_adamw(lr, s, eps=1e-3, weight_decay=1e-2),
    "repopt_adamw, published": lambda s, lr=0.1: adaptive.repopt_adamw(lr, s, eps=1e-3, rule="published"),
    "repopt_sign_mask": adaptive.repopt_sign_mask,
    "repopt_lion": lambda s, lr=0.1: adaptive.repopt_lion(lr, s),
    "reparameterize(sgd)": lambda s, lr=0.1: reparameterize(optax.sgd(lr, 0.9, nesterov=True), s),
    "reparameterize(adam)": lambda s, lr=0.1: reparameterize(optax.adamw(lr, eps=1e-3), s),
    "reparameterize(adafactor)": lambda s, lr=0.1: reparameterize(
        optax.adafactor(lr, min_dim_size_to_factor=2), s
    ),
    "reparameterize(lamb)": lambda s, lr=0.1: reparameterize(optax.lamb(lr, eps=1e-3), s),
}
# The two that have no number of their own, with one behind them.
WITH_A_NUMBER = OPTIMIZERS | {
    name: lambda s, lr, make=OPTIMIZERS[name]: optax.chain(make(s), optax.scale(lr))
    for name in ("repopt_mask", "repopt_sign_mask")
}
PLACED_ONLY = ("repopt_adamw, published", "repopt_sign_mask")  # refuse branches that mix taps
# They are wrapped as the other two inners of `reparameterize` are.
SELDOM = ("reparameterize(adafactor)", "reparameterize(lamb)")
every = pytest.mark.parametrize("name", tiers.seldom(OPTIMIZERS, *SELDOM))


def setting(name, *, dtype=jnp.float32, width=4, window=(3, 3)):
    """An optimizer, parameters and a gradient: a layer with scales, a stack of two, with average pooling if
    the optimizer takes it, and a vector without. The same objects each time, so that programs are shared."""
    return _setting(name, dtype, width, window)


@functools.cache
def _setting(name, dtype, width, window):
    rng = np.random.default_rng(0)
    kernel = (*window, width, width)
    identity = [Identity()] if window == (3, 3) else []
    small = Kernel((1, 1)) if window == (3, 3) else Kernel((2, 1))
    mixing = [] if name in PLACED_ONLY else [Average()]
    sets = {
        "a/kernel": BranchSet(kernel, (Kernel(window), small, *identity)),
        "b/kernel": BranchSet((2, *kernel), (Kernel(window), *mixing, *identity), stacked=1),
    }
    scales = Scales(
        {
            path: LayerScales(
                b, {n: jnp.asarray(rng.normal(size=b.vector_shape), jnp.float32) for n in b.names}
            )
            for path, b in sets.items()
        }
    )

    def draw(shape):
        return jnp.asarray(rng.normal(size=shape), dtype)

    def tree():
        kernels = {path[0]: {"kernel": draw(b.kernel)} for path, b in sets.items()}
        return kernels | {"norm": {"scale": draw((width,))}}

    return OPTIMIZERS[name](scales), tree(), tree(), scales


def weak_types(tree):
    return jax.tree.map(lambda a: a.weak_type, tree)


def close(found, expected, tolerance=CLOSE):
    assert_close(found, expected, tolerance)


# One optimizer's update is compiled once for all the tests that take it as it is.
update = jax.jit(lambda tx, *arguments: tx.update(*arguments), static_argnums=0)


def eager(tx, *arguments):
    """Operation by operation: those of a wrapped optimizer are compiled already, its program is not."""
    return tx.update(*arguments)


def first_step(tx, params, gradients, *, update=update):
    """The updates of the first step, and the state after it."""
    return update(tx, gradients, tx.init(params), params)


def two_steps(tx, params, gradients, *, update=update):
    """The parameters after two steps."""
    state = tx.init(params)
    for _ in range(2):
        updates, state = update(tx, gradients, state, params)
        params = optax.apply_updates(params, updates)
    return params


@every
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
def test_under_jit_nothing_changes_its_type_and_the_second_step_compiles_nothing(counted, name, dtype):
    tx, params, gradients, _ = setting(name, dtype=dtype)
    state = tx.init(params)
    updates, new = update(tx, gradients, state, params)
    chex.assert_trees_all_equal_shapes_and_dtypes(new, state)
    assert weak_types(new) == weak_types(state)
    chex.assert_trees_all_equal_shapes_and_dtypes(updates, params)
    compiled = update._cache_size()
    update(tx, updates, new, optax.apply_updates(params, updates))
    assert update._cache_size() == compiled > 0
    close((updates, new), tx.update(gradients, state, params), COARSE if dtype == jnp.bfloat16 else CLOSE)


@every
def test_bfloat16_follows_float32(name):
    """Scales are squared and branches summed in float32, so only the rounding of what comes and goes is
    left."""
    tx, params, gradients, _ = setting(name, dtype=jnp.bfloat16)
    as_float32 = jax.tree.map(lambda a: a.astype(jnp.float32), (params, gradients))
    close(first_step(tx, params, gradients)[0], first_step(tx, *as_float32)[0], COARSE)


@every
def test_a_step_that_donates_its_state_leaves_the_scales(name):
    tx, params, gradients, scales = setting(name)
    jax.jit(lambda s, g, p: tx.update(g, s, p), donate_argnums=0)(tx.init(params), gradients, params)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(scales))
    tx.init(params)


@every
def test_unknown_extra_arguments_are_let_pass(name):
    tx, params, gradients, _ = setting(name)
    assert isinstance(tx, optax.GradientTransformationExtraArgs)
    told = optax.GradientTransformation(tx.init, functools.partial(tx.update, value=1.0, who="knows"))
    close(two_steps(told, params, gradients, update=eager), two_steps(tx, params, gradients))


@every
def test_half_precision_gradients_of_float32_parameters(name):
    """As in Optax, the update is as wide as the optimizer computes, that of kernels too."""
    tx, params, gradients, _ = setting(name)
    half = jax.tree.map(lambda g: g.astype(jnp.bfloat16), gradients)
    updates, state = first_step(tx, params, half, update=eager)
    assert updates["a"]["kernel"].dtype == updates["norm"]["scale"].dtype
    start = tx.init(params)
    chex.assert_trees_all_equal_shapes_and_dtypes(state, start)
    assert weak_types(state) == weak_types(start)
    wide = jax.tree.map(lambda g: g.astype(jnp.float32), half)
    close(updates, first_step(tx, params, wide)[0], COARSE)


@every
def test_no_constant_of_a_parameters_size_in_the_program(name):
    """The multipliers are computed from vectors. A dense one would be 64 x 64 x 9 numbers of text."""
    tx, params, gradients, _ = setting(name, width=64)
    text = jax.jit(tx.update).lower(gradients, jax.eval_shape(tx.init, params), params).as_text()
    literals = re.findall(r'dense<"0x([0-9A-Fa-f]+)">', text) + re.findall(r"dense<\[(.*?)\]>", text)
    assert max((len(literal) for literal in literals), default=0) < 1000
    assert "tensor<3x3x64x64xf32>" in text


@every
@pytest.mark.parametrize("axis", [0, 2, 3], ids=["spatial", "inputs", "outputs"])
def test_sharded_parameters(name, axis):
    """The numbers of one device; updates and state lie after a step where they lay before it."""
    mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:2])
    tx, params, gradients, _ = setting(name, window=(3, 3) if axis else (4, 3))
    expected = two_steps(tx, params, gradients)
    whole = jax.NamedSharding(mesh, jax.P())

    def where_it_lies(a):
        return jax.NamedSharding(mesh, jax.P(*(None,) * (a.ndim - 4 + axis), "x")) if a.ndim > 3 else whole

    def place(tree):
        return jax.tree.map(lambda a: jax.device_put(a, where_it_lies(a)), tree)

    params, gradients = place(params), place(gradients)
    state = jax.tree.map(
        lambda a: a if len(a.sharding.device_set) == 2 else jax.device_put(a, whole), tx.init(params)
    )
    where = jax.tree.map(lambda a: a.sharding, (params, state))
    # Left to itself the compiler splits Adafactor's own vectors.
    step = jax.jit(tx.update, out_shardings=where if "adafactor" in name else None)
    for _ in range(2):
        updates, new = step(gradients, state, params)
        params = jax.tree.map(jnp.add, params, updates)
        lies = jax.tree.map(lambda a, b: a.sharding.is_equivalent_to(b.sharding, a.ndim), new, state)
        assert jax.tree.all(lies)
        state = new
    for layer in "ab":
        kernel = params[layer]["kernel"]
        assert kernel.sharding.is_equivalent_to(where_it_lies(kernel), kernel.ndim)
    close(params, expected)


@every
def test_nnx_optimizer(name):
    """`nnx.Optimizer` shows `init` variables and `update` bare arrays."""
    from flax import nnx

    tx, params, gradients, _ = setting(name)

    class Net(nnx.Module):
        def __init__(self):
            for part, leaves in params.items():
                setattr(self, part, nnx.Dict({n: nnx.Param(v) for n, v in leaves.items()}))

    model = Net()
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    grads = nnx.state(model, nnx.Param)
    grads = nnx.map_state(lambda path, v: v.replace(gradients[path[0]][path[1]]), grads)
    step = nnx.jit(lambda model, optimizer, grads: optimizer.update(model, grads))
    for _ in range(2):
        step(model, optimizer, grads)
    close(nnx.to_pure_dict(nnx.state(model, nnx.Param)), two_steps(tx, params, gradients))


@every
def test_masked_and_partition(name):
    """Hidden layers are left alone, and the others move as if they were all there is."""
    tx, params, gradients, scales = setting(name)
    alone = {"a": params["a"]}
    shown = Scales({"a/kernel": scales.entries["a/kernel"]})
    expected = two_steps(OPTIMIZERS[name](shown), alone, {"a": gradients["a"]}, update=eager)
    masked = optax.masked(tx, {"a": True, "b": False, "norm": False})
    found = two_steps(masked, params, gradients, update=eager)
    close(found["a"], expected["a"])
    frozen = optax.partition({"ours": tx, "frozen": optax.set_to_zero()}, labels)
    found = two_steps(frozen, params, gradients, update=eager)
    close(found["a"], expected["a"])
    close(found["b"], params["b"])


def labels(params):
    return {
        part: dict.fromkeys(leaves, "ours" if part == "a" else "frozen") for part, leaves in params.items()
    }


@every
def test_multi_steps_takes_the_mean_gradient(name):
    tx, params, gradients, _ = setting(name)
    other = jax.tree.map(lambda g: g**2, gradients)
    mean = jax.tree.map(lambda a, b: (a + b) / 2, gradients, other)
    accumulate = optax.MultiSteps(tx, 2).gradient_transformation()
    updates, state = first_step(accumulate, params, gradients)
    chex.assert_trees_all_equal(updates, jax.tree.map(jnp.zeros_like, updates))
    updates, _ = update(accumulate, other, state, params)
    close(updates, first_step(tx, params, mean)[0])


@every
def test_apply_if_finite_skips_a_bad_gradient(name):
    tx, params, gradients, _ = setting(name)
    guarded = optax.apply_if_finite(tx, 3)
    bad = gradients | {"a": {"kernel": gradients["a"]["kernel"].at[0, 0, 0, 0].set(jnp.nan)}}
    updates, state = first_step(guarded, params, bad)
    chex.assert_trees_all_equal(updates, jax.tree.map(jnp.zeros_like, updates))
    updates, _ = update(guarded, gradients, state, params)
    close(updates, first_step(tx, params, gradients)[0])


@every
def test_pmap(name):
    """A loop of the old kind: state on every device, gradients averaged by hand."""
    tx, params, gradients, _ = setting(name)
    count = 2
    parts = jax.tree.map(lambda g: jnp.stack([g * 0.5, g * 1.5]), gradients)
    many = jax.tree.map(lambda a: jnp.stack([a] * count), (params, tx.init(params)))

    def step(params, state, gradients):
        updates, state = tx.update(jax.lax.pmean(gradients, "batch"), state, params)
        return optax.apply_updates(params, updates), state

    parallel = jax.pmap(step, axis_name="batch", devices=jax.devices()[:count])
    for _ in range(2):
        many = parallel(*many, parts)
    expected = two_steps(tx, params, gradients)
    for device in range(count):
        close(jax.tree.map(lambda a, d=device: a[d], many[0]), expected)


def test_given_branches_lie_where_the_kernels_lie(counted):
    """`weights` come from one device; with sharded parameters the second step must not compile anew."""
    mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:2])
    _, params, gradients, scales = setting("repopt_sgd")
    weights = {
        path: entry.branches.split(params[path[0]]["kernel"], entry.vectors)
        for path, entry in scales.entries.items()
    }
    tx = reparameterize(optax.sgd(0.1, 0.9), scales, weights=weights)

    def along_inputs(a):
        parts = (*(None,) * (a.ndim - 2), "x") if a.ndim > 3 else ()
        return jax.device_put(a, jax.NamedSharding(mesh, jax.P(*parts)))

    params, gradients = (jax.tree.map(along_inputs, tree) for tree in (params, gradients))
    step = jax.jit(tx.update)
    state = tx.init(params)
    _, state = step(gradients, state, params)
    step(gradients, state, params)
    assert step._cache_size() == 1


@every
def test_inject_hyperparams_around_it(name):
    """A number of the optimizer in the state, changed between steps."""
    _, params, gradients, scales = setting(name)
    make = WITH_A_NUMBER[name]
    tx = optax.inject_hyperparams(lambda number: make(scales, number))(number=0.1)
    state = tx.init(params)
    step = jax.jit(tx.update)
    before, state = step(gradients, state, params)
    state.hyperparams["number"] = jnp.asarray(0.4)
    after, _ = step(gradients, state, params)
    expected, state = first_step(make(scales, 0.1), params, gradients)
    close(before, expected)
    close(after, jax.jit(make(scales, 0.4).update)(gradients, state, params)[0])


@pytest.mark.parametrize(
    ("factory", "changed"),
    [
        (optim.repopt_sgd, {"weight_decay": 0.5}),
        (adaptive.repopt_adamw, {"weight_decay": 0.5, "eps": 0.1, "b1": 0.5}),
        (adaptive.repopt_lion, {"weight_decay": 0.5, "b1": 0.5}),
    ],
)
def test_inject_hyperparams_of_the_ready_made(factory, changed):
    """By the names of their arguments, a schedule among them."""
    _, params, gradients, scales = setting("repopt_sgd")
    tx = optax.inject_hyperparams(factory)(
        learning_rate=optax.linear_schedule(0.1, 0.2, 10), scales=scales, **dict.fromkeys(changed, 0.1)
    )
    state = tx.init(params)
    assert float(state.hyperparams["learning_rate"]) == pytest.approx(0.1)
    for field, value in changed.items():
        state.hyperparams[field] = jnp.asarray(value)
    updates, state = jax.jit(tx.update)(gradients, state, params)
    fixed = factory(0.1, scales, **changed)
    close(updates, first_step(fixed, params, gradients)[0])


@every
def test_scales_that_do_not_fit_or_are_not_finite(name):
    _, params, _, scales = setting(name)
    tx = OPTIMIZERS[name](scales)
    with pytest.raises(ValueError, match=r"extra layers: b/kernel"):
        tx.init({"a": params["a"]})
    bad = jax.tree.map(lambda v: v.at[0].set(jnp.inf), scales)
    with pytest.raises(ValueError, match="NaN or infinite values: a/kernel/1x1"):
        OPTIMIZERS[name](bad)


@every
def test_scales_that_are_all_zero_in_a_layer(name):
    """A dead layer, or one of a stack. A branch or a channel may be switched off."""
    *_, scales = setting(name)
    make = OPTIMIZERS[name]
    make(jax.tree.map(lambda v: v.at[..., 0].set(0.0), scales))
    a, b = (scales.entries[path] for path in ("a/kernel", "b/kernel"))
    off = next(iter(a.vectors))
    make(Scales({"a/kernel": LayerScales(a.branches, a.vectors | {off: jnp.zeros(4)})}))
    # The identity's vector is where its weight starts, and no scale.
    a = LayerScales(
        a.branches, {n: jnp.zeros_like(v) if n != "identity" else v for n, v in a.vectors.items()}
    )
    b = LayerScales(b.branches, {n: v.at[1].set(0.0) for n, v in b.vectors.items()})
    with pytest.raises(ValueError, match=r"all scales are 0 at a/kernel, b/kernel\[1\], so these kernels"):
        make(Scales({"a/kernel": a, "b/kernel": b}))


@every
def test_gradients_that_lack_a_kernel(name):
    tx, params, gradients, _ = setting(name)
    state = tx.init(params)
    part = {layer: g for layer, g in gradients.items() if layer != "b"}
    # Rules that keep moments are refused by the moments' tree before the scales are looked at.
    keeps_moments = name in ("scale_by_repopt_adam", "repopt_adamw", "repopt_lion")
    ours = r"the gradients lack kernels .* initialised with: b/kernel; give"
    with pytest.raises(ValueError, match="structure" if keeps_moments else ours):
        tx.update(part, state, params)


def test_gradients_without_a_value_are_missing_and_hidden_ones_are_not():
    tx, params, gradients, _ = setting("repopt_mask")
    state = tx.init(params)
    with pytest.raises(ValueError, match="the gradients lack kernels"):
        tx.update(gradients | {"b": {"kernel": None}}, state, params)
    tx.update(gradients | {"b": {"kernel": optax.MaskedNode()}}, state, params)
