"""What a run is: plain typed dataclasses, and how they are read and written.

A config file defines `get_config(arg="") -> Config`. Its argument names one of its runs; `,smoke` after it
(`digits.py:search,smoke`) asks for `smoke` of that run. Everything that is known of a field stands at the
field: its default, what it means, its range or choices, and where it applies; `rules.validate` checks all of
that. The dataclasses are not frozen, because `ml_collections.config_flags` writes
`--config.optim.learning_rate=0.05` into them; nothing changes one after that.
"""

import dataclasses
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, get_args

from repopt_jax import jsontext, models, userfile
from repopt_jax.arguments import check_kind, check_path, is_of, must_be
from repopt_jax.core.published import STRUCTURES
from repopt_jax.data import SOURCES
from repopt_jax.data.transforms import MAX_MAGNITUDE
from repopt_jax.hints import did_you_mean
from repopt_jax.models.registry import registering
from repopt_jax.nn.block import ACTIVATIONS
from repopt_jax.quantize.layers import MAX_BITS, MAX_SCALE_BITS, MIN_BITS, Per, WeightRange
from repopt_jax.surgery.prepare import Mode
from repopt_jax.train.loggers import LOGGERS
from repopt_jax.train.own import note_file

# Task -> where its images can come from.
SOURCES_OF = {
    task: tuple(name for name, entry in SOURCES.items() if entry.task == task)
    for task in ("classify", "detect")
}
NAMED_SCALES = ("ones", "depth")
LAW, TRANSFER = "law:", "transfer:"  # before a number, and before a folder
SEARCH = "search:"  # before the name of a search of the comparison that a run belongs to

CLASSIFY = {"task": ("classify",)}
DETECT = {"task": ("detect",)}


def sources_with(option: str) -> dict[str, tuple[str, ...]]:
    """The rule `only` of a field that opens data sets: those that take it, by the registry of `data`."""
    return {"data.source": tuple(name for name, entry in SOURCES.items() if option in entry.options)}


def setting(default: Any, **rules: Any) -> Any:
    """A field of a config with the rules for its value, by which `validate` checks it.

    Args:
      default: its value where none is given.
      rules: any of
        at_least, more_than, at_most, less_than: its range, of a tuple that of each entry; a string names
          another field whose value is the bound. None is in every range.
        length: of a tuple, how many entries it has.
        ascending: True for a tuple whose entries must not fall.
        choices: the values that it can take, of a tuple its entries, or a function of the whole config that
          gives them.
        only: path of another field -> the values of that field with which this one has a meaning; with others
          it must keep its default.
        path: True if it names a file or a folder, or can.
        changeable: True if it says how a run is carried out, not what it computes: an unfinished run may go
          on with another value.
    """
    return dataclasses.field(default=default, metadata=rules)


def only_of(field: dataclasses.Field[Any]) -> Mapping[str, tuple[str, ...]]:
    """The rule `only` of a field, empty where it has a meaning everywhere."""
    return field.metadata.get("only", {})


@dataclasses.dataclass
class ModelConfig:
    """The network.

    Attributes:
      name: in `models.list()`, of the config's task.
      mode: how it is trained, a `surgery.Mode`: "plain", "search" (scales are trained), "repopt" (scales in
        the optimizer), "online" (scales are trained, on the target itself), or as a structure: "repvgg",
        "acnet" and so on.
      structure_options: arguments of the structure, such as "gamma=1/3" in mode "acnet" or "copies=4" in mode
        "mobileone"; `core.published` has those of each.
      post_se: adds squeeze-and-excitation after every block (VGG-style networks).
      dtype: of the computation, "float32" or "bfloat16"; parameters and statistics stay float32. Detectors
        compute in float32.
      activation: of a detector, a key of `nn.ACTIVATIONS`. Scales are searched with the one that trains with
        them.
      file: the Python file that registers networks of your own (`models.register`), absolute. `load_config`
        fills in a config file that does so. Commands that are given the run import it for the network.
    """

    name: str = setting("vgg-digits", choices=lambda config: models.list(config.task))
    mode: str = setting("plain", choices=tuple(mode.value for mode in Mode))
    structure_options: str = setting("", only={"model.mode": tuple(STRUCTURES)})
    post_se: bool = setting(False, only=CLASSIFY)
    dtype: str = setting("float32", choices=("float32", "bfloat16"), only=CLASSIFY)
    activation: str = setting("relu", choices=tuple(ACTIVATIONS), only=DETECT)
    file: str = setting("", path=True, changeable=True)


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
        the whole image. Classification, as are `crop_padding` and the next six.
      resize: side to which the shorter side of an image is resized before the centre is cut out, at least
        `image_size`, which None stands for: 256 with an `image_size` of 224. In training where `area` is
        None, and in evaluation.
      randaugment: magnitude of RandAugment's two operations on each training image; None for none.
      jitter: largest change of brightness, contrast and saturation of a training image, as a share.
      erasing: probability that a box of a training image is blanked.
      mixup, cutmix: alpha of the Beta distribution by which training images are mixed in pairs, as a whole or
        by pasting a box; 0 for none. With both, each pair takes one of them. The loss is then share *
        CE(label) + (1 - share) * CE(other), and the log's accuracy that by the label of the larger share.
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
        after pair: 0, 1, 2, 3 means that 0 and 1 do, and 2 and 3. None for those that their names give.
      max_pixels: that an image file may have; None for 2^25, of which a WebP takes 0.6 GB while it is
        decoded, in each thread or process that decodes. Of "folder", "tfds" and "coco".
      mean, std: of each channel, for pixels in [0, 1].
      validation: training images that are held out, always the same ones; the run is evaluated on these and
        does not see the test images, which `repopt eval` reads. 0 for none: it is evaluated on the test
        images.
      train_limit, eval_limit: use that many training images, and test images, only; None for all.
      skip_bad: leaves out the images that cannot be read. To find them all images are decoded each time the
        data are opened; their number is in the log. Without it a run ends at the first.
      workers: processes that decode; 0 decodes in threads of this one.
      prefetch: batches prepared ahead.
    """

    source: str = setting("digits", choices=lambda config: SOURCES_OF.get(config.task, SOURCES))
    name: str = setting("", only=sources_with("name"))
    data_dir: str = setting("", path=True, only=sources_with("data_dir"))
    train_annotations: str = setting("", path=True, only=sources_with("train_annotations"))
    eval_annotations: str = setting("", path=True, only=sources_with("eval_annotations"))
    train_images: str = setting("", path=True, only=sources_with("train_images"))
    eval_images: str = setting("", path=True, only=sources_with("eval_images"))
    image_size: int = setting(8, at_least=1)
    crop_padding: int = setting(0, at_least=0, only=CLASSIFY)
    flip: bool = False
    area: tuple[float, ...] | None = setting(
        None, length=2, more_than=0, at_most=1, ascending=True, only=CLASSIFY
    )
    resize: int | None = setting(None, at_least="data.image_size", only=CLASSIFY)
    randaugment: int | None = setting(None, at_least=1, at_most=MAX_MAGNITUDE, only=CLASSIFY)
    jitter: float = setting(0.0, at_least=0, only=CLASSIFY)
    erasing: float = setting(0.0, at_least=0, at_most=1, only=CLASSIFY)
    mixup: float = setting(0.0, at_least=0, only=CLASSIFY)
    cutmix: float = setting(0.0, at_least=0, only=CLASSIFY)
    zoom: tuple[float, ...] | None = setting(None, length=2, more_than=0, ascending=True, only=DETECT)
    scenes: tuple[int, ...] = setting((4096, 256), length=2, at_least=1, only=sources_with("scenes"))
    scenes_seed: int = setting(0, at_least=0, only=sources_with("scenes_seed"))
    max_objects: int | None = setting(None, at_least=1, only=sources_with("max_objects"))
    sigmas: tuple[float, ...] | None = setting(None, more_than=0, only=sources_with("sigmas"))
    flip_pairs: tuple[int, ...] | None = setting(None, at_least=0, only=sources_with("flip_pairs"))
    max_pixels: int | None = setting(None, at_least=1, only=sources_with("max_pixels"))
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = setting((1.0,), more_than=0)
    validation: int = setting(0, at_least=0)
    train_limit: int | None = setting(None, at_least=1)
    eval_limit: int | None = setting(None, at_least=1)
    skip_bad: bool = False
    workers: int = setting(0, at_least=0, changeable=True)
    prefetch: int = setting(2, at_least=0, changeable=True)


@dataclasses.dataclass
class OptimConfig:
    """The optimizer; the learning rate warms up linearly, then follows a cosine, by default to 0, step by
    step. `optimizer.make_schedule` has the formula.

    Attributes:
      name: "sgd", "adamw" or "lion".
      learning_rate: the highest.
      base_batch: images that `learning_rate`, `warmup_start` and `min_learning_rate` are for: all three are
        multiplied by `batch_size` / base_batch. None for whatever the batch is.
      momentum, nesterov: of SGD.
      b1, b2: of AdamW and Lion, eps: of AdamW; None for Optax's value.
      weight_decay: for SGD added to the (multiplied) gradient; for the others decoupled from it, which takes
        far larger values.
      custom_l2: of SGD in mode "repvgg": the loss, in the log too, has RepVGG's penalty of merged kernels,
        weight_decay / 2 * `surgery.custom_l2`, in place of the decay of their branches. The authors of
        QARepVGG find that its networks quantize badly.
      decay_scaling: "batch" multiplies `weight_decay` by batch * max(1, round(64 / batch)) / 64, as YOLOv6
        and the detectors that follow it do: 1 for every batch that divides 64, 2 at 128.
      warmup_epochs: epochs of the linear rise.
      warmup_start: learning rate that it starts from.
      min_learning_rate: what the cosine falls to.
      cosine_over: "rest", the steps after the warm-up; or "run", all steps, the first of them replaced by the
        warm-up, so that it ends a little above the cosine: timm's default.
      schedule_by: "step"; or "epoch", the rate staying for an epoch what it is at the epoch's start, which
        needs a `warmup_start` above 0.
      label_smoothing: share of the label's probability that is spread over all classes.
      clip_norm: the largest global norm of a gradient; None for no clipping. With scales it is the norm of
        the gradient that the network with branches would have.
      accumulate: parts in which a batch goes through the network, one after the other; their mean gradient
        makes one update. Batch norm normalises each part by itself.
      ema: decay d of the moving average of parameters and batch statistics, e <- d e + (1 - d) x after each
        update, d being at most (1 + t) / (10 + t) at update t; None for none. Where there is one, it is
        what is evaluated and deployed.
    """

    name: str = setting("sgd", choices=("sgd", "adamw", "lion"))
    learning_rate: float = setting(0.1, at_least=0)
    base_batch: int | None = setting(None, at_least=1)
    momentum: float = setting(0.9, at_least=0, at_most=1, only={"optim.name": ("sgd",)})
    nesterov: bool = setting(True, only={"optim.name": ("sgd",)})
    b1: float | None = setting(None, at_least=0, less_than=1, only={"optim.name": ("adamw", "lion")})
    b2: float | None = setting(None, at_least=0, less_than=1, only={"optim.name": ("adamw", "lion")})
    eps: float | None = setting(None, at_least=0, only={"optim.name": ("adamw",)})
    weight_decay: float = setting(4e-5, at_least=0)
    custom_l2: bool = setting(False, only={"model.mode": ("repvgg",), "optim.name": ("sgd",)})
    decay_scaling: str = setting("none", choices=("none", "batch"))
    warmup_epochs: float = setting(0.0, at_least=0, at_most="epochs")
    warmup_start: float = setting(0.0, at_least=0, at_most="optim.learning_rate")
    min_learning_rate: float = setting(0.0, at_least=0, at_most="optim.learning_rate")
    cosine_over: str = setting("rest", choices=("rest", "run"))
    schedule_by: str = setting("step", choices=("step", "epoch"))
    label_smoothing: float = setting(0.0, at_least=0, at_most=1, only=CLASSIFY)
    clip_norm: float | None = setting(None, more_than=0)
    accumulate: int = setting(1, at_least=1)
    ema: float | None = setting(None, at_least=0, at_most=1)

    def constants(self) -> dict[str, Any]:
        """The fields that only some optimizers have, this one among them, where they are not None."""
        constants = (f for f in dataclasses.fields(self) if tuple(only_of(f)) == ("optim.name",))
        own = (f.name for f in constants if self.name in only_of(f)["optim.name"])
        return {name: value for name in own if (value := getattr(self, name)) is not None}


@dataclasses.dataclass
class DetectConfig:
    """Detection: who answers for an object, the weights of the losses, and what counts as a detection.

    Attributes:
      radius: in strides; locations this near to an object's centre answer for it.
      level_range: a level is for objects of up to this many of its strides, and of more than half of that.
      box_weight, centerness_weight, keypoint_weight: of the losses, that of the classes being 1.
      score_threshold: the least score of a detection.
      iou_threshold: boxes of one class that overlap more are one object.
      max_detections: in an image; `detection.decode` looks at 500 candidates.
    """

    radius: float = setting(1.5, more_than=0)
    level_range: float = setting(8.0, more_than=0)
    box_weight: float = setting(1.0, at_least=0)
    centerness_weight: float = setting(1.0, at_least=0)
    keypoint_weight: float = setting(1.0, at_least=0)
    score_threshold: float = setting(0.05, at_least=0, at_most=1)
    iou_threshold: float = setting(0.6, at_least=0, at_most=1)
    max_detections: int = setting(100, at_least=1, at_most=500)


@dataclasses.dataclass
class MeshConfig:
    """How the devices of the job are arranged; `train.state` has the table of what lies where.

    Attributes:
      data: groups of devices, each with a whole copy of the state and its part of a batch; None for all
        devices over `fsdp`.
      fsdp: devices that share one copy of the state; 1 keeps a copy on every device.
      statistics: what batch norm normalises by in training: "global", the whole batch (of an accumulated
        step, each of its parts), or "device", the part of it on one device, as the published recipes had it.
        The running statistics are then the mean over the devices, each of which holds all parameters and
        gradients while a step lasts, whatever `fsdp` is.
    """

    data: int | None = setting(None, at_least=1, changeable=True)
    fsdp: int = setting(1, at_least=1, changeable=True)
    statistics: str = setting("global", choices=("global", "device"))


@dataclasses.dataclass
class PruneConfig:
    """Pruning by ResRep: a trained network goes on with compactors, which are merged when it is deployed.

    `repopt prune` fills in where it starts; the defaults are the published recipe's.

    Attributes:
      run: folder of the trained run; "" for no pruning.
      step: of its checkpoint.
      target: share of the multiply-accumulates that is to stay.
      select: regular expression for the paths of the layers to prune; "" for all convolutions that can be
        pruned by themselves, see `surgery.plan_pruning`.
      strength: lambda of the lasso on the rows of the compactors.
      momentum: of the compactors, which are not decayed.
      before_epochs: epochs before the first mask.
      interval: steps between two choices of the masks.
      granularity: how many more rows each choice may mask.
      at_least: channels that every layer keeps.
      threshold: norm below which a row is removed in the end.
    """

    run: str = setting("", path=True)
    step: int | None = setting(None, at_least=0)
    target: float = setting(0.5, more_than=0, at_most=1)
    select: str = ""
    strength: float = setting(1e-4, at_least=0)
    momentum: float = setting(0.99, at_least=0, less_than=1)
    before_epochs: float = setting(5.0, at_least=0)
    interval: int = setting(200, at_least=1)
    granularity: int = setting(4, at_least=1)
    at_least: int = setting(1, at_least=1)
    threshold: float = setting(1e-5, at_least=0)


@dataclasses.dataclass
class QuantizeConfig:
    """Quantization-aware training: inputs and kernels of the convolutions and dense layers are rounded in the
    forward pass, and gradients pass through (`repopt_jax.quantize`).

    `repopt quantize --qat` fills in where it starts.

    Attributes:
      bits: of inputs, 2 to 8; 0 for training in floating point.
      weight_bits: of kernels; None for `bits`.
      per: whether a kernel has a scale for each output "channel" or one for the "tensor". Batch norms can be
        kept with "channel" alone, without `scale_bits`, where rounding commutes with their factors.
      weight_range: "reduced" or "full", see `quantize.Scheme`.
      scale_bits: significant binary digits of every scale; None for all.
      keep_float: paths of layers that stay in floating point.
      momentum: of the moving average of the inputs' ranges.
      freeze_after: steps after which the ranges stay as they are; None for never.
      run: folder of the trained run that it starts from; "" to start from scratch.
      step: of its checkpoint; None for the newest.
      fused: trains the fused network, without batch norms, in place of that of `model.mode`.
    """

    bits: int = setting(0, at_least=0, at_most=MAX_BITS)
    weight_bits: int | None = setting(None, at_least=MIN_BITS, at_most=MAX_BITS)
    per: str = setting("channel", choices=get_args(Per))
    weight_range: str = setting("reduced", choices=get_args(WeightRange))
    scale_bits: int | None = setting(None, at_least=1, at_most=MAX_SCALE_BITS)
    keep_float: tuple[str, ...] = ()
    momentum: float = setting(0.9, at_least=0, less_than=1)
    freeze_after: int | None = setting(None, at_least=0)
    run: str = setting("", path=True)
    step: int | None = setting(None, at_least=0)
    fused: bool = False


@dataclasses.dataclass
class Config:
    """One run.

    Attributes:
      name: what reports call it.
      task: "classify" or "detect".
      seed: of the initial weights and of the order and augmentation of the images.
      epochs, batch_size, eval_batch_size: batch sizes are over all devices.
      scales: "ones"; "depth", the depth rule; "law:1.0", that rule at a decay Lambda of 1.0
        (`surgery.law_scales`); the path of a scales directory; or "transfer:PATH", for a network of another
        width or depth than that of the scales in the directory PATH (`surgery.transfer_scales`). In mode
        "repopt" the network is re-initialised by them and its gradients are multiplied; in modes "search" and
        "online" they are where the scales start, "" being "depth". The other modes have none, "".
      scales_mean: replaces each vector of searched or transferred scales by its mean over the channels.
      rules: what scales do in mode "repopt": "both", "init" (re-initialise the network only) or "multiplier"
        (multiply its gradients only).
      normalise: of SGD in mode "repopt": divides each layer's multiplier by its mean over the layer, so that
        the scales no longer set the layer's learning rate (`optim.repopt_mask`).
      freeze_scales: share of the steps of a "search" after which its scales stay as they are; None
        for never.
      eval_every: epochs between evaluations; the last epoch is always evaluated.
      checkpoint_every: steps between checkpoints; 0 means at the end of each epoch.
      keep_last: how many of the newest checkpoints are kept; a damaged one is skipped for the one before.
      keep_best: checkpoints that are kept besides, by the first number of the evaluation at their step; more
        than 0 also writes one at every evaluation.
      log_every: steps that one line of `metrics.jsonl` averages over.
      published: test accuracy that the authors of a recipe report; it is repeated in the summary.
      loggers: where the records go besides `metrics.jsonl`, any of "tensorboard" and "wandb", each with the
        extra of its name; see `train.loggers`.
      tensorboard: the same as "tensorboard" among `loggers`.
    """

    name: str = "run"
    task: str = setting("classify", choices=tuple(SOURCES_OF))
    seed: int = setting(0, at_least=0, less_than=2**32)
    epochs: int = setting(1, at_least=1)
    batch_size: int = setting(64, at_least=1)
    eval_batch_size: int = setting(256, at_least=1)
    scales: str = setting("", path=True)
    scales_mean: bool = False
    rules: str = setting("both", choices=("both", "init", "multiplier"), only={"model.mode": ("repopt",)})
    normalise: bool = setting(
        False,
        only={"model.mode": ("repopt",), "rules": ("both", "multiplier"), "optim.name": ("sgd",)},
    )
    freeze_scales: float | None = setting(None, at_least=0, at_most=1, only={"model.mode": ("search",)})
    eval_every: int = setting(1, at_least=1)
    checkpoint_every: int = setting(0, at_least=0, changeable=True)
    keep_last: int = setting(2, at_least=1, changeable=True)
    keep_best: int = setting(0, at_least=0, changeable=True)
    log_every: int = setting(20, at_least=1)
    published: float | None = setting(None, at_least=0, at_most=1, changeable=True)
    loggers: tuple[str, ...] = setting((), choices=tuple(LOGGERS), changeable=True)
    tensorboard: bool = setting(False, changeable=True)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    optim: OptimConfig = dataclasses.field(default_factory=OptimConfig)
    detect: DetectConfig = dataclasses.field(default_factory=DetectConfig, metadata={"only": DETECT})
    prune: PruneConfig = dataclasses.field(default_factory=PruneConfig)
    quantize: QuantizeConfig = dataclasses.field(default_factory=QuantizeConfig)


def evaluated_on(config: Config) -> str:
    """The images that a run of `config` is evaluated on: "validation" or "test"."""
    return "validation" if config.data.validation else "test"


def logger_names(config: Config) -> tuple[str, ...]:
    """The loggers that `config` asks for, each once."""
    return tuple(dict.fromkeys((*config.loggers, *(["tensorboard"] if config.tensorboard else []))))


# -- files


def load_config(file_and_arg: str) -> Config:
    """The config of `path/to/file.py:arg`; a bare name such as `digits:search` means the file shipped with
    the package. The `config.json` of a run's folder gives the config of that run.

    Raises:
      FileNotFoundError: no such file.
      ValueError: the file is no Python file with a `get_config`, or no `config.json`.
      TypeError: the file does not return a `Config`.
    """
    check_path("file_and_arg", file_and_arg)
    name, _, arg = file_and_arg.partition(":")
    path = config_file(name)
    if path.suffix == ".json":
        try:
            return from_json(path.read_bytes())
        except ValueError as error:
            raise ValueError(f"{path} is not the config.json of a run: {error}") from error
    with registering(path.absolute()):
        config = userfile.call(path, "get_config", arg, noun="config")
    if not isinstance(config, Config):
        raise TypeError(f"`get_config` of {path} returned {type(config).__name__}, not `Config`")
    note_file(config, path)
    return config


def config_file(name: str) -> Path:
    """The file that `name` means: itself where it exists, else a shipped one (with or without `.py`).

    Raises:
      FileNotFoundError: there is none; the shipped ones are listed.
    """
    folders = (Path(__file__).parents[1] / "configs", Path(__file__).parents[2] / "configs")
    candidates = [Path(name)]
    if Path(name).parent in (Path("."), Path("configs")):  # another folder is meant as it is written
        candidates += [folder / f"{Path(name).stem}.py" for folder in folders]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    shipped = sorted({path.stem for folder in folders for path in folder.glob("*.py")})
    raise FileNotFoundError(f"no config file {name!r}; shipped ones are {', '.join(shipped)}")


def check_config(config: Any) -> None:
    """Raises TypeError if an argument `config` is no `Config`."""
    check_kind("config", config, Config, "a `Config`", remedy="`load_config` reads a file")


def to_json(config: Config) -> str:
    """The config as indented JSON; `from_json` gives an equal config back."""
    check_config(config)
    return json.dumps(dataclasses.asdict(config), indent=2)


def from_json(text: str | bytes) -> Config:
    """The config that `to_json` wrote.

    Raises:
      ValueError: no JSON, no object, or unknown fields and values of wrong types; all of them are listed.
    """
    check_kind("text", text, (str, bytes), "the text of a config.json")
    unknown: list[str] = []
    config = _from_dict(Config, jsontext.parse(text, "it"), "", unknown)
    problems = [f"unknown config fields: {', '.join(unknown)}"] if unknown else []
    problems += [
        f"`{name}`={value!r} must {must_be(kind)}"
        for name, value, _, _, kind in settings_of(config)
        if not is_of(value, kind)
    ]
    if problems:
        raise ValueError("; ".join(problems))
    return config


def _from_dict(cls: Any, values: Any, prefix: str, unknown: list[str]) -> Any:
    if not isinstance(values, dict):
        raise ValueError(f"{prefix.rstrip('.') or 'it'} is {type(values).__name__}, not an object of fields")
    fields = {field.name: field.type for field in dataclasses.fields(cls)}
    unknown += [prefix + name for name in values if name not in fields]
    known = {name: value for name, value in values.items() if name in fields}
    for name, value in known.items():
        if dataclasses.is_dataclass(fields[name]):
            known[name] = _from_dict(fields[name], value, f"{prefix}{name}.", unknown)
        else:
            known[name] = tuples(value)
    return cls(**known)


def tuples(value: Any) -> Any:
    """A value that JSON gave back, with the tuples for which it has lists."""
    return tuple(map(tuples, value)) if isinstance(value, list) else value


def differing_fields(first: Config, second: Config) -> list[str]:
    """The fields that make two configs different runs, each as `name (1 and 2)`."""
    other = {setting.name: setting.value for setting in settings_of(second)}
    return [
        f"{name} ({value!r} and {other[name]!r})"
        for name, value, _, rules, _ in settings_of(first)
        if value != other[name] and not rules.get("changeable")
    ]


class Setting(NamedTuple):
    """A field of a config by its whole name, `optim.learning_rate`."""

    name: str
    value: Any
    default: Any
    rules: Mapping[str, Any]
    type: Any


def settings_of(section: Any, prefix: str = "", only: Mapping[str, Any] | None = None) -> Iterator[Setting]:
    """Every field of a config and of its sections."""
    for field in dataclasses.fields(section):
        value, name = getattr(section, field.name), prefix + field.name
        rules = {**field.metadata, "only": {**(only or {}), **only_of(field)}}
        if dataclasses.is_dataclass(value):
            yield from settings_of(value, f"{name}.", rules["only"])
        else:
            yield Setting(name, tuples(value), field.default, rules, field.type)


def needs_no_folder(scales: str) -> bool:
    """Whether a config's `scales` are those of a rule; not for the empty text."""
    return scales in NAMED_SCALES or scales.startswith(LAW)


def scales_folder(scales: str) -> str:
    """The folder that a config's `scales` name, where they need one; `~` is the user's."""
    return os.path.expanduser(scales.removeprefix(TRANSFER))


def law_of(scales: str) -> float | None:
    """The Lambda of "law:NUMBER"; None of other `scales`, and if there is no number that can be one."""
    if not scales.startswith(LAW):
        return None
    try:
        number = float(scales.removeprefix(LAW))
    except ValueError:
        return None
    return number if 0 <= number < math.inf else None


# -- what the files of `configs/` share

# Function that makes networks -> the network that stands for all of them in a `smoke`.
SMALLEST = {
    models.vgg: "vgg-digits",
    models.ghostnet: "repghost-digits",
    models.mobileone: "mobileone-digits",
    models.RepMLPNet: "repmlpnet-digits",
}
SMOKE_SIDE = 8  # of the images: the digits' own
SMOKE_HELD_OUT = {"classify": 16, "detect": 8}  # at most, for validation


class UnknownRun(ValueError):
    """The argument of a config file names none of its `runs`."""

    def __init__(self, message: str, runs: tuple[str, ...]):
        super().__init__(message)
        self.runs: tuple[str, ...] = runs


def parse_argument(arg: str, choices: Iterable[str], default: str | None = None) -> tuple[str, bool]:
    """(run, whether `,smoke` follows it) of a config file's argument; an empty one means `default`, or else
    the first choice.

    Raises:
      UnknownRun: no such run; the nearest one is named.
      ValueError: something else than `smoke` after the comma.
    """
    choices = tuple(choices)
    name, _, option = arg.partition(",")
    name = name or default or choices[0]
    if name not in choices:
        raise UnknownRun(
            f"argument {arg!r}{did_you_mean(name, choices)} must be one of {', '.join(choices)}, or that and "
            "',smoke'",
            choices,
        )
    if option not in ("", "smoke"):
        raise ValueError(f"argument {arg!r} ends in {option!r}: only ',smoke' can follow the run")
    return name, option == "smoke"


def smoke(config: Config) -> Config:
    """The same recipe as a run of seconds that needs no data: two epochs of a network of its family that
    fits the embedded digits, on a few of them; or of a detector, on a few scenes. Detectors and networks of
    your own stay the network that they are.

    Mode, optimizer, schedule, augmentation, mixing, dtype, accumulation, moving average and mesh stay as they
    are. Scales from a folder, transferred or not, become those of the depth rule, for there is no search to
    take them from; lengths in pixels and epochs shrink with the image and the run. The given config is left
    as it is.
    """
    model, data, scales = config.model, config.data, config.scales
    of_search = scales.startswith(SEARCH)  # of its own comparison, which is a smoke too
    if config.task == "detect":
        batch_size, eval_batch_size = 8, 8
        data = _from_source(data, "scenes", scenes=(16, 8), train_limit=None, eval_limit=None)
    else:
        batch_size, eval_batch_size = 16, 32
        model = dataclasses.replace(model, name=SMALLEST.get(models.find(model.name).family, model.name))
        share = SMOKE_SIDE / data.image_size
        data = _from_source(
            data,
            "digits",
            data_dir="",
            mean=(0.3,),
            std=(0.37,),
            image_size=SMOKE_SIDE,
            resize=None if data.resize is None else round(data.resize * share),
            crop_padding=data.crop_padding and max(1, round(data.crop_padding * share)),
            train_limit=32,
            eval_limit=40,
            workers=0,
        )
    data = dataclasses.replace(data, validation=min(data.validation, SMOKE_HELD_OUT[config.task]))
    return dataclasses.replace(
        config,
        name=f"{config.name}-smoke",
        epochs=2,
        batch_size=batch_size,
        eval_batch_size=eval_batch_size,
        eval_every=1,
        log_every=1,
        checkpoint_every=0,
        published=None,
        scales=scales if not scales or needs_no_folder(scales) or of_search else "depth",
        scales_mean=config.scales_mean and of_search,
        model=model,
        data=data,
        optim=dataclasses.replace(config.optim, warmup_epochs=min(config.optim.warmup_epochs, 1.0)),
    )


def _from_source(data: DataConfig, source: str, **changes: Any) -> DataConfig:
    """The same of images from another source, with what that does not take at its default."""
    defaults = {
        field.name: field.default
        for field in dataclasses.fields(data)
        if source not in only_of(field).get("data.source", (source,))
    }
    return dataclasses.replace(data, source=source, **{**defaults, **changes})
