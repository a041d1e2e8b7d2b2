"""Whether the input pipeline keeps up: images per second of one core, compared with a training step."""

import logging
import math
import tempfile
from pathlib import Path
from typing import Any

from repopt_jax import data
from repopt_jax.bench.networks import title
from repopt_jax.bench.results import Section
from repopt_jax.bench.settings import Settings
from repopt_jax.bench.step import add_speed, section_of, stepping
from repopt_jax.bench.timing import Facts, measure, spread
from repopt_jax.data.throughput import input_throughput, photographs

LOG = logging.getLogger(__name__)

# The network whose training step consumes the images.
CONSUMER = "repopt"
PIPELINE = "input pipeline, one core"
PHOTOGRAPHS = 128
# Images of one measurement, and of a batch of it.
IMAGES, BATCH = 128, 32


def bench_input(settings: Settings) -> list[Section]:
    """Measures decoding and augmentation of the ImageNet recipe, and the cores that a training step needs.

    The step is that of the first batch size and dtype.

    Raises:
      FileNotFoundError, ValueError: as `data.open_source`, of `settings.images`.
    """
    dtype, batch = settings.dtypes[0], settings.batches[0]
    LOG.info("input: images of %d px", settings.size)
    with tempfile.TemporaryDirectory() as folder:
        source, what = open_images(settings, Path(folder))
        found: dict[str, Facts] = {PIPELINE: pipeline_speed(settings, source)}
    LOG.info("input: the step of %s", settings.label(dtype, batch))
    name = f"training step, {title(CONSUMER)}"
    step = measure({name: lambda: stepping(CONSUMER, settings, dtype, batch)}, settings.rounds, {})
    add_speed(step, batch)
    found |= step
    notes = [f"Read and augmented: {what}."]
    if "images_per_s" in step[name]:
        need, supply = step[name]["images_per_s"], found[PIPELINE]["images_per_s"]
        cores = need / supply
        found[name]["cores"] = cores
        notes.append(
            f"The step consumes the images of {cores:.2g} cores: {math.ceil(cores)} for each device."
        )
    heading = "Input pipeline beside the step"
    return [section_of("input", heading, settings, dtype, batch, found, notes=notes)]


def check_images(settings: Settings) -> None:
    """Checks the folder of images, where one is given.

    Raises:
      ValueError: it cannot be opened.
    """
    if not settings.images:
        return
    try:
        data.open_source("folder", data_dir=settings.images)
    except (OSError, ValueError) as error:
        raise ValueError(f"`images` cannot be used for the part input: {error}") from error


def open_images(settings: Settings, folder: Path) -> tuple[Any, str]:
    """Opens the images of `settings`, or generated photographs in `folder`; also returns a description."""
    if settings.images:
        return data.open_source("folder", data_dir=settings.images), f"images of {settings.images}"
    source = data.open_source("folder", data_dir=photographs(folder / "images", PHOTOGRAPHS))
    return source, f"{PHOTOGRAPHS} generated photographs of 500 x 375 pixels (JPEG)"


def recipe(settings: Settings) -> data.Transform:
    """Returns the published ImageNet recipe: random resized crop, flip, RandAugment of magnitude 15."""
    return data.Transform(
        image_size=settings.size,
        area=(0.08, 1.0),
        flip=True,
        randaugment=15,
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
    )


def pipeline_speed(settings: Settings, source: Any) -> Facts:
    """Measures the images per second of one core, as the median of `rounds` measurements."""
    found = [
        input_throughput(source, recipe(settings), batch_size=BATCH, images=IMAGES, seed=seed)
        for seed in range(settings.rounds)
    ]
    taken = spread([1e3 / one["images_per_s"] for one in found])
    parts = {name: spread([one[name] for one in found])["median"] for name in ("decode_ms", "augment_ms")}
    return {"ms_per_image": taken, "images_per_s": 1e3 / taken["median"], **parts}
