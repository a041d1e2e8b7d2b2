"""Every shipped config and every argument of it: it can run, it is its published network at full size, and
its smoke trains from end to end."""

import dataclasses
import functools
import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiers
from flax import nnx

from repopt_jax import data, models, train, userfile
from repopt_jax.deploy import deploy
from repopt_jax.models import GhostRow, GhostVariant, VGGVariant
from repopt_jax.models.registry import NETWORKS
from repopt_jax.report.comparison import Comparison, load_comparison, smoke_of
from repopt_jax.train import build
from repopt_jax.train import config as configs
from repopt_jax.train.optimizer import make_schedule
from repopt_jax.train.state import make_mesh
from repopt_jax.train.tasks import cross_entropy, mixed_cross_entropy

pytestmark = pytest.mark.once

FILES = sorted(path.stem for path in (Path(__file__).parents[1] / "configs").glob("*.py"))


def arguments(file, load=train.load_config):
    """What a config file takes, as it says itself; `load` is of runs or of comparisons."""
    with pytest.raises(ValueError, match="must be one of") as error:
        load(f"{file}:?")
    return str(error.value).partition("must be one of ")[2].removesuffix(", or that and ',smoke'").split(", ")


RUNS = [f"{file}:{arg}" for file in FILES for arg in arguments(file)]

# Trained numbers of the networks at 1000 classes, of the search at 100: counted in the authors' code.
PARAMETERS = {
    **{"imagenet:B1": 51_841_832, "imagenet:B2": 80_330_536, "imagenet:L1": 76_037_928},
    **{"imagenet:L2": 118_132_776, "imagenet:ghost-0.5": 2_309_008},
    **{"imagenet:B1-repvgg": 57_415_016, "imagenet:B2-repvgg": 89_022_376},
    **{"imagenet:ghost-0.5-repghost": 2_313_968},
    **{"imagenet:repvgg-A0": 9_108_968, "imagenet:repvgg-A1": 14_092_264, "imagenet:repvgg-A2": 28_210_600},
    **{"imagenet:repvgg-B0": 15_817_960, "imagenet:repvgg-B1": 57_415_016, "imagenet:repvgg-B2": 89_022_376},
    **{"imagenet:repvgg-B1g2": 45_782_376, "imagenet:repvgg-B1g4": 39_966_056},
    "imagenet:repvgg-B2g4": 61_758_376,
    **{"imagenet:repghost-0.5": 2_313_968, "imagenet:repghost-0.58": 2_546_388},
    **{"imagenet:repghost-0.8": 3_278_968, "imagenet:repghost-1.0": 4_073_604},
    **{"imagenet:repghost-1.11": 4_539_984, "imagenet:repghost-1.3": 5_478_612},
    **{"imagenet:repghost-1.5": 6_575_336, "imagenet:repghost-2.0": 9_796_124},
    **{"repmlp:T224": 38_293_608, "repmlp:T256": 58_687_848, "repmlp:B224": 68_242_712},
    **{"repmlp:B256": 96_447_512, "repmlp:D256": 86_887_648, "repmlp:L256": 117_641_560},
}


@pytest.fixture
def somewhere(tmp_path, monkeypatch):
    """A folder of images, empty, and the folders of scales, empty, that configs take by name."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "images").mkdir()

    def placed(config):
        if config.data.source == "folder" and not config.data.data_dir:
            config.data.data_dir = "images"
        if "/" in config.scales:
            Path(config.scales.removeprefix("transfer:")).mkdir(parents=True, exist_ok=True)
        return config

    return placed


@pytest.mark.parametrize("file", FILES)
def test_every_argument_can_run_on_eight_devices(file, somewhere):
    for arg in arguments(file):
        for option in ("", ",smoke"):
            train.validate(somewhere(train.load_config(f"{file}:{arg}{option}")), device_count=8)
    assert train.load_config(file) in [train.load_config(f"{file}:{arg}") for arg in arguments(file)]


COMPARED = [file for file in FILES if userfile.defines(configs.config_file(file), "get_comparison")]


@pytest.mark.parametrize("file", COMPARED)
def test_every_comparison_of_a_file_can_run(file, somewhere):
    for choice in arguments(file, load_comparison):
        for option in ("", ",smoke"):
            comparison = load_comparison(f"{file}:{choice}{option}")
            for config in (*comparison.ways.values(), *comparison.searches.values()):
                if config.scales.startswith("search:"):  # before it has run
                    config.scales, config.scales_mean = "depth", False
                train.validate(somewhere(config), device_count=8)


def test_arguments_are_told_apart():
    assert configs.parse_argument("", ("a", "b")) == ("a", False)
    assert configs.parse_argument("", ("a", "b"), default="b") == ("b", False)
    assert configs.parse_argument("b,smoke", ("a", "b")) == ("b", True)
    assert configs.parse_argument(",smoke", ("a", "b")) == ("a", True)
    with pytest.raises(ValueError, match=r"'serch' \(did you mean 'search'\?\) must be one of plain, search"):
        configs.parse_argument("serch", ("plain", "search"))
    with pytest.raises(ValueError, match=r"ends in 'smok': only ',smoke'"):
        configs.parse_argument("plain,smok", ("plain", "search"))


def test_recipes_that_are_told_in_words():
    """Numbers of the papers and repositories, apart from how the configs put them together."""
    b1, ghost, a0 = (train.load_config(f"imagenet:{run}") for run in ("B1", "ghost-0.5", "repvgg-A0"))
    for config, start, peak in ((b1, 0.1 / 25, 0.1), (ghost, 4e-4 + (2.4 - 4e-4) / 25, 2.4), (a0, 0.1, 0.1)):
        rate = make_schedule(
            config.optim, epochs=config.epochs, steps_per_epoch=5, batch_size=config.batch_size
        )
        assert float(rate(0)) == pytest.approx(start, rel=1e-6)
        warmed = 5 * config.optim.warmup_epochs - 1
        assert float(rate(max(warmed, 0))) == pytest.approx(peak, rel=1e-6)
    assert (b1.epochs, b1.batch_size, ghost.epochs, ghost.batch_size) == (120, 256, 300, 1024)
    assert b1.scales == "runs/cifar100/B1/scales"
    assert ghost.scales == "runs/cifar100/ghost-0.5/scales"
    for network in ("B1", "B2", "L1", "L2", "ghost-0.5"):
        search, target = train.load_config(f"cifar100:{network}"), train.load_config(f"imagenet:{network}")
        assert (search.model.mode, target.model.mode) == ("search", "repopt")
        assert search.model.name == target.model.name
        assert models.find(target.model.name).variant.name == network.removeprefix("ghost-")
        assert search.optim.clip_norm == 5.0
        assert target.optim.clip_norm is None
        plain = train.load_config(f"imagenet:{network}-plain")
        assert plain.model == dataclasses.replace(target.model, mode="plain")
        assert plain == dataclasses.replace(
            target, name=plain.name, scales="", published=plain.published, model=plain.model
        )


# -- full size ----------------------------------------------------------------------------------------------


@pytest.fixture
def abstract():
    """A config's program and state at full size, without an array, on four devices in two groups of two."""

    def trace(run):
        config = train.load_config(run)
        config.scales = "depth" if "/" in config.scales else config.scales
        config.scales_mean = False
        if config.task == "detect":
            info = data.open_scenes(num_train=1, num_eval=1).info
        else:
            count = 100 if "cifar100" in run else 1000
            names = tuple(str(number) for number in range(count))
            info = data.DatasetInfo(
                name="any", class_names=names, channels=3, image_shape=None, num_train=count, num_eval=count
            )
        program, state = build.abstract_program(config, info, make_mesh(2), steps_per_epoch=100)
        return config, info, program, state

    return trace


# Built by `pytest -m long`: they differ from others in the size of their network, or in what it begins with.
SELDOM = (
    *("cifar100:B2", "cifar100:L1", "cifar100:L2"),
    *(f"cifar10_deep:{way}" for way in ("init", "depth", "normalised", "transferred")),
    *(f"deep_digits:{way}" for way in ("init", "depth", "repopt", "normalised", "transferred", "search")),
    "deep_digits:repvgg",
    *(f"imagenet:{name}" for name in ("B2", "L1", "L2", "ghost-0.5", "ghost-0.5-repghost")),
    *(f"imagenet:{name}-repvgg" for name in ("B2", "L1", "L2")),
    *(f"imagenet:repvgg-{name}" for name in ("A1", "A2", "B0", "B1", "B2", "B1g2", "B2g4")),
    *(f"imagenet:repghost-{width}" for width in ("0.58", "0.8", "1.0", "1.11", "1.3", "1.5", "2.0")),
    *(f"repmlp:{name}" for name in ("T256", "B224", "B256", "D256", "L256")),
)


@pytest.mark.parametrize("run", tiers.seldom(RUNS, *SELDOM))
def test_every_config_builds_at_full_size(run, abstract):
    config, _, _, state = abstract(run)
    if run in PARAMETERS:
        assert sum(leaf.size for leaf in jax.tree.leaves(state.params)) == PARAMETERS[run]
    sizes = {leaf.dtype for leaf in jax.tree.leaves(state.params)}
    assert sizes == {jnp.dtype("float32")}  # whatever the computation is in
    assert bool(state.ema) == (config.optim.ema is not None)
    divided = [leaf for leaf in jax.tree.leaves(state.params) if not leaf.sharding.is_fully_replicated]
    assert sum(leaf.size for leaf in divided) > 0.9 * sum(leaf.size for leaf in jax.tree.leaves(state.params))


def check_step(run, abstract):
    config, info, program, state = abstract(run)
    new_state, means = jax.eval_shape(program.train_step, state, batch_of(config, info))
    like = functools.partial(jax.tree.map, lambda leaf: (leaf.shape, leaf.dtype))
    assert like(new_state) == like(state)
    assert means["loss"].shape == ()


def batch_of(config, info):
    rows, side = config.batch_size, config.data.image_size
    image = jax.ShapeDtypeStruct((rows, side, side, info.channels), jnp.float32)
    if config.task == "classify":
        return {"image": image, "label": jax.ShapeDtypeStruct((rows,), jnp.int32)}
    source = data.open_scenes(num_train=config.batch_size, num_eval=1)
    task = build.make_task(config)
    transform = task.open_data(dataclasses.replace(config.data, scenes=(1, 1)))[1]
    batch = next(iter(task.train_batches(source, transform, batch_size=rows, seed=0)))
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), batch)


# The steps of the others, slower to trace, are long.
TRACED = ("imagenet:B1",)


@pytest.mark.parametrize("run", TRACED)
def test_step_at_full_size(run, abstract):
    check_step(run, abstract)


@pytest.mark.long
@pytest.mark.parametrize("run", [run for run in RUNS if run not in TRACED])
def test_step_at_full_size_of_every_other(run, abstract):
    check_step(run, abstract)


# -- smokes -------------------------------------------------------------------------------------------------


def unnamed(config):
    """A config without what does not change its run."""
    return json.dumps(dataclasses.asdict(dataclasses.replace(config, name="")))


# Runs whose smokes are the same but for their names are run once.
SMOKES = {unnamed(train.load_config(f"{run},smoke")): run for run in reversed(RUNS)}
# The recipes whose parts no other test of the trainer runs; the rest, slower, are long.
QUICK_SMOKES = ("cifar100:B1", "imagenet:repghost-1.3")


def check_smoke(run, out, monkeypatch):
    config = train.load_config(f"{run},smoke")
    full = train.load_config(run)
    for owner, names in (
        ("model", ("mode", "dtype", "post_se", "activation")),
        ("data", ("flip", "area", "randaugment", "jitter", "erasing", "mixup", "cutmix")),
        ("optim", ("name", "schedule_by", "cosine_over", "base_batch", "ema", "accumulate", "clip_norm")),
        ("mesh", ("data", "fsdp", "statistics")),
    ):
        for name in names:
            assert getattr(getattr(config, owner), name) == getattr(getattr(full, owner), name), name
    assert bool(config.scales) == bool(full.scales)
    monkeypatch.setattr(
        build, "make_schedule", functools.partial(make_schedule, batch_size=config.batch_size)
    )
    summary = train.run(config, out, progress=False)
    assert summary.finished
    assert (out / "scales").exists() == (config.model.mode == "search")
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    losses = [record["loss"] for record in records if record["kind"] == "train"]
    assert losses
    assert all(0 < loss < 100 for loss in losses)
    return config


@pytest.fixture
def smallest(monkeypatch):
    """Networks that compile in a moment, in the place of the digits'."""
    small = VGGVariant("digits", (1, 1, 1, 1), (4, 4, 4, 8, 8), (1, 1, 2, 1, 1))
    one = GhostVariant("digits", 0.5, ((GhostRow(3, 8, 16, False, 1),),), features=8)
    for name, row in (("vgg-digits", small), ("repghost-digits", one)):
        monkeypatch.setitem(NETWORKS, name, dataclasses.replace(models.find(name), variant=row))


@pytest.mark.parametrize("run", QUICK_SMOKES)
def test_smoke(run, tmp_path, monkeypatch, smallest):
    check_smoke(run, tmp_path / "run", monkeypatch)


@pytest.mark.long
@pytest.mark.parametrize("run", [run for run in SMOKES.values() if run not in QUICK_SMOKES])
def test_smoke_of_every_other(run, tmp_path, monkeypatch):
    check_smoke(run, tmp_path / "run", monkeypatch)


def test_a_smoke_holds_out_and_takes_what_its_images_allow():
    """Whatever the run's own data are limited to, and whatever only their source takes."""
    limits = {"validation": 500, "train_limit": 1000, "eval_limit": 100}
    elsewhere = {"data_dir": "x", "max_pixels": 10**8, **limits}
    for run, changes, held_out in (
        ("scenes:plain", limits, 8),
        (
            "scenes:plain",
            {"source": "coco", "train_images": "train2017", "scenes": (4096, 256), **elsewhere},
            8,
        ),
        ("digits:plain", {"source": "folder", **elsewhere}, 16),
    ):
        config = train.load_config(run)
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, **changes))
        train.validate(config, device_count=1)
        small = configs.smoke(config)
        train.validate(small, device_count=1)
        assert small.data.validation == held_out
        compared = Comparison("", {"one": config}, grid={"optim.learning_rate": (0.1, 0.2)}, validation=500)
        assert smoke_of(compared).validation == held_out
        info = build.open_data(small)[0].info
        assert info.num_eval == held_out


def test_a_smoke_leaves_the_config_as_it_is():
    for run in RUNS:
        config = train.load_config(run)
        before = dataclasses.asdict(config)
        small = configs.smoke(config)
        assert dataclasses.asdict(config) == before
        assert small.published is None
        assert configs.smoke(small) == dataclasses.replace(small, name=f"{small.name}-smoke")


@pytest.mark.long
def test_ghost_from_search_to_deployment(tmp_path, monkeypatch):
    check_smoke("cifar100:ghost-0.5", tmp_path / "search", monkeypatch)
    config = train.load_config("imagenet:ghost-0.5,smoke")
    config.scales = str(tmp_path / "search" / "scales")
    train.run(config, tmp_path / "target", progress=False)
    deployed = deploy(tmp_path / "target", tmp_path / "deploy")
    assert deployed.max_rel < 1e-4
    config.model.name = "repghost-0.5"
    with pytest.raises(ValueError, match="GhostNet-digits"):
        train.run(config, tmp_path / "other", progress=False)


# -- networks and losses ------------------------------------------------------------------------------------


def test_networks_of_a_config():
    info = data.DatasetInfo(
        name="any", class_names=("a", "b"), channels=1, image_shape=None, num_train=1, num_eval=1
    )
    for name in ("vgg-digits", "repghost-digits", "mobileone-digits"):
        for mode in ("plain", "search", "repvgg", "repghost", "mobileone"):
            config = train.Config(model=train.ModelConfig(name=name, mode=mode, dtype="bfloat16"))
            network = nnx.eval_shape(lambda config=config: build.build_model(config, info)[0])
            params = jax.tree.leaves(nnx.state(network, nnx.Param))
            assert {leaf.dtype for leaf in params} == {jnp.dtype("float32")}
            if mode == "search":
                task = build.make_task(config)
                names = {task.resolve_scales(rule, info).metadata.architecture for rule in ("ones", "depth")}
                assert names == {task.architecture()}


LOGITS = np.random.default_rng(0).normal(size=(6, 5)) * 3
MIXED = {
    "label": np.array([0, 1, 2, 3, 4, 0], np.int32),
    "other": np.array([1, 1, 0, 4, 2, 3], np.int32),
    "share": np.array([1.0, 0.7, 0.5, 0.4, 0.0, 0.9], np.float32),
}


def slow_mixed_loss(logits, label, other, share, smoothing):
    """-sum_c q_c log p_c of one image, q being the mixture of two smoothed labels."""
    q = [smoothing / len(logits)] * len(logits)
    q[label] += share * (1 - smoothing)
    q[other] += (1 - share) * (1 - smoothing)
    total = math.log(sum(math.exp(value) for value in logits))
    return -sum(weight * (value - total) for weight, value in zip(q, logits))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_loss_of_mixed_images_against_a_slow_reference(x64, smoothing):
    losses, label = mixed_cross_entropy(
        jnp.array(LOGITS), jax.tree.map(jnp.array, MIXED), label_smoothing=smoothing
    )
    rows = zip(LOGITS, MIXED["label"], MIXED["other"], MIXED["share"].astype(float))
    expected = [slow_mixed_loss(*row, smoothing) for row in rows]
    np.testing.assert_allclose(losses, expected, rtol=1e-12)
    np.testing.assert_array_equal(label, [0, 1, 2, 4, 2, 0])
    # Negative control: the loss by the larger share alone is another one.
    alone = cross_entropy(jnp.array(LOGITS), label, label_smoothing=smoothing)
    assert np.abs(losses - alone).max() > 0.1


def test_images_that_are_not_mixed_have_the_plain_loss(x64):
    batch = {"label": jnp.array(MIXED["label"])}
    losses, label = mixed_cross_entropy(jnp.array(LOGITS), batch)
    np.testing.assert_array_equal(losses, cross_entropy(jnp.array(LOGITS), batch["label"]))
    np.testing.assert_array_equal(label, batch["label"])


def test_settings_of_the_images_reach_the_transform(tmp_path):
    settings = {"image_size": 8, "crop_padding": 2, "flip": True, "area": (0.1, 0.9), "resize": 9}
    settings |= {"randaugment": 5, "jitter": 0.2, "erasing": 0.3, "mixup": 0.4, "cutmix": 0.5}
    settings |= {"mean": (0.6,), "std": (0.7,)}
    config = train.Config(data=train.DataConfig(data_dir=str(tmp_path), **settings))
    assert build.open_data(config)[1] == data.Transform(**settings)
    assert {field.name for field in dataclasses.fields(data.Transform)} == set(settings)
