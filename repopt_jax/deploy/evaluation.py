"""The test images of a finished network's data set, and the numbers that the network has on them."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from repopt_jax.arguments import check_count, check_kind
from repopt_jax.train.build import Trained, make_task
from repopt_jax.train.config import Config, DataConfig
from repopt_jax.train.state import make_mesh, split_model
from repopt_jax.train.tasks import Task

COMPARED_IMAGES = 1024  # test images on which outputs of two forms of a network are compared


def evaluate(trained: Trained, *, data_dir: str | None = None) -> dict[str, Any]:
    """The numbers of the task (`tasks.METRICS`), loss and count over the test images of the network's data
    set, each counted once.

    Raises:
      FileNotFoundError, ValueError: the data are missing, or their classes are not those of the training.
    """
    task, source, batches = open_test(trained, data_dir)
    network = split_model(trained.model)
    mesh = make_mesh(devices=jax.local_devices()[:1])
    return task.make_evaluator(network.graphdef, source, mesh)(network.params, network.non_trainable, batches)


def open_test(trained: Trained, data_dir: str | None = None) -> tuple[Task, Any, Any]:
    """The task of a network, its data set, and the batches of the test split, the last one padded.

    Raises:
      FileNotFoundError, ValueError: as `evaluate`.
    """
    _check_trained(trained)
    info = trained.info
    return open_test_of(trained.config, info.class_names, info.channels, data_dir)


def open_test_of(
    config: Config,
    class_names: Sequence[str],
    channels: int,
    data_dir: str | None = None,
    **preprocessing: Any,
) -> tuple[Task, Any, Any]:
    """`open_test` by a config, the names of the classes, and the channels of the images; `preprocessing` are
    fields of `DataConfig` that replace those of the config."""
    # The test images, also of a run that was evaluated on training images that it held out.
    settings = dataclasses.replace(config.data, validation=0, **preprocessing)
    task, source, transform = _open(config, settings, class_names, channels, data_dir)
    size, limit = config.eval_batch_size, config.data.eval_limit
    batches = task.eval_batches(
        source, transform, batch_size=size, limit=limit, process_index=0, process_count=1
    )
    return task, source, batches


def training_images(trained: Trained, count: int, *, data_dir: str | None = None) -> np.ndarray:
    """The first `count` training images of a run, in the order of `data.train_limit`, or all if there are
    fewer: preprocessed as in evaluation, not augmented. float32 (count, height, width, channels).

    Raises:
      FileNotFoundError, ValueError: as `evaluate`.
    """
    _check_trained(trained)
    check_count("count", count)
    config, known = trained.config, trained.info
    task, source, transform = _open(config, config.data, known.class_names, known.channels, data_dir)
    info = dataclasses.replace(source.info, num_eval=source.info.num_train)
    source = dataclasses.replace(source, info=info, eval=source.train)
    limit = min(count, info.num_eval)
    size = min(config.eval_batch_size, limit)
    shown = {"batch_size": size, "limit": limit, "process_index": 0, "process_count": 1}
    batches = task.eval_batches(source, transform, **shown)
    return np.concatenate([batch["image"][batch["mask"] > 0] for batch in batches])


def _check_trained(trained: Any) -> None:
    what, remedy = "a trained network, such as `load_trained` returns", "`load_any` reads a folder"
    check_kind("trained", trained, Trained, what, remedy=remedy)


def _open(
    config: Config,
    settings: DataConfig,
    class_names: Sequence[str],
    channels: int,
    data_dir: str | None,
) -> tuple[Task, Any, Any]:
    """The task, the data set and the preprocessing of the `data` section of a config.

    Raises:
      FileNotFoundError, ValueError: as `evaluate`.
    """
    if data_dir is not None:
        # Where there is none, the digits would be prepared in it.
        if not Path(data_dir).expanduser().is_dir():
            raise FileNotFoundError(f"`data_dir` {data_dir} is not a folder: give the one of the images")
        settings = dataclasses.replace(settings, data_dir=data_dir)
    task = make_task(config)
    source, transform = task.open_data(settings)
    if (found := source.info.class_names) != (wanted := tuple(class_names)):
        raise ValueError(
            f"the network was trained on {len(wanted)} classes ({', '.join(wanted[:6])} ...) and the data "
            f"have {len(found)} ({', '.join(found[:6])} ...): give the data that it was trained on"
        )
    if source.info.channels != channels:
        raise ValueError(
            f"the network takes images of {channels} channels, and the data have {source.info.channels}: "
            "give the data that it was trained on"
        )
    return task, source, transform


def compared_batches(trained: Trained, data_dir: str | None = None) -> list[jax.Array]:
    """The first test images, in batches: at least `COMPARED_IMAGES` if there are as many, and no more batches
    than that takes."""
    batches, count = [], 0
    for batch in open_test(trained, data_dir)[2]:
        batches.append(batch["image"][batch["mask"] > 0])
        count += len(batches[-1])
        if count >= COMPARED_IMAGES:
            break
    return batches


def compared_images(trained: Trained, data_dir: str | None = None) -> jax.Array:
    """The first `COMPARED_IMAGES` test images; no more are read."""
    return jnp.asarray(np.concatenate(compared_batches(trained, data_dir))[:COMPARED_IMAGES])
