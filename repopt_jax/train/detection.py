"""Detection: boxes, classes and keypoints of every object, by the networks of `models.FCOS`.

The network is always built plain; what is searched or trained with branches is made of it by the surgery that
any network gets.
"""

import importlib.util
import os
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from repopt_jax import data
from repopt_jax.core.scales import Scales, load_scales
from repopt_jax.data.pipeline import subset
from repopt_jax.detection import Detections, LossWeights, decode, detection_loss
from repopt_jax.detection.evaluate import evaluate_detections, to_predictions
from repopt_jax.models import DETECTORS, FCOS
from repopt_jax.nn.blocks import ACTIVATIONS
from repopt_jax.surgery.search import csla_twin, depth_scales, sample_weights, to_repvgg, to_search
from repopt_jax.train.config import Config, DataConfig
from repopt_jax.train.state import merge_model, put_batch
from repopt_jax.train.tasks import METRICS, Batch, Task

PARTS = ("classes", "boxes", "centerness", "keypoints")


class Detection(Task):
    """Any number of objects an image."""

    sums = {f"{part}_loss": jnp.float32 for part in PARTS}  # noqa: RUF012  (constant)

    def open_data(self, settings: DataConfig) -> tuple[data.AnnotatedSource, data.DetectionTransform]:
        if settings.source == "scenes":
            count, eval_count = settings.scenes
            source = data.open_scenes(
                settings.scenes_seed, num_train=count, num_eval=eval_count, size=settings.image_size
            )
        else:
            names = ("train_annotations", "eval_annotations", "train_images", "eval_images")
            given = {name: os.path.expanduser(getattr(settings, name)) for name in names}
            paths: dict[str, Any] = {name: path for name, path in given.items() if path}
            flat = settings.flip_pairs
            source = data.open_coco(
                os.path.expanduser(settings.data_dir),
                max_objects=settings.max_objects,
                sigmas=settings.sigmas,
                flip_pairs=None if flat is None else tuple(zip(flat[::2], flat[1::2], strict=True)),
                **paths,
            )
        return source, detection_transform(settings)

    def train_batches(self, source, transform, **options):
        return data.train_detection_batches(source, transform, **options)

    def eval_batches(self, source, transform, **options):
        return data.eval_detection_batches(source, transform, **options)

    def new_model(self, info: data.DetectionInfo, *, seed: int, scales: Scales | None = None) -> nnx.Module:
        config, rngs = self.config.model, nnx.Rngs(seed)
        plain = self._plain(info, rngs)
        match config.kind:
            case "target":
                return plain
            case "repvgg":
                return to_repvgg(plain, FCOS.SELECT, rngs=rngs)
            case "search":
                return to_search(plain, FCOS.SELECT, scales=scales or "depth", form=config.form, rngs=rngs)  # pyright: ignore[reportArgumentType]
            case "csla":
                scales = scales or depth_scales(plain, FCOS.SELECT)
                weights = sample_weights(scales, rngs.params())
                return csla_twin(plain, scales, weights, form=config.form)  # pyright: ignore[reportArgumentType]
            case kind:
                raise ValueError(f"`model.kind` is {kind!r}: it must be target, search, csla or repvgg")

    def resolve_scales(self, name: str, info: data.DetectionInfo) -> Scales:
        plain = nnx.eval_shape(lambda: self._plain(info, nnx.Rngs(0)))
        if name in ("ones", "depth"):
            rule = Scales.ones(plain.branch_sets()) if name == "ones" else depth_scales(plain, FCOS.SELECT)
            return rule.with_metadata(architecture=self.architecture())
        scales = load_scales(name, plain)
        self._check_activation(scales, name)
        return scales

    def architecture(self) -> str:
        return f"{self.config.model.variant}/{self.config.model.activation}"

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

    def make_evaluator(self, graphdef: Any, source: data.AnnotatedSource, mesh: Mesh):
        # Before anything is trained, not at the first evaluation.
        if importlib.util.find_spec("pycocotools") is None:
            raise ModuleNotFoundError("the evaluation needs pycocotools", name="pycocotools")
        self._check_truth(source)
        detect = make_detect(graphdef, self.config)

        def evaluate(params: Any, rest: Any, batches: Iterable[dict[str, Any]]) -> dict[str, Any]:
            predictions, seen = [], []
            for batch in batches:
                images = put_batch({"image": batch["image"]}, mesh)["image"]
                real = {name: batch[name] for name in ("index", "ratio", "mask")}
                found, real = on_every_host(detect(params, rest, images), real, mesh)
                chosen = np.flatnonzero(real["mask"])
                found = Detections(*(part[chosen] for part in found))
                predictions += to_predictions(found, real["index"][chosen], real["ratio"][chosen])
                seen += real["index"][chosen].tolist()
            truth = data.eval_annotations(source, seen)
            measured = evaluate_detections(truth, predictions, sigmas=source.info.sigmas)
            numbers = {metric.name: measured[metric.name] for metric in METRICS["detect"]}
            return {"loss": None, **numbers, "count": len(seen)}

        return evaluate

    def _plain(self, info: data.DetectionInfo, rngs: nnx.Rngs) -> FCOS:
        return FCOS(
            DETECTORS[self.config.model.variant],
            num_classes=info.num_classes,
            num_keypoints=info.num_keypoints,
            in_channels=info.channels,
            activation=self.config.model.activation,
            rngs=rngs,
        )

    def _check_truth(self, source: data.AnnotatedSource) -> None:
        """Without an object, average precision is not defined."""
        limit = self.config.data.eval_limit
        used = subset(source.info.num_eval, limit, "eval")
        if all(source.eval.objects(int(index))["crowd"].all() for index in used):
            raise ValueError(
                f"no object is to be found on the {len(used)} test images, so that average precision is not "
                f"defined: raise `data.eval_limit` (it is {limit}), or give other images"
            )

    def _check_activation(self, scales: Scales, name: str) -> None:
        """Scales belong to the activation that they were searched with."""
        searched = scales.metadata.architecture.rpartition("/")[2]
        if searched in ACTIVATIONS and searched != self.config.model.activation:
            raise ValueError(
                f"the scales in {name} were searched with {searched}, and `model.activation` is "
                f"{self.config.model.activation!r}: use the same in search and training"
            )


def detection_transform(settings: DataConfig) -> data.DetectionTransform:
    """What is done to the images, as the config says."""
    return data.DetectionTransform(
        image_size=settings.image_size,
        flip=settings.flip,
        zoom=settings.zoom,
        mean=settings.mean,
        std=settings.std,
    )


def make_detect(graphdef: Any, config: Config):
    """The jitted `detect(params, rest, images) -> Detections` of a network, with running batch statistics."""
    settings, size = config.detect, config.data.image_size

    @jax.jit
    def detect(params, rest, images):
        model = merge_model(graphdef, params, rest)
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


def on_every_host(
    detections: Detections, real: dict[str, np.ndarray], mesh: Mesh
) -> tuple[Detections, dict[str, Any]]:
    """Detections of a global batch, and what each process knows of its own part, whole in every process."""
    if jax.process_count() == 1:
        return jax.device_get(detections), real
    # The rows of a global array come in the order of the mesh, which on a TPU pod is not that of the
    # processes: what belongs to them must be a global array as well.
    return multihost_utils.process_allgather((detections, put_batch(real, mesh)), tiled=True)
