"""Quantized layers: where they round, what they leave as it is, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiers
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import abstract, randomised, settled_statistics
from tolerances import QUANTIZED, QUANTIZED_APART
from training import tiny_config  # noqa: F401  (registers the network "tiny")

from repopt_jax import fuse, models, prepare
from repopt_jax.core import paths
from repopt_jax.quantize import (
    EXACT_SCALE_BITS,
    Observed,
    Scheme,
    calibrate,
    expected,
    find_quantizable,
    quantize,
    quantize_array,
    quantizers,
    sensitivity,
    with_integer_biases,
)
from repopt_jax.quantize.layers import (
    input_scale,
    kernel_scale,
    quantized_kernel,
    run_with_inputs,
    with_functions,
    with_quantizers,
)

PADS = ((1, 1), (1, 1))


class Chain(nnx.Module):
    """(batch, 6, 6, 3) -> (batch, 5), layers and ReLUs in turn, the second grouped and strided."""

    def __init__(self, *, rngs=None, dtype=jnp.float64):
        options = {"padding": PADS, "param_dtype": dtype, "rngs": rngs or nnx.Rngs(0)}
        self.first = nnx.Conv(3, 4, (3, 3), **options)
        self.second = nnx.Conv(4, 6, (3, 3), strides=2, feature_group_count=2, **options)
        self.head = nnx.Linear(6, 5, param_dtype=dtype, rngs=options["rngs"])

    def __call__(self, x):
        x = nnx.relu(self.second(nnx.relu(self.first(x))))
        return self.head(x.mean((1, 2)))


class Shared(nnx.Module):
    """One layer that is used twice, with inputs of other ranges."""

    def __init__(self):
        self.layer = nnx.Linear(4, 4, rngs=nnx.Rngs(0))

    def __call__(self, x):
        return self.layer(x) + self.layer(10 * x)


def random_chain(seed=0, dtype=jnp.float64):
    model = randomised(nnx.eval_shape(lambda: Chain(rngs=nnx.Rngs(0), dtype=dtype)), seed, dtype)
    return model, jnp.asarray(np.random.default_rng(seed).normal(size=(8, 6, 6, 3)), dtype)


def slow_rounding(x, scale, zero, low, high):
    """In Python's own arithmetic, whose `round` takes halves to the even number."""
    flat = [(min(max(round(v / scale) + zero, low), high) - zero) * scale for v in x.ravel().tolist()]
    return np.reshape(flat, x.shape)


def slow_input(x, least, largest, bits):
    least, largest, levels = min(least, 0.0), max(largest, 0.0), 2**bits - 1
    scale = (largest - least) / levels
    return slow_rounding(x, scale, round(-least / scale), 0, levels)


def slow_kernel(kernel, q, per):
    if per == "tensor":
        return slow_rounding(kernel, np.abs(kernel).max() / q, 0, -q, q)
    channels = [slow_kernel(kernel[..., c], q, "tensor") for c in range(kernel.shape[-1])]
    return np.stack(channels, -1)


def slow_conv(x, kernel, stride, groups):
    x = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    size = (x.shape[1] - 3) // stride + 1
    inputs, outputs = kernel.shape[2], kernel.shape[3] // groups
    y = np.zeros((len(x), size, size, kernel.shape[3]))
    for i in range(size):
        for j in range(size):
            window = x[:, i * stride : i * stride + 3, j * stride : j * stride + 3]
            for g in range(groups):
                part = window[..., g * inputs : (g + 1) * inputs]
                own = slice(g * outputs, (g + 1) * outputs)
                y[:, i, j, own] = np.tensordot(part, kernel[..., own], 3)
    return y


def slow_chain(model, x, ranges, bits, q, per):
    x = np.asarray(x)

    def operands(x, layer, path):
        least, largest = ranges[path]
        return slow_input(x, least, largest, bits), slow_kernel(np.asarray(layer.kernel[...]), q, per)

    for path, layer, stride, groups in (("first", model.first, 1, 1), ("second", model.second, 2, 2)):
        y = slow_conv(*operands(x, layer, path), stride, groups) + np.asarray(layer.bias[...])
        x = np.maximum(y, 0)
    x, kernel = operands(x.mean((1, 2)), model.head, "head")
    return x @ kernel + np.asarray(model.head.bias[...])


def difference(got, wanted):
    return np.abs(np.asarray(got) - np.asarray(wanted)).max() / np.abs(np.asarray(wanted)).max()


@pytest.mark.parametrize(
    ("scheme", "q"),
    [
        (Scheme(), 63),
        (Scheme(weight_range="full"), 127),
        (Scheme(per="tensor"), 63),
        (Scheme(4), 7),
        (Scheme(8, 4, "tensor"), 7),
        (Scheme(2), 1),
    ],
)
def test_quantized_layers_are_those_of_numpy(x64, scheme, q):
    model, x = random_chain()
    _, inputs = run_with_inputs(model, x)
    # Ranges that clip: what lies outside must be clipped in the same way.
    ranges = {p: (float(a[0].min()) * 0.7, float(a[0].max()) * 0.8) for p, a in inputs.items()}
    quantized = with_quantizers(model, scheme, ranges)
    wanted = slow_chain(model, x, ranges, scheme.bits, q, scheme.per)
    assert difference(quantized(x), wanted) < QUANTIZED
    assert difference(model(x), wanted) > QUANTIZED_APART
    other = with_quantizers(model, scheme, {p: (0.9 * low, 0.9 * high) for p, (low, high) in ranges.items()})
    assert difference(other(x), wanted) > QUANTIZED_APART


def test_what_stays_as_it_is(x64):
    model, x = random_chain()
    before = {path: np.asarray(leaf) for path, leaf in paths.named_leaves(nnx.state(model))[0].items()}
    exact = np.asarray(model(x))
    quantized = quantize(model, x, calibration="abs-max")
    np.testing.assert_array_equal(model(x), exact)
    assert set(paths.named_leaves(nnx.state(quantized, nnx.Param))[0]) == set(before)
    for path, leaf in paths.named_leaves(nnx.state(quantized, nnx.Param))[0].items():
        np.testing.assert_array_equal(leaf, before[path])
    assert set(paths.named_leaves(nnx.state(quantized, Observed))[0]) == {
        f"{layer}/{function}/{name}"
        for layer, function in (
            ("first", "conv_general_dilated"),
            ("second", "conv_general_dilated"),
            ("head", "dot_general"),
        )
        for name in ("range", "count")
    }


def test_transformations(x64):
    model, x = random_chain()
    quantized = quantize(model, x, calibration="abs-max", bits=4)
    wanted = np.asarray(quantized(x))
    np.testing.assert_allclose(nnx.jit(lambda m, x: m(x))(quantized, x), wanted, atol=1e-12)
    each = jax.vmap(lambda image: quantized(image[None])[0])(x)
    np.testing.assert_allclose(each, wanted, atol=1e-12)
    grads = nnx.grad(lambda m: m(x).sum())(quantized)
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(grads))
    remat = jax.checkpoint(lambda x: quantized(x).sum())
    np.testing.assert_allclose(jax.grad(remat)(x), jax.grad(lambda x: quantized(x).sum())(x), atol=1e-12)


def test_kept_layers_are_not_quantized(x64):
    model, x = random_chain()
    quantized = quantize(model, x, bits=2, keep_float=["second", "head"])
    assert list(quantizers(quantized)) == ["first"]
    one = quantize(model, x, bits=2, keep_float=["second"])
    assert list(quantizers(one)) == ["first", "head"]


def test_a_shared_layer_has_the_union_of_its_ranges():
    x = jnp.asarray(np.random.default_rng(0).uniform(-1, 1, (5, 4)), jnp.float32)
    found = calibrate(Shared(), x)["layer"]
    assert found.count == 40
    assert found.high == pytest.approx(10 * float(x.max()))
    assert found.low == pytest.approx(10 * float(x.min()))
    quantizer = quantizers(quantize(Shared(), x, calibration="abs-max"))["layer"]
    np.testing.assert_allclose(quantizer.range[...], [found.low, found.high])


# The other is `long`: test_onnx.py quantizes a smaller RepMLPNet, and compares every number in it.
@pytest.mark.parametrize("name", tiers.often(["repghost-digits", "repmlpnet-digits"], "repghost-digits"))
@pytest.mark.once
def test_layers_of_other_networks_are_quantized_all(name):
    """Depthwise layers and squeeze-and-excitation; dense layers over tiles, and over everything."""
    model = abstract(models.create, name, num_classes=10, in_channels=1)
    fused = fuse(settled_statistics(model, dtype=jnp.float32))
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 8, 8, 1)), jnp.float32)
    quantized = quantize(fused, x)
    assert set(quantizers(quantized)) == set(find_quantizable(fused))
    assert 0 < np.abs(quantized(x) - fused(x)).max() < 0.2 * np.abs(fused(x)).max()


# -- kernels


@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from([8, 6, 4, 2]),
    st.sampled_from(["reduced", "full"]),
)
@settings(deadline=None, max_examples=25)
def test_per_channel_commutes_with_factors_of_either_sign(seed, bits, weight_range):
    """So with a batch norm kept, the quantized kernel is that of the folded one: Q(K) s = Q(K s)."""
    with jax.enable_x64(True):
        rng = np.random.default_rng(seed)
        kernel = jnp.asarray(rng.normal(size=(3, 3, 4, 5)))
        s = jnp.asarray(rng.normal(size=(1, 1, 1, 5)) * 10.0 ** rng.uniform(-3, 3, (1, 1, 1, 5)))
        scheme = Scheme(bits, weight_range=weight_range)
        got, wanted = quantized_kernel(kernel * s, scheme), quantized_kernel(kernel, scheme) * s
        assert (np.abs(got - wanted).max((0, 1, 2)) / np.abs(wanted).max((0, 1, 2))).max() < QUANTIZED
        scheme = Scheme(bits, per="tensor", weight_range=weight_range)
        got, wanted = quantized_kernel(kernel * s, scheme), quantized_kernel(kernel, scheme) * s
        assert difference(got, wanted) > QUANTIZED_APART


@pytest.mark.parametrize("per", ["channel", "tensor"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_no_weight_is_clipped(x64, per, dtype):
    """Also the largest weights keep their gradient, whatever rounding does to their scale."""
    kernel = jnp.asarray(np.random.default_rng(0).normal(size=(3, 3, 4, 64)), dtype)
    grad = jax.grad(lambda k: quantized_kernel(k, Scheme(per=per)).sum())(kernel)
    np.testing.assert_array_equal(grad, 1)


@given(st.integers(0, 2**32 - 1), st.integers(1, 24), st.sampled_from(["channel", "tensor"]))
@settings(deadline=None, max_examples=50)
def test_scales_are_rounded_up_to_their_digits(seed, bits, per):
    rng = np.random.default_rng(seed)
    kernel = jnp.asarray(rng.normal(size=(3, 3, 2, 4)) * 10.0 ** rng.integers(-20, 20, 4), jnp.float32)
    ends = rng.normal(size=2) * 10.0 ** rng.integers(-20, 20)
    for scale, exact in (
        (kernel_scale(kernel, Scheme(per=per, scale_bits=bits)), kernel_scale(kernel, Scheme(per=per))),
        (input_scale(*ends, Scheme(scale_bits=bits))[0], input_scale(*ends, Scheme())[0]),
    ):
        scale, exact = np.asarray(scale, np.float64), np.asarray(exact, np.float64)
        digits = np.ldexp(np.frexp(scale)[0], bits)
        np.testing.assert_array_equal(digits, np.round(digits))
        assert (scale >= exact).all()
        assert (scale < exact * (1 + 2.0 ** (1 - bits))).all()


def test_sums_in_units_of_short_scales_are_exact():
    """Of 64 to 512 channels in a 3x3 window, in three orders: of 4,608 products at most 0.6 % are rounded, as
    large sums pass 2^24 units; with all digits more than half of all sums are."""
    wrong, rng = {EXACT_SCALE_BITS: [], None: []}, np.random.default_rng(0)
    for channels in (64, 128, 512):
        x = np.maximum(rng.normal(size=(32, 9 * channels)), 0).astype(np.float32)
        kernel = (rng.normal(size=(9 * channels, 16)) / 30).astype(np.float32)
        for bits in wrong:
            scale, zero = input_scale(jnp.zeros(()), jnp.asarray(x.max()), Scheme(scale_bits=bits))
            scales = kernel_scale(jnp.asarray(kernel), Scheme(scale_bits=bits))
            q = quantize_array(jnp.asarray(x), scale, zero, low=0, high=255)
            k = quantize_array(jnp.asarray(kernel), scales, jnp.zeros(16), low=-63, high=63, axis=1)
            units = np.float64(scale) * np.asarray(scales, np.float64)
            exact = (np.asarray(q, np.int64) @ np.asarray(k, np.int64)) * units
            products = np.asarray(q * scale)[:, :, None] * (np.asarray(k) * np.asarray(scales))
            for order in (slice(None), slice(None, None, -1), rng.permutation(9 * channels)):
                found = np.cumsum(products[:, order], axis=1, dtype=np.float32)[:, -1]
                wrong[bits].append(np.mean(found != exact))
    assert wrong[EXACT_SCALE_BITS][:6] == [0] * 6
    assert max(wrong[EXACT_SCALE_BITS]) < 0.02
    assert min(wrong[None]) > 0.5


def test_channels_and_kernels_of_zeros():
    kernel = jnp.ones((3, 2)).at[:, 1].set(0) * 0.5
    np.testing.assert_allclose(kernel_scale(kernel, Scheme(4)), [0.5 / 7] * 2, rtol=1e-5)
    assert not quantized_kernel(kernel, Scheme(4))[:, 1].any()
    np.testing.assert_allclose(kernel_scale(jnp.zeros((3, 2)), Scheme(4)), 1, rtol=1e-5)
    tiny = jnp.full((3, 2), 1e-40)
    assert np.isfinite(quantized_kernel(tiny, Scheme(4))).all()


def test_an_input_that_is_always_zero():
    model, x = random_chain(dtype=jnp.float32)
    quantized = quantize(model, jnp.zeros_like(x))
    assert np.isfinite(quantized(x)).all()


@pytest.mark.parametrize(
    ("options", "whole"),
    [
        ({}, True),
        ({"param_dtype": jnp.bfloat16, "dtype": jnp.float32}, False),
        ({"dtype": jnp.bfloat16}, False),
        ({"param_dtype": jnp.float64, "dtype": jnp.float32}, True),
    ],
    ids=["float32", "bf16 parameters", "computes in bf16", "float64 parameters"],
)
def test_biases_are_whole_in_the_scale_that_the_quantizer_finds(x64, options, whole):
    """It is given the kernel in the dtype in which the layer computes; half precision has no such biases."""
    rng, model = np.random.default_rng(0), nnx.Linear(6, 8, rngs=nnx.Rngs(0), **options)
    model.bias.set_value(jnp.asarray(rng.normal(size=8), model.bias.dtype))
    x = jnp.asarray(rng.normal(size=(32, 6)), jnp.float32)
    quantized = with_integer_biases(quantize(model, x))
    kernels = []

    def make(path, quantizer):
        def recorded(lhs, kernel, *args, **kwargs):
            kernels.append(np.asarray(kernel, np.float64))
            return quantizer.function(lhs, kernel, *args, **kwargs)

        return recorded

    with_functions(quantized, make)(x)
    quantizer = quantizers(quantized)[""]
    of_kernel = np.abs(kernels[0]).max(0) / 63 * (1 + 4 * 2.0**-23)
    units = np.asarray(quantized.bias[...], np.float64) / (
        of_kernel * np.float64(input_scale(*quantizer.range[...], Scheme())[0])
    )
    assert (abs(units - np.round(units)).max() < 2e-3) == whole
    if not whole:
        np.testing.assert_array_equal(quantized.bias[...], model.bias[...])
    noise = expected(model).layers[""].kernel_noise
    square = np.square(np.asarray(model.kernel[...], np.float64)).mean()
    np.testing.assert_allclose(noise, np.square(of_kernel).mean() / (12 * square), rtol=1e-5)


def test_half_precision_is_rounded_in_single():
    model, x = random_chain(dtype=jnp.float32)
    _, inputs = run_with_inputs(model, x)
    quantized = quantize(model, x, calibration="abs-max")
    quantizer = quantizers(quantized)["first"]
    rounded = quantizer.quantized_input(inputs["first"][0].astype(jnp.bfloat16))
    assert rounded.dtype == jnp.bfloat16
    exact = quantizer.quantized_input(inputs["first"][0].astype(jnp.bfloat16).astype(jnp.float32))
    np.testing.assert_array_equal(rounded, exact.astype(jnp.bfloat16))


def test_kernels_are_those_of_qwix(x64):
    """Within its convention of 127.5 steps to the largest weight, which leaves out no integer."""
    qwix = pytest.importorskip("qwix")
    from repopt_jax.quantize import fake_quantize

    kernel = jnp.asarray(np.random.default_rng(0).normal(size=(3, 3, 4, 6)))
    theirs = qwix.dequantize(qwix.quantize(kernel, jnp.int8, channelwise_axes=[3]))
    scale = jnp.abs(kernel).max((0, 1, 2)) / 127.5
    ours = fake_quantize(kernel, scale, jnp.zeros(6), low=-128, high=127, axis=3)
    np.testing.assert_allclose(ours, theirs, atol=1e-6)
    full = quantized_kernel(kernel, Scheme(weight_range="full"))
    assert (np.abs(full - theirs).max((0, 1, 2)) <= scale * 1.01).all()
    assert np.abs(quantized_kernel(kernel, Scheme(4)) - theirs).max() > 5 * float(scale.max())


# -- folding


@pytest.mark.parametrize("bits", tiers.often([8, 3], 3))
def test_fuse_keeps_quantizers_and_their_function(x64, bits):
    model = models.create("tiny", num_classes=3, in_channels=1, rngs=nnx.Rngs(0))
    model = randomised(nnx.eval_shape(lambda: model))
    x = jnp.asarray(np.random.default_rng(1).normal(size=(4, 8, 8, 1)))
    _, inputs = run_with_inputs(model, x)
    ranges = {p: (float(a[0].min()), float(a[0].max())) for p, a in inputs.items()}
    quantized = with_quantizers(model, Scheme(bits), ranges, momentum=0.9)
    fused = fuse(quantized)
    assert list(quantizers(fused)) == list(quantizers(quantized))
    assert not any(isinstance(m, nnx.BatchNorm) for _, m in nnx.iter_modules(fused))
    assert difference(fused(x), quantized(x)) < QUANTIZED
    assert difference(fuse(model)(x), quantized(x)) > QUANTIZED_APART
    with pytest.raises(ValueError, match="one scale for the whole tensor"):
        fuse(with_quantizers(model, Scheme(bits, per="tensor"), ranges))
    with pytest.raises(ValueError, match="or with rounded scales"):
        fuse(with_quantizers(model, Scheme(bits, scale_bits=4), ranges))


# -- what is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 1}, "`bits` is 1: it must be a whole number from 2 to 8"),
        ({"bits": 9, "weight_bits": 0}, "`bits` is 9: .*; `weight_bits` is 0: "),
        ({"bits": 8.0}, "`bits` is 8.0"),
        ({"bits": True}, "`bits` is True"),
        ({"per": "group"}, "`per` is 'group': it must be 'channel' or 'tensor'"),
        ({"scale_bits": 25}, "`scale_bits` is 25: it must be a whole number from 1 to 24"),
        ({"weight_range": "half"}, "`weight_range` is 'half': it must be 'reduced' or 'full'"),
        (
            {"calibration": "max"},
            "`calibration` is 'max': it must be one of abs-max, percentile, entropy, mse",
        ),
        ({"percentile": 0}, "`percentile` is 0: it must be above 0 and at most 100"),
        (
            {"keep_float": ["frist", "second", "third"]},
            "`keep_float` names frist, third, which are no layers",
        ),
        ({"keep_float": ["first", "second", "head"]}, "`keep_float` names all layers"),
    ],
)
def test_wrong_options_are_refused(options, message):
    model, x = random_chain(dtype=jnp.float32)
    with pytest.raises(ValueError, match=message):
        quantize(model, x, **options)


def test_wrong_images_are_refused():
    model, x = random_chain(dtype=jnp.float32)
    with pytest.raises(ValueError, match="there are no images"):
        quantize(model, x[:0])
    with pytest.raises(ValueError, match="there are no images"):
        quantize(model, iter([]))
    with pytest.raises(ValueError, match=r"the network does not take images of shape \(8, 6, 6, 2\)"):
        quantize(model, x[..., :2])
    with pytest.raises(ValueError, match=r"images of shape \(5, 6, 3\) follow images of shape \(6, 6, 3\)"):
        quantize(model, [x, x[:, 1:]])
    with pytest.raises(TypeError, match="the images are of dtype uint8"):
        quantize(model, np.zeros((2, 6, 6, 3), np.uint8))
    with pytest.raises(ValueError, match="inputs of first, head, second are not finite"):
        quantize(model, x.at[0, 0, 0, 0].set(jnp.nan))
    for size, error in ((0, ValueError), (-1, ValueError), (2.5, TypeError)):
        with pytest.raises(error, match=f"`batch_size` is {size}: it must be"):
            quantize(model, x, batch_size=size)
    with pytest.raises(TypeError, match="`keep_float` is 'head': it must be paths of layers, in a list"):
        quantize(model, x, keep_float="head")


def test_histograms_of_another_network_are_refused():
    model, x = random_chain(dtype=jnp.float32)
    found = calibrate(model, x)
    other = {"first": found["first"], "third": found["head"]}
    for use in (
        lambda given: quantize(model, given),
        lambda given: sensitivity(model, x, histograms=given),
        lambda given: expected(model, given),
    ):
        with pytest.raises(ValueError, match="the histograms lack head, second: they are of another network"):
            use(other)
        use(found)
    for use in (lambda given: sensitivity(model, x, histograms=given), lambda given: expected(model, given)):
        with pytest.raises(
            TypeError, match="`histograms` is of type float: it must be a mapping of `Histogram`s"
        ):
            use({"first": 1.0})


def test_unfinished_networks_are_refused():
    model = models.create("tiny", num_classes=3, in_channels=1, rngs=nnx.Rngs(0))
    x = jnp.zeros((2, 8, 8, 1))
    model.train()
    with pytest.raises(ValueError, match=r"stages/0/0/bn \(BatchNorm\), .* are in training mode: call"):
        quantize(model, x)
    branched = prepare(model, "repvgg", rngs=nnx.Rngs(1)).model
    branched.eval()
    with pytest.raises(ValueError, match=r"stages/0/0/conv \(Branched\), .* are made of branches: `fuse"):
        quantize(branched, x)
    model.eval()
    with pytest.raises(ValueError, match=r"stages/0/0/bn \(BatchNorm\), .* `fuse\(model\)` first"):
        quantize(model, x)
    quantized = quantize(fuse(model), x)
    with pytest.raises(ValueError, match="are quantized already: give the network in floating point"):
        quantize(quantized, x)


class Doubled(nnx.Linear):
    def __call__(self, x, out_sharding=None):
        return 2 * super().__call__(x)


class Odd(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.doubled = Doubled(3, 3, rngs=rngs)
        self.masked = nnx.Conv(3, 3, (1,), mask=jnp.ones((1, 3, 3)), rngs=rngs)
        self.stacked = nnx.vmap(lambda key: nnx.Linear(3, 3, rngs=nnx.Rngs(key)))(
            jax.random.split(jax.random.key(0), 2)
        )

    def __call__(self, x):
        return x


class Empty(nnx.Module):
    def __call__(self, x):
        return x


class Unused(nnx.Module):
    def __init__(self):
        self.used, self.idle = (nnx.Linear(3, 3, rngs=nnx.Rngs(0)) for _ in range(2))

    def __call__(self, x):
        return self.used(x)


def test_layers_that_cannot_be_quantized_are_refused_all_at_once():
    with pytest.raises(ValueError, match=r"doubled \(Doubled\) .*; masked \(Conv\) .*; stacked \(Linear\) "):
        quantize(Odd(), jnp.zeros((2, 3)))
    with pytest.raises(ValueError, match=r"no nnx\.Conv or nnx\.Linear"):
        quantize(Empty(), jnp.zeros((2, 3)))
    with pytest.raises(ValueError, match="no image reaches idle"):
        quantize(Unused(), jnp.zeros((2, 3)))
