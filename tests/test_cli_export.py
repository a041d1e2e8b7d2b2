"""The commands that make and use files: `repopt export`, and `eval` and `predict` of what it wrote."""

import collections
import html
import json
import re
import shutil
import sys

import numpy as np
import pytest
import tiers
from PIL import Image
from test_cli import refused, write_images
from tolerances import INT8_FILE, INT8_FILE_APART

from repopt_jax import data, deploy, models, train
from repopt_jax.cli.main import main
from repopt_jax.data.transforms import normalise
from repopt_jax.deploy import evaluate_file, export
from repopt_jax.export import runtime
from repopt_jax.models import registry
from repopt_jax.quantize import Scheme, quantizers

pytestmark = pytest.mark.once

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

CLASSIFIER = models.VGGVariant("export-tiny", (1, 1, 1, 1), (4, 4, 4, 4, 4), (1, 1, 2, 1, 1))
DETECTOR = models.DetectorVariant(
    "export-found",
    models.BackboneVariant("tiny", (4, 4, 6, 6, 8), (0, 0, 0, 1)),
    channels=6,
    maps=2,
    levels=2,
    tower=1,
)


def classifier_config(folder) -> train.Config:
    return train.Config(
        name="pets",
        epochs=3,
        batch_size=8,
        eval_batch_size=8,
        model=train.ModelConfig(name="export-tiny", mode="repvgg"),
        data=train.DataConfig(
            source="folder", data_dir=str(folder), image_size=8, resize=9, mean=(0.4,), std=(0.2,)
        ),
        optim=train.OptimConfig(learning_rate=0.05),
    )


def detector_config() -> train.Config:
    return train.Config(
        name="found",
        task="detect",
        epochs=1,
        batch_size=4,
        eval_batch_size=4,
        model=train.ModelConfig(name="fcos-export", activation="relu6"),
        data=train.DataConfig(source="scenes", image_size=32, scenes=(8, 6), mean=(0.3,), std=(0.25,)),
        optim=train.OptimConfig(learning_rate=0.01, clip_norm=5.0),
    )


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A classifier's run in pets/, with its images in data/, and a detector's in found/; both deployed."""
    models.register(models.Entry("export-tiny", models.vgg, CLASSIFIER))
    models.register(models.Entry("fcos-export", models.FCOS, DETECTOR, task="detect"))
    folder = tmp_path_factory.mktemp("runs")
    images = write_images(folder / "data")
    train.run(classifier_config(images), folder / "pets", progress=False)
    train.run(detector_config(), folder / "found", progress=False)
    for name in ("pets", "found"):
        deploy.deploy(folder / name, folder / f"{name}-deployed")
    yield folder
    for name in ("export-tiny", "fcos-export"):
        registry.NETWORKS.pop(name, None)


def run(capsys, *arguments):
    """The lines that a command prints."""
    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) == 0, capsys.readouterr().err
    return capsys.readouterr().out.splitlines()


@pytest.mark.parametrize(
    "source",
    tiers.often(["pets", "pets-deployed", "found", "found-deployed"], "pets", "pets-deployed", "found"),
)
def test_export_says_what_the_file_takes_and_how_far_it_is_from_the_network(capsys, runs, source, tmp_path):
    out = tmp_path / "network.stablehlo"
    said = run(capsys, "export", f"--run={runs / source}", "--format=stablehlo", f"--out={out}")
    side = 8 if source.startswith("pets") else 32
    assert said[0].startswith(
        f"input:  images float32 (batch, {side}, {side}, 1); (pixels / 255 - mean) / std"
    )
    assert said[-3:] == [
        f"one image: {said[-3].split()[2]} ms, here and now",
        f"File: {out}, {out.stat().st_size:,} bytes",
        f"Report: {out}.html",
    ]
    found = re.search(
        r"largest difference .*: (\S+) \((\S+) of the largest\), the same class for (\S+)%", said[2]
    )
    assert found
    assert float(found[2]) < 1e-5
    assert float(found[3]) == 100
    network = deploy.load_plain(runs / source)
    metadata = runtime.open_file(out).metadata
    assert metadata.class_names == network.info.class_names
    assert (metadata.mean, metadata.std) == (tuple(network.config.data.mean), tuple(network.config.data.std))
    assert metadata.resize == network.config.data.resize


EVALUATED = [
    pytest.param(format, name, options, id=f"{format}-{name}-options{number}")
    for format in ("stablehlo", "onnx")
    for name in ("pets", "found")
    for number, options in enumerate([[], ["--preprocess"], ["--preprocess=float32", "--layout=NCHW"]])
]


# Each format, each task and each way of preprocessing; StableHLO files without options are evaluated below.
@pytest.mark.parametrize(
    ("format", "name", "options"),
    tiers.often(
        EVALUATED,
        *("stablehlo-pets-options2", "stablehlo-found-options1", "onnx-pets-options0", "onnx-found-options2"),
    ),
)
def test_eval_of_a_file_is_eval_of_the_network(capsys, runs, format, name, options, tmp_path):
    out = tmp_path / f"network.{format}"
    if name == "found" and format == "stablehlo":
        options = [*options, "--decode"]
    if format == "onnx" and "--layout=NCHW" in options:
        options = [*options[:-1], "--layout=NHWC"]
    run(capsys, "export", f"--run={runs / name}", f"--format={format}", f"--out={out}", *options)
    (of_run,) = run(capsys, "eval", f"--run={runs / name}")
    (of_file,) = run(capsys, "eval", f"--model={out}", f"--run={runs / name}")
    assert of_file.partition(";")[0] == of_run.partition(";")[0]
    assert str(out) in of_file


def test_eval_of_a_file_on_a_folder(capsys, runs, tmp_path):
    out = tmp_path / "network.stablehlo"
    export(runs / "pets", out, format="stablehlo")
    (of_run,) = run(capsys, "eval", f"--run={runs / 'pets'}")
    (of_file,) = run(capsys, "eval", f"--model={out}", f"--data-dir={runs / 'data'}")
    assert of_file.partition(";")[0] == of_run.partition(";")[0]
    refused(capsys, ["eval", f"--model={out}"], "give `data_dir`")
    refused(
        capsys, ["eval", f"--model={out}", f"--run={runs / 'found'}"], "for the task 'classify'", "'detect'"
    )
    other = write_images(tmp_path / "other", classes=("cat", "cow"))
    refused(capsys, ["eval", f"--model={out}", f"--data-dir={other}"], "cat, dog", "cat, cow")


def test_the_wrong_preprocessing_is_seen(runs, tmp_path):
    """What the file says is what is done: other numbers give another loss."""
    export(runs / "pets", tmp_path / "a.stablehlo", format="stablehlo")
    right = evaluate_file(tmp_path / "a.stablehlo", run_dir=runs / "pets")[1]
    assert right["loss"] == pytest.approx(deploy.evaluate(deploy.load_plain(runs / "pets"))["loss"], rel=1e-5)
    config = json.loads((runs / "pets" / "config.json").read_text())
    config["data"]["mean"] = [0.1]
    shutil.copytree(runs / "pets", tmp_path / "pets")
    (tmp_path / "pets" / "config.json").write_text(json.dumps(config))
    export(tmp_path / "pets", tmp_path / "b.stablehlo", format="stablehlo")
    wrong = evaluate_file(tmp_path / "b.stablehlo", run_dir=runs / "pets")[1]
    assert abs(wrong["loss"] - right["loss"]) > 0.01


PREDICTED = [
    pytest.param(format, options, id=f"{format}-options{number}")
    for format in ("stablehlo", "onnx")
    for number, options in enumerate([[], ["--preprocess"], ["--layout=NCHW"]])
]


@pytest.mark.parametrize(("format", "options"), tiers.often(PREDICTED, "stablehlo-options2", "onnx-options1"))
def test_predict_classes(capsys, runs, format, options, tmp_path):
    out, picture = tmp_path / f"network.{format}", tmp_path / "picture.png"
    pixels = np.random.default_rng(0).integers(0, 256, (20, 13)).astype(np.uint8)
    Image.fromarray(pixels).save(picture)
    of_run = run(capsys, "predict", picture, f"--run={runs / 'pets'}")
    run(capsys, "export", f"--run={runs / 'pets'}", f"--format={format}", f"--out={out}", *options)
    assert run(capsys, "predict", picture, f"--model={out}") == of_run
    trained = deploy.load_any(runs / "pets")
    transform = data.Transform(8, resize=9, mean=(0.4,), std=(0.2,))
    fitted = data.transforms.fit(pixels[..., None], 8, 9)
    logits = np.asarray(trained.model(normalise(fitted[None], transform)))[0].astype(float)
    shares = np.exp(logits) / np.exp(logits).sum()
    order = np.argsort(-shares)
    assert of_run == [f"{('cat', 'dog')[i]}  {shares[i]:.2%}" for i in order]
    refused(capsys, ["predict", picture, f"--model={out}", "--threshold=0.5"], "are for detectors", code=2)


@pytest.mark.parametrize(
    ("format", "options"),
    [
        pytest.param("stablehlo", [], marks=pytest.mark.long),
        ("stablehlo", ["--decode"]),
        pytest.param("stablehlo", ["--preprocess", "--layout=NCHW"], marks=pytest.mark.long),
        pytest.param("onnx", [], marks=pytest.mark.long),
        ("onnx", ["--preprocess", "--layout=NHWC"]),
    ],
)
def test_predict_objects(capsys, runs, format, options, tmp_path):
    out, picture = tmp_path / f"network.{format}", tmp_path / "picture.png"
    Image.fromarray(data.open_scenes(3, num_train=1, num_eval=1, size=50).eval[0]["image"][..., 0]).save(
        picture
    )
    drawn = [f"--out={tmp_path / 'drawn.png'}", "--threshold=0.05"]
    of_run = run(capsys, "predict", picture, f"--run={runs / 'found'}", *drawn)
    expected = (tmp_path / "drawn.png").read_bytes()
    (tmp_path / "drawn.png").unlink()
    run(capsys, "export", f"--run={runs / 'found'}", f"--format={format}", f"--out={out}", *options)
    assert run(capsys, "predict", picture, f"--model={out}", *drawn) == of_run
    assert (tmp_path / "drawn.png").read_bytes() == expected
    assert len(of_run) > 1


@pytest.mark.parametrize(("name", "weights"), [("pets", "full"), ("found-deployed", "")])
def test_int8_is_measured_beside_float32(capsys, runs, name, weights, tmp_path):
    out = tmp_path / "int8.onnx"
    options = [f"--weights={weights}"] if weights else []
    said = run(capsys, "export", f"--run={runs / name}", "--format=onnx-int8", f"--out={out}", *options)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["int8.onnx", "int8.onnx.html"]
    text = "\n".join(said)
    assert f"Ranges are of {16 if name == 'pets' else 8} training images" in text
    for part in ("quantized network's on", "onnxruntime's fused integer kernels differ", " ms in INT8"):
        assert part in text
    metric = "test accuracy" if name == "pets" else "AP50"
    float32, int8 = (line for line in said if line.startswith(("float32:", "INT8:")))
    assert metric in float32
    assert metric in int8
    (evaluated,) = run(capsys, "eval", f"--model={out}", f"--run={runs / name}")
    assert evaluated.partition(" (")[0] in int8
    kept = "in float32: head/boxes, head/centerness, head/classes, head/keypoints"
    assert (kept in said) == (name == "found-deployed")
    model = onnx.load(out)
    stored = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    kernels = [array for array in stored.values() if array.dtype == np.int8 and array.ndim > 1]
    assert len(kernels) > 4
    largest = max(abs(kernel.astype(int)).max() for kernel in kernels)
    assert largest == (127 if weights == "full" else 63)


@pytest.mark.parametrize("command", ["export", "quantize"])
def test_short_scales_reach_the_file(capsys, runs, command, tmp_path):
    source, out, option = runs / "pets", tmp_path / "int8.onnx", "--scale-bits=3"
    if command == "quantize":
        source = tmp_path / "quantized"
        run(capsys, "quantize", f"--run={runs / 'pets'}", f"--out={source}", "--images=16", option)
        assert quantizers(deploy.load_any(source).model)["head"].scheme == Scheme(scale_bits=3)
        option = ""
    run(capsys, "export", f"--run={source}", "--format=onnx-int8", f"--out={out}", *filter(None, [option]))
    stored = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in onnx.load(out).graph.initializer}
    scales = [array for name, array in stored.items() if name.endswith(("input_scale", "kernel_scale"))]
    assert len(scales) > 8
    for scale in scales:
        digits = np.ldexp(np.frexp(scale)[0], 3)
        np.testing.assert_array_equal(digits, np.round(digits))


@pytest.mark.parametrize("bits", [8, 4])
def test_a_quantized_folder_is_exported_as_it_is(capsys, runs, bits, tmp_path):
    folder, out = tmp_path / "quantized", tmp_path / "int8.onnx"
    run(capsys, "quantize", f"--run={runs / 'pets'}", f"--out={folder}", f"--bits={bits}", "--images=16")
    said = run(capsys, "export", f"--run={folder}", "--format=onnx-int8", f"--out={out}")
    assert not [line for line in said if line.startswith("Ranges")]
    (of_network,), (of_file,) = (
        run(capsys, "eval", *options)
        for options in ([f"--run={folder}"], [f"--model={out}", f"--run={folder}"])
    )
    assert of_file.partition(" (")[0] == of_network.partition(" (")[0]
    difference = re.search(r"quantized network's on .*\((\S+) of the largest\)", "\n".join(said))
    assert difference
    # The file is the quantized network; that is not the network in floating point, which 4 bits change.
    assert float(difference[1]) < INT8_FILE
    damage = re.search(r"INT8: .*\((\S+) of the largest\)", "\n".join(said))
    assert damage
    assert bits == 8 or float(damage[1]) > INT8_FILE_APART
    other = tmp_path / "other.onnx"
    refused(
        capsys,
        ["export", f"--run={folder}", "--format=onnx-int8", f"--out={other}", "--weights=full"],
        "quantized already",
    )
    assert not other.exists()


# -- the page beside a file


def cells(page):
    """Every row of a page's tables."""
    rows = re.findall(r"<tr>(.*?)</tr>", page, re.DOTALL)
    return [[re.sub("<.*?>", "", cell) for cell in re.findall(r"<td>(.*?)</td>", row)] for row in rows]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("pets", ["--format=stablehlo"]),
        ("pets-deployed", ["--format=onnx-int8"]),
        pytest.param("found", ["--format=stablehlo", "--decode"], marks=pytest.mark.long),
        ("found", ["--format=onnx"]),
    ],
)
def test_the_page_has_what_was_printed_and_what_is_in_the_file(
    capsys, runs, tmp_path, monkeypatch, name, options
):
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # it needs none
    out = tmp_path / f"a<b.{'stablehlo' if 'stablehlo' in options[0] else 'onnx'}"
    said = run(capsys, "export", f"--run={runs / name}", *options, f"--out={out}")
    page = (tmp_path / f"{out.name}.html").read_text()
    assert "<b." not in page  # names are text, not markup
    for line in said[:-2]:
        assert html.escape(line) in page
    assert html.escape(f"--out={out}'") in page  # the command
    assert "http" not in page.replace("http-equiv", "")
    rows = cells(page)
    operations = runtime.count_operations(out)
    assert [[name, f"{number:,}"] for name, number in operations.items()] == rows[-len(operations) :]
    if "onnx" in options[0]:
        counted = collections.Counter(node.op_type for node in onnx.load(out).graph.node)
        assert operations == counted
        assert operations["Conv"] >= 5
    else:
        assert operations["convolution"] >= 5
    assert ["size", f"{out.stat().st_size:,} bytes"] in rows
    between = [row[0] for row in rows if row and row[0].startswith("the file and ")]
    assert between == [f"the file and the {'quantized ' if 'int8' in options[0] else ''}network"]
    if "int8" in options[0]:
        printed = "\n".join(said)
        for kind in ("float32", "INT8"):
            accuracy = re.search(rf"^{kind}: +test accuracy ([\d.]+)%", printed, re.MULTILINE)
            assert accuracy
            (row,) = (row for row in rows if row[:1] == [kind])
            assert row[1] == accuracy[1]


def test_operations_that_are_counted_are_the_networks(runs, tmp_path):
    """A VGG of five blocks: five convolutions, a ReLU after each, and a dense layer."""
    export(runs / "pets", tmp_path / "a.onnx", format="onnx", layout="NCHW")
    found = runtime.count_operations(tmp_path / "a.onnx")
    assert (found["Conv"], found["Relu"], found["Gemm"]) == (5, 5, 1)
    export(runs / "pets", tmp_path / "a.stablehlo", format="stablehlo")
    found = runtime.count_operations(tmp_path / "a.stablehlo")
    assert (found["convolution"], found["maximum"], found["dot_general"]) == (5, 5, 1)
    assert list(found.values()) == sorted(found.values(), reverse=True)


# -- mistakes


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (["--format=tflite", "--out=a.tflite"], ["`format` is 'tflite'", "stablehlo, onnx, onnx-int8"]),
        (["--format=onnx", "--out=a.stablehlo"], ["a.stablehlo", "files of format onnx end in .onnx"]),
        (["--format=stablehlo", "--out=a"], ["end in .stablehlo"]),
        (["--format=stablehlo", "--out=a.stablehlo", "--layout=HWC"], ["`layout` is 'HWC'", "NHWC, NCHW"]),
        (
            ["--format=stablehlo", "--out=a.stablehlo", "--preprocess=int8"],
            ["`preprocess`", "uint8, float32"],
        ),
        (["--format=onnx-int8", "--out=a.onnx", "--weights=half"], ["`weights` is 'half'", "reduced, full"]),
        (["--format=onnx", "--out=a.onnx", "--weights=full"], ["`weights` is for the format onnx-int8"]),
        (["--format=onnx", "--out=a.onnx", "--scale-bits=4"], ["`scale_bits` is for the format onnx-int8"]),
        (["--format=onnx-int8", "--out=a.onnx", "--scale-bits=0"], ["`scale_bits` is 0", "from 1 to 24"]),
        (["--format=onnx", "--out=a.onnx", "--decode"], ["`decode` is for the format stablehlo"]),
        (
            ["--format=stablehlo", "--out=a.stablehlo", "--decode"],
            ["`decode` is for a detector", "holds a classifier: leave it out"],
        ),
        (["--format=stablehlo", "--out=none/a.stablehlo"], ["no folder none"]),
        (["--format=stablehlo", "--out=a.stablehlo", "--checkpoint=9999"], ["9999"]),
    ],
)
def test_export_refuses_in_one_sentence(capsys, runs, tmp_path, monkeypatch, options, parts):
    monkeypatch.chdir(tmp_path)
    refused(capsys, ["export", f"--run={runs / 'pets'}", *options], *parts)
    assert not list(tmp_path.iterdir())


def test_export_does_not_overwrite(capsys, runs, tmp_path):
    (tmp_path / "a.stablehlo").write_text("mine")
    options = ["--format=stablehlo", f"--out={tmp_path / 'a.stablehlo'}"]
    refused(capsys, ["export", f"--run={runs / 'pets'}", *options], "exists: it is not overwritten")
    assert (tmp_path / "a.stablehlo").read_text() == "mine"
    (tmp_path / "c.stablehlo.html").write_text("mine")
    options = ["--format=stablehlo", f"--out={tmp_path / 'c.stablehlo'}"]
    refused(capsys, ["export", f"--run={runs / 'pets'}", *options], "c.stablehlo.html exists")
    assert not (tmp_path / "c.stablehlo").exists()
    refused(
        capsys,
        ["export", f"--run={tmp_path}", "--format=stablehlo", f"--out={tmp_path / 'b.stablehlo'}"],
        "no run",
    )


def test_images_to_calibrate_on_that_do_not_fit(capsys, runs, tmp_path):
    arguments = ["export", f"--run={runs / 'pets'}", "--format=onnx-int8", f"--out={tmp_path / 'a.onnx'}"]
    (tmp_path / "empty").mkdir()
    refused(capsys, [*arguments, f"--data-dir={tmp_path / 'none'}"], "none is not a folder")
    refused(capsys, [*arguments, f"--data-dir={tmp_path / 'empty'}"], "has no folder train")
    for split in ("train", "test"):
        for name in ("cat", "dog"):
            (tmp_path / "empty" / split / name).mkdir(parents=True)
    refused(capsys, [*arguments, f"--data-dir={tmp_path / 'empty'}"], "JPEG, PNG, WebP or BMP")
    coloured = tmp_path / "coloured"
    shutil.copytree(runs / "data", coloured)
    for path in coloured.rglob("*.png"):
        Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(path)
    refused(capsys, [*arguments, f"--data-dir={coloured}"], "images of 1 channels, and the data have 3")
    assert not (tmp_path / "a.onnx").exists()
    larger = tmp_path / "larger"  # are resized, as any image is
    shutil.copytree(runs / "data", larger)
    for path in larger.rglob("*.png"):
        with Image.open(path) as image:
            image.resize((31, 20)).save(path)
    run(capsys, *arguments, f"--data-dir={larger}")


@pytest.mark.parametrize("command", ["eval", "predict"])
def test_files_that_cannot_be_used(capsys, runs, tmp_path, command):
    picture = tmp_path / "picture.png"
    Image.fromarray(np.zeros((9, 9), np.uint8)).save(picture)
    arguments = [command, *([str(picture)] if command == "predict" else [f"--data-dir={runs / 'data'}"])]
    refused(capsys, [*arguments, f"--model={tmp_path / 'none.onnx'}"], "no file", "none.onnx")
    refused(capsys, [*arguments, f"--model={picture}"], "does not end in .onnx or .stablehlo")
    for name in ("a.onnx", "a.stablehlo"):
        (tmp_path / name).write_bytes(b"\x08\x07 not a model")
        refused(capsys, [*arguments, f"--model={tmp_path / name}"], name, "or a damaged one")
    refused(capsys, arguments, "one of --run", "--model", code=2)


@pytest.mark.parametrize(
    ("package", "format"), [("flatbuffers", "stablehlo"), ("onnx", "onnx"), ("onnxruntime", "onnx-int8")]
)
def test_missing_packages(capsys, runs, tmp_path, monkeypatch, package, format):
    monkeypatch.setitem(sys.modules, package, None)
    suffix = "stablehlo" if format == "stablehlo" else "onnx"
    out = tmp_path / f"a.{suffix}"
    sentence = f"{package}, which is not installed: pip install 'repopt_jax[export]'"
    refused(capsys, ["export", f"--run={runs / 'pets'}", f"--format={format}", f"--out={out}"], sentence)
    if package != "onnx":  # to run a file needs less than to write it
        out.write_bytes(b"")
        refused(capsys, ["eval", f"--model={out}", f"--data-dir={runs / 'data'}"], sentence)
