"""What a training config trains, as a check of its equivalence."""

from flax import nnx

from repopt_jax import data
from repopt_jax.surgery.decay import weight_decay_mask
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
    options = {"batch_size": config.batch_size, "decayed": weight_decay_mask(model)}
    return Check(
        model,
        scales,
        batches,
        optimizer=make_optimizer(config.optim, schedule, scales=scales, **options),
        twin_optimizer=make_optimizer(config.optim, schedule, **options),
        loss=lambda model, batch: task.objective(model, batch)[0],
        rngs=nnx.Rngs(config.seed),
    )
