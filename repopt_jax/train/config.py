"""What a run is: plain typed dataclasses, returned by the files of `configs/` and checked once by `validate`.

A config file defines `get_config(arg="") -> Config`. The dataclasses are not frozen, because
`ml_collections.config_flags` writes `--config.optim.learning_rate=0.05` into them; nothing changes one after
that.
"""

import dataclasses
import difflib
import math
import os
from typing import Any

import jax

from repopt_jax.data import SOURCES
from repopt_jax.data.scenes import LEAST_SIZE
from repopt_jax.models import DETECTORS, KINDS, VGG_VARIANTS
from repopt_jax.nn.blocks import ACTIVATIONS
from repopt_jax.nn.csla import FORMS

# Task -> its networks, and where its images can come from.
TASKS = {"classify": (VGG_VARIANTS, SOURCES), "detect": (DETECTORS, ("scenes", "coco"))}
DTYPES = ("float32", "bfloat16")
DECAY_SCALINGS = ("none", "batch")
NAMED_SCALES = ("ones", "depth")
RULES = ("both", "init", "multiplier")
# `detection.decode` looks at this many candidates of an image.
MOST_DETECTIONS = 500
# Fields of source "coco" only.
COCO_FIELDS = (
    *("train_annotations", "eval_annotations", "train_images", "eval_images"),
    *("max_objects", "sigmas", "flip_pairs"),
)
# Optimizer -> the fields of `OptimConfig` that are its own.
OPTIMIZERS = {"sgd": ("momentum", "nesterov"), "adamw": ("b1", "b2", "eps"), "lion": ("b1", "b2")}


@dataclasses.dataclass
class ModelConfig:
    """The network.

    Attributes:
      variant: a row of `models.VGG_VARIANTS`, or of `models.DETECTORS` where the task is "detect".
      kind: "search" (scales are trained), "target" (plain kernels), "repvgg" (branches with their own batch
        norm) or "csla" (constant scales, the twin of a target run).
      form: how a search or csla layer computes: "merged" (one convolution) or "branches".
      post_se: adds squeeze-and-excitation after every block (classification).
      dtype: of the computation, "float32" or "bfloat16"; parameters and statistics stay float32. Detectors
        compute in float32.
      activation: of a detector, "relu" or "relu6". Scales are searched with the one that trains with them.
    """

    variant: str = "digits"
    kind: str = "target"
    form: str = "merged"
    post_se: bool = False
    dtype: str = "float32"
    activation: str = "relu"


@dataclasses.dataclass
class DataConfig:
    """The images.

    Attributes:
      source: "digits" (embedded), "folder" (`train/<class>/*`, `test|val/<class>/*`) or "tfds" (a prepared
        dataset); for detection "scenes" (composed of the embedded digits) or "coco" (annotations in COCO's
        format and a folder of images).
      name: the dataset's name, for "tfds".
      data_dir: the folder, or the TFDS directory; of source "digits" where the prepared files are kept, ""
        for the user's cache. Scenes have none.
      train_annotations, eval_annotations: of source "coco", the JSON files, relative to `data_dir`; "" for
        `train.json` and `val.json`. COCO's own are `annotations/instances_train2017.json` and so on.
      train_images, eval_images: of source "coco", the folders of their images, relative to `data_dir`
        (`train2017`); "" for the one named as the JSON file is, without its ending, or else `images`.
      image_size: side, in pixels, of the square that the network sees.
      crop_padding: pixels of zeros around a training image before its random crop; 0 for no crop.
      flip: mirrors half of the training images.
      area: range of the share of a training image that is cut out and resized, at random; None for
        the whole image. Classification, as is `crop_padding`.
      zoom: range of the factor by which a training image is made larger or smaller, at random; None for
        none. Detection.
      scenes: of source "scenes", how many there are for training and for evaluation.
      scenes_seed: what the scenes are made from.
      max_objects: of source "coco", objects of one image that a batch has room for; None for the largest
        number in a training image, crowds not counted, but at most 100. The smallest of more are left out
        of training.
      sigmas: of source "coco", for each keypoint how exact its place is (COCO's constants); None for those of
        COCO's persons, and 0.05 for others.
      flip_pairs: of source "coco", the keypoints that trade places in a mirrored image, counted from 0, pair
        after pair: 0, 1, 2, 3 means that 0 and 1 do, and 2 and 3. None for what their names say.
      mean, std: of each channel, for pixels in [0, 1].
      train_limit, eval_limit: use that many images only; None for all.
      workers: processes that decode; 0 decodes in threads of this one.
      prefetch: batches prepared ahead.
    """

    source: str = "digits"
    name: str = ""
    data_dir: str = ""
    train_annotations: str = ""
    eval_annotations: str = ""
    train_images: str = ""
    eval_images: str = ""
    image_size: int = 8
    crop_padding: int = 0
    flip: bool = False
    area: tuple[float, ...] | None = None
    zoom: tuple[float, ...] | None = None
    scenes: tuple[int, ...] = (4096, 256)
    scenes_seed: int = 0
    max_objects: int | None = None
    sigmas: tuple[float, ...] | None = None
    flip_pairs: tuple[int, ...] | None = None
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    train_limit: int | None = None
    eval_limit: int | None = None
    workers: int = 0
    prefetch: int = 2


@dataclasses.dataclass
class OptimConfig:
    """The optimizer; the learning rate warms up linearly, then follows a cosine to 0, step by step.

    Attributes:
      name: "sgd", "adamw" or "lion".
      learning_rate: the highest.
      momentum, nesterov: of SGD.
      b1, b2: of AdamW and Lion, eps: of AdamW; None for Optax's value.
      weight_decay: for SGD added to the (multiplied) gradient; for the others decoupled from it, which takes
        far larger values.
      decay_scaling: "batch" multiplies `weight_decay` by batch * max(1, round(64 / batch)) / 64, as YOLOv6
        and the detectors that follow it do: 1 for every batch that divides 64, 2 at 128.
      warmup_epochs: epochs of the linear rise.
      label_smoothing: share of the label's probability that is spread over all classes.
      clip_norm: the largest global norm of a gradient; None for no clipping. With scales it is the norm of
        the gradient that the network with branches would have.
    """

    name: str = "sgd"
    learning_rate: float = 0.1
    momentum: float = 0.9
    nesterov: bool = True
    b1: float | None = None
    b2: float | None = None
    eps: float | None = None
    weight_decay: float = 4e-5
    decay_scaling: str = "none"
    warmup_epochs: float = 0.0
    label_smoothing: float = 0.0
    clip_norm: float | None = None


@dataclasses.dataclass
class DetectConfig:
    """Detection: who answers for an object, the weights of the losses, and what counts as a detection.

    Attributes:
      radius: in strides, more than 0; locations this near to an object's centre answer for it.
      level_range: a level is for objects of up to this many of its strides, and of more than half of that;
        more than 0.
      box_weight, centerness_weight, keypoint_weight: of the losses, that of the classes being 1.
      score_threshold: the least score of a detection.
      iou_threshold: boxes of one class that overlap more are one object.
      max_detections: in an image, at most 500.
    """

    radius: float = 1.5
    level_range: float = 8.0
    box_weight: float = 1.0
    centerness_weight: float = 1.0
    keypoint_weight: float = 1.0
    score_threshold: float = 0.05
    iou_threshold: float = 0.6
    max_detections: int = 100


@dataclasses.dataclass
class Config:
    """One run.

    Attributes:
      name: what reports call it.
      task: "classify" or "detect".
      seed: of the initial weights and of the order and augmentation of the images.
      epochs, batch_size, eval_batch_size: batch sizes are over all devices.
      scales: "", "ones", "depth", or the path of a scales directory. For kind "target", "" is plain
        SGD, and anything else re-initialises the network by the scales and multiplies its
        gradients. For "search" they are where the scales start and for "csla" the constants; there
        "" means "depth".
      scales_mean: replaces each vector of searched scales by its mean over the channels.
      rules: what scales do to a "target" network: "both", "init" (re-initialise it only) or
        "multiplier" (multiply its gradients only).
      freeze_scales: share of the steps of a "search" after which its scales stay as they are; None
        for never.
      eval_every: epochs between evaluations; the last epoch is always evaluated.
      checkpoint_every: steps between checkpoints; 0 means at the end of each epoch.
      log_every: steps that one line of `metrics.jsonl` averages over.
      fsdp: devices that share one copy of the state; 1 keeps a copy on every device.
      tensorboard: also writes TensorBoard files (needs the `tensorboard` extra).
    """

    name: str = "run"
    task: str = "classify"
    seed: int = 0
    epochs: int = 1
    batch_size: int = 64
    eval_batch_size: int = 256
    scales: str = ""
    scales_mean: bool = False
    rules: str = "both"
    freeze_scales: float | None = None
    eval_every: int = 1
    checkpoint_every: int = 0
    log_every: int = 20
    fsdp: int = 1
    tensorboard: bool = False
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    optim: OptimConfig = dataclasses.field(default_factory=OptimConfig)
    detect: DetectConfig = dataclasses.field(default_factory=DetectConfig)


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
        *_optim_problems(config.optim),
        *_scales_problems(config),
        *_data_problems(config.data),
        *_task_problems(config),
    ]
    if problems:
        raise ValueError("this config cannot run: " + "; ".join(problems))


def _choice_problems(config: Config) -> list[str]:
    model = config.model
    variants, sources = TASKS.get(config.task, TASKS["classify"])
    choices = (
        ("task", config.task, tuple(TASKS)),
        ("model.variant", model.variant, tuple(variants)),
        ("model.kind", model.kind, KINDS),
        ("model.form", model.form, FORMS),
        ("model.dtype", model.dtype, DTYPES),
        ("model.activation", model.activation, tuple(ACTIVATIONS)),
        ("data.source", config.data.source, sources),
        ("optim.decay_scaling", config.optim.decay_scaling, DECAY_SCALINGS),
        ("optim.name", config.optim.name, tuple(OPTIMIZERS)),
        ("rules", config.rules, RULES),
    )
    return [
        f"`{name}`={value!r} must be one of {', '.join(known)}{_closest(value, known)}"
        for name, value, known in choices
        if value not in known
    ]


def _closest(value: str, known: tuple[str, ...]) -> str:
    near = difflib.get_close_matches(str(value), known, n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""


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
        ("fsdp", config.fsdp, 1, math.inf),
        ("freeze_scales", config.freeze_scales, 0, 1),
        ("data.image_size", data.image_size, 1, math.inf),
        ("data.crop_padding", data.crop_padding, 0, math.inf),
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
        ("optim.momentum", optim.momentum, 0, 1),
        ("optim.b1", optim.b1, 0, 1),
        ("optim.b2", optim.b2, 0, 1),
        ("optim.eps", optim.eps, 0, math.inf),
        ("optim.weight_decay", optim.weight_decay, 0, math.inf),
        ("optim.warmup_epochs", optim.warmup_epochs, 0, config.epochs),
        ("optim.label_smoothing", optim.label_smoothing, 0, 1),
        ("optim.clip_norm", optim.clip_norm, 0, math.inf),
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
    problems = [
        f"`{name}`={size} is not divisible by the {devices} devices that share it; "
        f"the nearest sizes that are: {_nearest_multiples(size, devices)}"
        for name, size in (
            ("batch_size", config.batch_size),
            ("eval_batch_size", config.eval_batch_size),
        )
        if size > 0 and size % devices
    ]
    if config.fsdp > 0 and devices % config.fsdp:
        problems.append(f"`fsdp`={config.fsdp} does not divide the {devices} devices")
    return problems


def _nearest_multiples(size: int, step: int) -> str:
    below = size // step * step
    return " and ".join(str(n) for n in (below, below + step) if n > 0)


def _optim_problems(optim: OptimConfig) -> list[str]:
    problems = [
        f"`optim.{field}`=1 keeps an average that no gradient enters: give less"
        for field in ("b1", "b2")
        if getattr(optim, field) == 1
    ]
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
    if kind == "repvgg":
        problems.append(f"`scales`={scales!r} with kind 'repvgg', which takes none: leave it empty")
    if scales not in NAMED_SCALES and not os.path.isdir(scales):
        problems.append(
            f"`scales`={scales!r} is neither {' nor '.join(NAMED_SCALES)} nor a directory: "
            "run the search first, or give the directory that it wrote"
        )
    return problems


def _data_problems(data: DataConfig) -> list[str]:
    problems = []
    if data.source in ("folder", "coco") and not data.data_dir:
        problems.append("`data.data_dir` is empty: give the image folder")
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
    if data.source == "tfds" and not data.name:
        problems.append("`data.name` is empty: give the name of the TFDS dataset")
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
            ("data.crop_padding", data.crop_padding, 0),
            ("data.area", data.area, None),
            ("data.name", data.name, ""),
        ]
    else:
        foreign += [("model.activation", config.model.activation, "relu"), ("data.zoom", data.zoom, None)]
        foreign += [
            (f"detect.{name}", value, getattr(defaults.detect, name))
            for name, value in dataclasses.asdict(config.detect).items()
        ]
    if data.source != "coco":
        foreign += [
            (f"data.{name}", getattr(data, name), getattr(defaults.data, name)) for name in COCO_FIELDS
        ]
    if data.source == "scenes":
        foreign += [("data.data_dir", data.data_dir, "")]
    else:
        foreign += [
            ("data.scenes", tuple(data.scenes), defaults.data.scenes),
            ("data.scenes_seed", data.scenes_seed, defaults.data.scenes_seed),
        ]
    return [
        f"`{name}`={value!r} does nothing with `task`={config.task!r} and `data.source`={data.source!r}: "
        f"leave it at {default!r}"
        for name, value, default in foreign
        if value != default
    ]
