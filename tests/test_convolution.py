"""Convolutions lowered for a CPU against XLA's own, with every transformation of JAX; and XLA's text
elsewhere."""

import functools
import os
import subprocess
import sys
from unittest import mock

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiers
import tolerances
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax
from networks import abstract

from repopt_jax import Geometry, fast_on_cpu, find_layers, fuse, models, nn, to_search
from repopt_jax.core.published import repvgg
from repopt_jax.nn import convolution
from repopt_jax.nn.convolution import conv_general_dilated, product_of_tiles, xla_convolutions

LETTERS = "DHW"


@st.composite
def cases(draw):
    """Shapes and options of a convolution that has at least one output."""
    axes = draw(st.integers(1, 3))
    window = draw(st.lists(st.integers(1, 4), min_size=axes, max_size=axes))
    dilation = draw(st.lists(st.integers(1, 2), min_size=axes, max_size=axes))
    strides = draw(st.lists(st.integers(1, 3), min_size=axes, max_size=axes))
    padding = draw(st.lists(st.tuples(st.integers(-1, 3), st.integers(-1, 3)), min_size=axes, max_size=axes))
    sizes = [
        (n - 1) * d + 1 - before - after + draw(st.integers(0, 4))
        for n, d, (before, after) in zip(window, dilation, padding)
    ]
    sizes = [max(size, 1 - before - after, 2) for size, (before, after) in zip(sizes, padding)]
    spread = draw(st.lists(st.sampled_from([1, 1, 2]), min_size=axes, max_size=axes))
    shapes, options = draw(of_sizes(sizes, window, strides, padding, dilation, draw(st.sampled_from(SIDES))))
    return shapes, options | {"lhs_dilation": spread, "precision": draw(st.sampled_from([None, "highest"]))}


@st.composite
def tiles(draw):
    """Windows that lie side by side, with something left over at the end of an axis."""
    window = draw(st.lists(st.integers(1, 3), min_size=1, max_size=3))
    sizes = [draw(st.integers(1, 3)) * n + draw(st.integers(0, n - 1)) for n in window]
    return draw(of_sizes(sizes, window, window, [(0, 0)] * len(window), [1] * len(window)))


# What is divided into groups: the features, or the images, as in the gradient of a grouped kernel.
SIDES = ("feature", "feature", "batch")


@st.composite
def of_sizes(draw, sizes, window, strides, padding, dilation, side="feature"):
    axes, groups = len(sizes), draw(st.sampled_from([1, 2, 3, 4]))
    inputs, outputs = groups * draw(st.integers(1, 2)), groups * draw(st.integers(1, 2))
    spatial = LETTERS[-axes:]
    numbers = draw(
        st.sampled_from(
            [
                (f"N{spatial}C", f"{spatial}IO", f"N{spatial}C"),
                (f"NC{spatial}", f"OI{spatial}", f"NC{spatial}"),
                (f"{spatial}NC", f"I{spatial}O", f"C{spatial}N"),
            ]
        )
    )
    options = {
        "window_strides": strides,
        "padding": padding,
        "rhs_dilation": dilation,
        "dimension_numbers": numbers,
        f"{side}_group_count": groups,
    }
    images, depth = draw(st.integers(1, 3)), inputs // groups
    if side == "batch":
        images, depth = images * groups, inputs
    lengths = dict(zip(spatial, sizes)) | {"N": images, "C": inputs}
    kernel = dict(zip(spatial, window)) | {"I": depth, "O": outputs}
    shapes = [lengths[c] for c in numbers[0]], [kernel[c] for c in numbers[1]]
    return shapes, options


def operands(shapes, dtype, seed=0):
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes]


def results(operation, x, w, v, u):
    """A convolution, both gradients of a curved function of it, derivatives forwards and of a gradient in
    both directions, and a batch of each operand; compiled at once."""

    @jax.jit
    def everything(x, w, v, u):
        def curved(x, w):
            return jnp.sum(jnp.sin(operation(x, w)))

        gradients = jax.grad(curved, (0, 1))
        return (
            operation(x, w),
            gradients(x, w),
            jax.jvp(operation, (x, w), (v, u))[1],
            jax.linearize(operation, x, w)[1](v, u),
            jax.jvp(gradients, (x, w), (v, u))[1],
            jax.grad(lambda x, w: sum(jnp.sum(g**2) for g in gradients(x, w)), (0, 1))(x, w),
            jax.vmap(operation, (0, None))(jnp.stack([x, v]), w),
            jax.vmap(operation, (None, 0), 1)(x, jnp.stack([w, u])),
            jax.vmap(operation)(jnp.stack([x, v]), jnp.stack([w, u])),
            jax.grad(jax.checkpoint(curved), 1)(x, w),
        )

    return everything(x, w, v, u)


def far(found, expected):
    """The largest difference of any result, as a share of 1 + its largest number; infinite for NaN."""
    leaves = zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
    pairs = [(np.asarray(a, np.float64), np.asarray(b, np.float64)) for a, b in leaves]
    assert all(a.shape == b.shape for a, b in pairs)
    shares = [np.abs(a - b).max(initial=0) / (1 + np.abs(b).max(initial=0)) for a, b in pairs]
    return np.nan_to_num(np.max(shares), nan=np.inf)


def rounded_once(x, w, **options):
    wide = conv_general_dilated(x.astype(jnp.float64), w.astype(jnp.float64), **options)
    return wide.astype(x.dtype)


def both(case, dtype, operation=conv_general_dilated):
    shapes, options = case
    arrays = operands(shapes * 2, dtype)
    # What is drawn is small, and of several chunks.
    small = dict.fromkeys(("PHASED_OUTPUTS", "MIN_CHANNELS", "MIN_KERNEL_CHANNELS", "MIN_POSITIONS"), 1)
    with mock.patch.multiple(convolution, **small, CHUNK_BYTES=500):
        ours = results(functools.partial(operation, **options), *arrays)
    # XLA's, every pass in float64 and rounded afterwards: in float32 not all are right, see below.
    with xla_convolutions(), jax.enable_x64(True):
        theirs = results(functools.partial(rounded_once, **options), *arrays)
    chex.assert_trees_all_equal_shapes_and_dtypes(ours, theirs)
    return ours, theirs


# The same cases each time: of about a thousand, one makes XLA end the process while it compiles the
# derivative of a gradient of its own convolution (jaxlib 0.10 and 0.12).
DRAWN = {"deadline": None, "derandomize": True}


@pytest.mark.parametrize("count", [14, pytest.param(30, marks=pytest.mark.long)])
def test_every_shape_as_xla(count):
    @settings(max_examples=count, **DRAWN)
    @given(cases())
    def is_that_of_xla(case):
        assert far(*both(case, jnp.float64)) < tolerances.CONVOLUTIONS["float64"]

    with jax.enable_x64(True):
        is_that_of_xla()


@pytest.mark.parametrize("count", [6, pytest.param(12, marks=pytest.mark.long)])
def test_tiles_as_xla(count):
    @settings(max_examples=count, **DRAWN)
    @given(tiles())
    def are_those_of_xla(case):
        assert far(*both(case, jnp.float64, product_of_tiles)) < tolerances.CONVOLUTIONS["float64"]

    with jax.enable_x64(True):
        are_those_of_xla()


@pytest.mark.parametrize("platform", ["cpu", "cuda", "tpu"])
def test_tiles_are_a_product_of_matrices_and_other_windows_are_not(platform):
    def text(size, stride, operation=product_of_tiles, padding=0):
        options = IMAGES | {"padding": [(padding, padding)] * 2, "feature_group_count": 2}
        step = jax.jit(lambda x, w: operation(x, w, (stride, stride), **options))
        x, w = jnp.zeros((2, 8, 8, 4)), jnp.zeros((size, size, 2, 6))
        return step.trace(x, w).lower(lowering_platforms=(platform,)).as_text()

    assert "dot_general" in text(4, 4)
    assert "convolution" not in text(4, 4)
    for size, stride, padding in ((4, 3, 0), (3, 4, 0), (4, 4, 1)):
        assert text(size, stride, padding=padding) == text(size, stride, conv_general_dilated, padding)
    with xla_convolutions():
        assert text(4, 4) == text(4, 4, lambda *args, **options: lax.conv_general_dilated(*args, **options))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@settings(max_examples=6, **DRAWN)
@given(cases())
def test_every_shape_as_xla_to_rounding(dtype, case):
    assert far(*both(case, dtype)) < tolerances.CONVOLUTIONS[dtype]


OF_A_PROCESS = """
import jax, jax.numpy as jnp
from repopt_jax.nn.convolution import conv_general_dilated
x, w = jnp.zeros((1, 2, 4)), jnp.zeros((2, 2, 1))
print(jax.make_jaxpr(lambda x, w: conv_general_dilated(x, w, (1,), "SAME"))(x, w).eqns[0].primitive)
"""


@pytest.mark.parametrize(("value", "primitive"), [("1", "conv_general_dilated"), ("0", "repopt_convolution")])
def test_the_environment_turns_it_off_for_a_process(value, primitive):
    environment = {**os.environ, "REPOPT_XLA_CONVOLUTIONS": value}
    code = [sys.executable, "-c", OF_A_PROCESS]
    done = subprocess.run(code, capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.split() == [primitive]


IMAGES = {"padding": [(1, 1)] * 2, "dimension_numbers": ("NHWC", "HWIO", "NHWC")}


def conv(x, w, *, strides=(1, 1), convolution=conv_general_dilated):
    return convolution(x, w, strides, **IMAGES, feature_group_count=x.shape[-1] // w.shape[-2])


def training(x, w, strides=(1, 1)):
    """What a training step has of a convolution: the value and both gradients."""
    return jax.value_and_grad(lambda x, w: jnp.sum(jnp.sin(conv(x, w, strides=strides))), (0, 1))(x, w)


def images(groups, inputs, outputs, window=3, *, dtype=jnp.float32, size=12):
    """A map and the kernel of a convolution with these channels in a group."""
    shapes = [8, size, size, groups * inputs], [window, window, inputs, groups * outputs]
    return operands(shapes, dtype)


# Groups, inputs and outputs of each, side of the window.
KINDS = [(6, 1, 1), (6, 1, 2), (4, 3, 2), (3, 16, 8), (1, 8, 8), (1, 32, 32, 1)]


@pytest.fixture
def forms_of(monkeypatch):
    """The names of the forms that the convolutions of a function are lowered to."""
    chosen = []
    choose = convolution.choose

    def noted(*args, **kwargs):
        chosen.append(choose(*args, **kwargs))
        return chosen[-1]

    def names(function, *args):
        chosen.clear()
        jax.jit(lambda *args: function(*args)).lower(*args)
        return sorted({form.__name__ for form in chosen} - {"bind", "by_xla", "kernel_by_xla"})

    monkeypatch.setattr(convolution, "choose", noted)
    return names


@pytest.mark.parametrize(
    ("kind", "forms"),
    [
        ((6, 1, 1), ["by_taps", "depthwise_kernel"]),
        ((6, 1, 2), ["by_taps", "depthwise_kernel"]),
        ((4, 3, 2), ["by_groups", "by_taps"]),
        ((3, 16, 8), ["by_groups", "by_taps", "dense_kernel"]),
        ((1, 8, 8), ["dense_kernel"]),
        ((1, 4, 8), []),
        ((1, 32, 32, 1), ["dense_kernel", "pointwise"]),
    ],
    ids=str,
)
def test_forms(forms_of, kind, forms):
    """Of the value and the gradients; where none is named, a dense convolution is XLA's."""
    assert forms_of(training, *images(*kind)) == forms


@pytest.mark.parametrize(
    ("channels", "size", "forms"),
    [
        (8, 33, ["by_phases", "dense_kernel"]),
        (8, 31, ["dense_kernel"]),
        (4, 31, []),
        (8, 9, []),
        (682, 4, []),
        (683, 4, ["by_phases"]),
    ],
)
def test_forms_of_a_strided_dense_layer(forms_of, channels, size, forms):
    strided = functools.partial(training, strides=(2, 2))
    x, w = [8, size, size, channels], [3, 3, channels, channels]
    assert forms_of(strided, *(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in (x, w))) == forms


# A form -> a kind and a stride of which the training uses it.
USED = {
    "by_taps": ((6, 1, 1), 1),
    "depthwise_kernel": ((6, 1, 2), 2),
    "by_groups": ((4, 3, 2), 1),
    "dense_kernel": ((1, 8, 8), 1),
    "pointwise": ((1, 32, 32, 1), 1),
    "by_phases": ((1, 8, 8), 2),
}


@pytest.mark.parametrize("form", USED)
def test_a_form_that_reads_one_pixel_beside_shows(monkeypatch, form, x64):
    """The control of every form."""
    kind, stride = USED[form]
    arrays = images(*kind, dtype=jnp.float64, size=33 if form == "by_phases" else 12)

    def step(*arrays):
        return training(*arrays, (stride, stride))

    with xla_convolutions():
        expected = jax.jit(step)(*arrays)
    assert far(jax.jit(lambda *a: step(*a))(*arrays), expected) < tolerances.CONVOLUTIONS["float64"]
    right = getattr(convolution, form)

    def shifted(lhs, rhs, *, padding, **params):
        return right(lhs, rhs, padding=tuple((before + 1, after - 1) for before, after in padding), **params)

    monkeypatch.setattr(convolution, form, shifted)
    assert far(jax.jit(lambda *a: step(*a))(*arrays), expected) > 0.01


@pytest.mark.parametrize("platform", ["tpu", "cuda", "rocm"])
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_other_platforms_see_the_same_text(kind, platform):
    def text():
        step = jax.jit(lambda x, w: training(x, w))
        return step.trace(*images(*kind)).lower(lowering_platforms=(platform,)).as_text()

    ours = text()
    with xla_convolutions():
        assert ours == text()


# One of each platform, and of networks with depthwise layers and without.
OFTEN = ("repopt-ghostnet-digits-tpu", "vgg-digits-cuda")
STEPS = [
    pytest.param(name, platform, id=f"{name}-{platform}")
    for platform in ("tpu", "cuda")
    for name in ("mobileone-digits", "repopt-ghostnet-digits", "vgg-digits")
]


@pytest.mark.parametrize(("name", "platform"), tiers.often(STEPS, *OFTEN))
def test_other_platforms_see_the_same_text_of_a_whole_step(name, platform):
    """Of the search of a network."""
    model = abstract(lambda rngs: to_search(models.create(name, num_classes=3, rngs=rngs), rngs=rngs))
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    x = jax.ShapeDtypeStruct((4, 16, 16, 3), jnp.float32)

    def text():
        def loss(params, rest, x):
            return jnp.sum(nnx.merge(graph, params, rest, copy=True)(x) ** 2)

        traced = jax.jit(jax.value_and_grad(loss)).trace(params, rest, x)
        return traced.lower(lowering_platforms=(platform,)).as_text()

    ours = text()
    with xla_convolutions():
        assert ours == text()
    assert ours.count("stablehlo.convolution") > 6


COLLECTIVES = ("all-gather", "all-to-all", "collective-permute", "all-reduce", "reduce-scatter")


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_several_devices_exchange_what_they_did(kind):
    """A batch that lies on four of them."""
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    batch, whole = (
        jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*axis)) for axis in (["data"], [])
    )

    def program():
        step = jax.jit(
            lambda x, w: training(x, w), in_shardings=(batch, whole), out_shardings=(whole, (batch, whole))
        )
        return step.lower(*images(*kind)).compile()

    ours = program()
    with xla_convolutions():
        theirs = program()
    for name in COLLECTIVES:
        assert ours.as_text().count(f"{name}(") <= theirs.as_text().count(f"{name}("), name
    found, expected = (compiled(*images(*kind)) for compiled in (ours, theirs))
    assert far(found, expected) < tolerances.CONVOLUTIONS["float32"]


@pytest.mark.parametrize("checked", [False, True], ids=["unchecked", "checked"])
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_in_a_shard_map(monkeypatch, kind, checked, x64):
    monkeypatch.setattr(convolution, "CHUNK_BYTES", 1)  # image by image, in a loop
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spec, whole = jax.sharding.PartitionSpec("data"), jax.sharding.PartitionSpec()
    x, w = images(*kind, dtype=jnp.float64)

    def local(x, w):
        w = lax.pcast(w, "data", to="varying") if checked else w
        return conv(x, w), lax.psum(jax.grad(lambda w: jnp.sum(jnp.sin(conv(x, w))))(w), "data")

    y, gradient = jax.jit(
        jax.shard_map(local, mesh=mesh, in_specs=(spec, whole), out_specs=(spec, whole), check_vma=checked)
    )(x, w)
    assert far(y, conv(x, w, convolution=lax.conv_general_dilated)) < tolerances.CONVOLUTIONS["float64"]
    assert far(gradient, training(x, w)[1][1]) < tolerances.CONVOLUTIONS["float64"]


def test_a_branch_that_is_smaller_than_its_padded_layer():
    """The 1x1 beside a 3x3 padded by (0, 2) has the pads (-1, 1), in the precision that networks train in."""
    layer = nn.Branched(repvgg(Geometry((3, 3), 8, 8, padding=((0, 2), (0, 2)))), rngs=nnx.Rngs(0))
    layer.eval()
    (x,) = operands([[2, 6, 6, 8]], jnp.float32)
    y, fused = (jax.jit(lambda x, m=model: m(x))(x) for model in (layer, fuse(layer)))
    assert far(y, fused) < tolerances.CONVOLUTIONS["float32"]


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_sums_of_another_type_are_kept(kind):
    """Products of bfloat16 with sums in float32, which are not rounded at the end. Rounded, they differ by
    2e-3."""
    x, w = images(*kind, dtype=jnp.bfloat16)
    wide = functools.partial(conv_general_dilated, preferred_element_type=jnp.float32)
    y, expected = (jax.jit(functools.partial(conv, convolution=wide))(*a) for a in ((x, w), exact(x, w)))
    assert y.dtype == jnp.float32
    assert far(y, expected) < tolerances.CONVOLUTIONS["float32"]
    assert far(y.astype(jnp.bfloat16), expected) > 20 * tolerances.CONVOLUTIONS["float32"]


def exact(*arrays):
    return [a.astype(jnp.float32) for a in arrays]


@pytest.mark.parametrize("pads", [(-1, 1), (-2, 2), (-1, 2), (1, -1), (-5, 5), (5, -5)])
@pytest.mark.parametrize("stride", [1, 2])
def test_a_map_that_padding_cuts_is_not_read_outside(stride, pads):
    """In jaxlib 0.10 XLA's own reads outside of it, in float32; the last two pads leave nothing of it."""
    x, w = operands(([2, 5, 5, 8], [3, 3, 8, 8]), jnp.float32)
    options = IMAGES | {"padding": [pads, pads]}
    y = jax.jit(lambda x, w: conv_general_dilated(x, w, (stride, stride), **options))(x, w)
    with jax.enable_x64(True), xla_convolutions():
        wide = (a.astype(jnp.float64) for a in (x, w))
        expected = conv_general_dilated(*wide, (stride, stride), **options)
    assert far(y, expected) < tolerances.CONVOLUTIONS["float32"]


def test_no_padded_map_is_kept_for_the_gradient_of_a_depthwise_kernel():
    def temporaries():
        numbers = ("NHWC", "HWIO", "NHWC")

        def loss(kernels, x):
            for kernel in kernels:
                options = {"feature_group_count": 32, "dimension_numbers": numbers}
                x = x + jnp.tanh(conv_general_dilated(x, kernel, (1, 1), ((1, 1), (1, 1)), **options))
            return (x * x).sum()

        kernels = [jax.ShapeDtypeStruct((3, 3, 1, 32), jnp.float32)] * 4
        x = jax.ShapeDtypeStruct((8, 16, 16, 32), jnp.float32)
        compiled = jax.jit(jax.grad(loss)).lower(kernels, x).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    ours = temporaries()
    with xla_convolutions():
        assert ours <= tolerances.DEPTHWISE_MEMORY * temporaries()


def test_kernel_gradients_do_not_compute_the_network_before_them_again(monkeypatch):
    """XLA fuses the transposition of a map with what it was computed with, back to the first identity."""

    def loss(kernels, x):
        for w in kernels:
            x = jnp.maximum(conv(x, w) + x, 0)
        return (x * x).sum()

    def activations():
        """The most activations that are computed in one loop together with a transposition."""
        kernels = [jax.ShapeDtypeStruct((3, 3, 8, 8), jnp.float32)] * 5
        x = jax.ShapeDtypeStruct((8, 4, 4, 8), jnp.float32)
        compiled = jax.jit(jax.grad(lambda *args: loss(*args))).lower(kernels, x).compile().as_text()
        loops = [loop for loop in compiled.split("\n}") if " transpose(" in loop and "ENTRY" not in loop]
        return max((loop.count(" maximum(") for loop in loops), default=0)

    assert activations() == 0
    monkeypatch.setattr(convolution, "_computed", lambda *operands: operands)
    if not activations():
        pytest.skip("this XLA computes nothing again: `kernel_by_xla` can be `by_xla`")
    assert activations() > 3


def test_what_xla_refuses_is_refused():
    x, w = images(6, 1, 1)
    with pytest.raises(TypeError, match=r"dtypes"):
        conv(x, w.astype(jnp.bfloat16))
    with pytest.raises(ValueError, match="feature_group_count"):
        conv_general_dilated(x, w, (1, 1), **IMAGES, feature_group_count=4)


def test_without_outputs_and_with_integers():
    x, w = images(6, 1, 1, size=1)
    numbers = {"dimension_numbers": IMAGES["dimension_numbers"], "feature_group_count": 6}
    assert conv_general_dilated(x, w, (1, 1), "VALID", **numbers).shape == (8, 0, 0, 6)
    x, w = images(6, 1, 1, dtype=jnp.int32)
    chex.assert_trees_all_equal(conv(x, w), conv(x, w, convolution=lax.conv_general_dilated))


@pytest.mark.parametrize(("convolution", "stride"), [(conv_general_dilated, 1), (product_of_tiles, 3)])
def test_gradients_of_an_empty_batch(convolution, stride):
    x, w = jnp.ones((0, 6, 6, 4)), jnp.ones((3, 3, 4, 8))
    numbers = IMAGES["dimension_numbers"]

    def total(x, w):
        return convolution(x, w, (stride, stride), "VALID", dimension_numbers=numbers).sum()

    chex.assert_trees_all_equal(jax.grad(total, (0, 1))(x, w), (x, jnp.zeros_like(w)))


class Separable(nnx.Module):
    """A stranger's network with every kind of convolution."""

    def __init__(self, rngs):
        self.stem = nnx.Conv(3, 8, (3, 3), strides=2, rngs=rngs)
        self.depthwise = nnx.Conv(8, 8, (3, 3), feature_group_count=8, padding="CIRCULAR", rngs=rngs)
        self.grouped = nnx.List([nnx.Conv(8, 8, (3, 3), feature_group_count=2, rngs=rngs)])
        self.own = nnx.Conv(8, 8, (1, 1), conv_general_dilated=own_convolution, rngs=rngs)

    def __call__(self, x):
        return self.own(self.grouped[0](self.depthwise(self.stem(x)))).mean((1, 2))


def own_convolution(*args, **kwargs):
    return lax.conv_general_dilated(*args, **kwargs)


def test_a_stranger_s_network(x64):
    model = Separable(nnx.Rngs(0))
    fast = fast_on_cpu(model)
    assert fast.own.conv_general_dilated is own_convolution
    for layer, before in ((fast.stem, model.stem), (fast.grouped[0], model.grouped[0])):
        assert layer.conv_general_dilated is conv_general_dilated
        assert before.conv_general_dilated is lax.conv_general_dilated
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 16, 16, 3)))

    def loss(model):
        return jnp.sum(jnp.sin(model(x)))

    found, expected = (jax.tree.leaves(nnx.grad(loss)(m)) for m in (fast, model))
    assert far(found, expected) < 1e-5  # of float32 parameters
    assert find_layers(fast, "depthwise").keys() == find_layers(model, "depthwise").keys()
