"""What a training config trains, as a check of its equivalence."""

import functools

import jax
from flax import nnx

from repopt_jax import data
from repopt_jax.surgery.decay import weight_decay_mask
from repopt_jax.surgery.reinitialize import sample_weights
from repopt_jax.surgery.search import csla_twin
from repopt_jax.train.build import build_model, make_task
from repopt_jax.train.config import Config, validate
from repopt_jax.train.optimizer import make_optimizer, make_schedule
from repopt_jax.verify.equivalence import Check


def config_check(config: Config) -> Check:
    """Network, scales, data, loss and optimizer as the trainer would build them, and the optimizer without
    scales for the twin. The batches are endless.

    Raises:
      ValueError: the config is wrong, or trains nothing that could be equivalent: its mode is not "repopt",
        or its rules leave the multiplier out.
      FileNotFoundError: as `build.open_data` and `build.build_model`.
    """
    validate(config, device_count=1)
    task = make_task(config)
    source, transform = task.open_data(config.data)
    model, scales = build_model(config, source.info)
    if scales is None:
        raise ValueError(
            f"`model.mode` is {config.model.mode!r} and `rules` {config.rules!r}: what is checked is a "
            "network whose gradients are multiplied by scales, so add --config.model.mode=repopt "
            "--config.scales=depth (or the folder of a search) --config.rules=both"
        )
    model.train()
    limit = config.data.train_limit
    batches = task.train_batches(
        source, transform, batch_size=config.batch_size, seed=config.seed, limit=limit
    )
    schedule = make_schedule(
        config.optim,
        epochs=config.epochs,
        steps_per_epoch=data.steps_per_epoch(source, config.batch_size, limit=limit),
        batch_size=config.batch_size,
    )
    # The network with branches, of which only the paths matter: it decays branches where `model` has kernels.
    twin = nnx.eval_shape(
        lambda: csla_twin(model, scales, sample_weights(scales, jax.random.key(config.seed)))
    )
    make = functools.partial(make_optimizer, config.optim, schedule, batch_size=config.batch_size)
    return Check(
        model,
        scales,
        batches,
        optimizer=make(scales=scales, decayed=weight_decay_mask(model)),
        twin_optimizer=make(decayed=weight_decay_mask(twin)),
        loss=lambda model, batch: task.objective(model, batch)[0],
        rngs=nnx.Rngs(config.seed),
    )
