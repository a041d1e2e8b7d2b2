"""Quantizing a run: what is saved, measured and said, by the function and by `repopt quantize`."""

import contextlib
import dataclasses
import io
import json
import shutil

import numpy as np
import programs
import pytest
from test_cli import refused
from training import tiny_config

from repopt_jax import train
from repopt_jax.cli.main import main
from repopt_jax.deploy import deploy, evaluate, export, load_any, load_plain
from repopt_jax.deploy.quantization import (
    Options,
    Quantized,
    aware_config,
    load_quantized,
    quantize_run,
    weight_bytes,
)
from repopt_jax.quantize import find_quantizable, quantizers
from repopt_jax.report import quantization
from repopt_jax.report.figures import png

pytestmark = pytest.mark.once

LAYERS = [f"stages/{stage}/{block}/conv" for stage, block in ((0, 0), (1, 0), (1, 1), (2, 0), (3, 0), (4, 0))]

OPTIONS = Options(bits=4, weight_bits=6, per="tensor", keep_float=2, images=24)


def quantized(*args) -> Quantized:
    """`quantize_run` without a training that could be stopped."""
    done = quantize_run(*args)
    assert isinstance(done, Quantized)
    return done


@pytest.fixture(scope="module")
def run(tmp_path_factory, digits):
    """A finished run of RepVGG, and its deployment beside it."""
    out = tmp_path_factory.mktemp("runs") / "repvgg"
    train.run(tiny_config("repvgg", digits), out, progress=False)
    deploy(out, out.parent / "deployed")
    return out


@pytest.fixture(scope="module")
def done(run):
    return quantized(run, run.parent / "quantized", OPTIONS)


@pytest.fixture(scope="module")
def by_command(run):
    """The arguments of `repopt quantize`, the folder that it made, and what it printed."""
    out, printed = run.parent / "by_command", io.StringIO()
    argv = ["quantize", f"--run={run}", f"--out={out}", "--images=24", "--sensitivity"]
    with contextlib.redirect_stdout(printed):
        assert main(argv) == 0
    return argv, out, printed.getvalue()


def test_the_record_says_what_was_measured(run, done):
    assert done.images == 24
    assert list(done.layers) == ["head", *LAYERS]
    assert len(done.kept) == 2
    by_sensitivity = sorted(done.layers, key=lambda path: done.layers[path].sensitivity)
    assert set(done.kept) == set(by_sensitivity[:2])
    plain = load_plain(run)
    assert done.test_float["accuracy"] == evaluate(plain)["accuracy"]
    network, record = load_quantized(run.parent / "quantized")
    assert record == done
    assert set(quantizers(network.model)) == set(done.layers) - set(done.kept)
    assert evaluate(network)["accuracy"] == done.test["accuracy"]
    assert evaluate(load_any(run.parent / "quantized"))["loss"] == evaluate(network)["loss"]
    for path, layer in done.layers.items():
        kernel = np.asarray(dict(_kernels(plain.model))[path])
        assert sum(layer.kernel["before"]) == kernel.size
        assert sum(layer.kernel["after"]) == (0 if layer.kept else kernel.size)
        assert sum(layer.inputs["after"]) == (0 if layer.kept else sum(layer.inputs["before"]))
    assert done.measured is not None
    assert done.measured > 0


@pytest.mark.parametrize("content", ["[]", "5", "{}", '{"layers": 5}', '{"layers": {"head": 5}}'])
def test_a_damaged_record_is_refused(run, done, tmp_path, content):
    shutil.copytree(run.parent / "quantized", folder := tmp_path / "quantized")
    (folder / "quantize.json").write_text(content)
    with pytest.raises(ValueError, match=r"quantize\.json is damaged or of another version: .*it lacks "):
        load_quantized(folder)


def test_a_record_that_is_none_is_not_taken_for_another_quantization(run, done, tmp_path):
    shutil.copytree(run.parent / "quantized", folder := tmp_path / "quantized")
    (folder / "quantize.json").write_text("[]")
    with pytest.raises(ValueError, match=r"quantize\.json is damaged"):
        quantize_run(run, folder, OPTIONS)


def _kernels(model):
    return [(path, layer.kernel[...]) for path, layer in find_quantizable(model).items()]


def test_bytes_of_parameters(run, done):
    model = load_plain(run).model
    total = sum(np.asarray(k).size for _, k in _kernels(model))
    kept = sum(np.asarray(k).size for p, k in _kernels(model) if p in done.kept)
    biases = (done.float_bytes - 4 * total) // 4
    assert biases > 0
    assert done.quantized_bytes == 4 * (biases + kept) + -(-(total - kept) * 6 // 8)
    assert weight_bytes(model, Options().scheme) == (done.float_bytes, done.float_bytes)


def test_a_deployment_is_quantized_like_its_run(run, by_command, tmp_path):
    _, of_run, _ = by_command
    _, one = load_quantized(of_run)
    other = quantized(run.parent / "deployed", tmp_path / "b", Options(images=24))
    assert one.test == other.test
    assert one.measured == pytest.approx(other.measured, abs=0.01)
    assert other.warning == ""
    options = Options(images=24, sensitivity=True)
    again = quantized(run, of_run, options)
    assert again.reused
    assert again.layers == one.layers
    with pytest.raises(ValueError, match=r"holds another quantization \(it differs in options\)"):
        quantize_run(run, of_run, Options(images=24, sensitivity=True, bits=5))
    with pytest.raises(ValueError, match="is quantized already"):
        quantize_run(of_run, tmp_path / "c")
    with pytest.raises(ValueError, match="`out_dir`"):
        quantize_run(run, run, options)
    with pytest.raises(ValueError, match="holds another deployment"):
        deploy(run, of_run)


def test_wrong_preprocessing_is_said(run, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr("repopt_jax.deploy.quantization.SETTLED_STEPS", 1)
    config = json.loads((run / "config.json").read_text())
    config["data"]["mean"], config["data"]["std"] = [0.9], [0.1]
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    (copy / "config.json").write_text(json.dumps(config))
    found = quantized(copy, tmp_path / "out", Options(images=24))
    assert "check mean and std of the preprocessing" in found.warning
    assert found.warning in caplog.text


def test_training_on(run, tmp_path):
    options = Options(bits=4, aware=True, epochs=1, keep_float=1, images=24)
    stopped = quantize_run(run, tmp_path / "out", options, progress=False, stop=lambda: True)
    assert isinstance(stopped, train.Summary)
    found = quantize_run(run, tmp_path / "out", options, progress=False)
    assert not isinstance(found, train.Summary)
    network = load_any(tmp_path / "out")
    assert network.config.quantize.fused
    assert list(network.config.quantize.keep_float) == found.kept
    assert set(quantizers(network.model)) == set(found.layers) - set(found.kept)
    assert evaluate(network)["accuracy"] == found.test["accuracy"]
    trained = train.load_trained(tmp_path / "out" / "training")
    assert evaluate(trained)["loss"] == pytest.approx(evaluate(network)["loss"], rel=1e-5)
    assert quantize_run(run, tmp_path / "out", options).reused


def test_the_config_of_training_on(run, digits):
    source = train.load_trained(run)
    made = aware_config(source, run, Options(bits=4, aware=True), ["head"])
    assert (made.epochs, made.optim.learning_rate) == (1, pytest.approx(0.005))
    assert made.model.mode == "repvgg"
    assert made.quantize.fused
    assert made.quantize.freeze_after == 3  # half of six steps
    train.validate(made, device_count=1)
    repopt = source._replace(config=tiny_config("repopt", digits, scales="depth"))
    kept = aware_config(repopt, run, Options(aware=True), [])
    assert (kept.model.mode, kept.scales, kept.quantize.fused) == ("repopt", "depth", False)
    fused = aware_config(repopt, run, Options(per="tensor", aware=True), [])
    assert (fused.model.mode, fused.scales, fused.quantize.fused) == ("plain", "", True)
    for config in (kept, fused):
        train.validate(config, device_count=1)
    with pytest.raises(ValueError, match="is a search"):
        aware_config(source._replace(config=tiny_config("search", digits)), run, Options(aware=True), [])
    with pytest.raises(ValueError, match="is a deployment"):
        aware_config(source, run.parent / "deployed", Options(aware=True), [])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 9}, "`bits` is 9"),
        ({"per": "layer"}, "`per` is 'layer'"),
        ({"calibration": "max"}, "`calibration` is 'max'"),
        (
            {"calibration": "mse", "percentile": 50.0},
            "`percentile` is 50.0, and `calibration` 'mse' has none",
        ),
        ({"images": 0}, "`images` is 0: it must be at least 1"),
        ({"keep_float": -1}, "`keep_float` is -1: it must be at least 0"),
        ({"epochs": 2}, "only quantization-aware training has epochs"),
        ({"epochs": 0, "aware": True}, "`epochs` is 0"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Options(**options)


def test_no_folder_is_made_of_one_that_is_not_there(run, tmp_path):
    """The digits are prepared where they are to be trained on, and not where they are only looked for."""
    with pytest.raises(FileNotFoundError, match=r"`data_dir` .*none is not a folder: give the one of"):
        evaluate(load_plain(run), data_dir=str(tmp_path / "none"))
    assert not (tmp_path / "none").exists()


# -- the command and its page


def test_the_command_and_its_page(by_command, capsys):
    argv, out, printed = by_command
    assert "8 bits, kernels 8 bits with a scale per channel; ranges by percentile on 24 training" in printed
    assert "most sensitive layers, each alone: " in printed
    assert "expected from kernels and ranges" in printed
    page = (out / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 2
    assert all(path in page for path in LAYERS)
    assert sorted(p.name for p in (out / "report").iterdir()) == ["histograms.png", "layers.png"]
    assert main(argv) == 0
    assert "Already quantized; nothing was done." in capsys.readouterr().out
    assert main(["eval", f"--run={out}"]) == 0


def test_lines_name_what_stayed_in_floating_point(done):
    printed = "\n".join(quantization.lines(done))
    assert f"in floating point: {', '.join(done.kept)}" in printed
    assert "kernels 6 bits with a scale per tensor; ranges" in printed
    short = dataclasses.replace(done, options=done.options | {"scale_bits": 4})
    assert "with a scale per tensor, of 4 significant bits; ranges" in "\n".join(quantization.lines(short))


@pytest.mark.parametrize(
    ("argv", "message", "code"),
    [
        (["--bits=1"], "`bits` is 1: it must be a whole number from 2 to 8", 1),
        (["--per=group"], "`per` is 'group'", 1),
        (["--weights=half"], "`weight_range` is 'half'", 1),
        (["--calibration=kl"], "`calibration` is 'kl'", 1),
        (["--keep-float=7"], "`keep_float` is 7: the network has 7 layers", 1),
        (["--epochs=3"], "only quantization-aware training has epochs", 1),
        (["--config.optim.learning_rate=1"], "without --qat there is none", 2),
        (["--images=0"], "must be at least 1, not 0", 2),
        (["--checkpoint=7"], "7", 1),
    ],
)
def test_what_the_command_refuses(run, tmp_path, capsys, argv, message, code):
    refused(capsys, ["quantize", f"--run={run}", f"--out={tmp_path / 'out'}", *argv], message, code=code)


def test_the_table_is_of_the_runs_of_the_report(tmp_path, monkeypatch, caplog):
    """Of a grid those at the chosen point, by number of the seed; the name of results may have a dot."""
    caplog.set_level("INFO", logger="repopt_jax")  # the script sets it, and this sets it back
    table = programs.load("scripts/quantize_table.py")
    ways = {"plain": "rate=0.1", "repopt": "rate=0.2"}
    chosen = [
        (way, tmp_path / "runs" / way / point / f"seed{s}") for way, point in ways.items() for s in (2, 10)
    ]
    others = [folder.parent.with_name("rate=0.3") / folder.name for _, folder in chosen]
    for folder in (*(folder for _, folder in chosen), *others):
        folder.mkdir(parents=True)
    runs = [{"label": f"by {way}", "directory": f"seen/{f.relative_to(tmp_path)}"} for way, f in chosen]
    runs.append({"label": "search one", "directory": "seen/searches/one"})
    rows = [{"way": way, "label": f"by {way}"} for way in ways]
    report = {"title": "Some", "task": "classify", "rows": rows, "runs": runs}
    (tmp_path / "report.json").write_text(json.dumps(report))
    measured = []

    def measure(way, folder, args):
        measured.append((way, folder))
        return {"way": way, "count": 10}

    for name, made in {"measure": measure, "markdown": str, "draw": str, "commit": str}.items():
        monkeypatch.setattr(table, name, made)
    monkeypatch.setattr(table.figures, "png", str.encode)
    monkeypatch.setattr(
        "sys.argv", ["quantize_table.py", str(tmp_path), f"--out={tmp_path / 'of_cifar10.1'}"]
    )
    table.main()
    assert measured == chosen
    assert sorted(path.name for path in tmp_path.glob("of_*")) == [
        "of_cifar10.1.json",
        "of_cifar10.1.md",
        "of_cifar10.1.png",
    ]


def test_the_table_of_a_comparison():
    table = programs.load("scripts/quantize_table.py")
    cells = {
        f"{bits}:{per}": {"value": 0.1 * bits, "ratio": 5.0 * bits, "expected": 4.0 * bits}
        for bits in table.BITS
        for per in table.PER
    }
    networks = [
        {
            "way": way,
            "seed": seed,
            "count": 10,
            "float": 0.9,
            "tail": 9.0,
            "median_tail": 4.0,
            "quantized": cells,
            "aware": {"value": 0.85, "ratio": 12.0},
        }
        for way in ("plain", "repvgg")
        for seed in (0, 1)
    ]
    content = {
        "title": "Some",
        "labels": {"plain": "plain SGD", "repvgg": "RepVGG"},
        "metric": "accuracy",
        "label": "test accuracy",
        "calibration": "percentile",
        "images": 8,
        "qat": "4:tensor",
        "test_count": 10,
        "made": {"commit": "", "processor": "a processor", "jax": "1"},
        "networks": networks,
    }
    text = table.markdown(content)
    assert "| plain SGD | 90.0 (90.0, 90.0) | 80.0 (80.0, 80.0) |" in text
    assert "4 bits per tensor, trained on" in text
    assert "| RepVGG | 40.0 (40.0, 40.0) |" in text
    assert png(table.draw(content)).startswith(b"\x89PNG")


def test_all_that_is_wrong_with_the_options_is_listed():
    wanted = ("`calibration` is 'f'", "`bits` is 99", "`images` is 0", "`keep_float` is -1", "`epochs` is 2")
    with pytest.raises(ValueError, match="`images` is 0: it must be at least 1") as caught:
        Options(bits=99, calibration="f", images=0, keep_float=-1, epochs=2)
    assert [part for part in wanted if part not in str(caught.value)] == []


def test_all_that_is_wrong_with_an_export_is_listed(tmp_path):
    wrong = {"layout": "X", "weights": "all", "preprocess": "y", "scale_bits": 99}
    with pytest.raises(ValueError, match="`layout` is 'X'") as caught:
        export(tmp_path, tmp_path / "out.onnx", format="onnx-int8", **wrong)
    assert [name for name in wrong if f"`{name}` is " not in str(caught.value)] == []
