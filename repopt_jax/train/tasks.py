"""What a run learns, classification or detection: its data, networks, loss and evaluation.

The loop, the state and the checkpoints know the interface `Task` only.
"""

import abc
import dataclasses
import importlib.util
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from repopt_jax import data, models
from repopt_jax.core.scales import Scales, load_scales
from repopt_jax.data.pipeline import subset
from repopt_jax.detection import Detections, LossWeights, decode, detection_loss
from repopt_jax.detection.evaluate import evaluate_detections, to_predictions
from repopt_jax.models import FCOS
from repopt_jax.nn.block import ACTIVATIONS
from repopt_jax.surgery.layers import find_branches
from repopt_jax.surgery.search import depth_scales, law_scales, transfer_scales
from repopt_jax.train.config import TRANSFER, Config, DataConfig, law_of, scales_folder
from repopt_jax.train.state import Batch, add_sums, merge_model, put_batch, replicated, zero_sums

# `evaluate(params, non_trainable, batches) -> numbers`: those of `METRICS`, "loss" (or None) and "count".
Evaluator = Callable[[Any, Any, Iterable[dict[str, Any]]], dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Metric:
    """A number in [0, 1] that an evaluation gives: its name in records, and what people call it."""

    name: str
    label: str


# The first of a task is what its runs are compared by.
METRICS: dict[str, tuple[Metric, ...]] = {
    "classify": (Metric("accuracy", "test accuracy"),),
    "detect": (
        Metric("ap50", "AP50"),
        Metric("ap", "AP"),
        Metric("keypoint_ap50", "keypoint AP50"),
        Metric("keypoint_ap", "keypoint AP"),
    ),
}


def metric_label(metric: Metric, split: str = "test") -> str:
    """What people call the metric of a split, "test" or "validation": `test accuracy`, `validation AP50`."""
    return metric.label if split == "test" else f"{split} {metric.label.removeprefix('test ')}"


def format_metrics(task: str, measured: Mapping[str, Any], *, split: str = "test") -> str:
    """The numbers of an evaluation in a line: `test accuracy 97.20%`; a number that is None is left out."""
    values = [(metric_label(metric, split), measured.get(metric.name)) for metric in METRICS[task]]
    return ", ".join(f"{label} {value:.2%}" for label, value in values if value is not None)


class Task(abc.ABC):
    """What one config learns.

    Attributes:
      sums: what the log averages beside the loss, and the dtype in which it is summed.
      transform_type: a dataclass whose fields are settings of the same names.
      train_batches, eval_batches: the functions of `data`.
    """

    sums: ClassVar[Mapping[str, Any]]
    transform_type: ClassVar[type]
    train_batches: ClassVar[Callable[..., Any]]
    eval_batches: ClassVar[Callable[..., Any]]

    def __init__(self, config: Config):
        self.config = config

    def open_data(self, settings: DataConfig) -> tuple[Any, Any]:
        """The data set and what is done to its images.

        Raises:
          FileNotFoundError, ValueError: the data are missing or cannot be used.
        """
        source = data.open_configured(settings)
        if settings.skip_bad:
            source = data.without_bad(source)
        if settings.validation:
            source = data.hold_out(source, settings.validation)
        return source, self.transform(settings)

    def transform(self, settings: DataConfig) -> Any:
        """What is done to images."""
        names = (field.name for field in dataclasses.fields(self.transform_type))
        return self.transform_type(**{name: getattr(settings, name) for name in names})

    @abc.abstractmethod
    def model_options(self, info: Any) -> dict[str, Any]:
        """What `models.create` is given besides the name and the numbers of classes and channels."""

    def new_model(self, info: Any, *, seed: Any) -> models.Network:
        """The config's network for this data, plain. `seed` is an integer or a key."""
        return models.create(
            self.config.model.name,
            num_classes=info.num_classes,
            in_channels=info.channels,
            rngs=nnx.Rngs(seed),
            **self.model_options(info),
        )

    def resolve_scales(self, name: str, info: Any) -> Scales:
        """The scales that a config names, for its network on this data; see `Config.scales`.

        Raises:
          FileNotFoundError, ValueError: the scales are missing, do not fit the network or (transferred ones)
            lack a branch of it, or were searched with another activation.
        """
        model = nnx.eval_shape(lambda: self.new_model(info, seed=0))
        if name in ("ones", "depth"):
            rule = depth_scales(model) if name == "depth" else Scales.ones(find_branches(model))
            return rule.with_metadata(architecture=self.architecture())
        if (decay := law_of(name)) is not None:
            scales = law_scales(model, decay)
            return scales.with_metadata(architecture=self.architecture(), config=name)
        folder, transferred = scales_folder(name), name.startswith(TRANSFER)
        # None may lack of the layers that the network declares, or else of those that a search takes.
        scales = load_scales(folder, None if transferred else find_branches(model))
        searched, activation = scales.metadata.architecture.rpartition("/")[2], self.config.model.activation
        if searched in ACTIVATIONS and searched != activation:
            raise ValueError(
                f"the scales in {folder} were searched with {searched}, and `model.activation` is "
                f"{activation!r}: use the same in search and training"
            )
        if not transferred:
            return scales
        made = transfer_scales(model, scales)
        return made.with_metadata(architecture=self.architecture(), config=name)

    def architecture(self) -> str:
        """What files of scales call the network."""
        return models.find(self.config.model.name).architecture

    @abc.abstractmethod
    def objective(self, model: Any, batch: Batch) -> tuple[jax.Array, dict[str, jax.Array]]:
        """The training loss of a network in training mode, and the sums that `sums` declares."""

    @abc.abstractmethod
    def make_evaluator(self, graphdef: Any, source: Any, mesh: Mesh) -> Evaluator:
        """The evaluation of such a network on all test images."""

    @abc.abstractmethod
    def measure(
        self, answer: Callable[[np.ndarray], Any], source: Any, batches: Iterable[dict[str, Any]]
    ) -> dict[str, Any]:
        """The numbers that `make_evaluator` gives, of any function of images in one process.

        Args:
          answer: images of a batch -> logits, or of a detector `Detections`.
          source: the data set.
          batches: those of `eval_batches`.

        Raises:
          ValueError, ModuleNotFoundError: as `make_evaluator`.
        """


# -- classification


class Classification(Task):
    """One label an image: cross-entropy, of mixed images too, and accuracy."""

    sums: ClassVar[Mapping[str, Any]] = {"accuracy": jnp.int32}
    transform_type: ClassVar[type] = data.Transform
    train_batches: ClassVar[Callable[..., Any]] = staticmethod(data.train_batches)
    eval_batches: ClassVar[Callable[..., Any]] = staticmethod(data.eval_batches)

    def model_options(self, info: data.DatasetInfo) -> dict[str, Any]:
        model = self.config.model
        dtype = None if model.dtype == "float32" else jnp.dtype(model.dtype)
        return {"dtype": dtype, **({"post_se": True} if model.post_se else {})}

    def objective(self, model: Any, batch: Batch) -> tuple[jax.Array, dict[str, jax.Array]]:
        logits = model(batch["image"])
        losses, label = mixed_cross_entropy(logits, batch, label_smoothing=self.config.optim.label_smoothing)
        return losses.mean(), {"accuracy": count_correct(logits, label)}

    def make_evaluator(self, graphdef: Any, source: Any, mesh: Mesh) -> Evaluator:
        step = make_eval_step(graphdef)

        def evaluate(params: Any, non_trainable: Any, batches: Iterable[dict[str, Any]]) -> dict[str, Any]:
            sums = jax.device_put(zero_sums(self.sums), replicated(mesh))
            for batch in batches:
                sums = step(params, non_trainable, sums, put_batch(batch, mesh))
            return sums_to_means(sums)

        return evaluate

    def measure(
        self, answer: Callable[[np.ndarray], Any], source: Any, batches: Iterable[dict[str, Any]]
    ) -> dict[str, Any]:
        sums = zero_sums(self.sums)
        for batch in batches:
            logits = jnp.asarray(answer(batch["image"]))
            sums = add_sums(sums, answers_right(logits, batch["label"], batch["mask"] > 0))
        return sums_to_means(sums)


def make_eval_step(
    graphdef: Any,
) -> Callable[[Any, Any, dict[str, jax.Array], Batch], dict[str, jax.Array]]:
    """The jitted evaluation step, with running batch statistics.

    Returns:
      `step(params, non_trainable, sums, batch) -> sums`, which adds a batch to the sums of loss, correct
      answers ("accuracy") and images. Images whose "mask" is 0 are padding and count for nothing. The loss is
      the plain cross-entropy, whatever smoothing training used.
    """

    def eval_step(params, non_trainable, sums, batch):
        model = merge_model(graphdef, params, non_trainable)
        model.eval()
        return add_sums(sums, answers_right(model(batch["image"]), batch["label"], batch["mask"] > 0))

    return jax.jit(eval_step, donate_argnums=2)


def answers_right(logits: jax.Array, labels: jax.Array, real: jax.Array) -> dict[str, jax.Array]:
    """Sums over the images that are `real`: of the loss, of those with their largest logit at the label
    ("accuracy"), and of images ("count")."""
    # Selected, not multiplied: padding may give any number, and 0 * nan is nan.
    loss = jnp.where(real, cross_entropy(logits, labels), 0).sum()
    correct = count_correct(logits, labels, real=real)
    return {"loss": loss, "accuracy": correct, "count": real.sum(dtype=jnp.int32)}


def sums_to_means(sums: dict[str, jax.Array]) -> dict[str, Any]:
    """Loss, accuracy and count as Python numbers."""
    host = jax.device_get(sums)
    count = int(host["count"])
    return {
        "loss": float(host["loss"]) / max(count, 1),
        "accuracy": int(host["accuracy"]) / max(count, 1),
        "count": count,
    }


def cross_entropy(logits: jax.Array, labels: jax.Array, *, label_smoothing: float = 0.0) -> jax.Array:
    """Softmax cross-entropy of each image, (N, classes) and (N,) -> (N,), computed in float32 or wider."""
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    targets = jax.nn.one_hot(labels, logits.shape[-1], dtype=logits.dtype)
    return optax.softmax_cross_entropy(logits, optax.smooth_labels(targets, label_smoothing))


def mixed_cross_entropy(
    logits: jax.Array, batch: Batch, *, label_smoothing: float = 0.0
) -> tuple[jax.Array, jax.Array]:
    """share * CE(label) + (1 - share) * CE(other) of each image, (N,), and the label of the larger share,
    (N,) int32: "label" where they are equal.

    A batch of images that are not mixed has no "other" and no "share"; then CE(label) and its label.
    """
    label = batch["label"]
    losses = cross_entropy(logits, label, label_smoothing=label_smoothing)
    if "other" not in batch:
        return losses, label
    other, share = batch["other"], batch["share"].astype(losses.dtype)
    losses_of_other = cross_entropy(logits, other, label_smoothing=label_smoothing)
    return share * losses + (1 - share) * losses_of_other, jnp.where(share < 0.5, other, label)


def count_correct(logits: jax.Array, labels: jax.Array, *, real: jax.Array | bool = True) -> jax.Array:
    """How many images, of those that are `real`, have their largest logit at the label; () int32."""
    return ((logits.argmax(-1) == labels) & real).sum(dtype=jnp.int32)


# -- detection

PARTS = ("classes", "boxes", "centerness", "keypoints")


class Detection(Task):
    """Any number of objects an image, each with a box, a class and keypoints, by the networks of
    `models.FCOS`."""

    sums: ClassVar[Mapping[str, Any]] = {f"{part}_loss": jnp.float32 for part in PARTS}
    transform_type: ClassVar[type] = data.DetectionTransform
    train_batches: ClassVar[Callable[..., Any]] = staticmethod(data.train_detection_batches)
    eval_batches: ClassVar[Callable[..., Any]] = staticmethod(data.eval_detection_batches)

    def model_options(self, info: data.DetectionInfo) -> dict[str, Any]:
        return {"num_keypoints": info.num_keypoints, "activation": self.config.model.activation}

    def architecture(self) -> str:
        return f"{super().architecture()}/{self.config.model.activation}"

    def objective(self, model: FCOS, batch: Batch) -> tuple[jax.Array, dict[str, jax.Array]]:
        settings, size = self.config.detect, batch["image"].shape[0]
        weights = LossWeights(
            boxes=settings.box_weight,
            centerness=settings.centerness_weight,
            keypoints=settings.keypoint_weight,
        )
        loss, parts = detection_loss(
            model(batch["image"]),
            batch,
            model.locations(self.config.data.image_size),
            weights,
            radius=settings.radius,
            level_range=settings.level_range,
        )
        return loss, {f"{part}_loss": parts[part] * size for part in PARTS}

    def make_evaluator(self, graphdef: Any, source: data.AnnotatedSource, mesh: Mesh) -> Evaluator:
        self._check_evaluation(source)  # before anything is trained, not at the first evaluation
        detect = make_detect(graphdef, self.config)

        def evaluate(params: Any, non_trainable: Any, batches: Iterable[dict[str, Any]]) -> dict[str, Any]:
            found = []
            for batch in batches:
                images = put_batch({"image": batch["image"]}, mesh)["image"]
                detections = detect(params, non_trainable, images)
                found.append(allgather_detections(detections, _origin(batch), mesh))
            return _average_precision(found, source)

        return evaluate

    def measure(
        self, answer: Callable[[np.ndarray], Any], source: Any, batches: Iterable[dict[str, Any]]
    ) -> dict[str, Any]:
        self._check_evaluation(source)
        found = [(answer(batch["image"]), _origin(batch)) for batch in batches]
        return _average_precision(found, source)

    def _check_evaluation(self, source: data.AnnotatedSource) -> None:
        if importlib.util.find_spec("pycocotools") is None:
            raise ModuleNotFoundError("the evaluation needs pycocotools", name="pycocotools")
        limit = self.config.data.eval_limit
        used = subset(source.info.num_eval, limit, "eval")
        if all(source.eval.objects(int(index))["crowd"].all() for index in used):
            raise ValueError(
                f"no object is to be found on the {len(used)} test images, so that average precision is not "
                f"defined: raise `data.eval_limit` (it is {limit}), or give other images"
            )


def _origin(batch: dict[str, Any]) -> dict[str, np.ndarray]:
    """Where the images of a batch come from."""
    return {name: batch[name] for name in ("index", "ratio", "mask")}


def _average_precision(
    found: Iterable[tuple[Detections, dict[str, np.ndarray]]], source: data.AnnotatedSource
) -> dict[str, Any]:
    """The numbers of an evaluation, from the detections of each batch and where its images come from."""
    predictions, seen = [], []
    for detections, real in found:
        chosen = np.flatnonzero(real["mask"])
        kept = Detections(*(part[chosen] for part in detections))
        predictions += to_predictions(kept, real["index"][chosen], real["ratio"][chosen])
        seen += real["index"][chosen].tolist()
    truth = data.eval_annotations(source, seen)
    measured = evaluate_detections(truth, predictions, sigmas=source.info.sigmas)
    numbers = {metric.name: measured[metric.name] for metric in METRICS["detect"]}
    return {"loss": None, **numbers, "count": len(seen)}


def make_detect(graphdef: Any, config: Config) -> Callable[[Any, Any, Any], Detections]:
    """The jitted `detect(params, non_trainable, images) -> Detections` of a network, with running batch
    statistics."""
    settings, size = config.detect, config.data.image_size

    @jax.jit
    def detect(params, non_trainable, images):
        model = merge_model(graphdef, params, non_trainable)
        model.eval()
        return decode(
            model(images),
            model.locations(size),
            size,
            score_threshold=settings.score_threshold,
            iou_threshold=settings.iou_threshold,
            count=settings.max_detections,
        )

    return detect


def allgather_detections(
    detections: Detections, real: dict[str, np.ndarray], mesh: Mesh
) -> tuple[Detections, dict[str, Any]]:
    """Detections of a global batch, and what each process knows of its own part, whole in every process."""
    if jax.process_count() == 1:
        return jax.device_get(detections), real
    # The rows of a global array come in the order of the mesh, which on a TPU pod is not that of the
    # processes: what belongs to them must be a global array as well.
    return multihost_utils.process_allgather((detections, put_batch(real, mesh)), tiled=True)
