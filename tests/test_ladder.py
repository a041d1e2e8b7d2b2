"""The ablation ladder: each rung is what its name says, the script runs them all, and the table is right."""

import dataclasses
import importlib.util
import json
import os
import shutil
import subprocess
from pathlib import Path

import jax
import numpy as np
import pytest
from training import tiny_config

from repopt_jax import data, save_scales, train
from repopt_jax.core import paths
from repopt_jax.core.scales import LayerScales, Scales, ScalesMetadata
from repopt_jax.train import build
from repopt_jax.train.rundir import read_records

ROOT = Path(__file__).parents[1]
INFO = data.DatasetInfo(
    name="made up", class_names=("a", "b"), channels=1, image_shape=None, num_train=50, num_eval=37
)
RUNGS = [
    "1-plain", "2-init", "3-multiplier", "4-ones", "5-depth", "6-means", "7-full", "8-direct", "9-frozen",
]  # fmt: skip


def module(path):
    """A program or config of the repository, imported by its place."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


@pytest.fixture(scope="module")
def searched(tmp_path_factory):
    """A directory of scales of both signs for the tiny network, and what is in it."""
    model, _ = build.build_model(tiny_config("plain", ""), INFO)
    rng = np.random.default_rng(0)
    entries = {
        path: LayerScales(bs, {n: rng.normal(size=bs.out).astype(np.float32) for n in bs.names})
        for path, bs in model.branch_sets().items()
    }
    folder = tmp_path_factory.mktemp("search") / "scales"
    save_scales(folder, Scales(jax.tree.map(jax.numpy.asarray, entries)))
    return str(folder), entries


def kernels(model):
    named, _ = paths.named_leaves(jax.device_get(build.split_model(model).params))
    return {path: value for path, value in named.items() if path.endswith("conv/kernel")}


def same(a, b):
    """Whether two networks have equal kernels: all or none of them."""
    equal = {np.array_equal(a[path], b[path]) for path in a}
    assert len(equal) == 1
    return equal.pop()


def test_each_rule_alone_and_both(searched):
    folder, entries = searched
    fresh = kernels(build.build_model(tiny_config("plain", ""), INFO)[0])
    built = {
        rules: build.build_model(tiny_config("repopt", "", scales=folder, rules=rules), INFO)
        for rules in ("both", "init", "multiplier")
    }
    scaled = kernels(built["both"][0])
    assert not same(scaled, fresh)
    assert same(kernels(built["init"][0]), scaled)
    assert same(kernels(built["multiplier"][0]), fresh)
    assert built["init"][1] is None  # nothing for the optimizer to multiply by
    for rules in ("both", "multiplier"):
        scales = built[rules][1]
        assert scales is not None
        for path, entry in entries.items():
            for name, vector in entry.vectors.items():
                np.testing.assert_array_equal(scales.entries[path].vectors[name], vector)


def test_means_keep_one_signed_number_of_each_vector(searched):
    folder, entries = searched
    config = tiny_config("repopt", "", scales=folder, scales_mean=True)
    _, scales = build.build_model(config, INFO)
    assert scales is not None
    negative = 0
    for path, entry in entries.items():
        assert scales.entries[path].branches == entry.branches
        for name, vector in entry.vectors.items():
            found = np.asarray(scales.entries[path].vectors[name])
            assert (found.dtype, found.shape) == (np.float32, vector.shape)
            # float32 sums of at most 12 numbers; measured below 1e-7.
            np.testing.assert_allclose(found, vector.mean(), atol=1e-6)
            assert len(set(found.tolist())) == 1
            negative += vector.mean() < 0
    assert negative  # the mean is of the values, not of their sizes
    twice = scales.channel_means()
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), twice, scales)
    metadata = ScalesMetadata("tiny", "made up", "{}", 7)
    assert dataclasses.replace(scales, metadata=metadata).channel_means().metadata == metadata


def test_rungs_have_one_recipe():
    ladder = module(ROOT / "configs" / "ladder.py")
    assert [rung for rung in ladder.RUNGS if rung != "search"] == RUNGS
    flat = {
        rung: dataclasses.asdict(ladder.get_config(rung)) | {"mode": ladder.get_config(rung).model.mode}
        for rung in RUNGS
    }
    own = {"name", "scales", "rules", "scales_mean", "freeze_scales", "model", "mode"}
    for rung, values in flat.items():
        model = values["model"] | {"mode": "plain"}
        assert model == flat["1-plain"]["model"], rung
        assert {k: v for k, v in values.items() if k not in own} == {
            k: v for k, v in flat["1-plain"].items() if k not in own
        }, rung
    searched = ladder.SEARCHED
    table = {
        rung: tuple(values[k] for k in ("mode", "scales", "rules", "scales_mean", "freeze_scales"))
        for rung, values in flat.items()
    }
    assert table == {
        "1-plain": ("plain", "", "both", False, None),
        "2-init": ("repopt", searched, "init", False, None),
        "3-multiplier": ("repopt", searched, "multiplier", False, None),
        "4-ones": ("repopt", "ones", "both", False, None),
        "5-depth": ("repopt", "depth", "both", False, None),
        "6-means": ("repopt", searched, "both", True, None),
        "7-full": ("repopt", searched, "both", False, None),
        "8-direct": ("search", "", "both", False, None),
        "9-frozen": ("search", "", "both", False, 0.1),
    }
    with pytest.raises(ValueError, match="must be one of search, 1-plain"):
        ladder.get_config("plain")


def test_frozen_scales_stay_also_in_a_run_that_goes_on(digits, tmp_path):
    """Steps 1 to 6 of 18 move the scales; the run is stopped after step 10, where they are held."""
    config = tiny_config("search", digits, freeze_scales=1 / 3, optim__clip_norm=1.0)
    steps = iter(range(1, 19))
    assert not train.run(config, tmp_path / "run", progress=False, stop=lambda: next(steps) == 10).finished
    assert train.run(config, tmp_path / "run", progress=False).finished
    records = [r for r in read_records(tmp_path / "run" / "metrics.jsonl") if r["kind"] == "scales"]
    assert [r["step"] for r in records] == [0, 6, 12, 18]
    for layer in records[0]["layers"]:
        for branch in records[0]["layers"][layer]:
            changes = [r["layers"][layer][branch]["rms_change"] > 0 for r in records]
            trained_on = branch == "identity"  # its u is a weight, not a scale
            assert changes == [False, True, trained_on, trained_on], (layer, branch)


@pytest.mark.parametrize(
    ("name", "constants"),
    [("adamw", {"b2": 0.99, "eps": 1e-6}), ("lion", {"b1": 0.8})],
)
def test_each_optimizer_trains_with_scales_and_clipping(digits, tmp_path, searched, name, constants):
    folder, _ = searched
    config = tiny_config("repopt", digits, scales=folder, epochs=1, batch_size=24, checkpoint_every=0)
    config.optim = train.OptimConfig(name=name, learning_rate=0.01, clip_norm=1.0, **constants)
    summary = train.run(config, tmp_path / "run", progress=False)
    assert (summary.finished, summary.steps) == (True, 2)


# -- the script and its table
# ---


def test_script_runs_one_search_and_nine_rungs_seed_by_seed(tmp_path):
    """With programs named `repopt` and `python` that only write down how they were called."""
    (tmp_path / "scripts").mkdir()
    shutil.copy(ROOT / "scripts" / "ladder.sh", tmp_path / "scripts")
    programs = tmp_path / "programs"
    programs.mkdir()
    for name in ("repopt", "python"):
        program = programs / name
        program.write_text(
            f'#!/bin/sh\necho {name} "$@" "cache=$JAX_COMPILATION_CACHE_DIR" >> {tmp_path}/log\n'
        )
        program.chmod(0o755)
    (tmp_path / "images").mkdir()
    environment = {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"}
    subprocess.run(
        [tmp_path / "scripts" / "ladder.sh", "images", "runs"],
        cwd=tmp_path,
        env={**environment, "PATH": f"{programs}:{os.environ['PATH']}"},
        check=True,
    )
    lines = (tmp_path / "log").read_text().splitlines()
    runs = tmp_path / "runs"
    calls = [line.split() for line in lines if line.startswith("repopt")]
    rest = [word for call in calls for word in call if word.startswith("cache=")]
    assert set(rest) == {f"cache={runs}/compiled"}
    outs = [next(word for word in call if word.startswith("--out=")) for call in calls]
    assert outs == [f"--out={runs}/search-0"] + [
        f"--out={runs}/{rung}-{seed}" for seed in range(3) for rung in RUNGS
    ]
    ladder = module(ROOT / "configs" / "ladder.py")
    for call, out in zip(calls, outs):
        rung, _, seed = out.rpartition("/")[2].rpartition("-")
        assert call[1] == ("search" if rung == "search" else "train")
        assert f"--config=configs/ladder.py:{rung}" in call
        assert f"--config.seed={seed}" in call
        assert f"--config.data.data_dir={tmp_path}/images" in call
        # The rungs that take searched scales are told where these runs have them.
        given = [word for word in call if word.startswith("--config.scales")]
        takes = ladder.get_config(rung).scales == ladder.SEARCHED
        assert given == ([f"--config.scales={runs}/search-0/scales"] if takes else [])
    summaries = [i for i, line in enumerate(lines) if line.startswith("python")]
    assert summaries == [10, 20, 30]  # after each seed
    assert f"--compare {' '.join(RUNGS)} " in lines[-1]


@pytest.fixture
def finished_runs(tmp_path):
    """Summaries of three seeds of two rungs, of one seed of a third."""
    accuracies = {"1-plain": (0.5, 0.52, 0.54), "2-init": (0.53, 0.54, 0.55), "7-full": (0.7,)}
    for rung, values in accuracies.items():
        for seed, accuracy in enumerate(values):
            folder = tmp_path / f"{rung}-{seed}"
            folder.mkdir()
            summary = {
                "test": {"accuracy": accuracy}, "test_count": 5000, "epochs": 5, "steps": 500, "seed": seed,
                "train_parameters": 1000, "versions": {"jax": "0"}, "device": "1 x cpu", "wall_s": 3.0,
            }  # fmt: skip
            (folder / "summary.json").write_text(json.dumps(summary))
            (folder / "metrics.jsonl").write_text(
                json.dumps({"kind": "eval", "epoch": 5.0, "accuracy": accuracy}) + "\n"
            )
    return tmp_path


def test_table_of_many_groups_against_one(finished_runs):
    program = module(ROOT / "scripts" / "summarize_runs.py")
    groups = program.read_groups(finished_runs)
    found = program.compare_all(groups, "accuracy", "1-plain", "2-init", "7-full", "9-frozen")
    assert [c["b"] for c in found] == ["2-init", "7-full"]  # the last one has not been run
    # Differences 3, 2, 1: mean 2, standard deviation 1, and 4.303 / sqrt(3) = 2.484 each way.
    assert found[0]["differences"] == pytest.approx([3, 2, 1])
    assert (found[0]["mean"], found[0]["low"], found[0]["high"]) == pytest.approx(
        (2, 2 - 2.4843, 2 + 2.4843), abs=1e-3
    )
    assert found[1]["differences"] == pytest.approx([20])
    assert "low" not in found[1]
    result = {
        "groups": groups,
        "metrics": ["accuracy"],
        "comparisons": [found],
        "command": "",
        "hardware": "",
    }
    text = program.markdown("Ladder", result)
    assert "| 2-init | +3.00, +2.00, +1.00 | +2.00 | -0.48 to +4.48 | yes |" in text
    assert "| 7-full | +20.00 | +20.00 |  |  |" in text
    with pytest.raises(SystemExit, match="no finished run of 3-x"):
        program.compare_all(groups, "accuracy", "3-x", "2-init")


def test_metrics_that_a_run_lacks_are_skipped_and_deployments_have_a_table(
    finished_runs, tmp_path_factory, monkeypatch
):
    pytest.importorskip("matplotlib")
    program = module(ROOT / "scripts" / "summarize_runs.py")
    for seed, ap50 in enumerate((0.25, None)):
        folder = finished_runs / f"3-detector-{seed}"
        folder.mkdir()
        summary = json.loads((finished_runs / "1-plain-0" / "summary.json").read_text())
        summary |= {"task": "detect", "test": {"ap50": ap50, "ap": None}}
        (folder / "summary.json").write_text(json.dumps(summary))
        (folder / "metrics.jsonl").write_text(json.dumps({"kind": "eval", "epoch": 5.0, "ap50": ap50}) + "\n")
    place = tmp_path_factory.mktemp("summary")
    out, deployed = place / "results" / "all", place / "deployed"
    (deployed / "3-detector").mkdir(parents=True)
    record = {"max_abs": 6.2e-6, "max_rel": 1e-7, "compared": 6, "deploy_parameters": 1900, "run": "/a"}
    (deployed / "3-detector" / "deploy.json").write_text(json.dumps(record))
    arguments = ["x", str(finished_runs), "--out", str(out), "--metrics"]
    compared = ["--compare", "3-detector", "1-plain"]
    monkeypatch.setattr("sys.argv", [*arguments, "ap50", "ap", *compared, "--deployed", str(deployed)])
    program.main()
    text = out.with_suffix(".md").read_text()
    assert "| 3-detector | 0 | 25.00 | 25.00 |  | 1,000 |" in text
    assert "1-plain" not in text
    assert "AP, %" not in text
    assert "| | largest difference of an output | parameters deployed |" in text
    assert "| 3-detector | 6.2e-06 | 1,900 |" in text
    found = json.loads(out.with_suffix(".json").read_text())
    assert found["metrics"] == ["ap50"]
    assert "run" not in found["deployed"]["3-detector"]
    monkeypatch.setattr("sys.argv", [*arguments, "ap"])
    with pytest.raises(SystemExit, match="has measured ap"):
        program.main()


def test_picture_of_runs_that_were_measured_once(finished_runs, tmp_path):
    pytest.importorskip("matplotlib")
    program = module(ROOT / "scripts" / "summarize_runs.py")
    program.draw("Ladder", program.read_groups(finished_runs), finished_runs, "accuracy", tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
