"""Whether a config can run: everything that can be said before data are read, all problems at once."""

import dataclasses
import difflib
import importlib.util
import math
import os
from typing import Any

import jax

from repopt_jax.data import SOURCES
from repopt_jax.data.scenes import LEAST_SIZE
from repopt_jax.data.transforms import LARGEST_MAGNITUDE
from repopt_jax.models import DETECTORS, KINDS
from repopt_jax.nn.blocks import ACTIVATIONS
from repopt_jax.nn.csla import FORMS
from repopt_jax.train.config import OPTIMIZERS, Config, DataConfig, ModelConfig, OptimConfig
from repopt_jax.train.networks import SCALED_KINDS, find_network, network_kinds, network_names
from repopt_jax.train.rundir import MOUNTED
from repopt_jax.train.sharding import mesh_problems

# Task -> where its images can come from.
SOURCES_OF = {
    task: tuple(name for name, entry in SOURCES.items() if entry.task == task)
    for task in ("classify", "detect")
}
DTYPES = ("float32", "bfloat16")
DECAY_SCALINGS = ("none", "batch")
NAMED_SCALES = ("ones", "depth")
RULES = ("both", "init", "multiplier")
STATISTICS = ("global", "device")
COSINES = ("rest", "run")
SCHEDULES = ("step", "epoch")
# `detection.decode` looks at this many candidates of an image.
MOST_DETECTIONS = 500
# Fields of classification's images.
OF_IMAGES = ("crop_padding", "area", "resize", "randaugment", "jitter", "erasing", "mixup", "cutmix")
# Fields that only some sources take; `image_size` is also that of the network's input.
SOURCE_FIELDS = {option for entry in SOURCES.values() for option in entry.options} - {"image_size"}


def validate(config: Config, *, device_count: int | None = None) -> None:
    """Checks everything that can be checked before data are read.

    Args:
      config: the run.
      device_count: devices that a batch is divided over; all of this job's when not given.

    Raises:
      ValueError: listing every problem, not only the first.
    """
    devices = jax.device_count() if device_count is None else device_count
    problems = [
        *_choice_problems(config),
        *_range_problems(config),
        *_device_problems(config, devices),
        *_kind_problems(config),
        *_optim_problems(config.optim),
        *_scales_problems(config),
        *_data_problems(config.data),
        *_task_problems(config),
        *_package_problems(config),
    ]
    if problems:
        raise ValueError("this config cannot run: " + "; ".join(problems))


def _package_problems(config: Config) -> list[str]:
    if config.tensorboard and importlib.util.find_spec("tensorboardX") is None:
        return [
            "`tensorboard`=True needs tensorboardX: install `repopt_jax[tensorboard]`, or set it to False"
        ]
    return []


def _choice_problems(config: Config) -> list[str]:
    model = config.model
    detects = config.task == "detect"
    sources = SOURCES_OF.get(config.task, SOURCES_OF["classify"])
    choices = (
        ("task", config.task, tuple(SOURCES_OF)),
        ("model.variant", model.variant, tuple(DETECTORS) if detects else network_names()),
        ("model.kind", model.kind, KINDS if detects else network_kinds()),
        ("model.form", model.form, FORMS),
        ("model.dtype", model.dtype, DTYPES),
        ("model.activation", model.activation, tuple(ACTIVATIONS)),
        ("data.source", config.data.source, sources),
        ("optim.decay_scaling", config.optim.decay_scaling, DECAY_SCALINGS),
        ("optim.cosine_over", config.optim.cosine_over, COSINES),
        ("optim.schedule_by", config.optim.schedule_by, SCHEDULES),
        ("optim.name", config.optim.name, tuple(OPTIMIZERS)),
        ("rules", config.rules, RULES),
        ("mesh.statistics", config.mesh.statistics, STATISTICS),
    )
    return [
        f"`{name}`={value!r} must be one of {', '.join(known)}{_closest(value, known)}"
        for name, value, known in choices
        if value not in known
    ]


def _closest(value: str, known: tuple[str, ...]) -> str:
    near = difflib.get_close_matches(str(value), known, n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""


def _kind_problems(config: Config) -> list[str]:
    """A kind, or a field of the network, that its family has not."""
    model, defaults = config.model, ModelConfig()
    if config.task == "detect" or model.variant not in network_names():  # said where the choices are checked
        return []
    family, _ = find_network(model.variant)
    problems = [
        f"`model.{name}`={getattr(model, name)!r} does nothing with `model.variant`={model.variant!r}: "
        f"leave it at {getattr(defaults, name)!r}"
        for name in ("form", "post_se")
        if name not in family.options and getattr(model, name) != getattr(defaults, name)
    ]
    if model.kind in network_kinds() and model.kind not in family.kinds:
        problems.append(
            f"`model.kind`={model.kind!r} with `model.variant`={model.variant!r}, which comes as "
            f"{', '.join(family.kinds)} only"
        )
    return problems


def _range_problems(config: Config) -> list[str]:
    """Every number against its smallest (and largest) value; NaN and infinity fail each of them."""
    optim, data, detect = config.optim, config.data, config.detect
    ranges = (
        ("seed", config.seed, 0, math.inf),
        ("epochs", config.epochs, 1, math.inf),
        ("batch_size", config.batch_size, 1, math.inf),
        ("eval_batch_size", config.eval_batch_size, 1, math.inf),
        ("eval_every", config.eval_every, 1, math.inf),
        ("checkpoint_every", config.checkpoint_every, 0, math.inf),
        ("log_every", config.log_every, 1, math.inf),
        ("keep_last", config.keep_last, 1, math.inf),
        ("keep_best", config.keep_best, 0, math.inf),
        ("published", config.published, 0, 1),
        ("mesh.data", config.mesh.data, 1, math.inf),
        ("mesh.fsdp", config.mesh.fsdp, 1, math.inf),
        ("freeze_scales", config.freeze_scales, 0, 1),
        ("data.image_size", data.image_size, 1, math.inf),
        ("data.crop_padding", data.crop_padding, 0, math.inf),
        ("data.resize", data.resize, data.image_size, math.inf),
        ("data.randaugment", data.randaugment, 1, LARGEST_MAGNITUDE),
        ("data.jitter", data.jitter, 0, math.inf),
        ("data.erasing", data.erasing, 0, 1),
        ("data.mixup", data.mixup, 0, math.inf),
        ("data.cutmix", data.cutmix, 0, math.inf),
        *(("data.scenes", count, 1, math.inf) for count in data.scenes),
        ("data.scenes_seed", data.scenes_seed, 0, math.inf),
        ("data.max_objects", data.max_objects, 1, math.inf),
        *(("data.sigmas", sigma, 0, math.inf) for sigma in data.sigmas or ()),
        *(("data.flip_pairs", keypoint, 0, math.inf) for keypoint in data.flip_pairs or ()),
        ("data.train_limit", data.train_limit, 1, math.inf),
        ("data.eval_limit", data.eval_limit, 1, math.inf),
        ("data.workers", data.workers, 0, math.inf),
        ("data.prefetch", data.prefetch, 0, math.inf),
        ("optim.learning_rate", optim.learning_rate, 0, math.inf),
        ("optim.base_batch", optim.base_batch, 1, math.inf),
        ("optim.warmup_start", optim.warmup_start, 0, optim.learning_rate),
        ("optim.min_learning_rate", optim.min_learning_rate, 0, optim.learning_rate),
        ("optim.momentum", optim.momentum, 0, 1),
        ("optim.b1", optim.b1, 0, 1),
        ("optim.b2", optim.b2, 0, 1),
        ("optim.eps", optim.eps, 0, math.inf),
        ("optim.weight_decay", optim.weight_decay, 0, math.inf),
        ("optim.warmup_epochs", optim.warmup_epochs, 0, config.epochs),
        ("optim.label_smoothing", optim.label_smoothing, 0, 1),
        ("optim.clip_norm", optim.clip_norm, 0, math.inf),
        ("optim.accumulate", optim.accumulate, 1, math.inf),
        ("optim.ema", optim.ema, 0, 1),
        ("detect.radius", detect.radius, 0, math.inf),
        ("detect.level_range", detect.level_range, 0, math.inf),
        ("detect.box_weight", detect.box_weight, 0, math.inf),
        ("detect.centerness_weight", detect.centerness_weight, 0, math.inf),
        ("detect.keypoint_weight", detect.keypoint_weight, 0, math.inf),
        ("detect.score_threshold", detect.score_threshold, 0, 1),
        ("detect.iou_threshold", detect.iou_threshold, 0, 1),
        ("detect.max_detections", detect.max_detections, 1, MOST_DETECTIONS),
    )
    problems = [
        f"`{name}`={value} must be a finite number, at least {low}"
        + (f" and at most {high}" if high != math.inf else "")
        for name, value, low, high in ranges
        if value is not None and not (math.isfinite(value) and low <= value <= high)
    ]
    if optim.clip_norm == 0:
        problems.append("`optim.clip_norm`=0 would clip every gradient to nothing: leave it out (None)")
    problems += [
        f"`detect.{name}`=0 must be more than 0: no location would answer for any object"
        for name in ("radius", "level_range")
        if getattr(detect, name) == 0
    ]
    return problems


def _device_problems(config: Config, devices: int) -> list[str]:
    parts = devices * max(config.optim.accumulate, 1)
    shared = (
        ("batch_size", config.batch_size, parts),
        ("eval_batch_size", config.eval_batch_size, devices),
    )
    problems = [
        f"`{name}`={size} is not divisible by {_sharers(devices, count // devices)} that share it; "
        f"the nearest sizes that are: {_nearest_multiples(size, count)}"
        for name, size, count in shared
        if size > 0 and size % count
    ]
    mesh = config.mesh
    if mesh.fsdp < 1 or (mesh.data is not None and mesh.data < 1):  # said where the ranges are checked
        return problems
    return problems + mesh_problems(mesh.data, mesh.fsdp, devices)


def _sharers(devices: int, accumulate: int) -> str:
    parts = f", in {accumulate} parts (`optim.accumulate`)," if accumulate > 1 else ""
    return f"the {devices} devices{parts}"


def _nearest_multiples(size: int, step: int) -> str:
    below = size // step * step
    return " and ".join(str(n) for n in (below, below + step) if n > 0)


def _optim_problems(optim: OptimConfig) -> list[str]:
    problems = [
        f"`optim.{field}`=1 keeps an average that no gradient enters: give less"
        for field in ("b1", "b2")
        if getattr(optim, field) == 1
    ]
    if optim.schedule_by == "epoch" and optim.warmup_epochs and not optim.warmup_start:
        problems.append(
            "`optim.warmup_start`=0 with `optim.schedule_by`='epoch' is an epoch at rate 0: "
            "give a small rate, such as 1e-4"
        )
    if optim.warmup_start and not optim.warmup_epochs:
        problems.append(
            f"`optim.warmup_start`={optim.warmup_start} does nothing without `optim.warmup_epochs`: "
            "leave it at 0"
        )
    own, defaults = OPTIMIZERS.get(optim.name), OptimConfig()
    if own is None:  # said where the choices are checked
        return problems
    # Fields of another optimizer would do nothing.
    foreign = sorted({field for fields in OPTIMIZERS.values() for field in fields} - set(own))
    return problems + [
        f"`optim.{field}`={getattr(optim, field)} with `optim.name`={optim.name!r}, which takes "
        f"{', '.join(own)}: leave it at {getattr(defaults, field)}"
        for field in foreign
        if getattr(optim, field) != getattr(defaults, field)
    ]


def _scales_problems(config: Config) -> list[str]:
    scales, kind = config.scales, config.model.kind
    problems = []
    if config.rules != "both" and (kind != "target" or not scales):
        problems.append(
            f"`rules`={config.rules!r} with kind {kind!r} and `scales`={scales!r}: only a target network "
            "with scales follows the rules, leave it 'both'"
        )
    if config.scales_mean and scales in ("", *NAMED_SCALES):
        problems.append(
            f"`scales_mean` with `scales`={scales!r}, which are the same in all channels: give the "
            "directory of searched ones"
        )
    if config.freeze_scales is not None and kind != "search":
        problems.append(
            f"`freeze_scales`={config.freeze_scales} with kind {kind!r}, which trains no scales: "
            "leave it out (None)"
        )
    if not scales:
        return problems
    if kind in network_kinds() and kind not in SCALED_KINDS:
        problems.append(f"`scales`={scales!r} with kind {kind!r}, which takes none: leave it empty")
    if "://" in scales:
        problems.append(f"`scales`={scales!r} is a URL: {MOUNTED}")
    elif scales not in NAMED_SCALES and not os.path.isdir(scales):
        problems.append(
            f"`scales`={scales!r} is neither {' nor '.join(NAMED_SCALES)} nor a directory: "
            "run the search first, or give the directory that it wrote"
        )
    return problems


def _data_problems(data: DataConfig) -> list[str]:
    problems = []
    required = SOURCES[data.source].required if data.source in SOURCES else ()
    problems += [
        f"`data.{name}` is empty: `data.source`={data.source!r} needs it"
        for name in required
        if not getattr(data, name)
    ]
    if "://" in (data.data_dir or ""):
        problems.append(f"`data.data_dir`={data.data_dir!r} is a URL: {MOUNTED}")
    if len(data.scenes) != 2:
        problems.append(f"`data.scenes`={data.scenes} must be two numbers, for training and for evaluation")
    if data.source == "scenes" and data.image_size < LEAST_SIZE:
        problems.append(f"`data.image_size`={data.image_size} must be at least {LEAST_SIZE} for scenes")
    paired = data.flip_pairs or ()
    if len(paired) % 2 or len(set(paired)) < len(paired):
        problems.append(
            f"`data.flip_pairs`={paired} must be pairs of different keypoints, one after another: 0, 1, 2, 3 "
            "means that 0 and 1 trade places, and 2 and 3"
        )
    if not all(value > 0 for value in data.std):
        problems.append(f"`data.std`={data.std} must be positive")
    return problems


def _task_problems(config: Config) -> list[str]:
    """Fields of the other task would do nothing."""
    data, defaults = config.data, Config()
    foreign: list[tuple[str, Any, Any]] = []
    if config.task == "detect":
        foreign += [
            ("model.post_se", config.model.post_se, False),
            ("model.dtype", config.model.dtype, "float32"),
            ("optim.label_smoothing", config.optim.label_smoothing, 0.0),
            *((f"data.{name}", getattr(data, name), getattr(defaults.data, name)) for name in OF_IMAGES),
        ]
    else:
        foreign += [("model.activation", config.model.activation, "relu"), ("data.zoom", data.zoom, None)]
        foreign += [
            (f"detect.{name}", value, getattr(defaults.detect, name))
            for name, value in dataclasses.asdict(config.detect).items()
        ]
    if data.source in SOURCES:
        unused = sorted(SOURCE_FIELDS - set(SOURCES[data.source].options))
        foreign += [(f"data.{name}", getattr(data, name), getattr(defaults.data, name)) for name in unused]
    return [
        f"`{name}`={value!r} does nothing with `task`={config.task!r} and `data.source`={data.source!r}: "
        f"leave it at {default!r}"
        for name, value, default in foreign
        if value != default
    ]
