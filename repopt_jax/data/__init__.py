"""Images: where they come from, what is done to them, and the order in which they are read.

source = open_source("digits")
transform = Transform(image_size=8, crop_padding=1)
for batch in train_batches(source, transform, batch_size=64, seed=0):
    batch["image"], batch["label"]  # float32 (64, 8, 8, 1), int32 (64,)

The augmentation of ImageNet recipes and mixing in pairs are settings of `Transform`. How many images a core
makes ready in a second: `repopt_jax.data.throughput`.
With boxes and keypoints: `open_scenes` or `open_coco`, `DetectionTransform`, `train_detection_batches`.
"""

from repopt_jax.data.annotated import (
    AnnotatedExample,
    AnnotatedSource,
    AnnotatedSplit,
    DetectionInfo,
    Objects,
)
from repopt_jax.data.coco import open_coco
from repopt_jax.data.detection import (
    DetectionTransform,
    eval_annotations,
    eval_detection_batches,
    letterbox,
    train_detection_batches,
)
from repopt_jax.data.images import DatasetInfo, Record, Source, Split
from repopt_jax.data.pipeline import eval_batches, eval_steps, steps_per_epoch, train_batches
from repopt_jax.data.reading import CACHE_BYTES
from repopt_jax.data.scenes import open_scenes
from repopt_jax.data.sources import SOURCES, open_source
from repopt_jax.data.transforms import Transform

__all__ = [
    "CACHE_BYTES",
    "SOURCES",
    "AnnotatedExample",
    "AnnotatedSource",
    "AnnotatedSplit",
    "DatasetInfo",
    "DetectionInfo",
    "DetectionTransform",
    "Objects",
    "Record",
    "Source",
    "Split",
    "Transform",
    "eval_annotations",
    "eval_batches",
    "eval_detection_batches",
    "eval_steps",
    "letterbox",
    "open_coco",
    "open_scenes",
    "open_source",
    "steps_per_epoch",
    "train_batches",
    "train_detection_batches",
]
