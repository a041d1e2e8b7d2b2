"""Running ONNX files: models written here by hand, with the metadata of this library or without."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from flax import nnx
from tolerances import INT8_BIASES_APART, INT8_FILE

from repopt_jax.export import Metadata, compare_fused, runtime, to_onnx, to_stablehlo
from repopt_jax.quantize import quantize, quantizers, with_integer_biases
from repopt_jax.surgery.modules import named_modules

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

METADATA = Metadata(
    task="classify",
    name="by hand",
    class_names=("dark", "light"),
    image_size=4,
    channels=3,
    mean=(0.5,),
    std=(0.25,),
    layout="NCHW",
)


def write(path, metadata=METADATA, *, outputs=("logits",), dtype=None, strings=None):
    """A model whose first logit is minus the mean over the first channel, and whose second is the mean over
    the last."""
    helper, kinds = onnx.helper, onnx.TensorProto
    kind = kinds.UINT8 if metadata.dtype == "uint8" else kinds.FLOAT
    weights = np.zeros((3, 16, 2), np.float32)
    weights[0, :, 0], weights[2, :, 1] = -1 / 16, 1 / 16
    nodes = [
        helper.make_node("Cast", ["images"], ["float"], to=kinds.FLOAT),
        helper.make_node("Flatten", ["float"], ["flat"]),
        *(helper.make_node("MatMul", ["flat", "weights"], [name]) for name in outputs),
    ]
    graph = helper.make_graph(
        nodes,
        "by hand",
        [helper.make_tensor_value_info("images", kind, ["batch", *metadata.input_shape])],
        [helper.make_tensor_value_info(name, kinds.FLOAT, ["batch", 2]) for name in outputs],
        [onnx.numpy_helper.from_array(weights.reshape(48, 2), "weights")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    helper.set_model_props(model, metadata.to_strings() if strings is None else strings)
    onnx.save(model, path)
    return path


def test_an_onnx_file_is_run_in_its_layout(tmp_path):
    file = runtime.open_file(write(tmp_path / "a.onnx"))
    assert file.metadata == METADATA
    assert str(file.inputs[0]) == "images float32 (batch, 3, 4, 4)"
    assert str(file.outputs[0]) == "logits float32 (batch, 2)"
    images = np.random.default_rng(0).normal(size=(5, 4, 4, 3)).astype(np.float32)
    expected = np.stack([-images[..., 0].mean((1, 2)), images[..., 2].mean((1, 2))], -1)
    np.testing.assert_allclose(file.logits(images), expected, atol=1e-6)
    np.testing.assert_allclose(file(images[:1])["logits"], expected[:1], atol=1e-6)
    with pytest.raises(ValueError, match="is no detector: its task is 'classify'"):
        file.detect(images)
    with pytest.raises(ValueError, match=r"takes \(batch, 4, 4, 3\)"):
        file.logits(np.moveaxis(images, -1, 1))


@pytest.mark.parametrize("given", ["normalised", "uint8", "float32"])
def test_images_are_prepared_as_the_file_says(tmp_path, given):
    file = runtime.open_file(write(tmp_path / "a.onnx", dataclasses.replace(METADATA, input=given)))
    pixels = np.full((8, 6, 3), 51, np.uint8)
    image, ratio = file.prepare(pixels)
    assert ratio == 4 / 6
    assert image.dtype == file.metadata.dtype
    np.testing.assert_allclose(image, (0.2 - 0.5) / 0.25 if given == "normalised" else 51, rtol=1e-6)
    assert file.logits(image[None]).shape == (1, 2)


@pytest.mark.parametrize(
    ("pixels", "error", "message"),
    [
        (
            np.zeros((8, 8), np.uint8),
            ValueError,
            r"`pixels` is \(8, 8\): the file takes \(height, width, 3\) of any",
        ),
        (np.zeros((8, 8, 1), np.uint8), ValueError, "repeat the channel of a grey image"),
        (np.zeros((0, 8, 3), np.uint8), ValueError, r"`pixels` is \(0, 8, 3\)"),
        (
            np.zeros((8, 8, 3), np.float32),
            TypeError,
            "`pixels` is of float32: it must be a NumPy array of uint8",
        ),
        ([[0]], TypeError, "`pixels` is of list"),
    ],
)
def test_pixels_that_are_no_image_of_the_file_s_are_refused(tmp_path, pixels, error, message):
    for metadata in (METADATA, dataclasses.replace(METADATA, task="detect", strides=(4,))):
        with pytest.raises(error, match=message):
            runtime.prepare(pixels, metadata)


def test_a_home_folder_is_found_and_a_file_that_is_not_written_leaves_the_old_one(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    metadata = dataclasses.replace(METADATA, layout="NHWC")
    for write_it, name in ((to_onnx, "a.onnx"), (to_stablehlo, "a.stablehlo")):
        write_it(Three(nnx.Rngs(0)), f"~/{name}", metadata)
        whole = (tmp_path / name).read_bytes()
        assert runtime.open_file(f"~/{name}").path == tmp_path / name
        assert runtime.count_operations(f"~/{name}")
        with monkeypatch.context() as patched:
            patched.setattr(Path, "write_bytes", half_written)
            with pytest.raises(OSError, match="no space"):
                write_it(Three(nnx.Rngs(1)), tmp_path / name, metadata)
        assert (tmp_path / name).read_bytes() == whole
        with pytest.raises(FileNotFoundError, match=f"no folder .*missing to write {name} in: make it first"):
            write_it(Three(nnx.Rngs(0)), tmp_path / "missing" / name, metadata)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.onnx", "a.stablehlo"]


def half_written(path, content):
    with open(path, "wb") as file:
        file.write(content[: len(content) // 2])
    raise OSError("no space left")


def test_every_output_is_compared_with_the_fused_one(tmp_path, monkeypatch):
    """The second, whose difference is the larger part of its span, is told; an empty one is passed over."""
    plain = {"a": np.asarray([[0.0, 4.0]]), "b": np.asarray([[True, False]]), "c": np.zeros((1, 0))}
    fused = {"a": np.asarray([[1.0, 4.0]]), "b": np.asarray([[True, True]]), "c": np.zeros((1, 0))}
    monkeypatch.setattr(
        "repopt_jax.export.onnx.open_onnx", lambda path, optimized: lambda x: fused if optimized else plain
    )
    found = compare_fused(tmp_path / "a.onnx", np.zeros((1, 4, 4, 3)))
    assert (found.max_abs, found.span, found.agreement, found.count) == (1, 1, 1, 1)
    with pytest.raises(ValueError, match=r"`images` is of shape \(0, 4, 4, 3\): there is none"):
        compare_fused(tmp_path / "a.onnx", np.zeros((0, 4, 4, 3)))


def test_foreign_models_are_refused(tmp_path):
    write(tmp_path / "a.onnx", strings={"author": "someone"})
    with pytest.raises(ValueError, match=r"a\.onnx was not exported by this library: it has no metadata"):
        runtime.open_file(tmp_path / "a.onnx")
    write(tmp_path / "b.onnx", strings={**METADATA.to_strings(), "mean": "[0.5"})
    with pytest.raises(ValueError, match=r"b\.onnx .* the damaged entry mean"):
        runtime.open_file(tmp_path / "b.onnx")
    lacking = {n: v for n, v in METADATA.to_strings().items() if n not in ("mean", "layout")}
    write(tmp_path / "c.onnx", strings=lacking)
    with pytest.raises(ValueError, match="its metadata lack layout, mean"):
        runtime.open_file(tmp_path / "c.onnx")


@pytest.mark.parametrize("kept", [0, 1, 100, -40])
def test_damaged_models_are_refused(tmp_path, kept, capfd):
    whole = write(tmp_path / "a.onnx").read_bytes()
    (tmp_path / "a.onnx").write_bytes(whole[:kept])
    with pytest.raises(ValueError, match=r"a\.onnx") as caught:
        runtime.open_file(tmp_path / "a.onnx")
    if kept > 1:
        with pytest.raises(ValueError, match=r"a\.onnx is no ONNX file, or a damaged one"):
            runtime.count_operations(tmp_path / "a.onnx")
    assert "\n" not in str(caught.value)
    assert capfd.readouterr().err == ""


def test_altered_bytes_give_a_sentence_or_a_network(tmp_path):
    whole, rng = write(tmp_path / "a.onnx").read_bytes(), np.random.default_rng(0)
    noticed = 0
    for place in rng.integers(0, len(whole), 60):
        altered = bytearray(whole)
        altered[place] ^= 1 << rng.integers(8)
        (tmp_path / "b.onnx").write_bytes(altered)
        try:
            runtime.open_file(tmp_path / "b.onnx")
        except ValueError:
            noticed += 1
    assert noticed


def test_every_altered_byte_of_a_written_file_is_noticed_or_means_nothing(tmp_path):
    """Weights among them: nothing else tells that one is another number."""
    path, other = tmp_path / "a.onnx", tmp_path / "b.onnx"
    to_onnx(Three(nnx.Rngs(0)), path, METADATA)
    whole, rng = path.read_bytes(), np.random.default_rng(0)
    x = rng.normal(size=(1, 4, 4, 3)).astype(np.float32)
    file = runtime.open_file(path)
    expected, kernel = file.logits(x), onnx.numpy_helper.to_array(onnx.load(path).graph.initializer[0])
    weight = whole.index(kernel.tobytes())
    for place in (weight, weight + 3, *rng.integers(0, len(whole), 60)):
        altered = bytearray(whole)
        altered[place] ^= 1 << rng.integers(8)
        other.write_bytes(altered)
        try:
            found = runtime.open_file(other)
        except ValueError:
            continue
        assert place not in (weight, weight + 3)
        assert found.metadata == file.metadata
        np.testing.assert_array_equal(found.logits(x), expected)
    proto = onnx.load(path)
    proto.producer_name = "changed on purpose"
    onnx.save(proto, other)
    with pytest.raises(ValueError, match="take the entry sha256 out of its metadata_props"):
        runtime.open_file(other)
    kept = [entry for entry in proto.metadata_props if entry.key != "sha256"]
    del proto.metadata_props[:]
    proto.metadata_props.extend(kept)
    onnx.save(proto, other)
    np.testing.assert_array_equal(runtime.open_file(other).logits(x), expected)


def test_every_node_can_be_run_as_it_is_written(tmp_path):
    path = write(tmp_path / "a.onnx")
    images = np.random.default_rng(0).normal(size=(2, 4, 4, 3)).astype(np.float32)
    one, other = (runtime.open_onnx(path, optimized=flag).logits(images) for flag in (True, False))
    np.testing.assert_allclose(one, other, atol=1e-6)


@pytest.mark.parametrize("dtype", [np.uint8, np.int32, np.int64])
def test_pixel_values_are_refused_where_a_file_takes_normalised_images(tmp_path, dtype):
    """`prepare` is easily forgotten, and what the network makes of pixel values looks like an answer."""
    file = runtime.open_file(write(tmp_path / "a.onnx"))
    pixels = np.full((1, 4, 4, 3), 200, dtype)
    with pytest.raises(
        TypeError, match=r"dtype u?int\d+, as pixel values are; .*a.onnx takes \(pixels / 255 - me"
    ):
        file(pixels)
    file(pixels.astype(np.float16))
    with pytest.raises(TypeError, match=r"dtype bool; .* takes numbers"):
        file(pixels > 3)
    raw = runtime.open_file(write(tmp_path / "b.onnx", dataclasses.replace(METADATA, input="float32")))
    np.testing.assert_allclose(raw(pixels)["logits"], [[-200, 200]])


# -- biases of INT8


class Three(nnx.Module):
    """Two convolutions and a dense layer, with biases that matter."""

    def __init__(self, rngs):
        draw = {"bias_init": nnx.initializers.normal(0.3), "rngs": rngs}
        self.first = nnx.Conv(3, 8, (3, 3), **draw)
        self.second = nnx.Conv(8, 8, (3, 3), **draw)
        self.head = nnx.Linear(8, 2, **draw)

    def __call__(self, x):
        x = nnx.relu(self.second(nnx.relu(self.first(x))))
        return self.head(x.mean((1, 2)))


def units_of_biases(model):
    """Path -> the biases in units of input scale times kernel scale, computed by NumPy."""
    modules, found = dict(named_modules(model)), {}
    for path, quantizer in quantizers(model).items():
        low, high = np.asarray(quantizer.range[...], np.float64)
        kernel = np.asarray(modules[path].kernel[...], np.float64)
        scheme = quantizer.scheme
        of_kernel = abs(kernel).reshape(-1, kernel.shape[-1]).max(0) / scheme.weight_max
        of_input = (max(high, 0) - min(low, 0)) / scheme.levels
        found[path] = np.asarray(modules[path].bias[...], np.float64) / (of_input * of_kernel)
    return found


@pytest.mark.parametrize("bits", [8, 4])
def test_with_biases_of_whole_numbers_fused_kernels_compute_the_same(tmp_path, bits):
    images = np.random.default_rng(0).normal(size=(64, 4, 4, 3)).astype(np.float32)
    quantized = quantize(Three(nnx.Rngs(0)), images, bits=bits, keep_float=["head"])
    whole = with_integer_biases(quantized)
    units, rounded = units_of_biases(quantized), units_of_biases(whole)
    assert set(units) == {"first", "second"}
    for path in units:
        np.testing.assert_allclose(rounded[path], np.round(units[path]), rtol=1e-5, atol=1e-5)
        assert abs(units[path] - rounded[path]).max() > 0.2
    np.testing.assert_array_equal(whole.head.bias[...], quantized.head.bias[...])
    for name, model in (("before", quantized), ("after", whole)):
        to_onnx(model, tmp_path / f"{name}.onnx", METADATA)
    before, after = (compare_fused(tmp_path / f"{n}.onnx", images).relative for n in ("before", "after"))
    assert after < INT8_FILE
    assert before > INT8_BIASES_APART


@pytest.mark.parametrize("per", ["channel", "tensor"])
@pytest.mark.parametrize("factor", [1e-6, 1e-12, 1e-30])
def test_a_channel_that_is_nearly_dead_does_not_overflow_fused_kernels(tmp_path, factor, per):
    """As weight decay leaves it before a batch norm that shifts: its bias has far more than 32 bits in units
    of its products."""
    images = np.random.default_rng(0).normal(size=(16, 4, 4, 3)).astype(np.float32)
    model = Three(nnx.Rngs(0))
    dead = slice(None) if per == "tensor" else 1
    model.second.kernel.set_value(model.second.kernel[...].at[..., dead].multiply(factor))
    model.second.bias.set_value(model.second.bias[...].at[1].set(0.9))
    quantized = quantize(model, images, per=per)
    path = tmp_path / "int8.onnx"
    with pytest.raises(
        ValueError, match=r"second \(Conv\): conv.*units of the products.*with_integer_biases"
    ):
        to_onnx(quantized, path, METADATA)
    whole = with_integer_biases(quantized)
    to_onnx(whole, path, METADATA)
    assert quantizers(whole)["second"].least_scale > 0
    assert quantizers(whole)["first"].least_scale == 0
    kinds = {i.name: i.data_type for i in onnx.load(path).graph.initializer}
    assert kinds["second/bias_quantized"] == onnx.TensorProto.INT32
    expected = np.asarray(whole(images))
    for optimized in (True, False):
        found = runtime.open_onnx(path, optimized=optimized).logits(images)
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
    np.testing.assert_allclose(expected, quantized(images), rtol=0, atol=0.02)
