"""ONNX files: onnxruntime computes from them what JAX computes, of whole networks and of each operation, in
floating point and with whole numbers."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tolerances
from any_networks import DEPTHWISE
from any_networks import NETWORKS as ANY
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import abstract, made_ready, randomised, settled_statistics
from test_any_network import PAIRS
from test_models_mobileone import TINY as TINY_MOBILEONE
from test_models_repmlp import TINY as TINY_REPMLP

from repopt_jax import fuse, models, prepare
from repopt_jax.core import paths
from repopt_jax.data.transforms import normalise
from repopt_jax.export import Metadata, compare_fused, onnx_model, to_onnx
from repopt_jax.export.graph import trace
from repopt_jax.export.operations import OPERATIONS
from repopt_jax.export.runtime import open_file
from repopt_jax.models.mobileone import mobileone
from repopt_jax.nn.block import SqueezeExcite
from repopt_jax.nn.convolution import conv_general_dilated, product_of_tiles
from repopt_jax.quantize import Scheme, quantize, quantize_array, quantizers
from repopt_jax.quantize.layers import input_scale, with_functions

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

TINY_DETECTOR = models.DetectorVariant(
    "tiny", models.BackboneVariant("tiny", (4, 4, 6, 6, 8), (0, 0, 1, 1)), channels=6, maps=2, levels=3, tower=1
)


class Case(NamedTuple):
    """A network in evaluation mode, float32, and the shape of its input without the batch."""

    build: Callable[[], nnx.Module]
    shape: tuple[int, ...]


def of_registry(name, **options):
    def build():
        model = abstract(lambda rngs: models.create(name, rngs=rngs, **options))
        return fuse(settled_statistics(model, dtype=jnp.float32))

    return build


def made(build, *args, mode="plain", **options):
    def fused():
        return fuse(settled_statistics(made_ready(build, mode, *args, **options), dtype=jnp.float32))

    return fused


def any_network(name):
    def build():
        model = settled_statistics(ANY[name].abstract(), dtype=jnp.float32)
        return fuse(model, pairs=PAIRS.get(name))

    return Case(build, ANY[name].inputs)


DIGITS = {"num_classes": 10, "in_channels": 1}
CASES = {
    "VGG, digits": Case(of_registry("vgg-digits", **DIGITS), (8, 8, 1)),
    "VGG, CIFAR": Case(of_registry("vgg-cifar-small", num_classes=10), (32, 32, 3)),
    "Ghost": Case(of_registry("repghost-digits", **DIGITS), (8, 8, 1)),
    "MobileOne": Case(made(mobileone, TINY_MOBILEONE, mode="mobileone", num_classes=5), (40, 33, 3)),
    "RepMLPNet": Case(
        made(models.RepMLPNet, TINY_REPMLP, mode="repmlp", num_classes=5),
        (TINY_REPMLP.image_size, TINY_REPMLP.image_size, 3),
    ),
    "detector": Case(
        made(models.FCOS, TINY_DETECTOR, num_classes=3, num_keypoints=2, activation="relu6"), (80, 50, 3)
    ),
    "detector without keypoints": Case(made(models.FCOS, TINY_DETECTOR, num_classes=2), (32, 32, 3)),
    "separable": Case(lambda: settled_statistics(DEPTHWISE.abstract(), dtype=jnp.float32), DEPTHWISE.inputs),
    **{name: any_network(name) for name in ("U-Net", "ResNet-18", "shared head", "1-D", "3-D", "MLP")},
}


@functools.cache
def network(name):
    return CASES[name].build()


def images(shape, count, seed=0):
    return np.random.default_rng(seed).normal(size=(count, *shape)).astype(np.float32)


def session(proto, *, optimized=True, seen=()):
    """Runs a file; of a quantized one also gives the outputs of these nodes."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if not optimized:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    proto = onnx.ModelProto.FromString(proto.SerializeToString())
    for name in seen:
        proto.graph.output.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.UINT8, None))
    return onnxruntime.InferenceSession(
        proto.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def run_file(proto, x, **options):
    return session(proto, **options).run(None, {"images": x})


def arrays(output):
    """The arrays of an output in the order in which a file gives them."""
    return list(output) if isinstance(output, tuple) else [output]


@functools.partial(jax.jit, static_argnums=0)
def computed(definition, state, x):
    return nnx.merge(definition, state, copy=True)(x)


def run(model, x):
    return [np.asarray(a) for a in arrays(computed(*nnx.split(model), x))]


def far(found, expected):
    """The largest difference of an output, of its largest number."""
    assert [a.shape for a in found] == [a.shape for a in expected]
    differences = [0.0]
    for a, b in zip(found, expected, strict=True):
        differing, finite = a != b, b[np.isfinite(b)]
        if differing.any():
            differences.append(float(np.abs(a[differing] - b[differing]).max() / np.abs(finite).max()))
    return max(differences)


def operations_of(proto):
    return {node.op_type for node in proto.graph.node}


# -- floating point: whole networks


@pytest.mark.parametrize("name", CASES)
def test_a_network_for_any_batch_size(name):
    case, model = CASES[name], network(name)
    for layout in ("NCHW", "NHWC") if name in ("VGG, digits", "U-Net") else ("NCHW",):
        run_it = session(onnx_model(model, case.shape, layout=layout))
        for count in (1, 3, 5):
            x = images(case.shape, count, seed=count)
            given = np.moveaxis(x, -1, 1) if layout == "NCHW" else x
            found = run_it.run(None, {"images": given})
            assert far(found, run(model, x)) <= tolerances.ONNX


def test_a_published_network():
    model = of_registry("repvgg-a0", num_classes=1000)()
    x = images((64, 64, 3), 2)
    proto = onnx_model(model, (64, 64, 3))
    assert far(run_file(proto, x), run(model, x)) <= tolerances.ONNX
    assert operations_of(proto) == {"Transpose", "Conv", "Relu", "GlobalAveragePool", "Reshape", "Gemm"}


@pytest.mark.long
@pytest.mark.parametrize(
    "name", ["repvgg-a0", "repvgg-d2se", "repghost-0.5", "mobileone-s0", "repmlpnet-t224", "fcos-face"]
)
def test_published_networks_at_their_own_size(name):
    shape = (224, 224, 3)
    model = of_registry(name, num_classes=10)()
    x = images(shape, 1)
    assert far(run_file(onnx_model(model, shape), x), run(model, x)) <= tolerances.ONNX


def test_nothing_moves_axes_between_the_layers_of_a_vgg():
    proto = onnx_model(network("VGG, digits"), (8, 8, 1), layout="NCHW")
    names = [(node.op_type, node.name) for node in proto.graph.node]
    assert names[:4] == [
        ("Conv", "stages/0/0/conv/Conv"),
        ("Relu", "stages/0/0/Relu"),
        ("Conv", "stages/1/0/conv/Conv"),
        ("Relu", "stages/1/0/Relu"),
    ]
    assert names[-3:] == [
        ("GlobalAveragePool", "GlobalAveragePool"),
        ("Reshape", "head/Reshape"),
        ("Gemm", "head/Gemm"),
    ]
    assert len(names) == 19
    assert {i.name for i in proto.graph.initializer} >= {"stages/1/0/conv/kernel", "head/bias"}


def test_repeated_pixels_are_a_resize():
    kinds = operations_of(onnx_model(network("detector"), (80, 50, 3), layout="NCHW"))
    assert "Resize" in kinds
    assert "Expand" not in kinds


def spoiled(proto, op, change, which=0):
    """A copy in which one node of this kind is changed, or its constants are: `change(node, constants)`."""
    proto = onnx.ModelProto.FromString(proto.SerializeToString())
    node = [node for node in proto.graph.node if node.op_type == op][which]
    constants = {i.name: i for i in proto.graph.initializer}
    change(node, constants)
    return proto


def set_constant(constants, name, change):
    array = onnx.numpy_helper.to_array(constants[name])
    constants[name].CopyFrom(onnx.numpy_helper.from_array(np.ascontiguousarray(change(array)), name))


def shifted_pads(node, constants):
    [pads] = [a for a in node.attribute if a.name == "pads"]
    pads.ints[:] = [2, 0, 0, 2]


MISTAKES = {
    "a pad at the other side": shifted_pads,
    "rows for columns": lambda n, c: set_constant(c, n.input[1], lambda k: k.swapaxes(2, 3)),
    "a kernel turned round": lambda n, c: set_constant(c, n.input[1], lambda k: k[..., ::-1, ::-1]),
    "no bias": lambda n, c: n.input.pop(),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_would_be_noticed(mistake):
    x, model = images((8, 8, 1), 3), network("VGG, digits")
    proto = spoiled(onnx_model(model, (8, 8, 1)), "Conv", MISTAKES[mistake], 2)
    assert far(run_file(proto, x), run(model, x)) >= tolerances.ONNX_WRONG


# -- floating point: random networks


class Step(NamedTuple):
    """One step of a random network; what `times` and `flag` mean depends on `sort`."""

    sort: str
    window: tuple[int, int]
    strides: tuple[int, int]
    padding: Any
    dilation: tuple[int, int]
    groups: int
    times: int
    flag: bool


class Layer(nnx.Module):
    def __init__(self, inputs, step, rngs):
        self.step = step
        self.outputs = inputs
        if step.sort == "conv":
            self.outputs = inputs // step.groups * step.groups * step.times
            self.layer = nnx.Conv(
                inputs,
                self.outputs,
                step.window,
                strides=step.strides,
                padding=step.padding,
                kernel_dilation=step.dilation,
                feature_group_count=step.groups,
                use_bias=step.flag,
                conv_general_dilated=conv_general_dilated,
                rngs=rngs,
            )
        elif step.sort == "gate":
            self.layer = SqueezeExcite(inputs, 2, hard=step.flag, rngs=rngs)
        elif step.sort == "norm":
            self.layer = nnx.BatchNorm(inputs, use_running_average=True, rngs=rngs)
        elif step.sort == "skip":
            self.layer = nnx.Conv(inputs, inputs, (3, 3), padding="SAME", rngs=rngs)
            self.outputs = 2 * inputs if step.flag else inputs

    def __call__(self, x):
        step = self.step
        match step.sort:
            case "conv" | "gate" | "norm":
                return self.layer(x)
            case "skip":
                y = self.layer(x)
                return jnp.concatenate([x, y], -1) if step.flag else x + nnx.relu(y)
            case "activation":
                return ACTIVATIONS[step.times](x)
            case "pool":
                pool = nnx.max_pool if step.flag else nnx.avg_pool
                window = tuple(min(n, m) for n, m in zip(step.window, x.shape[1:3]))
                return pool(x, window, step.strides, "SAME" if step.groups == 1 else "VALID")
            case "up":
                return x.repeat(2, axis=1).repeat(2, axis=2)[:, 1:, : x.shape[2] + 1]
            case "turn":
                return x.swapaxes(1, 2)
        raise AssertionError(self.step.sort)


ACTIVATIONS = [nnx.relu, nnx.relu6, nnx.gelu, nnx.silu]
SORTS = ("conv", "conv", "conv", "gate", "norm", "skip", "activation", "pool", "up", "turn")


@st.composite
def steps(draw):
    pad = st.tuples(st.integers(1, 3), st.integers(1, 3))
    return Step(
        sort=draw(st.sampled_from(SORTS)),
        window=draw(st.tuples(st.integers(1, 3), st.integers(1, 3))),
        strides=draw(st.tuples(st.integers(1, 2), st.integers(1, 2))),
        padding=draw(st.one_of(st.sampled_from(["SAME", "CIRCULAR"]), st.tuples(pad, pad))),
        dilation=draw(st.tuples(st.integers(1, 2), st.integers(1, 2))),
        groups=draw(st.sampled_from([1, 2, 4])),
        times=draw(st.integers(1, 3)),
        flag=draw(st.booleans()),
    )


class Chain(nnx.Module):
    def __init__(self, layers, *, rngs):
        self.layers, channels = nnx.List([]), 4
        for step in layers:
            self.layers.append(Layer(channels, step, rngs))
            channels = self.layers[-1].outputs
        self.head = nnx.Linear(channels, 3, rngs=rngs)

    def __call__(self, x):
        for layer in self.layers:
            x = layer(x)
        return x, self.head(x.mean((1, 2)))


@settings(max_examples=20, deadline=None)
@given(st.lists(steps(), min_size=1, max_size=6), st.booleans())
def test_random_networks(layers, first):
    model = randomised(abstract(Chain, layers), dtype=jnp.float32)
    for layer in model.layers:
        if layer.step.sort == "norm":
            layer.layer.var.set_value(1 + layer.layer.var[...])
    run_it = session(onnx_model(model, (7, 6, 4), layout="NCHW" if first else "NHWC"))
    for count in (1, 3):
        x = images((7, 6, 4), count)
        found = run_it.run(None, {"images": np.moveaxis(x, -1, 1) if first else x})
        assert far(found, run(model, x)) <= tolerances.ONNX


# -- operations one by one


class Function(nnx.Module):
    def __init__(self, function):
        self.function = nnx.static(function)

    def __call__(self, x):
        return self.function(x)


def kernel(*shape):
    return jnp.asarray(np.random.default_rng(1).normal(size=shape), jnp.float32)


def convolved(x, *shape, strides=(1, 1), padding=((0, 0), (0, 0)), numbers=("NHWC", "HWIO", "NHWC"), **options):
    return jax.lax.conv_general_dilated(
        x, kernel(*shape), strides, padding, dimension_numbers=numbers, **options
    )


MAPS, ROWS = (5, 6, 4), (7,)
FUNCTIONS: dict[str, tuple[Callable[[Any], Any], tuple[int, ...]]] = {
    # convolutions
    "asymmetric pads": (lambda x: convolved(x, 3, 3, 4, 5, padding=((2, 0), (0, 1))), MAPS),
    "pads that crop": (lambda x: convolved(x, 2, 2, 4, 5, padding=((-1, 1), (0, -2))), MAPS),
    "grouped, dilated": (
        lambda x: convolved(
            x, 2, 2, 2, 6, strides=(2, 1), rhs_dilation=(2, 3), feature_group_count=2
        ),
        MAPS,
    ),
    "channels first inside": (
        lambda x: convolved(jnp.moveaxis(x, -1, 1), 5, 4, 3, 3, numbers=("NCHW", "OIHW", "NHWC")),
        MAPS,
    ),
    "transposed": (
        lambda x: convolved(x, 3, 2, 4, 5, lhs_dilation=(2, 3), padding=((1, 2), (1, 0)), rhs_dilation=(1, 2)),
        MAPS,
    ),
    "transposed, grouped": (
        lambda x: convolved(
            x, 3, 3, 2, 6, lhs_dilation=(2, 2), padding=((2, 2), (1, 1)), feature_group_count=2
        ),
        MAPS,
    ),
    "transposed, pads beyond": (
        lambda x: convolved(x, 2, 2, 4, 5, lhs_dilation=(2, 2), padding=((3, 1), (0, 4))),
        MAPS,
    ),
    "tiles": (
        lambda x: product_of_tiles(
            x, kernel(2, 3, 4, 5), (2, 3), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
        ),
        (4, 6, 4),
    ),
    "a kernel from the input": (
        lambda x: jax.lax.conv_general_dilated(
            jnp.ones((1, 4, 4, 1)), x.sum(0)[..., None, None], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        ),
        (3, 2),
    ),
    # products
    "dense": (lambda x: x @ kernel(7, 3) + kernel(1, 3), ROWS),
    "dense of maps": (lambda x: x @ kernel(4, 3) + kernel(1, 1, 1, 3), MAPS),
    "dense of two axes": (lambda x: jnp.einsum("bhwc,hwk->bkc", x, kernel(5, 6, 3)), MAPS),
    "dense to two axes": (lambda x: jnp.einsum("bhwc,wkl->bhckl", x, kernel(6, 3, 2)), MAPS),
    "attention": (lambda x: jnp.einsum("bhwc,bhvc->bhwv", x, jnp.tanh(x)), MAPS),
    "attention over images": (lambda x: jnp.einsum("bhwc,bkwc->bhk", x, nnx.relu(x)), MAPS),
    "a bias of one number": (lambda x: x @ kernel(7, 3) + 2.0, ROWS),
    # activations
    "relu": (nnx.relu, MAPS),
    "relu6": (nnx.relu6, MAPS),
    "relu, then the larger": (lambda x: jnp.maximum(nnx.relu(x), jnp.tanh(x)), MAPS),
    "gelu": (lambda x: nnx.gelu(x, approximate=False), MAPS),
    "gelu by tanh": (lambda x: nnx.gelu(x, approximate=True), MAPS),
    "silu": (nnx.silu, MAPS),
    "hard": (lambda x: (nnx.hard_sigmoid(x), nnx.hard_swish(x), nnx.hard_tanh(x)), MAPS),
    "softplus": (nnx.softplus, MAPS),
    "elu": (lambda x: (nnx.elu(x), nnx.selu(x), nnx.celu(x), nnx.leaky_relu(x)), MAPS),
    "softmax": (lambda x: (nnx.softmax(x), nnx.log_softmax(x, 1), nnx.standardize(x)), MAPS),
    "mish": (lambda x: x * jnp.tanh(nnx.softplus(x)), MAPS),
    # elementwise
    "arithmetic": (lambda x: (-x / (1.5 + jnp.abs(x)) - jnp.sign(x) + 3 * x**3 + x**2), MAPS),
    "roots": (lambda x: jax.lax.rsqrt(1 + jnp.square(x)) + jnp.sqrt(jnp.abs(x)) + jnp.abs(x) ** 0.3, MAPS),
    "waves": (lambda x: jnp.sin(x) * jnp.cos(x) + jax.lax.erf(x) + jax.lax.erfc(x), MAPS),
    "logarithms": (lambda x: jnp.log(jnp.exp(x) + jnp.log1p(jnp.abs(x))) + jnp.expm1(x), MAPS),
    "rounding": (lambda x: jnp.round(x) + jnp.floor(3 * x) - jnp.ceil(2 * x), MAPS),
    "comparisons": (
        lambda x: (
            jnp.where((x > 0.1) & (x <= 1) | ~(x >= -1), x, 2 * x),
            jnp.where((x < 0) | (x == 1), 0.0, jnp.where(x != 0.5, x, 1.0)).astype(jnp.int32),
        ),
        MAPS,
    ),
    "clips": (
        lambda x: (
            jnp.clip(x, -0.5, 0.7),
            jnp.minimum(x, 0.3),
            jax.lax.clamp(jnp.sin(x) - 1, x, jnp.sin(x)),
            jax.lax.clamp(-0.5, x, 0.5),
        ),
        MAPS,
    ),
    "axes that are broadcast": (
        lambda x: x.mean(1)[:, None] * kernel(1, 1, 6, 1) + x.max(2)[:, :, None] * kernel(1, 5, 1, 1) + kernel(1, 1, 1, 4),
        MAPS,
    ),
    "an outer product": (lambda x: x[:, :, None] * x[:, None] + jnp.arange(7.0)[None, None], ROWS),
    "constants": (lambda x: (jnp.zeros((x.shape[0], 2)), jnp.ones((3, 4)), x), ROWS),
    "nothing": (lambda x: x, MAPS),
    # reductions and pooling
    "reductions": (
        lambda x: (x.sum((0, 1)), x.max(1), x.min((1, 3)), x.prod(2), x.mean(3), x.mean((1, 2)), x.var((1, 2))),
        MAPS,
    ),
    "means": (lambda x: (x.mean((1, 2), keepdims=True) * x, x.sum(1) / 3), MAPS),
    "indices": (lambda x: (jnp.argmax(x, 1), jnp.argmax(x, -1)), MAPS),
    "max pool": (
        lambda x: (
            nnx.max_pool(x, (3, 2), (2, 1), "SAME"),
            nnx.max_pool(x, (2, 2), (2, 2), ((1, 0), (0, 1))),
            nnx.max_pool(x, (2, 2), (2, 2), ((3, 0), (0, 2))),
        ),
        MAPS,
    ),
    "average pool": (
        lambda x: (
            nnx.avg_pool(x, (3, 2), (2, 1), "SAME"),
            nnx.avg_pool(x, (2, 2), (2, 2), ((1, 0), (0, 1)), count_include_pad=False),
        ),
        MAPS,
    ),
    "pools of one axis": (lambda x: (nnx.max_pool(x, (2,), (2,)), nnx.avg_pool(x, (3,))), (9, 2)),
    "pools without channels": (
        lambda x: jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 3), (1, 2), "SAME"),
        ROWS,
    ),
    "pools over channels": (
        lambda x: jax.lax.reduce_window(x, 0.0, jax.lax.add, (1, 1, 1, 3), (1, 1, 1, 1), "SAME"),
        MAPS,
    ),
    # moving, cutting, joining
    "pads": (lambda x: jnp.pad(x, ((0, 0), (1, 2), (0, 1), (3, 0)), constant_values=2.0), MAPS),
    "pads of other kinds": (
        lambda x: [jnp.pad(x, ((0, 0), (1, 2), (2, 1), (0, 0)), kind) for kind in ("reflect", "wrap")],
        MAPS,
    ),
    "pads of single rows": (lambda x: jnp.pad(x[:, None], ((0, 0), (1, 1), (0, 0))), ROWS),
    "slices": (lambda x: (x[:, 1:4:2], x[:, :, ::-1], x[..., 1], x[:, 2, 3:], x[:, -1]), MAPS),
    "slices of one": (lambda x: jax.lax.slice(x, (0, 1, 0, 0), (x.shape[0], 5, 6, 4), (1, 2, 3, 1)), MAPS),
    "entries": (lambda x: (x[:, :, jnp.asarray([3, 1, 1])], jnp.take(x, np.asarray([0, 2]), axis=3)), MAPS),
    "parts": (lambda x: jnp.split(nnx.relu(x), [1, 4], axis=2), MAPS),
    "joined": (lambda x: jnp.concatenate([x, jnp.ones_like(x), nnx.relu(x)[:, :2]], 1), MAPS),
    "stacked": (lambda x: (jnp.stack([x, -x], 1), jnp.stack([x, -x], -1)), MAPS),
    "repeated": (lambda x: (x.repeat(3, 1), x.repeat(2, 2).repeat(2, 1), x.repeat(2, 3)), MAPS),
    "resized": (lambda x: jax.image.resize(x, (x.shape[0], 10, 18, 4), "nearest"), MAPS),
    "resized to less": (lambda x: jax.image.resize(x, (x.shape[0], 3, 9, 4), "nearest"), MAPS),
    "tiled": (lambda x: jnp.tile(x, (1, 2, 1, 3)), MAPS),
    "reshaped": (
        lambda x: (
            x.reshape(x.shape[0], -1),
            nnx.relu(x).reshape(x.shape[0], 30, 4),
            x.reshape(-1, 6, 2, 2),
            x.transpose(0, 3, 1, 2).reshape(x.shape[0], 2, 2, 5, 3, 2),
            x.reshape(x.shape[0], 1, 5, 6, 1, 4).squeeze((1, 4)),
        ),
        MAPS,
    ),
    "moved": (lambda x: (x.transpose(0, 2, 3, 1), jnp.moveaxis(x, 0, -1), x.swapaxes(1, 3) * 2), MAPS),
    "shuffled channels": (
        lambda x: x.reshape(*x.shape[:3], 2, 2).swapaxes(3, 4).reshape(x.shape),
        MAPS,
    ),
    "pixels to channels": (
        lambda x: x[:, :4].reshape(x.shape[0], 2, 2, 3, 2, 4).transpose(0, 1, 3, 2, 4, 5).reshape(-1, 2, 3, 16),
        MAPS,
    ),
}
# What is computed in place of the function. On a CPU, jax 0.10 reads past the end of a map that negative pads
# crop where it is compiled without optimizations, as tests are.
IN_PLACE = {
    "pads that crop": lambda x: convolved(x[:, 1:, :-2], 2, 2, 4, 5, padding=((0, 1), (0, 0))),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_an_operation(name):
    function, shape = FUNCTIONS[name]
    run_it = session(onnx_model(Function(function), shape))
    model = Function(lambda x: tuple(jax.tree.leaves(IN_PLACE.get(name, function)(x))))
    for count in (1, 3):
        x = images(shape, count)
        found, expected = run_it.run(None, {"images": x}), run(model, x)
        assert [a.dtype for a in found] == [a.dtype for a in expected]
        assert far(found, expected) <= tolerances.ONNX


def test_every_operation_is_tested():
    seen = set()
    for function, shape in FUNCTIONS.values():
        graph = trace(Function(function), lambda m: lambda x: {str(i): y for i, y in enumerate(jax.tree.leaves(m(x)))}, shape, np.float32)
        seen |= {e.name for e in graph.equations}
    others = {"repopt_fake_quantize", "add_any", "copy_p"}  # tested below; names in other versions of JAX
    assert set(OPERATIONS) - others <= seen
