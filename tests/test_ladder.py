"""The ablation ladder: each rung is what its name says, and the comparison has them all."""

import dataclasses
import os
import shutil
import subprocess
from pathlib import Path

import jax
import numpy as np
import programs
import pytest
from training import tiny_config

from repopt_jax import data, save_scales, train
from repopt_jax.core import paths
from repopt_jax.core.scales import LayerScales, Scales, ScalesMetadata
from repopt_jax.train import build
from repopt_jax.train.rundir import read_records

pytestmark = pytest.mark.once

ROOT = Path(__file__).parents[1]
INFO = data.DatasetInfo(
    name="made up", class_names=("a", "b"), channels=1, image_shape=None, num_train=50, num_eval=37
)
RUNGS = [
    "1-plain", "2-init", "3-multiplier", "4-ones", "5-depth", "6-means", "7-full", "8-direct", "9-frozen",
]  # fmt: skip


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
    ladder = programs.load("configs/ladder.py")
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
    [
        ("adamw", {"b2": 0.99, "eps": 1e-6}),
        pytest.param("lion", {"b1": 0.8}, marks=pytest.mark.long),
    ],
)
def test_each_optimizer_trains_with_scales_and_clipping(digits, tmp_path, searched, name, constants):
    folder, _ = searched
    config = tiny_config("repopt", digits, scales=folder, epochs=1, batch_size=24, checkpoint_every=0)
    config.optim = train.OptimConfig(name=name, learning_rate=0.01, clip_norm=1.0, **constants)
    summary = train.run(config, tmp_path / "run", progress=False)
    assert (summary.finished, summary.steps) == (True, 2)


# -- the comparison and its scripts


def test_the_comparison_has_every_rung_by_one_recipe():
    ladder = programs.load("configs/ladder.py")
    comparison = ladder.get_comparison()
    assert list(comparison.ways) == RUNGS
    assert (comparison.seeds, comparison.points) == (3, ({},))
    assert comparison.searches == {"search": ladder.get_config("search")}
    for rung, config in comparison.ways.items():
        alone = ladder.get_config(rung)
        searched = alone.scales == ladder.SEARCHED
        assert config == dataclasses.replace(alone, scales="search:search" if searched else alone.scales)
    assert list(comparison.pairs) == [(rung, "1-plain") for rung in RUNGS[1:]]
    small = ladder.get_comparison(",smoke").ways["6-means"]
    assert (small.data.source, small.scales, small.scales_mean) == ("digits", "search:search", True)


@pytest.mark.parametrize("name", ["ladder", "cifar10_small"])
def test_scripts_make_comparisons_of_images(tmp_path, name):
    """With a program named `repopt` that only writes down how it was called."""
    (tmp_path / "scripts").mkdir()
    shutil.copy(ROOT / "scripts" / f"{name}.sh", tmp_path / "scripts")
    programs = tmp_path / "programs"
    programs.mkdir()
    program = programs / "repopt"
    program.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/log\n')
    program.chmod(0o755)
    (tmp_path / "images").mkdir()
    subprocess.run(
        [tmp_path / "scripts" / f"{name}.sh", "images", "runs"],
        cwd=tmp_path,
        env={**os.environ, "PATH": f"{programs}:{os.environ['PATH']}"},
        check=True,
    )
    assert (tmp_path / "log").read_text().split(" ", 5) == [
        "compare",
        f"--config=configs/{name}.py",
        f"--config.data.data_dir={tmp_path}/images",
        f"--out={tmp_path}/runs",
        f"--results=scripts/results/{name}",
        f"--named=scripts/{name}.sh DATA\n",
    ]
