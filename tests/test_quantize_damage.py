"""What quantization costs: measured layer by layer, expected beforehand, and what wrong images do."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiers
from flax import nnx
from test_quantize import PADS
from tolerances import EXPECTED_DECIBEL
from training import tiny_config  # noqa: F401  (registers the network "tiny")

from repopt_jax import fuse, models, prepare
from repopt_jax.quantize import (
    calibrate,
    check_images,
    expected,
    image_statistics,
    layer_noise,
    output_noise,
    quantize,
    sensitivity,
)
from repopt_jax.quantize.layers import Scheme, quantized_input, quantized_kernel
from repopt_jax.quantize.sensitivity import Noise

pytestmark = pytest.mark.once


class Deep(nnx.Module):
    """(batch, 6, 6, 3) -> (batch, 5): four convolutions and a dense layer."""

    def __init__(self):
        rngs = nnx.Rngs(0)
        he = {"kernel_init": nnx.initializers.he_normal(), "padding": PADS, "rngs": rngs}
        widths = (3, 16, 16, 16, 16)
        self.convs = nnx.List([nnx.Conv(a, b, (3, 3), **he) for a, b in itertools.pairwise(widths)])
        self.head = nnx.Linear(16, 5, rngs=rngs)

    def __call__(self, x):
        for conv in self.convs:
            x = nnx.relu(conv(x))
        return self.head(x.mean((1, 2)))


def with_outlier(model, layer):
    """A channel of `layer` with weights 200 times those of the others, whose output the ReLU makes zero."""
    model = nnx.clone(model)
    kernel = model.convs[layer].kernel
    kernel.set_value(kernel[...].at[..., 0].set(200 * jnp.abs(kernel[..., 0])))
    model.convs[layer].bias.set_value(model.convs[layer].bias[...].at[0].set(-1e5))
    return model


@pytest.fixture(scope="module")
def images():
    return jnp.asarray(np.abs(np.random.default_rng(0).normal(size=(48, 6, 6, 3))), jnp.float32)


def test_noise_is_that_of_its_formula():
    rng = np.random.default_rng(0)
    y, other = rng.normal(size=(2, 10, 4)), rng.normal(size=(2, 10, 4)) * 0.1
    noise = Noise()
    for part in (slice(0, 3), slice(3, 10)):
        noise.add({"a": y[0, part], "b": y[1, part]}, {"a": (y + other)[0, part], "b": (y + other)[1, part]})
    ratios = np.square(other).sum((1, 2)) / np.square(y).sum((1, 2))
    assert noise.decibel == pytest.approx(-10 * np.log10(ratios.mean()))
    same = Noise()
    same.add(y, y)
    assert same.decibel == np.inf


def test_each_layer_alone_is_what_quantizing_it_alone_gives(images):
    model, options = Deep(), {"bits": 4, "per": "channel"}
    found = sensitivity(model, images, **options)
    layers = list(calibrate(model, images))
    assert set(found.layers) == set(layers)
    assert list(found.layers.values()) == sorted(found.layers.values())
    for path in layers:
        one = quantize(model, images, keep_float=[p for p in layers if p != path], **options)
        assert output_noise(model, one, images) == pytest.approx(found.layers[path], abs=0.01)
    whole = quantize(model, images, **options)
    assert output_noise(model, whole, images) == pytest.approx(found.whole, abs=0.01)


@pytest.mark.parametrize("layer", tiers.often([0, 1, 3], 0))
def test_sensitivity_names_the_layer_with_an_outlier_and_float_recovers_it(images, layer):
    model = with_outlier(Deep(), layer)
    options = {"per": "tensor", "bits": 8}
    found = sensitivity(model, images, **options)
    assert found.worst(1) == [f"convs/{layer}"]
    usual = list(found.layers.values())[1]
    assert usual - found.layers[f"convs/{layer}"] > 15  # dB
    whole = quantize(model, images, **options)
    partial = quantize(model, images, keep_float=found.worst(1), **options)
    assert output_noise(model, whole, images) < 15
    assert output_noise(model, partial, images) > 25
    by_channel = quantize(model, images, bits=8)  # where each channel has its own scale it does no harm
    assert output_noise(model, by_channel, images) > 25


def test_sensitivity_compiles_one_program(images, counted):
    compiled = []

    def listen(event, duration_secs, **_):
        compiled.append(event)

    model, found = Deep(), None
    histograms = calibrate(model, images)
    jax.clear_caches()
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        found = sensitivity(model, images, histograms=histograms, batch_size=24)
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert len(found.layers) == 5
    # That of the outputs, and those that cut the images into batches; not one for each layer.
    assert compiled.count("/jax/core/compile/backend_compile_duration") <= 3


# -- expected


@pytest.mark.parametrize(
    ("per", "bits"),
    tiers.often(
        [(per, bits) for per in ("channel", "tensor") for bits in (8, 4)], ("channel", 8), ("tensor", 4)
    ),
)
def test_noise_of_layers_is_as_expected_of_random_kernels(per, bits):
    rng = np.random.default_rng(0)
    model = nnx.Linear(64, 32, use_bias=False, rngs=nnx.Rngs(0))
    model.kernel.set_value(jnp.asarray(rng.normal(size=(64, 32)), jnp.float32))
    whole = Wrapped(model)
    x = jnp.asarray(rng.normal(size=(4096, 64)), jnp.float32)
    options = {"bits": bits, "per": per, "calibration": "abs-max"}
    found = expected(whole, calibrate(whole, x), **options)
    measured = output_noise(whole, quantize(whole, x, **options), x)
    assert found.decibel == pytest.approx(measured, abs=EXPECTED_DECIBEL)
    kernels = expected(whole, **options)
    only = Wrapped(nnx.clone(model))
    only.layer.kernel.set_value(quantized_kernel(model.kernel[...], Scheme(bits, per=per)))
    assert kernels.decibel == pytest.approx(output_noise(whole, only, x), abs=EXPECTED_DECIBEL)
    inputs = found.layers["layer"].input_noise
    rounded = quantized_input(x, jnp.asarray([x.min(), x.max()]), Scheme(bits))
    ratio = np.square(rounded - x).sum() / np.square(x).sum()
    assert inputs == pytest.approx(float(ratio), rel=0.2)


class Wrapped(nnx.Module):
    def __init__(self, layer):
        self.layer = layer

    def __call__(self, x):
        return self.layer(x)


def test_expectation_names_the_layer_with_an_outlier_and_the_price_of_bits(images):
    model = with_outlier(Deep(), 1)
    assert expected(model, per="tensor").worst == "convs/1"
    assert expected(model, per="tensor").layers["convs/1"].tail > 5
    clean, histograms = Deep(), calibrate(Deep(), images)
    prices = [
        expected(clean, histograms, bits=bits).decibel - sensitivity(clean, images, bits=bits).whole
        for bits in (8, 6, 5, 4)
    ]
    assert all(-15 < price < 3 for price in prices), prices  # at most a little too hopeful
    assert expected(clean).decibel > expected(clean, histograms).decibel


def test_a_silent_layer_is_expected_to_make_no_noise():
    model = Wrapped(nnx.Linear(3, 3, kernel_init=nnx.initializers.zeros, rngs=nnx.Rngs(0)))
    assert expected(model, calibrate(model, jnp.zeros((2, 3)))).decibel == np.inf


# -- wrong images


@pytest.mark.parametrize("mode", ["plain", "repvgg"])
def test_calibration_with_wrong_mean_and_std_is_found_and_said(mode):
    rng = np.random.default_rng(0)
    pixels = np.clip(rng.normal(0.3, 0.3, size=(64, 8, 8, 1)), 0, 1).astype(np.float32)
    right = (pixels - 0.3) / 0.37
    model = models.create("tiny", num_classes=3, in_channels=1, rngs=nnx.Rngs(0))
    model = prepare(model, mode, rngs=nnx.Rngs(1)).model
    run = nnx.jit(lambda model, x: model(x))
    for _ in range(60):  # running statistics of the right images
        run(model, jnp.asarray(right))
    model.eval()
    found = image_statistics(model, right[:16])
    assert found is not None
    assert found.problem == ""
    check_images(model, right)
    for wrong in (pixels, 255 * pixels, (pixels - 0.5) / 0.5, (pixels - 0.3) / 0.2):
        with pytest.raises(ValueError, match=r"at its first batch norm, stages/0/0/.*check mean and std"):
            check_images(model, wrong)
    assert image_statistics(fuse(model), right) is None
    with pytest.raises(ValueError, match="there are no images"):
        check_images(model, right[:0])


def test_noise_arrives_at_each_layer_from_those_before_it(images):
    model = Deep()
    quantized = quantize(model, images, bits=4, keep_float=["convs/0", "convs/1"])
    output, layers = layer_noise(model, quantized, images)
    assert output == pytest.approx(output_noise(model, quantized, images), abs=0.01)
    assert [layers[f"convs/{k}"] for k in range(3)] == [np.inf] * 3  # nothing is rounded before the third
    assert np.isfinite([layers["convs/3"], layers["head"]]).all()
