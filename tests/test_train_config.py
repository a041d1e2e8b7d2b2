"""A config that cannot run says everything that is wrong with it; one that can survives JSON."""

import dataclasses
import functools
import inspect
import os
import sys

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from repopt_jax import data, save_scales, train
from repopt_jax.detection import decode
from repopt_jax.models import registry
from repopt_jax.report.comparison import load_comparison
from repopt_jax.report.quickstart import comparison_of
from repopt_jax.train.config import (
    CLASSIFY,
    DataConfig,
    DetectConfig,
    config_file,
    differing_fields,
    smoke,
    to_json,
)
from repopt_jax.train.tasks import Detection


def test_all_problems_are_listed_at_once():
    config = train.Config(batch_size=30, eval_batch_size=6, epochs=0, scales="nowhere")
    config.model = train.ModelConfig(name="repvgg-b11", mode="repvg", dtype="float31")
    config.data = train.DataConfig(source="folders", crop_padding=-1, std=(0.0,))
    config.optim = train.OptimConfig(learning_rate=float("nan"), momentum=1.5, label_smoothing=-0.1)
    with pytest.raises(ValueError) as error:
        train.validate(config, device_count=4)
    for part in (
        "`model.name`='repvgg-b11'", "did you mean 'repvgg-b1'", "`model.mode`='repvg'",
        "did you mean 'repvgg'", "`model.dtype`='float31'", "`data.source`='folders'", "`epochs`=0",
        "`data.crop_padding`=-1", "`data.std`=(0.0,)", "`optim.learning_rate`=nan", "`optim.momentum`=1.5",
        "`optim.label_smoothing`=-0.1", "`batch_size`=30 is not divisible by the 4 devices", "28 and 32",
        "`eval_batch_size`=6", "'nowhere'",
    ):  # fmt: skip
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: setattr(c.mesh, "fsdp", 3), "`mesh.fsdp`=3 does not divide the 4 devices"),
        (lambda c: setattr(c.mesh, "data", 3), "`mesh.data`=3 times `mesh.fsdp`=1 is 3"),
        (lambda c: setattr(c.mesh, "statistics", "host"), "`mesh.statistics`='host' must be one of global"),
        (lambda c: setattr(c, "keep_last", 0), "`keep_last`=0"),
        (lambda c: setattr(c, "published", 78.62), "`published`=78.62 must be a finite number"),
        (lambda c: setattr(c.optim, "ema", 1.5), "`optim.ema`=1.5"),
        (lambda c: setattr(c.optim, "accumulate", 3), "the 4 devices, in 3 parts (`optim.accumulate`)"),
        (lambda c: setattr(c.optim, "base_batch", 0), "`optim.base_batch`=0"),
        (lambda c: setattr(c.optim, "warmup_start", 0.2), "at most 0.1 (`optim.learning_rate`)"),
        (lambda c: setattr(c.optim, "warmup_start", 0.01), "does nothing without `optim.warmup_epochs`"),
        (lambda c: setattr(c.optim, "min_learning_rate", 0.2), "`optim.min_learning_rate`=0.2"),
        (lambda c: setattr(c.optim, "cosine_over", "rst"), "did you mean 'rest'"),
        (lambda c: setattr(c.optim, "schedule_by", "epochs"), "did you mean 'epoch'"),
        (lambda c: setattr(c.data, "resize", 7), "`data.resize`=7 must be a whole number, at least 8"),
        (lambda c: setattr(c.data, "randaugment", 31), "`data.randaugment`=31"),
        (lambda c: setattr(c.data, "jitter", -0.1), "`data.jitter`=-0.1"),
        (lambda c: setattr(c.data, "erasing", 1.1), "`data.erasing`=1.1"),
        (lambda c: setattr(c.data, "mixup", -1.0), "`data.mixup`=-1.0"),
        (lambda c: setattr(c.data, "cutmix", float("nan")), "`data.cutmix`=nan"),
        (lambda c: setattr(c.data, "source", "folder"), "`data.data_dir` is empty"),
        (lambda c: setattr(c.data, "source", "tfds"), "`data.name` is empty"),
        (lambda c: setattr(c.optim, "warmup_epochs", 2.0), "at most 1"),
        (lambda c: setattr(c.optim, "clip_norm", -1.0), "`optim.clip_norm`=-1.0"),
        (lambda c: setattr(c, "log_every", 0), "`log_every`=0 must be a whole number, at least 1"),
        (lambda c: setattr(c, "epochs", 1.5), "`epochs`=1.5 must be a whole number, at least 1"),
        (lambda c: setattr(c, "epochs", "3"), "`epochs`='3' must be a whole number, at least 1"),
        (lambda c: setattr(c, "batch_size", True), "`batch_size`=True must be a whole number"),
        (lambda c: setattr(c, "batch_size", float("nan")), "`batch_size`=nan must be a whole number"),
        (
            lambda c: setattr(c, "seed", 2**32),
            "`seed`=4294967296 must be a whole number, at least 0 and less",
        ),
        (lambda c: setattr(c, "scales", None), "`scales`=None must be text"),
        (lambda c: setattr(c, "mesh", None), "`mesh` is None: it must be a MeshConfig"),
        (lambda c: setattr(c.optim, "nesterov", "yes"), "`optim.nesterov`='yes' must be True or False"),
        (lambda c: setattr(c.data, "mean", (float("nan"),)), "`data.mean`=(nan,) must hold finite numbers"),
        (lambda c: setattr(c.data, "area", 0.5), "`data.area`=0.5 must hold 2 finite numbers, more"),
        (lambda c: setattr(c.data, "area", (0.9, 0.2)), "`data.area`=(0.9, 0.2) must hold 2 finite numbers"),
        (lambda c: setattr(c.data, "area", (2.0, 3.0)), "`data.area`=(2.0, 3.0)"),
        (lambda c: setattr(c.data, "area", (0.0, 1.0)), "more than 0 and at most 1, in ascending order, or"),
        (lambda c: setattr(c.data, "area", (0.5,)), "`data.area`=(0.5,)"),
        (lambda c: setattr(c.model, "name", 3), "`model.name`=3 must be text"),
    ],
)
def test_each_problem_is_named(change, message):
    config = train.Config()
    change(config)
    with pytest.raises(ValueError) as error:
        train.validate(config, device_count=4)
    assert message in str(error.value)


@pytest.mark.parametrize("mixing", [{"mixup": 0.2}, {"cutmix": 1.0}, {"mixup": 0.2, "cutmix": 1.0}])
def test_images_are_mixed_in_pairs(mixing):
    config = train.Config(batch_size=18, data=train.DataConfig(**mixing))
    train.validate(config, device_count=1)
    config.batch_size = 17
    names = " and ".join(f"`data.{name}`" for name in mixing)
    with pytest.raises(ValueError, match=rf"`batch_size`=17 .* 2, as .* \({names}\); .*: 16 and 18$"):
        train.validate(config, device_count=1)
    config.optim.accumulate = 3
    with pytest.raises(ValueError, match=r"in 3 parts .*, that share it nor by 2, as .*: 12 and 18$"):
        train.validate(config, device_count=1)


def test_an_epoch_at_rate_0_is_refused():
    optim = train.OptimConfig(schedule_by="epoch", warmup_epochs=1.0)
    with pytest.raises(ValueError, match="is an epoch at rate 0: give a small rate"):
        train.validate(train.Config(epochs=2, optim=optim))
    train.validate(train.Config(epochs=2, optim=dataclasses.replace(optim, warmup_start=1e-4)))


def test_networks_and_what_their_families_do_not_have():
    for name in ("repopt-vgg-b1", "repghost-0.5", "mobileone-s0"):
        for mode in ("plain", "search", "repvgg", "repghost", "mobileone", "acnet", "dbb"):
            train.validate(train.Config(model=train.ModelConfig(name=name, mode=mode)))
    with pytest.raises(ValueError, match=r"did you mean 'repghost-0.5"):
        train.validate(train.Config(model=train.ModelConfig(name="repghost-0.55")))
    mlp = train.ModelConfig(name="repmlpnet-t224", mode="repmlp")
    with pytest.raises(ValueError, match=r"maps .* whole tiles .*'repmlpnet-t224': .* a multiple of 224"):
        train.validate(train.Config(model=mlp, data=DataConfig(image_size=200)))
    with pytest.raises(ValueError, match=r"`model.post_se`=True does nothing with .*'repghost-0.5'"):
        train.validate(train.Config(model=train.ModelConfig(name="repghost-0.5", post_se=True)))


def test_detection_refuses_what_is_done_to_labelled_images():
    values = {"crop_padding": 1, "area": (0.1, 1.0), "resize": 64, "randaugment": 9}
    values |= {"jitter": 0.4, "erasing": 0.2, "mixup": 0.2, "cutmix": 1.0}
    own = {f.name for f in dataclasses.fields(DataConfig) if f.metadata.get("only") == CLASSIFY}
    assert {*values} == own
    with pytest.raises(ValueError) as error:
        train.validate(detecting(**values), device_count=1)
    for name, value in values.items():
        assert f"`data.{name}`={value!r} does nothing with `task`='detect'" in str(error.value)


def test_scales_go_with_the_modes_that_take_them():
    for mode in ("search", "repopt"):
        train.validate(train.Config(scales="depth", model=train.ModelConfig(mode=mode)))
    for mode in ("plain", "repvgg"):
        with pytest.raises(ValueError, match=f"`model.mode`='{mode}', which takes none"):
            train.validate(train.Config(scales="depth", model=train.ModelConfig(mode=mode)))
    with pytest.raises(ValueError, match=r"`model.mode`='repopt' needs `scales`: 'depth', 'ones', or"):
        train.validate(train.Config(model=train.ModelConfig(mode="repopt")))


@pytest.mark.parametrize("before", ["", "transfer:"])
def test_scales_are_found_in_the_users_folder(tmp_path, monkeypatch, before):
    """A shell does not expand a `~` after an equals sign."""
    monkeypatch.setenv("HOME", str(tmp_path))
    mode = train.ModelConfig(name="vgg-digits", mode="repopt")
    config = train.Config(scales=f"{before}~/scales", model=mode)
    with pytest.raises(ValueError, match=rf"`scales`='{before}~/scales' .*directory"):
        train.validate(config)
    task = train.build.make_task(config)
    info = task.open_data(config.data)[0].info
    save_scales(tmp_path / "scales", task.resolve_scales("depth", info))
    train.validate(config)
    train.build.check_scales_folder(config)
    read, depth = (task.resolve_scales(scales, info).vectors for scales in (config.scales, "depth"))
    jax.tree.map(np.testing.assert_allclose, read, depth)


def test_clipping_goes_with_every_mode():
    optim = train.OptimConfig(clip_norm=5.0)
    for scales, mode in (("", "search"), ("", "plain"), ("ones", "repopt"), ("", "acnet")):
        train.validate(train.Config(optim=optim, scales=scales, model=train.ModelConfig(mode=mode)))


@pytest.mark.parametrize(
    ("mode", "fields", "message"),
    [
        ("plain", {"rules": "init"}, "`rules`='init' does nothing with `model.mode`='plain'"),
        ("search", {"rules": "init", "scales": "ones"}, "only with 'repopt'"),
        ("repopt", {"rules": "intt", "scales": "ones"}, "did you mean 'init'"),
        ("plain", {"scales_mean": True}, "`scales_mean` with `scales`=''"),
        ("repopt", {"scales_mean": True, "scales": "depth"}, "which are the same in all channels"),
        ("plain", {"freeze_scales": 0.1}, "`freeze_scales`=0.1 does nothing with `model.mode`='plain'"),
        ("search", {"freeze_scales": 1.5}, "`freeze_scales`=1.5 must be a finite number, at least 0"),
    ],
)
def test_options_of_the_ladder_are_refused_where_they_mean_nothing(mode, fields, message):
    with pytest.raises(ValueError) as error:
        train.validate(train.Config(**fields, model=train.ModelConfig(mode=mode)))
    assert message in str(error.value)


def test_options_of_the_ladder(tmp_path):
    searched = str(tmp_path)
    for mode, fields in (
        ("repopt", {"rules": "init", "scales": "ones"}),
        ("repopt", {"rules": "multiplier", "scales": searched, "scales_mean": True}),
        ("search", {"freeze_scales": 0.1}),
    ):
        train.validate(train.Config(**fields, model=train.ModelConfig(mode=mode)))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"name": "adam"}, "did you mean 'adamw'"),
        (
            {"b1": 0.9},
            "`optim.b1`=0.9 does nothing with `optim.name`='sgd', only with 'adamw' or 'lion': leave it at "
            "None",
        ),
        ({"name": "adamw", "momentum": 0.8}, "only with 'sgd': leave it at 0.9"),
        ({"name": "adamw", "nesterov": False}, "`optim.nesterov`=False"),
        (
            {"name": "lion", "eps": 1e-8},
            "`optim.eps`=1e-08 does nothing with `optim.name`='lion', only with 'adamw'",
        ),
        ({"name": "lion", "b1": 1.0}, "at least 0 and less than 1, or None"),
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


def detecting(source="scenes", detect=None, **fields):
    own = {"image_size": 64} if source == "scenes" else {"image_size": 64, "data_dir": "not/there"}
    return train.Config(
        task="detect",
        model=train.ModelConfig(name="fcos-scenes"),
        data=train.DataConfig(source=source, **{**own, **fields}),
        detect=DetectConfig(**(detect or {})),
    )


OF_COCO = {
    "train_annotations": "annotations/instances_train2017.json",
    "eval_annotations": "annotations/instances_val2017.json",
    "train_images": "train2017",
    "eval_images": "val2017",
    "max_objects": 7,
    "sigmas": (0.1, 0.2, 0.3, 0.4),
    "flip_pairs": (0, 1, 3, 2),
    "max_pixels": 10**8,
}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (detecting(detect={"radius": 0.0}), "`detect.radius`=0.0 must be a finite number, more than 0"),
        (detecting(detect={"radius": -1.0}), "`detect.radius`=-1.0 must be a finite number"),
        (detecting(detect={"level_range": 0.0}), "`detect.level_range`=0.0 must be .*, more than 0"),
        (detecting(detect={"max_detections": 501}), "`detect.max_detections`=501 .* and at most 500"),
        (
            detecting(data_dir="digits"),
            "`data.data_dir`='digits' does nothing with .*: leave it at ''",
        ),
        (detecting(image_size=31), "`data.image_size`=31 must be at least 32 for scenes"),
        (detecting(zoom=(-1.0, 0.0)), r"`data.zoom`=\(-1.0, 0.0\) must hold 2 finite numbers, more than 0"),
        (detecting(zoom=(2.0, 1.0)), r"`data.zoom`=\(2.0, 1.0\) .* in ascending order, or None"),
        (detecting(scenes=(5,)), r"`data.scenes`=\(5,\) must hold 2 whole numbers, at least 1$"),
        (detecting("coco", sigmas=(0.0, 0.0)), r"`data.sigmas`=\(0.0, 0.0\) .* more than 0"),
        (detecting("coco", flip_pairs=(0, 1, 2)), r"`data.flip_pairs`=\(0, 1, 2\) must be pairs"),
        (detecting("coco", flip_pairs=(0, 1, 1, 2)), "`data.flip_pairs`=.* must be pairs"),
        (detecting("coco", flip_pairs=(0, -1)), r"`data.flip_pairs`=\(0, -1\) must hold whole numbers"),
        *((detecting(**{name: value}), f"`data.{name}`=.* does nothing") for name, value in OF_COCO.items()),
    ],
)
def test_detection_refuses_what_cannot_be(config, message):
    with pytest.raises(ValueError, match=message):
        train.validate(config, device_count=1)


def test_what_detection_takes():
    assert set(OF_COCO) == set(data.SOURCES["coco"].options) - {"data_dir", "name"}
    most = DetectConfig.__dataclass_fields__["max_detections"].metadata["at_most"]
    assert inspect.signature(decode).parameters["pre"].default == most
    config = detecting("coco", **OF_COCO, detect={"max_detections": 500})
    train.validate(config, device_count=1)  # looks for no file
    train.validate(detecting("coco", image_size=31), device_count=1)
    train.validate(detecting(image_size=32), device_count=1)
    assert train.from_json(train.to_json(config)) == config


def test_fields_of_coco_reach_its_reader(monkeypatch):
    calls = []

    @functools.wraps(data.open_coco)
    def opened(**options):
        calls.append(options)

    monkeypatch.setitem(data.SOURCES, "coco", data.SOURCES["coco"]._replace(open=opened))
    for config in (detecting("coco", **OF_COCO), detecting("coco")):
        Detection(config).open_data(config.data)
    assert calls == [{"data_dir": "not/there", **OF_COCO}, {"data_dir": "not/there"}]


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


def test_urls_and_missing_packages_are_refused(tmp_path, monkeypatch):
    config = train.Config(scales="gs://bucket/scales", tensorboard=True)
    config.data = train.DataConfig(source="folder", data_dir="s3://bucket/images")
    config.prune.run = "gs://bucket/run"
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(ValueError, match="cannot run") as error:
        train.validate(config)
    for part in (
        "`scales`='gs://bucket/scales' is a URL",
        "`data.data_dir`='s3",
        "`prune.run`='gs",
        "tensorboardX",
    ):
        assert part in str(error.value)
    with pytest.raises(ValueError, match=r"`out_dir` gs://bucket/run is a URL: give a folder"):
        train.RunFolder("gs://bucket/run")


@pytest.mark.parametrize("file", ["digits", "cifar10_small", "scenes"])
def test_runs_of_one_file_differ_only_in_network_and_scales(file):
    plain, repopt = (dataclasses.asdict(train.load_config(f"{file}:{arg}")) for arg in ("plain", "repopt"))
    differing = {name for name in plain if plain[name] != repopt[name]}
    assert differing == {"name", "scales", "model"}
    assert plain["model"] | {"mode": "repopt"} == repopt["model"]


def test_config_files_are_found_by_name():
    assert config_file("digits") == config_file("digits.py")
    assert train.load_config("digits:search").model.mode == "search"
    with pytest.raises(
        FileNotFoundError,
        match="ones are cifar100, cifar10_deep, cifar10_small, deep_digits, digits, imagenet, ladder, "
        "quantize_digits, repmlp, scenes",
    ):
        train.load_config("didgits:search")
    with pytest.raises(ValueError, match="must be one of plain, search"):
        train.load_config("digits:serch")


def test_a_config_file_must_return_a_config(tmp_path):
    (tmp_path / "mine.py").write_text("def get_config(arg=''):\n    return {}\n")
    with pytest.raises(TypeError, match="returned dict"):
        train.load_config(str(tmp_path / "mine.py"))


def test_a_config_file_is_read_each_time_and_nothing_is_left_beside_it(tmp_path, monkeypatch):
    """Also where it was changed within the second it was written in, to a text of the same length."""
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    path = tmp_path / "mine.py"
    text = "from repopt_jax import train\ndef get_config(arg): return train.Config(epochs={})"
    for epochs in (3, 4):
        path.write_text(text.format(epochs))
        os.utime(path, (1, 1))
        assert train.load_config(str(path)).epochs == epochs
    assert list(tmp_path.iterdir()) == [path]


def test_quickstart_refuses_before_its_search_what_a_later_run_would():
    for base, message in (
        (train.Config(model=train.ModelConfig(mode="repvgg")), "`base` has mode 'repvgg'"),
        (train.Config(optim=train.OptimConfig(name="lion")), "`optim.name` is 'lion': quickstart shows"),
        (train.Config(freeze_scales=0.5), "`freeze_scales`=0.5 does nothing with"),
    ):
        with pytest.raises(ValueError, match=message):
            comparison_of(base)
    with pytest.raises(ValueError, match="`seeds` is 0"):
        comparison_of(train.Config(), seeds=0)


def test_the_config_of_a_run_is_read_from_its_folder(tmp_path):
    config = train.load_config("digits:depth")
    path = tmp_path / "config.json"
    path.write_text(to_json(config))
    assert train.load_config(str(path)) == config
    path.write_text('{"epoch": 3}')
    with pytest.raises(ValueError, match=r"is not the config\.json of a run: unknown config fields: epoch"):
        train.load_config(str(path))
    path.write_text('{"epoch": 3, "seed": "0", "data": {"mean": 0.3}, "optim": {"ema": [1]}}')
    with pytest.raises(ValueError, match="is not the config") as error:
        train.load_config(str(path))
    assert str(error.value).endswith(
        "of a run: unknown config fields: epoch; `seed`='0' must be a whole number; `data.mean`=0.3 must "
        "hold finite numbers; `optim.ema`=(1,) must be a finite number"
    )


def names_of(section, prefix=""):
    for field in dataclasses.fields(section):
        value = getattr(section, field.name)
        if dataclasses.is_dataclass(value):
            yield from names_of(value, f"{prefix}{field.name}.")
        else:
            yield prefix + field.name


@pytest.mark.parametrize("name", list(names_of(train.Config())))
def test_a_nan_is_one_complaint_that_names_its_field(name):
    """In any field: it has one place, and no other field is blamed for it."""
    config = train.Config()
    *parts, last = name.split(".")
    setattr(getattr(config, parts[0]) if parts else config, last, float("nan"))
    with pytest.raises(ValueError, match=rf"^this config cannot run: `{name}`=nan must [^;]*$"):
        train.validate(config, device_count=1)


VALUES = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.tuples(st.floats())
)


@given(
    changes=st.dictionaries(st.sampled_from(list(names_of(train.Config()))), VALUES, min_size=1, max_size=4)
)
@settings(max_examples=300, deadline=None)
def test_whatever_values_a_config_has(changes):
    """It is valid, or refused with every field named that is wrong."""
    config = train.Config()
    for name, value in changes.items():
        *parts, last = name.split(".")
        setattr(getattr(config, parts[0]) if parts else config, last, value)
    try:
        train.validate(config, device_count=1)
    except ValueError as error:
        if not str(error).startswith("this config cannot run: "):
            raise


OWN = """
from flax import nnx
from repopt_jax import models, train
def make(*, num_classes, in_channels, dtype, rngs):
    return nnx.Linear(in_channels, num_classes, rngs=rngs)
models.register(models.Entry("config-own", make))
def get_config(arg=""):
    return train.Config(model=train.ModelConfig(name=arg or "config-own"))
"""


@pytest.fixture
def own_file(tmp_path, monkeypatch):
    """A config file that registers a network."""
    monkeypatch.setattr(registry, "NETWORKS", dict(registry.NETWORKS))
    monkeypatch.setattr(registry, "FILES", {})
    path = tmp_path / "mine.py"
    path.write_text(OWN)
    return path


def test_a_config_remembers_the_file_that_registers_its_network(own_file):
    config = train.load_config(str(own_file))
    assert config.model.file == str(own_file)
    assert train.load_config(f"{own_file}:vgg-digits").model.file == str(
        own_file
    )  # the name may be overridden
    assert train.load_config("digits").model.file == ""
    train.validate(config)
    registry.NETWORKS.pop("config-own")
    train.validate(config)  # imports it
    assert "config-own" in registry.NETWORKS
    moved = dataclasses.replace(config, model=dataclasses.replace(config.model, file="/elsewhere/mine.py"))
    assert differing_fields(config, moved) == []
    train.validate(moved)  # which is not needed while the network is known
    config.model.file = str(own_file.with_name("copy.py"))
    own_file.with_name("copy.py").write_text(OWN)
    with pytest.raises(
        ValueError, match=r"'config-own' is that of .*mine\.py in this program, and .*copy\.py"
    ):
        train.validate(config)


@pytest.mark.parametrize(
    ("file", "error", "message"),
    [
        (
            "/elsewhere/mine.py",
            FileNotFoundError,
            r"'config-own' is registered by /elsewhere/mine\.py .* change",
        ),
        ("mine.py", ValueError, "`model.file`='mine.py', .* must be an absolute path"),
        (
            None,
            ValueError,
            r"other\.py \(`model.file`\) does not register the network 'config-own': when it is",
        ),
        ("", ValueError, "`model.name`='config-own' must be one of"),
    ],
)
def test_a_file_that_does_not_register_the_network(own_file, file, error, message):
    config = train.load_config(str(own_file))
    registry.NETWORKS.pop("config-own")
    (own_file.with_name("other.py")).write_text("")
    config.model.file = str(own_file.with_name("other.py")) if file is None else file
    with pytest.raises(error, match=message):
        train.validate(config)


def test_a_comparison_remembers_it_as_well(own_file):
    own_file.write_text(
        f"{OWN}\ndef get_comparison(arg):\n    return Comparison('own', {{'own': get_config()}})\n"
    )
    with own_file.open("a") as file:
        file.write("from repopt_jax.report.comparison import Comparison\n")
    assert load_comparison(str(own_file)).ways["own"].model.file == str(own_file)


def test_smoke_keeps_a_network_of_ones_own(own_file):
    assert smoke(train.load_config(str(own_file))).model.name == "config-own"
