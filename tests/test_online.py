"""Structures with trainable scales and products of tensors, kept in the optimizer: the same training as in
the network. And trained networks: split into branches, kept, or refused."""

import dataclasses
import functools
import os

import chex
import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiers
from flax import nnx
from hypothesis import strategies as st
from jax.flatten_util import ravel_pytree
from networks import randomised
from optax import contrib
from orbax.checkpoint import v1 as ocp
from test_structure import structures as drawn_structures
from test_structure import without_norm
from twins import LIGHT, assert_close, problem, relative, slow_merge, train

from repopt_jax import (
    BranchSet,
    Geometry,
    Identity,
    Kernel,
    Parametrization,
    Scales,
    Stage,
    Structure,
    branches_of,
    decay_mask,
    depth_scales,
    find_parametrizations,
    nn,
    prepare,
    reinitialize,
    reparameterize,
    repopt_mask,
    to_search,
    to_structure,
    verify_equivalence,
    weight_decay_mask,
)
from repopt_jax.core import paths
from repopt_jax.core.published import STRUCTURES, dbb, orepa, repopt
from repopt_jax.optim import OptimizerError, Reason, check_optimizer
from repopt_jax.surgery.modules import named_modules

pytestmark = pytest.mark.once

# Relative, in float64, after 50 steps. Measured: at most 3e-14.
EXACT = 1e-12
# Of Muon, whose polynomial of the gradient's singular values amplifies rounding. Measured: at most 4.3e-12.
MUON_EXACT = 1e-10
# From kernels that are kept: A(theta) is K but for rounding, which 50 steps of products of tensors amplify.
# Measured: at most 1.8e-12.
KEPT_EXACT = 1e-11
# Of a kernel that conjugate gradients have split, in float64. Measured: at most 1e-9.
SPLIT = 1e-7
# What constant scales differ by. Measured: 0.02 and more.
OTHER = 5e-3
STEPS = 50


def nesterov(mask=None):
    return optax.chain(optax.add_decayed_weights(1e-2, mask), optax.sgd(0.1, 0.9, nesterov=True))


INNER = {
    "nesterov": nesterov,
    "adamw": lambda mask=None: optax.adamw(1e-2, weight_decay=0.1, mask=mask),
    "muon": lambda mask=None: contrib.muon(1e-2, weight_decay=0.1, weight_decay_mask=mask),
}


# --- Layers with the branches of `Scales`, against branches that are merged entry by entry.


# A layer of each kind, and five of them that have least in common.
EVERY = (*LIGHT, "inside maps", "ACNet + dilated")
UNLIKE = ("3x3+1x1+identity", "PyTorch layout", "stacked averages", "fixed 1x1, then 3x3", "inside maps")


@functools.cache
def layers():
    return problem(EVERY)


def trained_twin(p, tx):
    """Trains the branches and their scales; returns the merged kernels."""
    scales = {
        name: {b.name: p.entry(name).vectors[b.name] for b in p.entry(name).branches.branches if b.has_scale}
        for name in p.weights
    }

    def merged(params):
        return {
            name: slow_merge(p.entry(name).branches, params["weights"][name], params["scales"][name])
            for name in p.weights
        }

    def loss(params, batch):
        return p.loss(merged(params), params["other"], batch)

    start = {"weights": p.weights, "scales": scales, "other": p.bias}
    return jax.jit(merged)(train(tx, start, loss, p.batches))


@pytest.mark.parametrize("name", tiers.often(INNER, "nesterov"))
def test_scales_are_trained_as_in_the_branches(x64, name):
    p = layers()
    expected = trained_twin(p, INNER[name]())
    tx = reparameterize(INNER[name](), p.scales, weights=p.path_weights(), trainable_scales=True)
    assert_close(p.train(tx), expected, EXACT)
    constant = reparameterize(INNER[name](), p.scales, weights=p.path_weights())
    assert relative(p.train(constant), expected) > OTHER


# --- A network, with every structure that has no norm inside.


class Network(nnx.Module):
    """Strided, plain, grouped and depthwise convolutions with batch norms, and a dense layer."""

    def __init__(self, rngs, dtype=jnp.float64):
        def conv(i, o, strides=1, groups=1):
            return nnx.Conv(
                i,
                o,
                (3, 3),
                strides,
                padding=((1, 1), (1, 1)),
                feature_group_count=groups,
                use_bias=False,
                param_dtype=dtype,
                rngs=rngs,
            )

        def norm(n):
            return nnx.BatchNorm(n, param_dtype=dtype, rngs=rngs)

        self.convs = nnx.List([conv(3, 4, 2), conv(4, 4), conv(4, 8, groups=2), conv(8, 8, groups=8)])
        self.norms = nnx.List([norm(4), norm(4), norm(8), norm(8)])
        self.middle = nnx.Linear(8, 8, param_dtype=dtype, rngs=rngs)
        self.head = nnx.Linear(8, 5, param_dtype=dtype, rngs=rngs)

    def __call__(self, x):
        for conv, norm in zip(self.convs, self.norms):
            x = nnx.relu(norm(conv(x)))
        return self.head(nnx.relu(self.middle(x.mean((1, 2)))))


def rules(name):
    """A structure for each layer: that of `name` for the convolutions, RepOptimizer's for the dense one."""
    return {r"convs/.*": name, "middle": repopt}


SELECTED = r"convs/.*|middle"


@functools.cache
def batches():
    rng = np.random.default_rng(0)
    return jnp.asarray(rng.normal(size=(STEPS, 6, 8, 8, 3))), jnp.asarray(rng.integers(0, 5, (STEPS, 6)))


def ends(model, tx, state=None, part=slice(None)):
    """Parameters and statistics after a part of `STEPS` steps, as one compiled scan, and the optimizer's
    state; `state` is the one to go on from."""
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    rest = jax.tree.map(lambda x: x.astype(jnp.float64), rest)  # statistics are float32 in Flax

    def step(carry, batch):
        params, rest, state = carry

        def loss(params):
            net = nnx.merge(graph, params, rest, copy=True)
            value = optax.softmax_cross_entropy_with_integer_labels(net(batch[0]), batch[1]).mean()
            return value, nnx.split(net, nnx.Param, ...)[2]

        gradients, rest = jax.grad(loss, has_aux=True)(params)
        updates, state = tx.update(gradients, state, params)
        return (optax.apply_updates(params, updates), rest, state), None

    def start(params):
        return tx.init(params) if state is None else state

    run = jax.jit(lambda p, r, data: jax.lax.scan(step, (p, r, start(p)), data)[0])
    params, rest, state = run(params, rest, [each[part] for each in batches()])
    return nnx.merge(graph, params, rest), state


def filled(model, theta):
    """A copy with these tensors and scales in its `nn.Merged` layers."""
    model = nnx.clone(model)
    for path, module in named_modules(model):
        if isinstance(module, nn.Merged):
            for name, values in theta[f"{path}/kernel"].items():
                for key, value in values.items():
                    getattr(module, name)[key].set_value(value)
    return model


def kernels(model):
    """Merged kernels by path, of either form, and everything else that both have."""
    found = {}
    for path, module in named_modules(model):
        match module:
            case nn.Merged():
                found[path] = module.merged_kernel()
            case nnx.Conv() | nnx.Linear():
                found[path] = module.kernel[...]
            case nnx.BatchNorm():
                found |= {f"{path}/{n}": getattr(module, n)[...] for n in ("scale", "bias", "mean", "var")}
    return found


@functools.cache
def started(structure):
    """The plain network with A(theta), the network of merged layers, the structures and theta."""
    plain = Network(nnx.Rngs(0))
    structures = find_parametrizations(plain, rules(structure), SELECTED)
    fresh, theta = reinitialize(plain, structures, rngs=nnx.Rngs(1), return_weights=True)
    # Scales that start at 0 or 1 would hide a missing factor.
    rng = np.random.default_rng(2)
    theta = jax.tree.map(lambda x: x + 0.1 * rng.normal(size=x.shape), theta)
    fresh = with_kernels(fresh, {path: s.merge(theta[path]) for path, s in structures.items()})
    online = filled(to_structure(plain, rules(structure), SELECTED, rngs=nnx.Rngs(1)), theta)
    return fresh, online, structures, theta


def with_kernels(model, values):
    model = nnx.clone(model)
    for path, module in named_modules(model):
        if f"{path}/kernel" in values:
            module.kernel.set_value(values[f"{path}/kernel"])
    return model


# Each structure with one of the optimizers, of which one is linear in the gradient and one is not.
OFTEN = ("online-nesterov", "orepa-adamw")
WAYS = [pytest.param(s, name, id=f"{s}-{name}") for name in INNER for s in ("online", "orepa")]


@pytest.mark.parametrize(("structure", "name"), tiers.often(WAYS, *OFTEN))
def test_in_the_optimizer_as_in_the_network(x64, structure, name):
    """Parameters and running statistics, with decay of what the structure decays."""
    description = repopt if structure == "online" else orepa
    fresh, online, structures, theta = started(description)
    expected, _ = ends(online, INNER[name](weight_decay_mask(online)))
    mask = decay_mask(structures, weight_decay_mask(fresh))
    tx = reparameterize(INNER[name](mask), structures, weights=theta, trainable_scales=True)
    found, state = ends(fresh, tx)
    assert_close(kernels(found), kernels(expected), MUON_EXACT if name == "muon" else EXACT)
    # The kernel is A(theta) at every step, not a sum of moves.
    for path, structure in structures.items():
        kernel = kernels(found)[path.removesuffix("/kernel")]
        assert_close({"kernel": kernel}, {"kernel": structure.merge(state.theta[path])}, 1e-15)


@pytest.fixture
def x64_in_all_threads(x64):
    """Also in those of Orbax, which read and write."""
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", False)


@pytest.mark.parametrize("structure", [repopt, pytest.param(orepa, marks=pytest.mark.long)])
def test_a_training_is_resumed_to_the_bit(x64_in_all_threads, tmp_path, structure):
    """From a checkpoint, by an optimizer that is made anew. The kernels alone would not tell theta."""
    name = "muon"  # with Adam for vectors, so that both kinds of moments are there
    half = STEPS // 2
    fresh, _, structures, theta = started(structure)
    mask = decay_mask(structures, weight_decay_mask(fresh))

    def optimizer(weights):
        return reparameterize(INNER[name](mask), structures, weights=weights, trainable_scales=True)

    model, state = ends(fresh, optimizer(theta), part=slice(half))
    whole, last = ends(model, optimizer(theta), state, slice(half, None))
    saved = nnx.to_pure_dict(nnx.state(model))
    ocp.save(str(tmp_path / "checkpoint"), {"network": saved, "optimizer": state})
    del state

    # The branches that it is made with are those of the start, and merge into other kernels than the loaded.
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here),
        jax.eval_shape(optimizer(theta).init, nnx.state(fresh, nnx.Param)),
    )
    loaded = ocp.load(str(tmp_path / "checkpoint"), {"network": saved, "optimizer": shapes})
    again = nnx.clone(fresh)
    nnx.update(again, loaded["network"])
    resumed, end = ends(again, optimizer(theta), loaded["optimizer"], slice(half, None))
    chex.assert_trees_all_equal(kernels(resumed), kernels(whole))
    chex.assert_trees_all_equal(end, last)
    # Negative control: from the kernels alone.
    split = branches_of(again, structures, near=nnx.Rngs(0))
    other, _ = ends(again, optimizer(split), part=slice(half, None))
    assert relative(kernels(other), kernels(whole)) > OTHER


@pytest.mark.parametrize("kind", ["structures", "scales"])
def test_branches_are_drawn_in_the_kernels_dtype(x64, kind):
    """And bfloat16 kernels from branches in float32. A float32 draw would leave zeros in the last bits."""
    for dtype, wanted in ((jnp.float64, jnp.float64), (jnp.bfloat16, jnp.float32)):
        plain = Network(nnx.Rngs(0), dtype)
        taken = find_parametrizations(plain, rules(orepa), SELECTED)
        given = taken if kind == "structures" else depth_scales(plain, SELECTED)
        _, weights = reinitialize(plain, given, rngs=nnx.Rngs(1), return_weights=True)
        assert {leaf.dtype for leaf in jax.tree.leaves(weights)} == {jnp.dtype(wanted)}
        if dtype == jnp.float64:
            drawn = max(jax.tree.leaves(weights["convs/1/kernel"]), key=jnp.size)
            assert (drawn != drawn.astype(jnp.float32)).any()


@pytest.mark.parametrize(
    ("description", "scales"),
    [(repopt, set()), (orepa, {"3x3", "average", "frequency", "1x1_3x3_1", "depthwise_1x1_1", "1x1"})],
)
def test_what_is_decayed_in_the_optimizer(x64, description, scales):
    """Tensors and the identity's vector; of scales OREPA's alone; no bias and no batch norm."""
    fresh, _, structures, theta = started(description)
    leaves, _ = paths.named_leaves(nnx.state(fresh, nnx.Param))
    mask = decay_mask(structures, weight_decay_mask(fresh))(paths.nested(leaves | theta))
    found = {path for path, decayed in paths.named_leaves(mask)[0].items() if decayed}
    tensors = {f"{path}/weights/{key}" for path, t in theta.items() for key in t["weights"]}
    assert {"convs/1/kernel/weights/1x1", "middle/kernel/weights/identity"} < tensors
    factors = {f"{path}/scales/{key}" for path in theta if path.startswith("convs") for key in scales}
    assert found == {"head/kernel"} | tensors | factors


def test_frozen_scales_train_another_network(x64):
    """The negative control."""
    fresh, _, structures, theta = started(repopt)
    mask = decay_mask(structures, weight_decay_mask(fresh))
    free, _ = ends(fresh, reparameterize(nesterov(mask), structures, weights=theta, trainable_scales=True))

    def labels(params):
        flat = jax.tree_util.tree_map_with_path(
            lambda path, _: "held" if any(getattr(k, "key", "") == "scales" for k in path) else "moved",
            params,
        )
        return flat

    held = optax.partition({"held": optax.set_to_zero(), "moved": nesterov()}, labels)
    frozen, _ = ends(fresh, reparameterize(held, structures, weights=theta, trainable_scales=True))
    assert relative(kernels(frozen), kernels(free)) > OTHER


def test_without_a_search_the_mode_is_the_network_of_the_search(x64):
    """And it is trained, decayed and fused as that."""
    plain = Network(nnx.Rngs(0))
    online = prepare(plain, "online", select=SELECTED, rngs=nnx.Rngs(1)).model
    search = to_search(plain, SELECTED, rngs=nnx.Rngs(1))
    chex.assert_trees_all_equal(*(nnx.to_pure_dict(nnx.state(m)) for m in (online, search)))
    start = Scales.ones(depth_scales(plain, SELECTED).branch_sets)
    assert prepare(plain, "online", scales=start, select=SELECTED, rngs=nnx.Rngs(1)).scales is None


# --- Any structure: merging, gradients, splitting.


@st.composite
def parametrizations(draw):
    """A drawn structure without norms, with a branch over the whole window, so that it can be any kernel."""
    structure = draw(drawn_structures())

    chains = {name: without_norm(chain) for name, chain in structure.chains}
    own = Stage(Kernel(structure.layer.window), draw(st.sampled_from(["scale", "constant", ""])), start=0.5)
    chains["own"] = (own,)
    structure = dataclasses.replace(structure, chains=chains, sums=())
    stack = draw(st.sampled_from([(), (2,)]))
    return Parametrization(structure, stack, draw(st.sampled_from(["...io", "oi..."])))


def moved_by(one, theta):
    """`merge` as a function of one flat vector: of the last tensors of all chains."""
    keys = sorted(c[-1].key for c in one.structure.placed.values() if c[-1].stage.trained)
    start = {key: theta["weights"][key] for key in keys}
    flat, back = ravel_pytree(start)
    return flat, lambda x: one.merge(theta | {"weights": theta["weights"] | back(x)}).ravel()


@hypothesis.settings(max_examples=int(os.environ.get("REPOPT_EXAMPLES", "4")))
@hypothesis.given(parametrizations(), st.integers(0, 1000))
@jax.enable_x64(True)
def test_a_drawn_structure_is_split_by_the_least_change(one, seed):
    """Against NumPy's least squares on the Jacobian, which has the least norm by construction."""
    rng = np.random.default_rng(seed)

    def perturbed(x):
        return x + rng.normal(size=x.shape)

    near = jax.tree.map(perturbed, one.sample(jax.random.key(seed), dtype=jnp.float64))
    assert jax.tree.map(jnp.shape, near) == one.shapes()
    kernel = jnp.asarray(rng.normal(size=one.kernel))
    found = jax.jit(one.split)(kernel, near)
    assert relative({"kernel": one.merge(found)}, {"kernel": kernel}) <= SPLIT
    assert found["scales"].keys() == near["scales"].keys()
    flat, merge = moved_by(one, near)
    change, *_ = np.linalg.lstsq(jax.jacobian(merge)(flat), kernel.ravel() - merge(flat), rcond=1e-10)
    moved, _ = moved_by(one, found)
    np.testing.assert_allclose(moved - flat, change, atol=SPLIT * np.abs(change).max())


def test_branches_that_merge_into_the_kernel_already_stay(x64):
    """But for rounding, also where they mix taps and a kernel is rounded otherwise than their sum."""
    p = problem(("average pooling", "stacked averages", "fixed 1x1, then 3x3", "inside maps"))
    for path, entry in p.scales.entries.items():
        one = Parametrization.of_branch_set(entry.branches)
        scales = {name: entry.vectors[name] for name in one.shapes()["scales"]}
        near = {"weights": p.path_weights()[path], "scales": scales}
        kernel = p.start()[path.partition("/")[0]]["kernel"] * (1 + 2e-16)
        assert_close(one.split(kernel, near), near, EXACT)
        assert relative(one.split(1.1 * kernel, near)["weights"], near["weights"]) > OTHER


def test_chains_of_any_names_are_split(x64):
    """Also where they are those of a branch set, which calls them by their maps."""
    chains = {"point": (Stage(Kernel((1,)), "scale"),), "own": (Stage(Kernel((3,)), "scale", start=0.5),)}
    structure = Structure(Geometry((3,), 2, 2), chains)
    kernel = jnp.asarray(np.random.default_rng(0).normal(size=(3, 2, 2)))
    found, same = (
        Parametrization(dataclasses.replace(structure, chains=named)).split(kernel)["weights"]
        for named in (chains, {chain[0].map.name: chain for chain in chains.values()})
    )
    assert set(found) == {"point", "own"}
    assert_close(found, {"point": same["1"], "own": same["3"]}, SPLIT)
    with pytest.raises(ValueError, match="the chains point, own are not one trained map, of its name"):
        structure.branch_set()


@pytest.mark.parametrize("layout", ["...io", "oi..."])
def test_gradients_of_theta(x64, layout):
    """Against differences of the merge, and the merge against the slow one."""
    structure = orepa(Geometry((3, 3), 4, 6, 2))
    one = Parametrization(structure, (2,), layout)
    rng = np.random.default_rng(0)
    theta = jax.tree.map(
        lambda x: x + rng.normal(size=x.shape), one.sample(jax.random.key(0), dtype=jnp.float64)
    )
    g = jnp.asarray(rng.normal(size=one.kernel))
    direction = jax.tree.map(lambda x: rng.normal(size=x.shape), theta)
    gradients = one.gradients(theta, g)
    along = sum(jnp.vdot(a, b) for a, b in zip(*map(jax.tree.leaves, (gradients, direction))))
    h = 1e-5

    def at(step):
        return jnp.vdot(g, one.merge(jax.tree.map(lambda x, d: x + step * d, theta, direction)))

    np.testing.assert_allclose((at(h) - at(-h)) / (2 * h), along, rtol=1e-8)
    for layer in range(2):
        single = jax.tree.map(lambda x, i=layer: x[i], theta)
        affines = {key: (s, None) for key, s in single["scales"].items()}
        expected, _ = structure.merge(single["weights"], affines)
        found = one.merge(theta)[layer]
        if layout == "oi...":
            found = jnp.moveaxis(found, (0, 1), (-1, -2))
        np.testing.assert_array_equal(found, expected)


# --- Trained networks.


@pytest.mark.parametrize(
    "names", [pytest.param(UNLIKE, id="unlike"), pytest.param(EVERY, id="every", marks=pytest.mark.long)]
)
def test_the_mask_alone_is_the_branches_of_any_split(x64, names):
    """SGD, with momentum and decay, moves K by a rule that does not depend on how K is split. LAMB's does."""
    p = problem(names)
    masked = p.train(optax.chain(repopt_mask(p.scales), nesterov()))
    rng = np.random.default_rng(3)
    ends = []
    for shift in (0.0, 1.0):
        weights = {}
        for path, entry in p.scales.entries.items():
            near = {n: w + shift * rng.normal(size=w.shape) for n, w in p.path_weights()[path].items()}
            one = Parametrization.of_branch_set(entry.branches)
            vectors = {n: v for n, v in entry.vectors.items() if n in one.shapes()["scales"]}
            kernel = p.start()[path.partition("/")[0]]["kernel"]
            weights[path] = one.split(kernel, {"weights": near, "scales": vectors})["weights"]
        found = p.train(reparameterize(nesterov(), p.scales, weights=weights))
        assert_close(found, masked, 1e-10)
        ends.append(p.train(reparameterize(optax.lamb(1e-2), p.scales, weights=weights)))
    assert relative(*ends) > OTHER


@functools.cache
def trained():
    """Whatever its arrays are: every one is drawn, statistics included."""
    model = randomised(Network(nnx.Rngs(0)))
    model.train()
    return model


def kept():
    """Ways to start from the kernels that a network has."""
    model, rngs = trained(), nnx.Rngs(5)
    scales = depth_scales(model, SELECTED)
    yield "search", to_search(model, SELECTED, keep="split", rngs=rngs)
    yield "online", prepare(model, "online", select=SELECTED, keep="split", rngs=rngs).model
    yield "orepa", to_structure(model, "orepa", r"convs/.*", keep="split", rngs=rngs)
    yield "repopt", reinitialize(model, scales, keep="split", rngs=rngs)
    structures = find_parametrizations(model, "orepa", r"convs/.*")
    yield "orepa in the optimizer", reinitialize(model, structures, keep="split", rngs=rngs)


def test_a_trained_network_is_kept(x64):
    model, x = nnx.clone(trained()), batches()[0][0]
    model.eval()
    expected = model(x)
    for name, other in kept():
        other.eval()
        np.testing.assert_allclose(
            other(x), expected, rtol=0, atol=1e-10 * np.abs(expected).max(), err_msg=name
        )
    structures = find_parametrizations(model, "orepa", r"convs/.*")
    with pytest.raises(ValueError, match="no theta of least norm: give `near`"):
        branches_of(model, structures)
    for given in (structures, depth_scales(model, SELECTED)):
        theta = branches_of(model, given, near=nnx.Rngs(2))
        tx = reparameterize(optax.adamw(1e-3), given, weights=theta, trainable_scales=True)
        tx.init(nnx.state(model, nnx.Param))  # refuses what does not merge into the kernels


@functools.cache
def split_twice():
    """With products of tensors: structures, the network of merged layers, the plain one, its theta, and the
    theta nearest to another draw."""
    structures = find_parametrizations(trained(), "orepa", r"convs/.*")
    online = to_structure(trained(), "orepa", r"convs/.*", keep="split", rngs=nnx.Rngs(1))
    kept, theta = reinitialize(trained(), structures, keep="split", rngs=nnx.Rngs(1), return_weights=True)
    return structures, online, kept, theta, branches_of(trained(), structures, near=nnx.Rngs(2))


@pytest.mark.parametrize("name", tiers.often(INNER, "nesterov"))
def test_training_on_in_the_optimizer_is_that_in_the_network(x64, name):
    """From kernels that are kept: both split them alike."""
    structures, online, kept, theta, other = split_twice()
    assert_close(kernels(kept), kernels(trained()), 0)
    mask = decay_mask(structures, weight_decay_mask(kept))
    expected, _ = ends(online, INNER[name](weight_decay_mask(online)))

    def in_the_optimizer(theta):
        tx = reparameterize(INNER[name](mask), structures, weights=theta, trainable_scales=True)
        return kernels(ends(kept, tx)[0])

    assert_close(in_the_optimizer(theta), kernels(expected), KEPT_EXACT)
    # A split nearest to another draw is another training.
    assert relative(in_the_optimizer(other), kernels(expected)) > OTHER


def thin(layer):
    """Of a window of 3x3 no branch is as large as that."""
    return Structure(layer, {"row": (Stage(Kernel((1, 3))),), "point": (Stage(Kernel((1, 1))),)}, norm=True)


def test_kernels_that_the_branches_cannot_express_are_not_lost(x64):
    """All layers are named. A scale of zero takes a branch away."""
    model, rngs = trained(), nnx.Rngs(0)

    def scaled(layer):
        return dataclasses.replace(thin(layer), chains={n: without_norm(c) for n, c in thin(layer).chains})

    def two(layer):
        return [Kernel((1, 3)), Kernel((1, 1))] if layer.geometry.axes else None

    halves = depth_scales(model, SELECTED)
    broken = {p: e for p, e in halves.entries.items() if p in ("convs/1/kernel", "middle/kernel")}
    for path, entry in broken.items():
        own = entry.branches.names[0]
        vectors = entry.vectors | {own: entry.vectors[own].at[0].set(0)}
        halves = Scales(halves.entries | {path: dataclasses.replace(entry, vectors=vectors)})
    every, some = (
        "convs/0/kernel, convs/1/kernel, convs/2/kernel, convs/3/kernel",
        "convs/1/kernel, middle/kernel",
    )
    for way, named in (
        (lambda: to_structure(model, scaled, r"convs/.*", keep="split", rngs=rngs), every),
        (lambda: to_search(model, r"convs/.*", two, keep="split", rngs=rngs), every),
        (lambda: branches_of(model, find_parametrizations(model, scaled, r"convs/.*")), every),
        (lambda: to_search(model, SELECTED, scales=halves, keep="split", rngs=rngs), some),
        (lambda: reinitialize(model, halves, keep="split", rngs=rngs), some),
    ):
        with pytest.raises(ValueError, match=f"^the branches of {named} cannot express the kernels that"):
            way()
    to_structure(model, scaled, r"convs/.*", allow_trained=True, rngs=rngs)


@pytest.mark.parametrize(
    "dtype", [jnp.float64, pytest.param(jnp.float32, marks=pytest.mark.long), jnp.bfloat16]
)
def test_kernels_of_zeros_are_kept(dtype, x64):
    """Where a draw cancels, so that what is left is the rounding of its terms."""
    model = Network(nnx.Rngs(0), dtype)
    model.convs[1].kernel.set_value(jnp.zeros_like(model.convs[1].kernel[...]))
    structures = find_parametrizations(model, "orepa", r"convs/.*")
    theta = branches_of(model, structures, near=nnx.Rngs(1))
    tx = reparameterize(optax.sgd(0.1), structures, weights=theta, trainable_scales=True)
    tx.init(nnx.state(model, nnx.Param))
    theta["convs/1/kernel"]["weights"]["3x3"] += 1
    tx = reparameterize(optax.sgd(0.1), structures, weights=theta, trainable_scales=True)
    with pytest.raises(ValueError, match=r"merge into other kernels .* at convs/1/kernel: give"):
        tx.init(nnx.state(model, nnx.Param))


def test_a_trained_network_is_not_redrawn_unasked(x64):
    model, rngs = trained(), nnx.Rngs(0)
    scales = depth_scales(model, SELECTED)
    ways = {
        "reinitialize": functools.partial(reinitialize, model, scales),
        "search": functools.partial(to_search, model, SELECTED),
        "structure": functools.partial(to_structure, model, "repvgg", r"convs/.*"),
        "prepare": functools.partial(prepare, model, "online", select=SELECTED),
    }
    for name, way in ways.items():
        with pytest.raises(ValueError, match=r"has been trained \(batch statistics norms/0/mean") as error:
            way(rngs=rngs)
        assert "allow_trained=True" in str(error.value), name
        assert 'keep="split"' in str(error.value), name
        way(rngs=rngs, allow_trained=True)
        way(rngs=rngs, trained=False)
    with pytest.raises(ValueError, match="kernels are kept or discarded"):
        to_search(model, SELECTED, allow_trained=True, keep="split", rngs=rngs)
    with pytest.raises(ValueError, match="`keep` is 'all'"):
        to_search(model, SELECTED, keep="all", rngs=rngs)
    with pytest.raises(
        ValueError,
        match=r"structures of convs/0, .* and 1 more have batch norms, which",
    ):
        to_structure(model, "repvgg", r"convs/.*", keep="split", rngs=rngs)


class Plain(nnx.Module):
    def __init__(self, use_bias):
        self.layer = nnx.Linear(4, 4, use_bias=use_bias, rngs=nnx.Rngs(0))

    def __call__(self, x):
        return self.layer(x)


def test_without_batch_norms_biases_tell_or_nothing_does():
    fresh, silent = Plain(True), Plain(False)
    to_search(fresh, rngs=nnx.Rngs(0))
    to_search(nnx.eval_shape(lambda: Plain(False)), rngs=nnx.Rngs(0))
    fresh.layer.bias.set_value(jnp.ones(4))
    for model, has in ((fresh, ""), (silent, " and no bias")):
        with pytest.raises(ValueError, match=f"cannot be told .* no batch norm{has}, and") as error:
            to_search(model, rngs=nnx.Rngs(0))
        assert "say trained=False" in str(error.value)
        to_search(model, trained=False, rngs=nnx.Rngs(0))
        with pytest.raises(ValueError, match="the model has been trained"):
            to_search(model, trained=True, rngs=nnx.Rngs(0))


def test_verify_checks_training_on_from_kernels_that_are_kept(x64):
    model = trained()
    scales = depth_scales(model, SELECTED)
    rng = np.random.default_rng(0)
    data = [{"image": rng.normal(size=(4, 8, 8, 3)), "label": rng.integers(0, 5, 4)} for _ in range(5)]
    assert verify_equivalence(model, scales, data, keep="split", rngs=nnx.Rngs(0)).equivalent
    wrong = verify_equivalence(
        model,
        scales,
        data,
        optimizer=optax.chain(optax.add_decayed_weights(0.1), repopt_mask(scales), optax.sgd(0.05, 0.9)),
        twin_optimizer=optax.chain(optax.add_decayed_weights(0.1), optax.sgd(0.05, 0.9)),
        keep="split",
        rngs=nnx.Rngs(0),
    )
    assert wrong.max_difference > 1e-5


# --- What it refuses; sharding; half precision.


def test_what_it_refuses():
    network = Network(nnx.Rngs(0), jnp.float32)
    structures = find_parametrizations(network, "orepa", r"convs/1")
    params = {"convs": {"1": {"kernel": jnp.ones((3, 3, 4, 4))}}}
    tx = reparameterize(optax.sgd(0.1), structures, trainable_scales=True)
    with pytest.raises(ValueError, match="a chain is a product"):
        tx.init(params)
    with pytest.raises(TypeError, match="with trainable_scales=True a mapping"):
        reparameterize(optax.sgd(0.1), structures)
    with pytest.raises(ValueError, match="`trainable_scales` is True and `keep_weights` is False"):
        reparameterize(optax.sgd(0.1), structures, trainable_scales=True, keep_weights=False)
    fresh, theta = reinitialize(params, structures, rngs=nnx.Rngs(0), return_weights=True)
    tx = reparameterize(optax.sgd(0.1), structures, weights=theta, trainable_scales=True)
    state = tx.init(fresh)
    with pytest.raises(ValueError, match="`params` are missing"):
        tx.update(fresh, state)
    with pytest.raises(ValueError, match=r"gradients lack kernels .* convs/1/kernel"):
        tx.update({"convs": {}}, state, fresh)
    with pytest.raises(ValueError, match=r"merge into other kernels .* convs/1/kernel"):
        tx.init(params)
    with pytest.raises(ValueError, match="the structures do not fit the parameters: 1 missing kernels"):
        tx.init({"convs": {}})
    short = {"convs/1/kernel": {"weights": theta["convs/1/kernel"]["weights"], "scales": {}}}
    with pytest.raises(ValueError, match="6 missing arrays: convs/1/kernel/scales/3x3"):
        reparameterize(optax.sgd(0.1), structures, weights=short, trainable_scales=True).init(fresh)
    scales = depth_scales(network, SELECTED)
    _, weights = reinitialize(network, scales, rngs=nnx.Rngs(0), return_weights=True)
    some = {path: w for path, w in weights.items() if path in ("convs/0/kernel", "middle/kernel")}
    with pytest.raises(ValueError, match="7 missing arrays: convs/1/kernel/weights/3x3") as error:
        reparameterize(optax.sgd(0.1), scales, weights=some, trainable_scales=True).init(
            nnx.state(network, nnx.Param)
        )
    assert all(f"convs/{i}/kernel/weights/1x1" in str(error.value) for i in (1, 2, 3))
    with pytest.raises(ValueError, match=r"convs/0: 3x3, 1x1 have batch norms"):
        find_parametrizations(network, "repvgg", r"convs/0")
    with pytest.raises(ValueError, match="convs/1/kernel"):
        branches_of({"convs": {}}, structures, near=nnx.Rngs(0))
    other = {"convs": {"1": {"kernel": jnp.ones((3, 3, 4, 6))}}}
    with pytest.raises(ValueError, match=r"expected \(3, 3, 4, 4\), found \(3, 3, 4, 6\)"):
        reinitialize(other, structures, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="with one tap all branches would be the same map"):
        find_parametrizations(network, "orepa", "middle")
    hidden = tx.init({"convs": {"1": {"kernel": optax.MaskedNode()}}})
    assert hidden.theta == {}


def test_there_is_nothing_to_check_it_against():
    params = {"kernel": jnp.ones((3, 3, 4, 4))}
    scales = Scales.ones({"kernel": repopt(Geometry((3, 3), 4, 4)).branch_set()})
    tx = reparameterize(optax.adam(1e-3), scales, trainable_scales=True)
    with pytest.raises(OptimizerError, match=r"trains the scales of kernel .* in mode online") as error:
        check_optimizer(optax.chain(tx), scales, params)
    assert error.value.reasons == (Reason.TRAINED_SCALES,)


def test_half_precision_kernels_have_a_full_theta():
    params = {"kernel": jnp.ones((3, 3, 4, 4), jnp.bfloat16)}
    scales = Scales.ones({"kernel": repopt(Geometry((3, 3), 4, 4)).branch_set()})
    tx = reparameterize(optax.sgd(1e-5), scales, trainable_scales=True)
    state = tx.init(params)
    assert {x.dtype for x in jax.tree.leaves(state.theta)} == {jnp.dtype("float32")}
    start = Parametrization.of_branch_set(scales.branch_sets["kernel"]).merge(state.theta["kernel"])
    for _ in range(3):  # each less than half of a step of bfloat16, and in theta none is lost
        updates, state = tx.update({"kernel": jnp.ones_like(params["kernel"])}, state, params)
        params = optax.apply_updates(params, updates)
        merged = Parametrization.of_branch_set(scales.branch_sets["kernel"]).merge(state.theta["kernel"])
        assert params["kernel"].dtype == jnp.bfloat16
        np.testing.assert_array_equal(params["kernel"], merged.astype(jnp.bfloat16))
    assert np.all(merged < start)
    assert np.any(params["kernel"] == 1)


def test_theta_is_sharded_with_the_kernel(x64):
    """Over four devices, along the outputs: as on one device, bit for bit within rounding."""
    mesh = jax.make_mesh((4,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
    rng = np.random.default_rng(0)
    params = {"kernel": jnp.asarray(rng.normal(size=(3, 3, 8, 8)))}
    scales = Scales.ones({"kernel": repopt(Geometry((3, 3), 8, 8)).branch_set()})
    tx = reparameterize(optax.adamw(1e-2), scales, trainable_scales=True)

    @jax.jit
    def steps(params):
        state = tx.init(params)
        for _ in range(3):
            updates, state = tx.update(jax.tree.map(jnp.sin, params), state, params)
            params = optax.apply_updates(params, updates)
        return params, state.theta

    expected = steps(params)
    sharding = jax.NamedSharding(mesh, jax.P(None, None, None, "fsdp"))
    sharded, theta = steps(jax.device_put(params, sharding))
    assert sharded["kernel"].sharding.is_equivalent_to(sharding, 4)
    assert theta["kernel"]["weights"]["3x3"].sharding.is_equivalent_to(sharding, 4)
    assert_close((sharded, theta), expected, EXACT)


@pytest.mark.parametrize(
    ("layout", "spec"),
    [
        pytest.param("...io", (None, None, None, "fsdp"), marks=pytest.mark.long),
        ("...io", (None, None, "fsdp")),
        ("oi...", ("fsdp",)),
    ],
)
def test_theta_that_is_given_is_sharded_with_the_kernel(x64, layout, spec):
    """Tensors and scales along the outputs, or along the inputs, and none of another width; nothing is kept
    whole on every device that need not be."""
    one = Parametrization(orepa(Geometry((3, 3), 8, 4)), (), layout)
    theta = one.sample(jax.random.key(0), dtype=jnp.float64)
    params = {"kernel": one.merge(theta)}
    tx = reparameterize(optax.adam(1e-2), {"kernel": one}, weights={"kernel": theta}, trainable_scales=True)

    def steps(params):
        state = tx.init(params)
        update = jax.jit(tx.update)
        for _ in range(3):
            updates, state = update(jax.tree.map(jnp.sin, params), state, params)
            params = optax.apply_updates(params, updates)
        return params, state.theta

    expected = steps(params)
    mesh = jax.make_mesh((4,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
    sharded = jax.device_put(params, jax.NamedSharding(mesh, jax.P(*spec)))
    found = tx.init(sharded).theta["kernel"]
    along_outputs = spec != (None, None, "fsdp")
    assert found["scales"]["3x3"].sharding.is_fully_replicated != along_outputs
    for key in ("3x3", "1x1", "average", "1x1_3x3_1"):
        x = found["weights"][key]
        part = list(x.shape)
        part[-1 if along_outputs else -2] //= 4
        assert list(x.sharding.shard_shape(x.shape)) == part, key
    other = found["weights"]["depthwise_1x1_0"]  # (3, 3, 1, 64)
    assert other.sharding.is_fully_replicated
    assert_close(steps(sharded), expected, EXACT)


def test_identity_and_kernel_alone():
    """A set of branches of which one has no scale."""
    branches = BranchSet((3, 3, 4, 4), (Kernel((3, 3)), Identity()))
    one = Parametrization.of_branch_set(branches)
    decayed = one.structure.decayed()
    assert (decayed["weights/3x3"], decayed["weights/identity"], decayed["scales/3x3"]) == (True, True, False)
    assert set(one.shapes()["scales"]) == {"3x3"}
    assert STRUCTURES["orepa"] is orepa
    with pytest.raises(ValueError, match="`layout` is 'ix'"):
        Parametrization(one.structure, (), "ix")
    with pytest.raises(ValueError, match="have batch norms, so that the kernel is not a function"):
        Parametrization(dbb(Geometry((3, 3), 4, 4)))
