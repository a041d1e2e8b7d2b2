"""A config that cannot run says everything that is wrong with it; one that can survives JSON."""

import dataclasses
import json
from pathlib import Path

import pytest

from repopt_jax import train
from repopt_jax.train.config_io import config_file, differing_fields
from repopt_jax.train.quickstart import quickstart

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.py"))
# Without those that need the scales of a search.
RUNS = {
    "digits": ("search", "plain", "depth", "repvgg"),
    "cifar10_small": ("search", "plain", "repvgg"),
    "ladder": ("search", "1-plain", "4-ones", "5-depth", "8-direct", "9-frozen"),
    "scenes": ("search", "plain", "repvgg"),
}


def test_all_problems_are_listed_at_once():
    config = train.Config(batch_size=30, eval_batch_size=6, epochs=0, scales="nowhere")
    config.model = train.ModelConfig(variant="B11", kind="repvg", form="split", dtype="float31")
    config.data = train.DataConfig(source="folders", crop_padding=-1, std=(0.0,))
    config.optim = train.OptimConfig(learning_rate=float("nan"), momentum=1.5, label_smoothing=-0.1)
    with pytest.raises(ValueError) as error:
        train.validate(config, device_count=4)
    for part in (
        "`model.variant`='B11'", "did you mean 'B1'", "`model.kind`='repvg'", "did you mean 'repvgg'",
        "`model.form`='split'", "`model.dtype`='float31'", "`data.source`='folders'", "`epochs`=0",
        "`data.crop_padding`=-1", "`data.std`=(0.0,)", "`optim.learning_rate`=nan", "`optim.momentum`=1.5",
        "`optim.label_smoothing`=-0.1", "`batch_size`=30 is not divisible by the 4 devices", "28 and 32",
        "`eval_batch_size`=6", "'nowhere'",
    ):  # fmt: skip
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: setattr(c, "fsdp", 3), "`fsdp`=3 does not divide the 4 devices"),
        (lambda c: setattr(c.data, "source", "folder"), "`data.data_dir` is empty"),
        (lambda c: setattr(c.data, "source", "tfds"), "`data.name` is empty"),
        (lambda c: setattr(c.optim, "warmup_epochs", 2.0), "at most 1"),
        (lambda c: setattr(c.optim, "clip_norm", -1.0), "`optim.clip_norm`=-1.0"),
        (lambda c: setattr(c, "log_every", 0), "`log_every`=0"),
    ],
)
def test_each_problem_is_named(change, message):
    config = train.Config()
    change(config)
    with pytest.raises(ValueError) as error:
        train.validate(config, device_count=4)
    assert message in str(error.value)


def test_scales_go_with_the_kinds_that_take_them():
    for kind in ("target", "search", "csla"):
        train.validate(train.Config(scales="depth", model=train.ModelConfig(kind=kind)))
    with pytest.raises(ValueError, match="takes none"):
        train.validate(train.Config(scales="depth", model=train.ModelConfig(kind="repvgg")))


def test_clipping_goes_with_every_kind():
    optim = train.OptimConfig(clip_norm=5.0)
    for scales, kind in (("", "search"), ("", "target"), ("ones", "target"), ("depth", "csla")):
        train.validate(train.Config(optim=optim, scales=scales, model=train.ModelConfig(kind=kind)))


@pytest.mark.parametrize(
    ("kind", "fields", "message"),
    [
        ("target", {"rules": "init"}, "`rules`='init' with kind 'target' and `scales`=''"),
        ("csla", {"rules": "init", "scales": "ones"}, "only a target network with scales"),
        ("target", {"rules": "intt", "scales": "ones"}, "did you mean 'init'"),
        ("target", {"scales_mean": True}, "`scales_mean` with `scales`=''"),
        ("target", {"scales_mean": True, "scales": "depth"}, "which are the same in all channels"),
        ("target", {"freeze_scales": 0.1}, "`freeze_scales`=0.1 with kind 'target', which trains no scales"),
        ("search", {"freeze_scales": 1.5}, "`freeze_scales`=1.5 must be a finite number, at least 0"),
    ],
)  # fmt: skip
def test_options_of_the_ladder_are_refused_where_they_mean_nothing(kind, fields, message):
    with pytest.raises(ValueError) as error:
        train.validate(train.Config(**fields, model=train.ModelConfig(kind=kind)))
    assert message in str(error.value)


def test_options_of_the_ladder(tmp_path):
    searched = str(tmp_path)
    for kind, fields in (
        ("target", {"rules": "init", "scales": "ones"}),
        ("target", {"rules": "multiplier", "scales": searched, "scales_mean": True}),
        ("csla", {"scales": searched, "scales_mean": True}),
        ("search", {"freeze_scales": 0.1}),
    ):
        train.validate(train.Config(**fields, model=train.ModelConfig(kind=kind)))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"name": "adam"}, "did you mean 'adamw'"),
        (
            {"b1": 0.9},
            "`optim.b1`=0.9 with `optim.name`='sgd', which takes momentum, nesterov: leave it at None",
        ),
        ({"name": "adamw", "momentum": 0.8}, "which takes b1, b2, eps: leave it at 0.9"),
        ({"name": "adamw", "nesterov": False}, "`optim.nesterov`=False"),
        ({"name": "lion", "eps": 1e-8}, "`optim.eps`=1e-08 with `optim.name`='lion', which takes b1, b2:"),
        ({"name": "lion", "b1": 1.0}, "`optim.b1`=1 keeps an average that no gradient enters"),
        ({"name": "adamw", "b2": -0.1}, "`optim.b2`=-0.1"),
        ({"name": "adamw", "eps": float("inf")}, "`optim.eps`=inf"),
    ],
)
def test_constants_go_with_the_optimizer_that_takes_them(fields, message):
    with pytest.raises(ValueError) as error:
        train.validate(train.Config(optim=train.OptimConfig(**fields)))
    assert message in str(error.value)


def test_constants_of_each_optimizer_are_taken():
    for optim in (
        train.OptimConfig(momentum=0.8, nesterov=False),
        train.OptimConfig(name="adamw", b1=0.8, b2=0.9, eps=1e-3),
        train.OptimConfig(name="lion", b1=0.8, b2=0.9),
    ):
        train.validate(train.Config(optim=optim))


def test_json_of_a_run_before_the_newer_fields_is_read():
    old = json.loads(train.to_json(train.Config()))
    for field in ("rules", "scales_mean", "freeze_scales"):
        del old[field]
    for field in ("name", "b1", "b2", "eps"):
        del old["optim"][field]
    assert train.from_json(json.dumps(old)) == train.Config()


def test_json_gives_the_config_back():
    config = train.Config(data=train.DataConfig(mean=(0.1, 0.2), area=(0.1, 1.0)))
    again = train.from_json(train.to_json(config))
    assert again == config
    assert differing_fields(config, again) == []


def test_json_with_unknown_fields_lists_them():
    text = train.to_json(train.Config()).replace('"seed"', '"sede"').replace('"flip"', '"flop"')
    with pytest.raises(ValueError, match=r"unknown config fields: (sede, data.flop|data.flop, sede)"):
        train.from_json(text)


def test_differences_are_named_by_their_whole_path():
    other = train.Config(seed=1, optim=train.OptimConfig(learning_rate=0.2))
    assert differing_fields(train.Config(), other) == ["seed (0 and 1)", "optim.learning_rate (0.1 and 0.2)"]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_shipped_config_is_valid(path):
    for run in RUNS[path.stem]:
        for arg in (run, f"{run},smoke"):
            config = train.load_config(f"{path}:{arg}")
            config.data.data_dir = "images"
            train.validate(config, device_count=4)


@pytest.mark.parametrize("path", [p for p in CONFIGS if p.stem != "ladder"], ids=lambda path: path.stem)
def test_runs_of_one_file_differ_only_in_network_and_scales(path):
    plain, repopt = (dataclasses.asdict(train.load_config(f"{path}:{arg}")) for arg in ("plain", "repopt"))
    differing = {name for name in plain if plain[name] != repopt[name]}
    assert differing == {"name", "scales"}


def test_config_files_are_found_by_name():
    assert config_file("digits") == config_file("digits.py")
    assert train.load_config("digits:search").model.kind == "search"
    with pytest.raises(FileNotFoundError, match="shipped ones are cifar10_small, digits, ladder, scenes"):
        train.load_config("didgits:search")
    with pytest.raises(ValueError, match="must be one of search, plain"):
        train.load_config("digits:serch")


def test_a_config_file_must_return_a_config(tmp_path):
    (tmp_path / "mine.py").write_text("def get_config(arg=''):\n    return {}\n")
    with pytest.raises(TypeError, match="returned dict"):
        train.load_config(str(tmp_path / "mine.py"))


def test_quickstart_refuses_before_its_search_what_a_later_run_would(tmp_path):
    for base, message in (
        (train.Config(optim=train.OptimConfig(name="lion")), "`optim.name` is 'lion': quickstart shows"),
        (train.Config(freeze_scales=0.5), "which trains no scales"),
    ):
        with pytest.raises(ValueError, match=message):
            quickstart(base, tmp_path / "out")
    assert not (tmp_path / "out").exists()
