"""What a config says, as objects: the data, the network with its scales, and a trained network read back."""

import os
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from repopt_jax import data
from repopt_jax.models import VGG_VARIANTS, RepOptVGG
from repopt_jax.scales import Scales, load_scales
from repopt_jax.surgery import reinitialize
from repopt_jax.train.checkpoint import Checkpoints
from repopt_jax.train.config import Config, DataConfig, ModelConfig
from repopt_jax.train.rundir import RunFolder
from repopt_jax.train.state import merge_model, split_model


class Trained(NamedTuple):
    """A network read back from a run: in evaluation mode, with the config, the data set and the step it is from."""

    model: RepOptVGG
    config: Config
    info: data.DatasetInfo
    step: int


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
    if config.model.kind != "target":
        # A search starts from these scales; the constants of a csla network are these scales.
        return _new_model(config.model, info, scales=scales, seed=config.seed), None
    # A key of its own: the branches' draws must not repeat the network's.
    key = jax.random.fold_in(jax.random.key(config.seed), 1)
    return reinitialize(model, scales, rngs=nnx.Rngs(key)), scales


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


def _new_model(
    config: ModelConfig, info: data.DatasetInfo, *, scales: Scales | None, seed: int
) -> RepOptVGG:
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
