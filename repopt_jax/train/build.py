"""What a config says, as objects: the data, the network with its scales, and a trained network read back."""

import os
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from repopt_jax import data
from repopt_jax.models import VGG_VARIANTS, RepOptVGG
from repopt_jax.scales import Scales, load_scales
from repopt_jax.surgery import extract_scales, reinitialize
from repopt_jax.train.checkpoint import Checkpoints
from repopt_jax.train.config import Config, DataConfig, ModelConfig
from repopt_jax.train.optimizer import hold_scales, make_optimizer, make_schedule
from repopt_jax.train.rundir import RunFolder
from repopt_jax.train.sharding import state_sharding
from repopt_jax.train.state import (
    TrainState,
    init_state,
    make_eval_step,
    make_train_step,
    merge_model,
    split_model,
)


class Feed(NamedTuple):
    """The data of a run."""

    info: data.DatasetInfo
    train: Any
    eval: Any
    steps_per_epoch: int


class Program(NamedTuple):
    """What is compiled, and where the state that it moves lies."""

    graphdef: Any
    train_step: Any
    eval_step: Any
    sharding: TrainState


class Trained(NamedTuple):
    """A network read back from a run, in evaluation mode; its config, data and number of steps."""

    model: RepOptVGG
    config: Config
    info: data.DatasetInfo
    step: int


def open_feed(config: Config) -> Feed:
    source, transform = open_data(config.data)
    train_limit, eval_limit = config.data.train_limit, config.data.eval_limit
    shared: dict[str, Any] = {
        "process_index": jax.process_index(),
        "process_count": jax.process_count(),
        "workers": config.data.workers,
        "prefetch": config.data.prefetch,
    }
    return Feed(
        source.info,
        data.train_batches(
            source,
            transform,
            batch_size=config.batch_size,
            seed=config.seed,
            limit=train_limit,
            **shared,
        ),
        data.eval_batches(source, transform, batch_size=config.eval_batch_size, limit=eval_limit, **shared),
        data.steps_per_epoch(source, config.batch_size, limit=train_limit),
    )


def build_program(config: Config, feed: Feed, mesh: Mesh) -> tuple[Program, TrainState]:
    """Network and optimizer as jitted steps, and the state before the first one, on its devices."""
    model, scales = build_model(config, feed.info)
    schedule = make_schedule(config.optim, epochs=config.epochs, steps_per_epoch=feed.steps_per_epoch)
    tx = make_optimizer(config.optim, schedule, scales=scales)
    if config.freeze_scales is not None:
        tx = hold_scales(tx, after=round(config.freeze_scales * config.epochs * feed.steps_per_epoch))
    network = split_model(model)
    marks = extract_scales(model).vectors if config.model.kind == "search" else None
    state = init_state(network, tx, marks=marks)
    sharding = state_sharding(mesh, state)
    train_step = make_train_step(
        network.graphdef,
        tx,
        schedule,
        label_smoothing=config.optim.label_smoothing,
        log_every=config.log_every,
        sharding=sharding,
    )
    program = Program(network.graphdef, train_step, make_eval_step(network.graphdef), sharding)
    return program, jax.device_put(state, sharding)


def load_trained(run_dir: str | Path) -> Trained:
    """The network of the newest checkpoint of a run, finished or not, on the first local device.

    Raises:
      FileNotFoundError: no run, or no checkpoint, in `run_dir`.
    """
    folder = RunFolder(run_dir)
    config, info = folder.read()
    network = split_model(_new_model(config.model, info, scales=None, seed=0))
    network = jax.device_put(network, jax.sharding.SingleDeviceSharding(jax.local_devices()[0]))
    with Checkpoints(folder.checkpoints) as checkpoints:
        step = checkpoints.latest
        if step is None:
            raise FileNotFoundError(f"`run_dir` {folder.path} has no checkpoint yet: let it train")
        params, rest = checkpoints.load_network(network.params, network.rest)
    model = merge_model(network.graphdef, params, rest)
    model.eval()
    return Trained(model, config, info, step)


def build_model(config: Config, info: data.DatasetInfo) -> tuple[RepOptVGG, Scales | None]:
    """A fresh network for `info`, and the scales that its gradients are to be multiplied by, if any.

    Raises:
      FileNotFoundError, ValueError: the scales are missing or do not fit the network.
    """
    model = _new_model(config.model, info, scales=None, seed=config.seed)
    if not config.scales:
        return model, None
    scales = _resolve_scales(config.scales, model)
    if config.scales_mean:
        scales = scales.channel_means()
    if config.model.kind != "target":
        # A search starts from these scales; the constants of a csla network are these scales.
        return _new_model(config.model, info, scales=scales, seed=config.seed), None
    if config.rules != "multiplier":
        # A key of its own: the branches' draws must not repeat the network's.
        key = jax.random.fold_in(jax.random.key(config.seed), 1)
        model = reinitialize(model, scales, rngs=nnx.Rngs(key))
    return model, None if config.rules == "init" else scales


def open_data(config: DataConfig) -> tuple[data.Source, data.Transform]:
    """The data set and what is done to its images.

    Raises:
      FileNotFoundError, ValueError: as `data.open_source`.
    """
    source = data.open_source(
        config.source,
        name=config.name or None,
        data_dir=os.path.expanduser(config.data_dir) or None,
    )
    transform = data.Transform(
        image_size=config.image_size,
        crop_padding=config.crop_padding,
        flip=config.flip,
        area=config.area,
        mean=config.mean,
        std=config.std,
    )
    return source, transform


def _resolve_scales(name: str, model: RepOptVGG) -> Scales:
    if name == "ones":
        return model.unit_scales()
    if name == "depth":
        return model.depth_scales()
    return load_scales(name, model)


def _new_model(config: ModelConfig, info: data.DatasetInfo, *, scales: Scales | None, seed: int) -> RepOptVGG:
    return RepOptVGG(
        VGG_VARIANTS[config.variant],
        kind=config.kind,  # pyright: ignore[reportArgumentType]
        num_classes=info.num_classes,
        in_channels=info.channels,
        post_se=config.post_se,
        form=config.form,  # pyright: ignore[reportArgumentType]
        scales=scales,
        dtype=None if config.dtype == "float32" else jnp.dtype(config.dtype),
        rngs=nnx.Rngs(seed),
    )
