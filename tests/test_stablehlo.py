"""StableHLO files: the function that they hold, their metadata, and what happens to damaged ones."""

import dataclasses
import hashlib
import json
import os
import subprocess
import sys
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiers
from any_networks import ResNet18
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st
from jax import export
from networks import TINY_DETECTOR, randomised
from tolerances import PREPROCESSED, PREPROCESSED_APART

from repopt_jax import fuse, models, prepare
from repopt_jax.data.transforms import normalise
from repopt_jax.detection import decode
from repopt_jax.export import Metadata, read_stablehlo, runtime, to_onnx, to_stablehlo
from repopt_jax.nn.convolution import xla_convolutions
from repopt_jax.nn.rngs import counted_in_python
from repopt_jax.quantize import quantize
from repopt_jax.surgery.modules import named_modules

CLASSIFIER = Metadata(
    task="classify",
    name="tiny",
    class_names=("one", "two", "three"),
    image_size=8,
    channels=1,
    mean=(0.3,),
    std=(0.25,),
)
DETECTOR = Metadata(
    task="detect",
    name="found",
    class_names=("cat", "dog"),
    keypoint_names=("nose",),
    image_size=32,
    channels=3,
    mean=(0.3, 0.4, 0.5),
    std=(0.2, 0.25, 0.3),
    strides=TINY_DETECTOR.strides,
    score_threshold=0.001,
    max_detections=20,
)


def drawn(build, seed=0):
    """A network with random parameters and statistics, in evaluation mode."""

    def make():
        with counted_in_python(nnx.Rngs(0)) as rngs:
            return build(rngs)

    return randomised(nnx.eval_shape(make), seed, jnp.float32)


@pytest.fixture(scope="module")
def classifier():
    variant = models.VGGVariant("tiny", (1, 1, 1, 1), (4, 4, 4, 4, 4), (1, 1, 2, 1, 1))
    return fuse(drawn(lambda rngs: models.vgg(variant, num_classes=3, in_channels=1, rngs=rngs)))


@pytest.fixture(scope="module")
def detector():
    model = fuse(drawn(lambda rngs: models.FCOS(TINY_DETECTOR, num_classes=2, num_keypoints=1, rngs=rngs)))
    for _, layer in named_modules(model):  # boxes that do not fill the image, scores that differ
        if isinstance(layer, nnx.Conv):
            layer.kernel[...] /= np.sqrt(np.prod(layer.kernel.shape[:-1]))
    return model


def images_for(metadata, count, seed=0):
    shape = (count, metadata.image_size, metadata.image_size, metadata.channels)
    return np.random.default_rng(seed).integers(0, 256, shape).astype(np.uint8)


def run_here(model, images):
    """The outputs of a network, traced with XLA's convolutions."""
    with xla_convolutions():
        return jax.tree.map(np.asarray, jax.jit(lambda x: model(x))(images))


# Loads files where neither this library nor Flax can be imported, and saves what they compute.
ALONE = """
import importlib.abc, sys

class Refuse(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name.partition(".")[0] in ("repopt_jax", "flax"):
            raise ImportError(f"{name} is refused")

sys.meta_path.insert(0, Refuse())
for name in ("repopt_jax", "flax"):
    try:
        __import__(name)
    except ImportError:
        continue
    raise SystemExit(f"{name} can be imported")

import jax, numpy as np
from jax import export

folder = sys.argv[1]
for name in ("classifier", "detector"):
    with open(f"{folder}/{name}.stablehlo", "rb") as file:
        exported = export.deserialize(bytearray(file.read()))
    for count in (1, 3, 355):
        images = np.load(f"{folder}/{name}_{count}.npy")
        outputs = exported.call(images)
        np.savez(f"{folder}/{name}_{count}_out.npz", **outputs)
print(*exported.platforms)
"""


def test_a_process_without_this_library_computes_equal_bits(classifier, detector, tmp_path):
    to_stablehlo(classifier, tmp_path / "classifier.stablehlo", CLASSIFIER)
    to_stablehlo(detector, tmp_path / "detector.stablehlo", DETECTOR)
    expected = {}
    for name, model, metadata in (("classifier", classifier, CLASSIFIER), ("detector", detector, DETECTOR)):
        for count in (1, 3, 355):
            images = normalise(images_for(metadata, count), metadata.pixels)
            np.save(tmp_path / f"{name}_{count}.npy", images)
            outputs = run_here(model, images)
            expected[name, count] = outputs._asdict() if name == "detector" else {"logits": outputs}
    code = [sys.executable, "-c", ALONE, str(tmp_path)]
    # XLA divides a loop between as many threads as there are devices, and the ends of its parts are computed
    # by other instructions: without AVX-512 an exponential there may differ by its last bit.
    environment = {**os.environ, "JAX_NUM_CPU_DEVICES": str(jax.device_count())}
    alone = subprocess.run(code, capture_output=True, text=True, check=False, env=environment)
    assert alone.returncode == 0, alone.stderr
    assert alone.stdout.split() == ["cpu", "cuda", "tpu"]
    for (name, count), outputs in expected.items():
        with np.load(tmp_path / f"{name}_{count}_out.npz") as saved:
            found = dict(saved)
        assert sorted(found) == sorted(outputs)
        for output, value in outputs.items():
            np.testing.assert_array_equal(found[output], value, err_msg=f"{name} {output}")
        assert len(np.unique(outputs["logits" if name == "classifier" else "classes"])) > count


@pytest.mark.parametrize(
    ("layout", "given"),
    tiers.often(
        [(layout, given) for layout in ("NHWC", "NCHW") for given in ("uint8", "float32")],
        *(("NHWC", "uint8"), ("NCHW", "float32")),
    ),
)
def test_preprocessing_inside(detector, tmp_path, layout, given):
    path, images = tmp_path / "inside.stablehlo", images_for(DETECTOR, 3)
    expected = run_here(detector, normalise(images, DETECTOR.pixels))

    def difference(metadata):
        to_stablehlo(detector, path, metadata)
        file = runtime.open_file(path)
        assert file.metadata == metadata
        assert file.inputs[0].dtype == given
        outputs = file(images.astype(given))
        return max(abs(outputs[n] - y).max() / abs(y).max() for n, y in expected._asdict().items())

    metadata = dataclasses.replace(DETECTOR, input=given, layout=layout)
    assert difference(metadata) < PREPROCESSED
    assert difference(dataclasses.replace(metadata, mean=(0.4, 0.3, 0.5))) > PREPROCESSED_APART


def test_a_file_that_takes_bytes_rounds_other_pixel_values(classifier, tmp_path):
    to_stablehlo(classifier, tmp_path / "a.stablehlo", dataclasses.replace(CLASSIFIER, input="uint8"))
    file, images = runtime.open_file(tmp_path / "a.stablehlo"), images_for(CLASSIFIER, 2)
    expected = file(images)["logits"]
    np.testing.assert_array_equal(file(images + np.float32(0.25))["logits"], expected)
    assert (file(images + np.float32(3)) != expected).any()


def test_decoding_inside_is_decoding_outside(detector, tmp_path):
    images = normalise(images_for(DETECTOR, 3), DETECTOR.pixels)
    to_stablehlo(detector, tmp_path / "raw.stablehlo", DETECTOR)
    to_stablehlo(detector, tmp_path / "decoded.stablehlo", dataclasses.replace(DETECTOR, decoded=True))
    outside, inside = (
        runtime.open_file(tmp_path / f"{name}.stablehlo").detect(images) for name in ("raw", "decoded")
    )
    options = {"score_threshold": 0.001, "count": 20}
    expected = decode(run_here(detector, images), detector.locations(32), 32, **options)
    assert (expected.classes >= 0).sum() > 10
    for one, other, wanted in zip(inside, outside, expected, strict=True):
        np.testing.assert_allclose(one, wanted, rtol=PREPROCESSED, atol=PREPROCESSED)
        np.testing.assert_allclose(other, wanted, rtol=PREPROCESSED, atol=PREPROCESSED)
    assert inside.boxes.shape == (3, 20, 4)


def test_any_network_of_modules(tmp_path):
    # Batch norms in evaluation mode are operations like others.
    model = drawn(lambda rngs: ResNet18(rngs=rngs))
    metadata = Metadata(image_size=16, channels=3)
    to_stablehlo(model, tmp_path / "resnet.stablehlo", metadata)
    images = np.random.default_rng(0).normal(size=(5, 16, 16, 3)).astype(np.float32)
    file = runtime.open_file(tmp_path / "resnet.stablehlo")
    assert [str(port) for port in file.outputs] == ["output float32 (batch, 3)"]
    np.testing.assert_array_equal(file(images)["output"], run_here(model, images))
    with pytest.raises(ValueError, match="is no classifier: its task is 'not known'"):
        file.logits(images)
    with pytest.raises(ValueError, match=r"`images` is \(5, 8, 16, 3\); .* takes \(batch, 16, 16, 3\)"):
        file(images[:, :8])


def test_the_same_network_gives_the_same_file(classifier, tmp_path):
    for name in ("one", "two"):
        to_stablehlo(classifier, tmp_path / name, CLASSIFIER)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_the_metadata_can_be_read_by_any_program(classifier, tmp_path):
    to_stablehlo(classifier, tmp_path / "a.stablehlo", CLASSIFIER)
    with zipfile.ZipFile(tmp_path / "a.stablehlo") as archive:
        given = json.loads(archive.read("metadata.json"))
    assert json.loads(given["class_names"]) == ["one", "two", "three"]
    assert json.loads(given["mean"]) == [0.3]
    assert given["layout"] == "NHWC"


# -- what cannot be exported


def test_branches_and_training_mode_are_refused_with_their_paths(tmp_path):
    variant = models.VGGVariant("tiny", (1, 1, 1, 1), (4, 4, 4, 4, 4), (1, 1, 2, 1, 1))
    plain = models.vgg(variant, num_classes=3, in_channels=1, rngs=nnx.Rngs(0))
    plain.train()
    with pytest.raises(
        ValueError, match=r"stages/0/0/bn \(BatchNorm\), .* and 2 more are in training mode: .*model.eval()"
    ):
        to_stablehlo(plain, tmp_path / "a", CLASSIFIER)
    branched = prepare(plain, "repvgg", rngs=nnx.Rngs(0)).model
    branched.eval()
    with pytest.raises(
        ValueError, match=r"stages/0/0/conv \(Branched\), .* have branches: export `fuse\(model\)`"
    ):
        to_stablehlo(branched, tmp_path / "a", CLASSIFIER)
    dropped = nnx.Sequential(nnx.Linear(2, 2, rngs=nnx.Rngs(0)), nnx.Dropout(0.5, rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match=r"layers/1 \(Dropout\) are in training mode"):
        to_stablehlo(dropped, tmp_path / "a", CLASSIFIER)
    assert not list(tmp_path.iterdir())


class Counting(nnx.Module):
    """Takes the batch size as a number, unless it is told otherwise."""

    def __call__(self, x, size):
        return x.reshape(size(x), -1)


def test_how_a_network_is_called_and_what_it_takes_as_a_number(tmp_path):
    path, metadata = tmp_path / "a.stablehlo", Metadata(image_size=8, channels=3)
    with pytest.raises(ValueError, match=r"images alone \(missing .* 'size'\): give `call`"):
        to_stablehlo(Counting(), path, metadata)
    with pytest.raises(ValueError, match=r"write `x.shape\[0\]` in place of `len\(x\)`"):
        to_stablehlo(Counting(), path, metadata, call=lambda model, images: model(images, len))
    assert not path.exists()
    to_stablehlo(Counting(), path, metadata, call=lambda model, images: model(images, lambda x: x.shape[0]))
    x = np.random.default_rng(0).normal(size=(3, 8, 8, 3)).astype(np.float32)
    np.testing.assert_array_equal(runtime.open_file(path)(x)["output"], x.reshape(3, -1))


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"task": "segment"}, ["`task` is 'segment'; it must be '', 'classify' or 'detect'"]),
        ({"image_size": 0, "layout": "CHW"}, ["`image_size` is 0", "`layout` is 'CHW'"]),
        ({"input": "int8"}, ["one of normalised, uint8, float32"]),
        ({"class_names": ()}, ["`class_names` is (); it must be given"]),
        ({"strides": (8,)}, ["`strides`"]),
        ({"decoded": True}, ["`decoded`"]),
        (
            {"mean": (0.1, 0.2), "std": (1.0, 1.0), "channels": 3},
            [
                "`mean` is (0.1, 0.2); it must be one number, or one for each of 3 channels, and `std` is",
                "(1.0, 1.0); it must be positive, one number, or one for each of 3",
            ],
        ),
        ({"std": (0.0,), "image_size": 0}, ["`image_size` is 0", "`std` is (0.0,); it must be positive"]),
        ({"resize": 4}, ["`resize` is 4; it must be None or at least `image_size`, 8"]),
        (
            {"score_threshold": 7, "iou_threshold": -1.0, "max_detections": -1},
            ["`score_threshold` is 7; it must be from 0 to 1", "`iou_threshold`", "`max_detections` is -1"],
        ),
        ({"class_names": "abc"}, ["`class_names` is 'abc'; it must hold texts"]),
        (
            {"image_size": "8", "mean": None, "resize": 8.5, "layout": "CHW"},
            [
                "`image_size` is '8'; it must be a whole number",
                "`resize` is 8.5; it must be a whole number or None",
                "`mean` is None; it must hold finite numbers",
                "`layout` is 'CHW'",
            ],
        ),
        (
            {"decoded": 1, "channels": True},
            ["`channels` is True; it must be a whole number", "`decoded` is 1"],
        ),
    ],
)
def test_metadata_that_no_file_has(changes, parts):
    with pytest.raises(ValueError) as caught:
        dataclasses.replace(CLASSIFIER, **changes)
    for part in parts:
        assert part in str(caught.value)


def test_metadata_take_one_number_lists_and_numbers_of_numpy():
    given = {"mean": 0.5, "std": [0.25, 0.25, 0.5], "image_size": np.int64(8), "class_names": ["a", "b"]}
    metadata = Metadata(task="classify", channels=3, **given)
    expected = Metadata(
        task="classify", channels=3, mean=(0.5,), std=(0.25, 0.25, 0.5), image_size=8, class_names=("a", "b")
    )
    assert metadata == expected
    assert dataclasses.replace(expected, mean=np.asarray([0.5])) == expected
    assert Metadata.from_strings(metadata.to_strings()) == expected


@pytest.mark.parametrize(
    ("task", "changes", "part"),
    [
        (
            "classify",
            {"class_names": ("a", "b")},
            "`metadata.class_names` has 2 names, and the logits are (b, 3)",
        ),
        (
            "classify",
            {"task": "detect", "strides": (8,)},
            "`metadata.task` is 'detect', and the network gives output",
        ),
        (
            "detect",
            {"task": "classify", "strides": ()},
            "`metadata.task` is 'classify', and the network gives classes",
        ),
        ("detect", {"class_names": ("a",)}, "`metadata.class_names` has 1 names, and `classes` is (b, 5, 2)"),
        (
            "detect",
            {"keypoint_names": ("a", "b")},
            "`metadata.keypoint_names` has 2 names, and `keypoints` is (b,",
        ),
        (
            "detect",
            {"strides": (8,)},
            "`metadata.strides`, (8,), stand for 16 locations, and the outputs have",
        ),
    ],
)
def test_metadata_of_another_network_are_refused(classifier, detector, tmp_path, task, changes, part):
    model, metadata = {"classify": (classifier, CLASSIFIER), "detect": (detector, DETECTOR)}[task]
    changed = dataclasses.replace(metadata, **changes)
    for write, name in ((to_stablehlo, "a.stablehlo"), (to_onnx, "a.onnx")):
        with pytest.raises(ValueError, match="do not fit the network") as caught:
            write(model, tmp_path / name, changed)
        assert part in str(caught.value)
    assert not list(tmp_path.iterdir())


class Giving(nnx.Module):
    """Gives what `function` makes of (batch, 4) numbers."""

    def __init__(self, function):
        self.function = nnx.static(function)

    def __call__(self, x):
        return self.function(x.mean((1, 2)))


@pytest.mark.parametrize("ending", ["onnx", "stablehlo"])
@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda y: (y, None), {"output_0": 1}),
        (lambda y: (y, (2 * y, [3 * y, None])), {"output_0": 1, "output_1_0": 2, "output_1_1_0": 3}),
        (lambda y: {"b": y, "a": (2 * y, 3 * y)}, {"b": 1, "a_0": 2, "a_1": 3}),
        (lambda y: {"a": {"b": y}, "constant": 2 * y}, {"a_b": 1, "constant": 2}),
    ],
    ids=["None", "nested", "in a dict", "name of a constant"],
)
def test_outputs_inside_others_and_none(tmp_path, ending, function, expected):
    path, metadata = tmp_path / f"a.{ending}", Metadata(image_size=2, channels=4)
    {"onnx": to_onnx, "stablehlo": to_stablehlo}[ending](Giving(function), path, metadata)
    x = np.random.default_rng(0).normal(size=(3, 2, 2, 4)).astype(np.float32)
    found = runtime.open_file(path)(x)
    assert set(found) == set(expected)
    for name, factor in expected.items():
        np.testing.assert_allclose(found[name], factor * x.mean((1, 2)), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("function", "part"),
    [
        (lambda y: {"images": y}, "an output has the name 'images', which is the input's"),
        (lambda y: {0: y, "a": {"": y}}, "0 of the outputs is no name: give it a text; '' of a is no name"),
        (lambda y: {"a": {"b": y}, "a_b": y}, "two outputs have the name 'a_b'"),
        (lambda y: (y, "a"), "output_1 is of type str, which is no array"),
        (lambda y: None, "it has none"),
    ],
)
def test_outputs_that_cannot_be_in_a_file(tmp_path, function, part):
    for write, name in ((to_stablehlo, "a.stablehlo"), (to_onnx, "a.onnx")):
        with pytest.raises(ValueError, match="the outputs of the network cannot be in a file: ") as caught:
            write(Giving(function), tmp_path / name, Metadata(image_size=2, channels=4))
        assert part in str(caught.value)
    assert not list(tmp_path.iterdir())


# -- files that are not whole, or not ours


@given(st.sampled_from([CLASSIFIER, DETECTOR]), st.data())
def test_metadata_survive_their_strings(metadata, data):
    names = data.draw(st.lists(st.text(min_size=1), min_size=1, max_size=3))
    mean = data.draw(st.floats(-10, 10))
    changed = dataclasses.replace(metadata, class_names=tuple(names), mean=(mean,), name=names[0])
    assert Metadata.from_strings(changed.to_strings()) == changed


@given(st.data())
def test_metadata_of_other_kinds_are_refused(data):
    given = CLASSIFIER.to_strings()
    name = data.draw(st.sampled_from(sorted(given.keys() - {"library"})))
    given[name] = data.draw(
        st.sampled_from(['"a"', "[[1]]", "null", "{}", "1e999", "[", "[" * 100_000, "true"])
    )
    try:
        read = Metadata.from_strings(given)
    except ValueError:
        return
    assert Metadata.from_strings(read.to_strings()) == read


@pytest.fixture(scope="module")
def stored(classifier, tmp_path_factory):
    path = tmp_path_factory.mktemp("stored") / "a.stablehlo"
    to_stablehlo(classifier, path, CLASSIFIER)
    return path


def test_every_altered_byte_is_noticed_or_means_nothing(stored, tmp_path_factory):
    whole, rng = stored.read_bytes(), np.random.default_rng(0)
    path, program = tmp_path_factory.mktemp("altered") / "a.stablehlo", read_stablehlo(stored).exported
    noticed = 0
    # The archive at the end is short: every byte of it; of the program some.
    end = len(whole) - whole.rindex(b"PK\x03\x04")
    places = [*rng.integers(0, len(whole) - end, 100), *range(len(whole) - end, len(whole))]
    for place in places:
        altered = bytearray(whole)
        altered[place] ^= 1 << rng.integers(8)
        path.write_bytes(altered)
        try:
            read = read_stablehlo(path)
        except ValueError:
            noticed += 1
        else:
            assert read.metadata == CLASSIFIER
            assert read.exported.mlir_module_serialized == program.mlir_module_serialized
    assert noticed > 0.8 * len(places)


@pytest.mark.parametrize("kept", [0, 1, 100, 5000, -1, -100])
def test_a_file_that_is_cut_off(stored, tmp_path, kept):
    (tmp_path / "a.stablehlo").write_bytes(stored.read_bytes()[:kept])
    with pytest.raises(ValueError, match="is no StableHLO file of this library, or a damaged one"):
        runtime.open_file(tmp_path / "a.stablehlo")


def test_foreign_files(classifier, tmp_path):
    path = tmp_path / "a.stablehlo"
    exported = export.export(jax.jit(lambda x: x + 1))(jnp.zeros(3))
    path.write_bytes(exported.serialize())
    with pytest.raises(ValueError, match="is no StableHLO file of this library"):
        runtime.open_file(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("metadata.json", json.dumps({"program_bytes": 10, "program_sha256": ""}))
    with pytest.raises(ValueError, match="is damaged: its program is not the one that was written"):
        runtime.open_file(path)
    for content, part in (
        ({"program_bytes": 10}, "it lacks program_sha256"),
        ({"program_bytes": 10, "program_sha256": 3, "mean": [0]}, "of another kind are program_sha256, mean"),
    ):
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("metadata.json", json.dumps(content))
        with pytest.raises(ValueError, match=f"the metadata at its end cannot be read \\({part}"):
            runtime.open_file(path)
    program = exported.serialize()
    checksum = hashlib.sha256(program).hexdigest()
    path.write_bytes(program)
    with zipfile.ZipFile(path, "a") as archive:
        content = {"program_bytes": len(program), "program_sha256": checksum, "library": "repopt_jax 1"}
        archive.writestr("metadata.json", json.dumps(content))
    with pytest.raises(ValueError, match=r"cannot be used: its metadata lack channels, .*; export it again"):
        runtime.open_file(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("metadata.json", "[" * 100_000)
    with pytest.raises(ValueError, match="is no StableHLO file of this library"):
        runtime.open_file(path)
    with pytest.raises(ValueError, match=r"does not end in .onnx or .stablehlo"):
        runtime.open_file(tmp_path / "a.pth")
    with pytest.raises(FileNotFoundError, match="no file"):
        runtime.open_file(tmp_path / "none.stablehlo")


def test_a_quantized_network_keeps_its_rounding(classifier, tmp_path):
    images = normalise(images_for(CLASSIFIER, 20), CLASSIFIER.pixels)
    quantized = quantize(classifier, images, bits=4)
    to_stablehlo(quantized, tmp_path / "a.stablehlo", CLASSIFIER)
    found = runtime.open_file(tmp_path / "a.stablehlo").logits(images)
    expected = run_here(quantized, images)
    np.testing.assert_allclose(found, expected, rtol=PREPROCESSED, atol=PREPROCESSED)
    assert abs(expected - run_here(classifier, images)).max() > PREPROCESSED_APART
