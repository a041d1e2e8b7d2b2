"""Images: data sets, preprocessing, and batches in a reproducible order.

source = open_source("digits")
transform = Transform(image_size=8, crop_padding=1)
for batch in train_batches(source, transform, batch_size=64, seed=0):
    batch["image"], batch["label"]  # float32 (64, 8, 8, 1), int32 (64,)

The augmentation of ImageNet recipes and mixing in pairs are settings of `Transform`. With boxes and
keypoints: `open_source("scenes")` or "coco", `DetectionTransform`, `train_detection_batches`. The throughput
of one core is measured by `repopt_jax.data.throughput`.
"""

from repopt_jax import extras

extras.require("PIL", "absl", "grain", by=__name__)

from repopt_jax.data.check import BadImage, check_images, check_quickly, without_bad
from repopt_jax.data.classification import eval_batches, train_batches
from repopt_jax.data.coco import open_coco
from repopt_jax.data.dataset import (
    AnnotatedExample,
    AnnotatedSource,
    AnnotatedSplit,
    DatasetInfo,
    DetectionInfo,
    Objects,
    Source,
    hold_out,
)
from repopt_jax.data.detection import (
    DetectionTransform,
    eval_annotations,
    eval_detection_batches,
    letterbox,
    train_detection_batches,
)
from repopt_jax.data.digits import open_digits
from repopt_jax.data.folder import open_folder
from repopt_jax.data.images import Record, Split
from repopt_jax.data.pipeline import CACHE_BYTES, eval_steps, steps_per_epoch
from repopt_jax.data.scenes import open_scenes
from repopt_jax.data.sources import SOURCES, open_configured, open_source
from repopt_jax.data.tfds import open_tfds
from repopt_jax.data.transforms import Transform

__all__ = [
    "CACHE_BYTES",
    "SOURCES",
    "AnnotatedExample",
    "AnnotatedSource",
    "AnnotatedSplit",
    "BadImage",
    "DatasetInfo",
    "DetectionInfo",
    "DetectionTransform",
    "Objects",
    "Record",
    "Source",
    "Split",
    "Transform",
    "check_images",
    "check_quickly",
    "eval_annotations",
    "eval_batches",
    "eval_detection_batches",
    "eval_steps",
    "hold_out",
    "letterbox",
    "open_coco",
    "open_configured",
    "open_digits",
    "open_folder",
    "open_scenes",
    "open_source",
    "open_tfds",
    "steps_per_epoch",
    "train_batches",
    "train_detection_batches",
    "without_bad",
]
