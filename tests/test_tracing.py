"""Layers found by tracing, in any framework, through whatever is done to their kernels."""

import functools
import re
from typing import Any

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from any_networks import DEPTHWISE, NETWORKS
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from strangers import STRANGERS, call

from repopt_jax import fast_on_cpu, find_branches, find_layers, find_parametrizations, find_structures
from repopt_jax.core import paths, published
from repopt_jax.core.branches import BranchSet, Identity, Kernel, from_canonical, to_canonical
from repopt_jax.core.published import default_branches
from repopt_jax.core.structure import Stage, Structure
from repopt_jax.core.tracing import trace_layers


def traced(model, run):
    """Arguments for tracing an NNX model that `run` calls."""
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    return lambda params: run(nnx.merge(graph, params, rest, copy=True)), params


@pytest.mark.parametrize("name", [*NETWORKS, "depthwise"])
def test_what_tracing_finds_is_what_the_classes_say(name):
    case = NETWORKS.get(name, DEPTHWISE)
    model = case.fresh()
    model.eval()
    x = jnp.zeros((2, *case.inputs))
    apply, params = traced(model, lambda model: model(x))
    assert find_branches(apply, params) == find_branches(model)
    layers = find_layers(model)
    found = trace_layers(apply, params).layers
    assert found.keys() >= layers.keys()
    for path, layer in layers.items():
        other, g = found[path], layer.geometry
        assert (other.stack, other.has_bias, other.kernel) == (layer.stack, layer.has_bias, layer.kernel)
        fields = ("window", "inputs", "outputs", "groups", "strides", "dilation")
        assert [getattr(other.geometry, f) for f in fields] == [getattr(g, f) for f in fields]
        if g.pad_mode == "constant":
            assert other.geometry.padding == g.padding
    assert all(layer.uses == 1 for layer in found.values()) == (name != "shared head")


def test_convolutions_of_ours_are_convolutions():
    model, x = fast_on_cpu(DEPTHWISE.fresh()), jnp.zeros((2, *DEPTHWISE.inputs))
    model.eval()
    apply, params = traced(model, lambda model: model(x))
    assert "repopt_convolution" in str(jax.make_jaxpr(apply)(params))
    assert find_branches(apply, params) == find_branches(model)


@pytest.mark.parametrize("name", STRANGERS)
def test_networks_of_collections(name):
    stranger = STRANGERS[name]
    model, x = stranger.fresh(), stranger.batches(1)[0]["x"]
    model.eval()
    apply, params = traced(model, lambda model: call(model, x))
    assert find_branches(apply, params) == find_branches(model)


# -- other frameworks


class LinenBlock(nn.Module):
    filters: int
    conv: Any
    norm: Any
    strides: tuple[int, int] = (1, 1)

    @nn.compact
    def __call__(self, x):
        y = nn.relu(self.norm()(self.conv(self.filters, (1, 1))(x)))
        y = nn.relu(self.norm()(self.conv(self.filters, (3, 3), self.strides)(y)))
        y = self.norm(scale_init=nn.initializers.zeros_init())(self.conv(2 * self.filters, (1, 1))(y))
        if x.shape != y.shape:
            x = self.conv(2 * self.filters, (1, 1), self.strides, name="conv_proj")(x)
            x = self.norm(name="norm_proj")(x)
        return nn.relu(x + y)


class LinenResNet(nn.Module):
    """In the style of Flax's example: layers by `functools.partial`, half precision, names by number."""

    @nn.compact
    def __call__(self, x, train: bool = True):
        conv = functools.partial(nn.Conv, use_bias=False, dtype=jnp.bfloat16)
        norm = functools.partial(nn.BatchNorm, use_running_average=not train, dtype=jnp.bfloat16)
        x = conv(4, (7, 7), (2, 2), padding=[(3, 3), (3, 3)], name="conv_init")(x)
        x = nn.max_pool(nn.relu(norm(name="bn_init")(x)), (3, 3), strides=(2, 2), padding="SAME")
        for i, count in enumerate((1, 2)):
            for j in range(count):
                strides = (2, 2) if i > 0 and j == 0 else (1, 1)
                x = LinenBlock(4 * 2**i, conv, norm, strides)(x)
        return nn.Dense(5)(jnp.mean(x, axis=(1, 2))).astype(jnp.float32)


class NNXBlock(nnx.Module):
    def __init__(self, inputs, filters, strides=(1, 1), *, rngs):
        conv = functools.partial(nnx.Conv, use_bias=False, rngs=rngs)
        self.Conv_0, self.Conv_1 = conv(inputs, filters, (1, 1)), conv(filters, filters, (3, 3), strides)
        self.Conv_2 = conv(filters, 2 * filters, (1, 1))
        if inputs != 2 * filters:
            self.conv_proj = conv(inputs, 2 * filters, (1, 1), strides)


class NNXResNet(nnx.Module):
    """Its twin, of which the layers are read only."""

    def __init__(self, *, rngs):
        self.conv_init = nnx.Conv(3, 4, (7, 7), (2, 2), padding=[(3, 3), (3, 3)], use_bias=False, rngs=rngs)
        for n, block in enumerate(((4, 4), (8, 8, (2, 2)), (16, 8))):
            setattr(self, f"LinenBlock_{n}", NNXBlock(*block, rngs=rngs))
        self.Dense_0 = nnx.Linear(16, 5, rngs=rngs)


def test_a_linen_network_as_in_flax_s_example():
    x = jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32)
    variables: Any = jax.eval_shape(LinenResNet().init, jax.random.key(0), x)

    def apply(params, stats, x):
        return LinenResNet().apply({"params": params, "batch_stats": stats}, x, mutable=["batch_stats"])

    found = find_branches(apply, variables["params"], variables["batch_stats"], x)
    twin = nnx.eval_shape(lambda: NNXResNet(rngs=nnx.Rngs(0)))
    assert found == find_branches(twin)
    assert found["LinenBlock_1/Conv_1/kernel"].names == ("3x3", "1x1")  # strided
    # What the shape alone says is wrong there: an identity.
    assert default_branches((3, 3, 8, 8)).names == ("3x3", "1x1", "identity")
    every = trace_layers(apply, variables["params"], variables["batch_stats"], x)
    assert every.layers.keys() == find_layers(twin).keys()
    assert every.layers["LinenBlock_1/Conv_1/kernel"].geometry.padding == ((0, 1), (0, 1))
    assert not every.others


class EquinoxNet(eqx.Module):
    stem: eqx.nn.Conv2d
    body: eqx.nn.Conv2d
    mix: eqx.nn.Linear
    head: eqx.nn.Linear

    def __init__(self, key):
        keys = jax.random.split(key, 4)
        self.stem = eqx.nn.Conv2d(2, 4, 3, stride=2, padding=1, key=keys[0])
        self.body = eqx.nn.Conv2d(4, 4, 3, padding=1, groups=2, use_bias=False, key=keys[1])
        self.mix, self.head = eqx.nn.Linear(4, 4, key=keys[2]), eqx.nn.Linear(4, 3, key=keys[3])

    def __call__(self, x):
        x = jax.nn.relu(self.body(jax.nn.relu(self.stem(x)))).mean((1, 2))
        return self.head(jax.nn.relu(self.mix(x)))


def functional(params, x):
    """A network of functions on a dictionary of two levels, modules by name, as Haiku's are."""

    def conv(name, x, stride=1, groups=1):
        w = params[name]["w"].astype(x.dtype)
        y = jax.lax.conv_general_dilated(
            x,
            w,
            (stride, stride),
            "SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=groups,
        )
        return y + params[name]["b"].reshape(1, 1, 1, -1) if "b" in params[name] else y

    def linear(name, x):
        return jnp.dot(x, params[name]["w"]) + params[name]["b"].reshape(1, -1)

    x = jax.nn.relu(conv("net/~/stem", x, 2))
    x = jax.checkpoint(lambda x: jax.nn.relu(conv("net/~/body", x, groups=2)))(x).mean((1, 2))
    return linear("net/~/head", jax.nn.relu(linear("net/~/mix", x)))


class Twin(nnx.Module):
    def __init__(self, *, rngs):
        self.stem = nnx.Conv(2, 4, (3, 3), 2, rngs=rngs)
        self.body = nnx.Conv(4, 4, (3, 3), feature_group_count=2, use_bias=False, rngs=rngs)
        self.mix, self.head = nnx.Linear(4, 4, rngs=rngs), nnx.Linear(4, 3, rngs=rngs)


def plain(sets, rename):
    return {rename(path): bs.plain for path, bs in sets.items()}


def test_equinox_and_functions_give_the_branch_sets_of_the_twin():
    expected = find_branches(nnx.eval_shape(lambda: Twin(rngs=nnx.Rngs(0))))
    params, static = eqx.partition(EquinoxNet(jax.random.key(0)), eqx.is_inexact_array)
    x = jnp.zeros((3, 2, 8, 8))
    found = find_branches(lambda params, x: jax.vmap(eqx.combine(params, static))(x), params, x)
    assert {bs.layout for bs in found.values()} == {"oi..."}
    assert plain(found, lambda path: path.replace("weight", "kernel")) == expected

    shapes = {"stem": (3, 3, 2, 4), "body": (3, 3, 2, 4), "mix": (4, 4), "head": (4, 3)}
    params = {f"net/~/{n}": {"w": jnp.zeros(s), "b": jnp.zeros(s[-1])} for n, s in shapes.items()}
    del params["net/~/body"]["b"]
    found = find_branches(functional, params, jnp.zeros((3, 8, 8, 2)))
    assert plain(found, lambda path: path.removeprefix("net/~/").replace("/w", "/kernel")) == expected
    layers = trace_layers(functional, params, jnp.zeros((3, 8, 8, 2))).layers
    assert [layer.has_bias for layer in layers.values()] == [False, True, True, True]
    assert layers["net/~/stem/w"].readers == ("max",)


def test_structures_of_a_function_are_those_of_the_twin():
    params, static = eqx.partition(EquinoxNet(jax.random.key(0)), eqx.is_inexact_array)
    x = jnp.zeros((3, 2, 8, 8))

    def apply(params, x):
        return jax.vmap(eqx.combine(params, static))(x)

    twin = nnx.eval_shape(lambda: Twin(rngs=nnx.Rngs(0)))
    for structure in ("repopt", "orepa"):
        described = published.repopt if structure == "repopt" else structure
        found = find_parametrizations(apply, params, x, structure=described)
        own = find_parametrizations(twin, described)
        shapes = {path.replace("weight", "kernel"): one.shapes() for path, one in found.items()}
        assert shapes == {path: one.shapes() for path, one in own.items()}
        assert all(one.kernel == paths.named_leaves(params)[0][path].shape for path, one in found.items())
    # A structure that is for dense layers too leaves that of the logits, which is told by what it makes.

    def doubled(layer):
        return Structure(layer, {name: (Stage(Kernel(layer.window), "scale"),) for name in "ab"})

    table = find_structures(apply, params, x, structure=doubled)
    assert "it is the dense layer that makes the logits" in table["head/weight"].reason
    assert [path for path, choice in table.items() if choice.structure] == [
        *("body/weight", "mix/weight", "stem/weight")
    ]
    assert "a + b" in str(table)
    chosen = find_parametrizations(apply, params, x, select="head")
    assert chosen.keys() == {"head/weight"}
    with pytest.raises(
        ValueError, match=r"`structure` is not defined for all selected layers: body: .* have batch norms"
    ):
        find_parametrizations(apply, params, x, structure="acnet", select="body")
    with pytest.raises(ValueError, match="`structure` is not defined for all selected layers: head: "):
        find_parametrizations(apply, params, x, structure="orepa", select="head|body")
    with pytest.raises(TypeError, match="`model` is a dict: it must be an NNX model, or a function"):
        find_parametrizations({})


# -- what is done to a kernel


@settings(deadline=None)
@given(
    order=st.permutations(range(4)),
    split=st.booleans(),
    half=st.booleans(),
    seed=st.integers(0, 9),
)
def test_a_kernel_is_followed_through_what_moves_its_entries(order, split, half, seed):
    """Whatever the order of its axes, the layout found is that which the convolution sees; but there is none
    in which the spatial axes change places."""
    rng = np.random.default_rng(seed)
    kernel = jnp.asarray(rng.normal(size=(3, 2, 4, 6)), jnp.float32)  # (*spatial, in, out)
    stored = kernel.transpose(order)
    if split:  # the outputs as two axes
        axis = list(order).index(3)
        stored = stored.reshape(*stored.shape[:axis], 2, 3, *stored.shape[axis + 1 :])

    def apply(params, x):
        w = params["w"].astype(jnp.bfloat16) if half else params["w"]
        w = w.reshape([kernel.shape[a] for a in order])
        w = jnp.transpose(w, np.argsort(order)).astype(x.dtype)
        numbers = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(x, w, (2, 1), "VALID", dimension_numbers=numbers)

    found = trace_layers(apply, {"w": stored}, jnp.zeros((1, 8, 8, 4)))
    if order.index(0) > order.index(1):
        assert found.others == {"w": "its axes are mixed before its use"}
        return
    layer = found.layers["w"]
    np.testing.assert_array_equal(to_canonical(stored, layer.layout), kernel)
    np.testing.assert_array_equal(from_canonical(kernel, layer.layout, stored.shape), stored)
    assert layer.geometry.strides == (2, 1)
    # Negative control: another order of two axes of the layout is another kernel.
    letters = layer.layout if "..." not in layer.layout else {"...io": "ssio", "oi...": "oiss"}[layer.layout]
    wrong = letters.translate(str.maketrans("io", "oi"))
    assert to_canonical(stored, wrong).shape != kernel.shape


def dense(x, w):
    return x @ w


def scanned(params, x):
    """Layers of a stack, with one weight that all share."""

    def one(x, w):
        return jnp.tanh(x @ w) @ params["shared"].T, None

    return jax.lax.scan(jax.checkpoint(one), x, params["stack"])[0]


def test_stacks_scans_and_repeated_uses():
    params = {"stack": jnp.zeros((5, 4, 4)), "shared": jnp.zeros((4, 4))}
    layers = trace_layers(scanned, params, jnp.zeros((2, 4))).layers
    assert (layers["stack"].stack, layers["stack"].uses, layers["stack"].layout) == ((5,), 1, "...io")
    assert (layers["shared"].stack, layers["shared"].uses, layers["shared"].layout) == ((), 5, "oi...")
    assert layers["stack"].readers == ("tanh",)
    assert layers["shared"].readers == ("scan",)
    assert find_branches(scanned, params, jnp.zeros((2, 4))) == {
        "shared": BranchSet((4, 4), (Kernel(()), Identity()), layout="oi..."),
        "stack": BranchSet((5, 4, 4), (Kernel(()), Identity()), stacked=1),
    }
    by_layer = trace_layers(lambda w, x: jax.vmap(dense)(x, w), params["stack"], jnp.zeros((5, 2, 4)))
    assert by_layer.layers[""].stack == (5,)
    chosen = trace_layers(
        lambda w, x: jax.lax.cond(x.sum() > 0, lambda: x @ w, lambda: -x), params["shared"], jnp.zeros((2, 4))
    )
    assert chosen.layers[""].uses == 1


def normalised(params, x):
    w = params["w"]
    return x @ (w / jnp.linalg.norm(w))


def tied(params, tokens):
    return jnp.tanh(params["w"][tokens]) @ params["w"].T


def fused(params, x):
    return x @ params["w"][:, :2]


def upwards(params, x):
    return jax.lax.conv_transpose(x, params["w"], (2, 2), "SAME")


def twice(params, x):
    return x @ params["w"] + x @ params["w"].T


def mixed(params, x):
    return x @ params["w"].reshape(2, 2, 2, 2).transpose(0, 3, 1, 2).reshape(4, 4)


def unread(params, x):
    return x


def turned(params, x):
    return jax.lax.conv_general_dilated(x, params["w"][::-1, ::-1], (1, 1), "SAME", dimension_numbers=NHWC)


def joined(params, x):
    return x @ jnp.concatenate([params["w"], 2 * params["w"], params["v"]], 1)


def sideways(params, x):
    """A stack along the second axis, as `nn.scan(variable_axes={"params": 1})` makes it."""
    return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w.astype(x.dtype)), None), x, params["w"].swapaxes(0, 1))[
        0
    ]


def multiplied(params, x):
    return x @ params["w"]


def part(params, x):
    return x @ params["w"][:, :0]


def stacked(params, x):
    return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params["w"])[0]


def convolved(params, x):
    return jax.lax.conv_general_dilated(x, params["w"], (1, 1), "SAME", dimension_numbers=NHWC)


NHWC = ("NHWC", "HWIO", "NHWC")
X, W = np.zeros((2, 4), np.float32), np.zeros((4, 4), np.float32)


@pytest.mark.parametrize(
    ("apply", "w", "x", "reason"),
    [
        (normalised, W, X, "it is changed before each use"),
        (tied, W, np.zeros((2,), int), "gather reads it"),
        (fused, W, X, "only a part of it is one kernel"),
        (
            upwards,
            np.zeros((3, 3, 4, 4), np.float32),
            np.zeros((1, 5, 5, 4), np.float32),
            "a transposed conv",
        ),
        (twice, W, X, "it is used as several different layers"),
        (mixed, W, X, "its axes are mixed before its use"),
        (unread, W, X, "no equation reads it"),
        (
            turned,
            np.zeros((3, 3, 4, 4), np.float32),
            np.zeros((1, 5, 5, 4), np.float32),
            "its taps are reversed before its use",
        ),
        (multiplied, np.zeros((4, 0), np.float32), X, "it is empty"),
        (part, W, X, "it is empty"),
        (stacked, np.zeros((0, 4, 4), np.float32), X, "it is empty"),
        (
            convolved,
            np.zeros((3, 3, 4, 0), np.float32),
            np.zeros((1, 5, 5, 4), np.float32),
            "it is empty",
        ),
        (sideways, np.zeros((4, 3, 4), np.float32), X, "its stack is not along its first axis"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_parameters_that_are_no_kernel(apply, w, x, reason):
    found = trace_layers(apply, {"w": w}, x)
    assert not found.layers
    assert reason in found.others["w"]
    assert f"  w: {found.others['w']}" in str(found).splitlines()
    with pytest.raises(ValueError, match="`apply` has no layer of several branches"):
        find_branches(apply, {"w": w}, x)


def test_an_empty_kernel_does_not_stop_the_others():
    params = {"w": W, "none": np.zeros((4, 0), np.float32)}
    found = trace_layers(lambda p, x: jnp.tanh(x @ p["w"]) @ p["none"], params, X)
    assert list(found.layers) == ["w"]
    assert found.others == {"none": "it is empty"}


def test_kernels_that_are_joined_before_their_use():
    """As those of the gates of Linen's `OptimizedLSTMCell`."""
    v = np.zeros((4, 2), np.float32)
    assert trace_layers(joined, {"w": W, "v": v}, X).others == dict.fromkeys(
        "vw", "it is joined with other parameters before each use"
    )
    cell = nn.RNN(nn.OptimizedLSTMCell(4))
    x = jax.ShapeDtypeStruct((2, 5, 4), jnp.float32)
    params: Any = jax.eval_shape(cell.init, jax.random.key(0), x)["params"]
    found = trace_layers(lambda params, x: cell.apply({"params": params}, x), params, x)
    assert set(found.others.values()) == {"it is joined with other parameters before each use"}
    assert len(found.others) == 8


def test_a_linen_stack_along_another_axis():
    class Stack(nn.Module):
        axis: int

        @nn.compact
        def __call__(self, x):
            scan = nn.scan(
                lambda layer, x, _: (nn.tanh(layer(x)), None),
                variable_axes={"params": self.axis},
                split_rngs={"params": True},
                length=3,
            )
            return scan(nn.Dense(4), x, None)[0]

    x = jax.ShapeDtypeStruct((2, 4), jnp.float32)
    found = {}
    for axis in (0, 1):
        stack = Stack(axis)
        params: Any = jax.eval_shape(stack.init, jax.random.key(0), x)["params"]
        found[axis] = trace_layers(lambda p, x, stack=stack: stack.apply({"params": p}, x), params, x)
    assert found[0].layers["Dense_0/kernel"].stack == (3,)
    assert found[1].others["Dense_0/kernel"] == "its stack is not along its first axis"


@pytest.mark.parametrize("groups", [1, 2])
def test_a_stack_of_convolutions_that_vmap_runs_as_one(groups):
    """What tracing finds is what the classes say: several layers, not one of more groups or outputs."""

    def make(rngs):
        options = {"feature_group_count": groups, "strides": 2, "padding": 1}
        return nnx.Conv(4, 4, (3, 3), **options, rngs=rngs)

    model = nnx.split_rngs(splits=3)(nnx.vmap(make))(nnx.Rngs(0))
    run = nnx.vmap(lambda layer, x: layer(x))
    x = jnp.zeros((3, 2, 6, 6, 4))
    apply, params = traced(model, lambda model: run(model, x))
    assert find_branches(apply, params, select=".*") == find_branches(model, nnx.Conv)
    assert find_branches(apply, params)["kernel"].stacked == 1
    assert trace_layers(apply, params).layers["kernel"].geometry == find_layers(model)["kernel"].geometry
    # Where all of them take one input, the outputs of a group are those of all layers.
    shared = nnx.vmap(lambda layer, x: layer(x), in_axes=(0, None))
    apply, params = traced(model, lambda model: shared(model, x[0]))
    if groups == 1:
        assert find_branches(apply, params) == find_branches(model)
    else:
        reason = "its stack is mixed with its groups before its use"
        assert trace_layers(apply, params).others["kernel"] == reason


# -- adapters


class Plain(nnx.Module):
    """A residual network with a bottleneck beside a shortcut, which is no adapter."""

    def __init__(self, *, rngs):
        self.down, self.up = nnx.Linear(6, 2, rngs=rngs), nnx.Linear(2, 6, rngs=rngs)
        self.short, self.head = nnx.Linear(6, 6, rngs=rngs), nnx.Linear(6, 6, rngs=rngs)

    def __call__(self, x):
        return self.head(nnx.relu(self.short(x) + self.up(nnx.relu(self.down(x)))) + x)


class Lora(nnx.Module):
    def __init__(self, *, rngs):
        self.free = nnx.Linear(6, 6, rngs=rngs)
        self.wrapped = nnx.LoRA(6, 2, 6, base_module=nnx.Linear(6, 6, rngs=rngs), rngs=rngs)
        self.linear = nnx.LoRALinear(6, 6, lora_rank=2, rngs=rngs)

    def __call__(self, x):
        return self.linear(nnx.relu(self.wrapped(nnx.relu(self.free(x)))))


ADAPTED = "the product of two smaller kernels is added to its output (LoRA)"


@pytest.mark.parametrize("closed_over", [False, True])
def test_the_base_of_a_lora_is_left_unless_it_is_chosen(closed_over):
    graph, params, rest = nnx.split(Lora(rngs=nnx.Rngs(0)), nnx.Param, ...)
    x = jnp.zeros((2, 6))

    def apply(params, *example):
        return nnx.merge(graph, params, rest, copy=True)(*(example or (x,)))

    example = () if closed_over else (x,)
    found = trace_layers(apply, params, *example)
    bases = {"linear/kernel", "wrapped/base_module/kernel"}
    assert {path for path, why in found.others.items() if why == ADAPTED} == bases == found.adapted.keys()
    assert find_branches(apply, params, *example).keys() == {"free/kernel"}
    every = find_branches(apply, params, *example, select=r"free|linear|wrapped/base_module")
    assert every.keys() == {"free/kernel", *bases}
    by_function = find_branches(apply, params, *example, select=lambda path, layer: path == "linear")
    assert list(by_function) == ["linear/kernel"]
    # The adapters alone are the parameters, as where they alone are trained.
    graph, params, rest = nnx.split(Lora(rngs=nnx.Rngs(0)), nnx.LoRAParam, ...)
    own = trace_layers(lambda p, x: nnx.merge(graph, p, rest, copy=True)(x), params, x)
    assert len(own.layers) == 4
    assert not own.adapted


def test_a_plain_residual_network_has_no_adapters():
    model, x = Plain(rngs=nnx.Rngs(0)), jnp.zeros((2, 6))
    apply, params = traced(model, lambda model: model(x))
    found = trace_layers(apply, params)
    assert found.adapted == {}
    assert found.layers.keys() == find_layers(model).keys()
    assert find_branches(apply, params) == find_branches(model)


def adapted(params, x, *, rank=2, between=lambda y: y, own=lambda x: x, last=lambda y: y):
    down, up = params["down"][:, :rank] if rank < 2 else params["down"], params["up"]
    y = x.astype(jnp.float32) @ params["w"] + params["b"].reshape(1, -1)
    return jnp.tanh(last(between(own(x) @ down) @ up) + y)


@pytest.mark.parametrize(
    ("options", "is_adapter"),
    [
        ({}, True),
        ({"last": lambda y: y * (16 / 2)}, True),
        ({"last": lambda y: 0.5 * y.astype(jnp.float32)}, True),
        ({"between": lambda y: y / 8}, True),
        ({"own": lambda x: x.reshape(-1, 6)}, True),
        ({"between": jnp.tanh}, False),
        ({"own": jnp.tanh}, False),
        ({"last": jnp.tanh}, False),
    ],
    ids=["plain", "alpha", "half", "before", "shape", "nonlinear", "another input", "nonlinear sum"],
)
def test_adapters_of_any_function(options, is_adapter):
    params = {"w": jnp.zeros((6, 6)), "b": jnp.zeros(6), "down": jnp.zeros((6, 2)), "up": jnp.zeros((2, 6))}
    x = jnp.zeros((3, 6))
    found = trace_layers(functools.partial(adapted, **options), params, x)
    assert ("w" in found.adapted) == is_adapter == ("w" not in found.layers)
    # As wide as the layer itself it is another branch.
    wide = params | {"down": jnp.zeros((6, 6)), "up": jnp.zeros((6, 6))}
    assert "w" in trace_layers(functools.partial(adapted, **options), wide, x).layers


def test_adapters_for_one_example_at_a_time_and_in_stacks():
    def single(params, x):
        return params["w"] @ x + params["b"] + 2.0 * (params["up"] @ (params["down"] @ x))

    def stacked(params, x):
        def one(x, layer):
            return jax.vmap(functools.partial(single, layer))(jnp.tanh(x)), None

        return jax.lax.scan(jax.checkpoint(one), x, params)[0]

    shapes = {"w": (6, 6), "b": (6,), "down": (2, 6), "up": (6, 2)}
    params = {name: jnp.zeros(shape) for name, shape in shapes.items()}
    found = trace_layers(jax.vmap(single, (None, 0)), params, jnp.zeros((3, 6)))
    assert found.adapted.keys() == {"w"}
    params = {name: jnp.zeros((5, *shape)) for name, shape in shapes.items()}
    found = trace_layers(stacked, params, jnp.zeros((3, 6)))
    assert found.adapted["w"].stack == (5,)
    assert found.layers.keys() == {"down", "up"}


def test_an_adapter_of_a_convolution():
    shapes = {"w": (3, 3, 4, 8), "down": (3, 3, 4, 2), "up": (1, 1, 2, 8)}
    params = {name: jnp.zeros(shape) for name, shape in shapes.items()}

    def conv(x, w):
        return jax.lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=NHWC)

    found = trace_layers(
        lambda p, x: conv(x, p["w"]) + 2 * conv(conv(x, p["down"]), p["up"]), params, jnp.zeros((1, 5, 5, 4))
    )
    assert found.adapted.keys() == {"w"}
    assert found.layers.keys() == {"down", "up"}
    assert re.search(rf"^  w: {re.escape(ADAPTED)}$", str(found), re.MULTILINE)


# -- attention, and a classifier with as many outputs as inputs


class LinenAttention(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.MultiHeadDotProductAttention(num_heads=2, qkv_features=6)(x)


class EquinoxAttention(eqx.Module):
    attention: eqx.nn.MultiheadAttention

    def __init__(self, key):
        self.attention = eqx.nn.MultiheadAttention(2, 6, use_output_bias=True, key=key)

    def __call__(self, x):
        return self.attention(x, x, x)


class OwnAttention(nnx.Module):
    """Its projections are arrays of its own, which no class tells."""

    def __init__(self, *, rngs):
        for name in ("query", "key", "value", "out"):
            setattr(self, name, nnx.Param(jax.random.normal(rngs.params(), (6, 6))))

    def __call__(self, x):
        q, k, v = ((x @ w[...]).reshape(*x.shape[:-1], 2, 3) for w in (self.query, self.key, self.value))
        weights = nnx.softmax(jnp.einsum("bqhd,bkhd->bhqk", q, k))
        return jnp.einsum("bhqk,bkhd->bqhd", weights, v).reshape(x.shape) @ self.out[...]


def test_attention_of_any_framework():
    x = jnp.zeros((2, 5, 6))
    params: Any = LinenAttention().init(jax.random.key(0), x)["params"]
    linen = find_branches(lambda params, x: LinenAttention().apply({"params": params}, x), params, x)
    model = nnx.MultiHeadAttention(2, 6, decode=False, rngs=nnx.Rngs(0))
    found = {path.removeprefix("MultiHeadDotProductAttention_0/"): one for path, one in linen.items()}
    assert found == find_branches(model)
    assert {path: one.layout for path, one in found.items()} == {
        **dict.fromkeys(("key/kernel", "query/kernel", "value/kernel"), "ioo"),
        "out/kernel": "iio",
    }

    params, static = eqx.partition(EquinoxAttention(jax.random.key(0)), eqx.is_inexact_array)
    found = find_branches(lambda params, x: jax.vmap(eqx.combine(params, static))(x), params, x)
    names = [f"attention/{name}_proj/weight" for name in ("key", "output", "query", "value")]
    assert list(found) == names
    assert {(one.layout, one.names) for one in found.values()} == {("oi...", ("dense", "identity"))}

    own = OwnAttention(rngs=nnx.Rngs(0))
    apply, params = traced(own, lambda model: model(x))
    assert find_branches(apply, params).keys() == {"key", "out", "query", "value"}
    with pytest.raises(ValueError, match=r"`model` has no layer: it has no nnx.Conv"):
        find_branches(own)


class Square(nnx.Module):
    """As many classes as features."""

    def __init__(self, *, rngs):
        self.conv, self.head = nnx.Conv(2, 4, (3, 3), rngs=rngs), nnx.Linear(4, 4, rngs=rngs)

    def __call__(self, x):
        return self.head(nnx.relu(self.conv(x)).mean((1, 2)))


def test_a_square_classifier_gets_an_identity_like_any_dense_layer():
    model, x = Square(rngs=nnx.Rngs(0)), jnp.zeros((1, 5, 5, 2))
    apply, params = traced(model, lambda model: model(x))
    found = find_branches(model)
    assert find_branches(apply, params) == found
    assert found["head/kernel"].names == ("dense", "identity")
    assert find_branches(model, r"(?!head).*").keys() == {"conv/kernel"}  # how to leave it
    # Structures of the network leave the layer of the logits as it is.
    assert find_structures(model, "repvgg")["head/kernel"].structure is None


def two(params, x):
    return jnp.tanh(x @ params["a"]["w"]) @ params["b"]["w"]


def test_choosing_layers_and_branches():
    params = {"a": {"w": np.zeros((4, 4), np.float32)}, "b": {"w": np.zeros((4, 3), np.float32)}}
    assert list(find_branches(two, params, X)) == ["a/w"]
    assert list(find_branches(two, params, X, select="b")) == ["b/w"]
    assert list(find_branches(two, params, X, select=lambda path, layer: layer.geometry.outputs == 3)) == [
        "b/w"
    ]
    own = find_branches(two, params, X, branches={"b": [Kernel(())]})
    assert own["b/w"].names == ("dense",)
    assert own["a/w"].names == ("dense", "identity")
    for arguments, error, message in (
        ({"select": "c"}, ValueError, "no layer that `select` = 'c' chooses: its layers are a, b"),
        ({"select": 3}, TypeError, "`select` is 3"),
        ({"branches": {"c": None}}, ValueError, "the rules 'c' of `branches` match none"),
        ({"branches": 3}, TypeError, "`branches` is 3"),
        ({"branches": [Identity()]}, ValueError, "`branches` do not fit: b: branch identity"),
    ):
        with pytest.raises(error, match=message):
            find_branches(two, params, X, **arguments)
    with pytest.raises(TypeError, match=r"must hold arrays only, not a/f \(.*\): give the arrays"):
        find_branches(two, {"a": {"f": "text"}}, X)
    with pytest.raises(TypeError, match="`model` is a dict: it must be an NNX model, or a function"):
        find_branches(params)
    with pytest.raises(ValueError, match=r"cannot be made of branches: a/w: it is changed before"):
        find_branches(lambda p, x: normalised(p["a"], x), params, X, select="a")
