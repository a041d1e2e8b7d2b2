"""Images: where they come from, what is done to them, and the order in which they are read.

source = open_source("digits")
transform = Transform(image_size=8, crop_padding=1)
for batch in train_batches(source, transform, batch_size=64, seed=0):
    batch["image"], batch["label"]  # float32 (64, 8, 8, 1), int32 (64,)
"""

from repopt_jax.data.images import DatasetInfo, Record, Source, Split
from repopt_jax.data.pipeline import (
    eval_batches,
    eval_steps,
    steps_per_epoch,
    train_batches,
)
from repopt_jax.data.reading import CACHE_BYTES
from repopt_jax.data.sources import SOURCES, open_source
from repopt_jax.data.transforms import Transform

__all__ = [
    "CACHE_BYTES",
    "SOURCES",
    "DatasetInfo",
    "Record",
    "Source",
    "Split",
    "Transform",
    "eval_batches",
    "eval_steps",
    "open_source",
    "steps_per_epoch",
    "train_batches",
]
