"""Whole runs on the embedded digits: every mode, broken and resumed, refused, and gone wrong."""

import json
import logging
import re
import shutil

import jax
import numpy as np
import pytest
from training import STEPS, arrays, assert_same_run, checkpoints_in, tiny_config, told, without_privileges

from repopt_jax import data, train
from repopt_jax.core.scales import load_scales
from repopt_jax.train import loop
from repopt_jax.train.rundir import RunFolder


@pytest.fixture(scope="module")
def unbroken(digits, tmp_path_factory):
    """Kind -> folder of its whole run, trained when first asked for."""
    folders = {}

    def folder_of(kind):
        if kind not in folders:
            folders[kind] = tmp_path_factory.mktemp(kind) / "run"
            train.run(tiny_config(kind, digits, **SCALED.get(kind, {})), folders[kind], progress=False)
        return folders[kind]

    return folder_of


SCALED = {"repopt": {"scales": "depth"}}


# -- whole runs
# ---


@pytest.mark.parametrize(
    ("mode", "scales"),
    [
        ("search", ""),
        ("plain", ""),
        ("repopt", "ones"),
        pytest.param("acnet", "", marks=pytest.mark.long),
        ("online", "ones"),
        pytest.param("orepa", "", marks=pytest.mark.long),
        ("repvgg", ""),
    ],
)
def test_two_steps_of_each_mode(digits, tmp_path, mode, scales):
    config = tiny_config(
        mode, digits, scales=scales, epochs=1, batch_size=24, log_every=1, checkpoint_every=0
    )
    summary = train.run(config, tmp_path / "run", progress=False)
    assert summary.finished
    assert (summary.mode, summary.scales, summary.steps, summary.test_count) == (mode, scales, 2, 37)
    assert summary.step_ms_median == pytest.approx(1e3 * 24 / summary.images_per_s)
    kinds = [(record["kind"], record["step"]) for record in told(tmp_path / "run")]
    expected = [("train", 1), ("train", 2), ("eval", 2)]
    if mode == "search":
        expected = [("scales", 0), *expected[:2], ("scales", 2), ("eval", 2)]
    assert kinds == expected
    assert (tmp_path / "run" / "scales").exists() == (mode == "search")


@pytest.mark.once
def test_learning_happens(digits, tmp_path):
    config = tiny_config(
        "repopt", digits, scales="depth", epochs=12, batch_size=32, data__train_limit=512, checkpoint_every=0
    )
    assert train.run(config, tmp_path / "run", progress=False).test_accuracy > 0.5


def test_scales_of_a_search_train_a_target(digits, tmp_path, unbroken):
    folder = unbroken("search") / "scales"
    scales = load_scales(folder, train.load_trained(unbroken("search")).model.branch_sets())
    metadata = scales.metadata
    assert (metadata.architecture, metadata.step) == ("tiny", STEPS)
    assert train.from_json(metadata.config).model.mode == "search"
    config = tiny_config("repopt", digits, scales=str(folder))
    summary = train.run(config, tmp_path / "run", progress=False, stop=lambda: True)
    assert (summary.scales, summary.steps, summary.finished) == (str(folder), 1, False)


def test_scale_records_follow_the_vectors(unbroken):
    records = [r for r in told(unbroken("search")) if r["kind"] == "scales"]
    assert [r["step"] for r in records] == [0, 6, 12, 18]
    vectors = load_scales(unbroken("search") / "scales").vectors
    for path, layer in records[-1]["layers"].items():
        for branch, told_of in layer.items():
            v = np.asarray(vectors[path][branch], np.float64)
            assert told_of["mean"] == pytest.approx(v.mean())
            assert told_of["rms"] == pytest.approx(np.sqrt((v**2).mean()))
            assert (told_of["min"], told_of["max"]) == (v.min(), v.max())
            assert told_of["rms_change"] > 0
            assert records[0]["layers"][path][branch]["rms_change"] == 0


def test_loaded_network_gives_the_summary(unbroken, digits):
    model, config, info, step = train.load_trained(unbroken("repopt"))
    assert step == STEPS
    source, transform = train.open_data(config)
    assert source.info == info
    correct = 0
    for batch in data.eval_batches(source, transform, batch_size=12, limit=config.data.eval_limit):
        hits = np.asarray(model(batch["image"])).argmax(-1) == batch["label"]
        correct += int((hits * batch["mask"]).sum())
    summary = json.loads((unbroken("repopt") / "summary.json").read_text())
    assert correct / 37 == pytest.approx(summary["test_accuracy"])


# -- there already
# ---


def test_run_killed_before_its_summary_only_writes_it(digits, tmp_path, unbroken):
    shutil.copytree(unbroken("search"), tmp_path / "run")
    (tmp_path / "run" / "summary.json").unlink()
    shutil.rmtree(tmp_path / "run" / "scales")
    summary = train.run(tiny_config("search", digits), tmp_path / "run", progress=False)
    assert (summary.finished, summary.reused) == (True, False)
    assert_same_run(tmp_path / "run", unbroken("search"))
    assert (tmp_path / "run" / "scales").is_dir()


def test_finished_run_is_reused(digits, unbroken):
    before = (unbroken("repopt") / "metrics.jsonl").read_bytes()
    summary = train.run(tiny_config("repopt", digits, scales="depth"), unbroken("repopt"), progress=False)
    assert (summary.reused, summary.steps) == (True, STEPS)
    assert (unbroken("repopt") / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize("change", [{"wall_s": None}, {"colour": "blue"}], ids=["lacks", "other"])
def test_a_summary_of_other_fields_is_refused(digits, tmp_path, unbroken, change):
    shutil.copytree(unbroken("search"), tmp_path / "run")
    path = tmp_path / "run" / "summary.json"
    fields = {**json.loads(path.read_text()), **change}
    path.write_text(json.dumps({name: value for name, value in fields.items() if name != "wall_s" or value}))
    lacks, has = ("wall_s", "nothing") if "wall_s" in change else ("nothing", "colour")
    with pytest.raises(
        ValueError, match=rf"summary\.json is damaged .* it lacks {lacks} and has {has} beside"
    ):
        train.run(tiny_config("search", digits), tmp_path / "run", progress=False)


# -- gone wrong
# ---


def test_not_finite_loss_stops_and_keeps_the_checkpoint(digits, tmp_path, monkeypatch):
    put, calls = loop.put_batch, iter(range(1, 100))

    def poisoned(batch, mesh):
        if "mask" not in batch and next(calls) == 7:
            batch = {**batch, "image": batch["image"] * np.float32("nan")}
        return put(batch, mesh)

    monkeypatch.setattr(loop, "put_batch", poisoned)
    with pytest.raises(
        FloatingPointError, match=r"the loss of step 7 is not finite; the checkpoint of step 4 is kept"
    ):
        train.run(tiny_config("plain", digits, checkpoint_every=4), tmp_path / "run", progress=False)
    assert checkpoints_in(tmp_path / "run") == [4]
    assert np.isfinite(np.concatenate([a.ravel() for a in jax.tree.leaves(arrays(tmp_path / "run"))])).all()


def test_parameters_that_are_not_finite_are_not_saved(digits, tmp_path):
    config = tiny_config(
        "plain", digits, optim__learning_rate=1e38, optim__warmup_epochs=0.0, checkpoint_every=1
    )
    with pytest.raises(FloatingPointError, match=r"is not finite; (no checkpoint|the checkpoint of step)"):
        train.run(config, tmp_path / "run", progress=False)


def test_folder_of_another_run_is_refused(digits, unbroken):
    before = sorted(unbroken("repopt").rglob("*"))
    config = tiny_config("repopt", digits, scales="ones", seed=3)
    with pytest.raises(
        ValueError, match=r"holds another run; it differs in seed \(0 and 3\), scales \('depth' and 'ones'\)"
    ):
        train.run(config, unbroken("repopt"), progress=False)
    assert sorted(unbroken("repopt").rglob("*")) == before


def test_folder_with_other_files_is_refused(digits, tmp_path):
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(ValueError, match=r"is not empty and holds no run \(it has thesis.tex\)"):
        train.run(tiny_config("plain", digits), tmp_path, progress=False)
    (tmp_path / "config.json").write_text('{"layers": 3}')
    with pytest.raises(ValueError, match="that this version did not write"):
        train.run(tiny_config("plain", digits), tmp_path, progress=False)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "thesis.tex"]


def test_folder_without_permission_is_one_sentence(digits, tmp_path):
    info = data.open_source("digits", data_dir=digits).info
    folder = RunFolder(tmp_path / "run")
    tmp_path.chmod(0o555)
    with without_privileges(), pytest.raises(PermissionError, match=r"`out_dir` .*Permission denied"):
        folder.claim(train.Config(), info)


def test_out_dir_below_a_file_is_one_sentence(digits, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"`out_dir` .*Not a directory"):
        train.run(tiny_config("plain", digits), tmp_path / "file" / "run", progress=False)


def test_other_data_than_the_run_began_on_are_refused(digits, tmp_path):
    config = tiny_config("plain", digits)
    asked = iter(range(STEPS))
    train.run(config, tmp_path / "run", progress=False, stop=lambda: next(asked) == 0)
    path = tmp_path / "run" / "dataset.json"
    path.write_text(path.read_text().replace('"num_eval": ', '"num_eval": 1'))
    with pytest.raises(ValueError, match="holds a run that began on DatasetInfo"):
        train.run(config, tmp_path / "run", progress=False)


def test_batch_that_devices_do_not_divide_is_refused(digits, tmp_path):
    with pytest.raises(ValueError, match=r"`batch_size`=10 is not divisible by the 4 devices .* 8 and 12"):
        train.run(tiny_config("plain", digits, batch_size=10), tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


def test_scales_that_do_not_fit_leave_no_folder(digits, tmp_path, unbroken):
    config = tiny_config("repopt", digits, scales=str(unbroken("search") / "scales"))
    config.model.name = "tiny-wider"
    with pytest.raises(ValueError, match=r"searched on tiny.* stages/4/0/conv/kernel \(expected"):
        train.run(config, tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


# -- what is told
# ---


def test_without_a_terminal_one_line_an_epoch(digits, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(loop, "LOADING_S", 600)
    with caplog.at_level(logging.INFO, logger="repopt_jax"):
        train.run(tiny_config("plain", digits, eval_every=2), tmp_path / "run")
    lines = [record.getMessage() for record in caplog.records if record.name.startswith("repopt_jax")]
    said = ["compiling", "epoch 1", "epoch 2", "epoch 3"]
    assert all(re.match(r"\d\d:\d\d:\d\d tiny: ", line) for line in lines)
    assert [line.split(",")[0].split(": ")[1] for line in lines] == said
    assert ["test accuracy" in line for line in lines[1:]] == [False, True, True]


def test_tensorboard_files_are_written_when_asked(digits, tmp_path):
    pytest.importorskip("tensorboardX")
    asked = iter(range(1, STEPS + 1))
    config = tiny_config("plain", digits, tensorboard=True)
    train.run(config, tmp_path / "run", progress=False, stop=lambda: next(asked) == 3)
    assert list((tmp_path / "run" / "tensorboard").glob("events.*"))
