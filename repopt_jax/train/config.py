"""What a run is: plain typed dataclasses, returned by the files of `configs/` and checked once by
`validation.validate`.

A config file defines `get_config(arg="") -> Config`. The dataclasses are not frozen, because
`ml_collections.config_flags` writes `--config.optim.learning_rate=0.05` into them; nothing changes one after
that.
"""

import dataclasses

# Optimizer -> the fields of `OptimConfig` that are its own.
OPTIMIZERS = {"sgd": ("momentum", "nesterov"), "adamw": ("b1", "b2", "eps"), "lion": ("b1", "b2")}


@dataclasses.dataclass
class ModelConfig:
    """The network.

    Attributes:
      variant: "B1" and the other rows of `models.VGG_VARIANTS`, "ghost-0.5" and the other widths of
        `models.GHOST_VARIANTS`, "mobileone-s0" and so on; or a row of `models.DETECTORS` where the task is
        "detect". `train.networks` has the table.
      kind: "search" (scales are trained), "target" (plain kernels), "csla" (constant scales, the twin of a
        target run), or branches with batch norms of their own: "repvgg"; "repghost" of Ghost networks, which
        have no "repvgg"; "mobileone", the only kind of those.
      form: how a search or csla layer computes: "merged" (one convolution) or "branches".
      post_se: adds squeeze-and-excitation after every block (VGG-style networks).
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
        the whole image. Classification, as are `crop_padding` and the next six.
      resize: side to which the shorter side of an image is resized before the centre is cut out, at least
        `image_size`, which None stands for: 256 with an `image_size` of 224. In training where `area` is
        None, and in evaluation.
      randaugment: magnitude of RandAugment's two operations on each training image, in [1, 30]; None for
        none.
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
    resize: int | None = None
    randaugment: int | None = None
    jitter: float = 0.0
    erasing: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
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

    name: str = "sgd"
    learning_rate: float = 0.1
    base_batch: int | None = None
    momentum: float = 0.9
    nesterov: bool = True
    b1: float | None = None
    b2: float | None = None
    eps: float | None = None
    weight_decay: float = 4e-5
    decay_scaling: str = "none"
    warmup_epochs: float = 0.0
    warmup_start: float = 0.0
    min_learning_rate: float = 0.0
    cosine_over: str = "rest"
    schedule_by: str = "step"
    label_smoothing: float = 0.0
    clip_norm: float | None = None
    accumulate: int = 1
    ema: float | None = None


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
class MeshConfig:
    """How the devices of the job are arranged; `train.sharding` has the table of what lies where.

    Attributes:
      data: groups of devices, each with a whole copy of the state and its part of a batch; None for all
        devices over `fsdp`.
      fsdp: devices that share one copy of the state; 1 keeps a copy on every device.
      statistics: what batch norm normalises by in training: "global", the whole batch (of an accumulated
        step, each of its parts), or "device", the part of it on one device, as the published recipes had it.
        The running statistics are then the mean over the devices, each of which holds all parameters and
        gradients while a step lasts, whatever `fsdp` is.
    """

    data: int | None = None
    fsdp: int = 1
    statistics: str = "global"


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
      keep_last: checkpoints that are kept, at least 1; a damaged one is passed over for the one before.
      keep_best: checkpoints that are kept besides, by the first number of the evaluation at their step; more
        than 0 also writes one at every evaluation.
      log_every: steps that one line of `metrics.jsonl` averages over.
      published: test accuracy in [0, 1] that the authors of a recipe report; the summary tells it.
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
    keep_last: int = 2
    keep_best: int = 0
    log_every: int = 20
    published: float | None = None
    tensorboard: bool = False
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    optim: OptimConfig = dataclasses.field(default_factory=OptimConfig)
    detect: DetectConfig = dataclasses.field(default_factory=DetectConfig)
