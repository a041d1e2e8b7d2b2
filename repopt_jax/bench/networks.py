"""The networks that are measured, and their training steps: those of the trainer, on one device."""

import contextlib
import types
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from repopt_jax.bench.settings import NETWORKS, XLA, Settings
from repopt_jax.data import DatasetInfo
from repopt_jax.nn.convolution import xla_convolutions
from repopt_jax.train.build import Feed, abstract_program, build_model, build_program
from repopt_jax.train.config import Config, ModelConfig, OptimConfig
from repopt_jax.train.state import batch_sharding, make_mesh

# So many steps that the learning rate stays at its initial value.
STEPS = 10**6


def title(name: str) -> str:
    """Returns the title in results of a network of `NETWORKS`."""
    return NETWORKS[name][0]


def config_of(name: str, settings: Settings, dtype: str, batch: int) -> Config:
    """Returns the config of the run whose step is measured: SGD with Nesterov momentum and decay."""
    _, mode, scales = NETWORKS[name]
    return Config(
        name=name,
        batch_size=batch,
        scales=scales,
        rules="multiplier" if scales else "both",  # where the kernels start makes no difference to the time
        model=ModelConfig(name=settings.model, mode=mode, dtype=dtype),
        optim=OptimConfig(learning_rate=0.01),
    )


def info_of(settings: Settings) -> DatasetInfo:
    names = tuple(map(str, range(settings.classes)))
    shape = (settings.size, settings.size, 3)
    return DatasetInfo(
        name="random numbers",
        class_names=names,
        channels=3,
        image_shape=shape,
        num_train=STEPS,
        num_eval=STEPS,
    )


def new_model(name: str, settings: Settings, dtype: str = "float32") -> Any:
    model, _ = build_model(config_of(name, settings, dtype, 1), info_of(settings))
    return model


def abstract_model(name: str, settings: Settings) -> tuple[Any, Any]:
    """Returns the abstract network, and the shapes of its parameters as a plain dict."""
    model = nnx.eval_shape(lambda: new_model(name, settings))
    return model, nnx.to_pure_dict(nnx.state(model, nnx.Param))


def training(name: str, settings: Settings, dtype: str, batch: int) -> tuple[Any, Any, Any]:
    """Returns a jitted training step, its state, and a batch of random numbers."""
    source = types.SimpleNamespace(info=info_of(settings))
    feed = Feed(source, train=None, eval=None, steps_per_epoch=STEPS)
    program, state = build_program(config_of(name, settings, dtype, batch), feed, one_device())
    return program.train_step, state, random_batch(settings, batch)


def abstract_training(name: str, settings: Settings, dtype: str, batch: int) -> tuple[Any, Any, Any]:
    """Returns `training` with shapes in place of arrays."""
    config = config_of(name, settings, dtype, batch)
    program, state = abstract_program(config, info_of(settings), one_device(), steps_per_epoch=STEPS)
    return program.train_step, state, abstract_batch(settings, batch)


def abstract_batch(settings: Settings, batch: int) -> dict[str, jax.ShapeDtypeStruct]:
    place = batch_sharding(one_device())
    shapes = {"image": (batch, settings.size, settings.size, 3), "label": (batch,)}
    dtypes = {"image": jnp.float32, "label": jnp.int32}
    return {name: jax.ShapeDtypeStruct(shape, dtypes[name], sharding=place) for name, shape in shapes.items()}


def random_batch(settings: Settings, batch: int) -> dict[str, jax.Array]:
    """Returns images, float32 (batch, size, size, 3), and labels, int32 (batch,)."""
    shape = (batch, settings.size, settings.size, 3)
    values = {
        "image": jax.random.normal(jax.random.key(0), shape),
        "label": jnp.arange(batch, dtype=jnp.int32) % settings.classes,
    }
    return jax.device_put(values, batch_sharding(one_device()))


def one_device() -> Any:
    return make_mesh(devices=jax.local_devices()[:1])


@contextlib.contextmanager
def tracing(name: str, tf32: bool):
    """Sets what programs of this network are traced with: TF32 for float32, if the device has it (JAX's
    default), or not; and the convolutions that `NETWORKS` names."""
    with contextlib.ExitStack() as stack:
        if not tf32:
            stack.enter_context(jax.default_matmul_precision("highest"))
        if name == XLA:
            stack.enter_context(xla_convolutions())
        yield
