"""What a training config trains, as a check of its equivalence."""

from flax import nnx

from repopt_jax import data
from repopt_jax.train.build import build_model, make_task
from repopt_jax.train.config import Config, validate
from repopt_jax.train.optimizer import make_optimizer, make_schedule
from repopt_jax.verify.equivalence import Check


def config_check(config: Config) -> Check:
    """Network, scales, data, loss and optimizer as the trainer would build them, and the optimizer without
    scales for the twin. The batches are endless.

    Raises:
      ValueError: the config is wrong, or trains nothing that could be equivalent: its kind is not "target",
        it has no scales, or its rules leave the multiplier out.
      FileNotFoundError: as `build.open_data` and `build.build_model`.
    """
    validate(config, device_count=1)
    task = make_task(config)
    source, transform = task.open_data(config.data)
    model, scales = build_model(config, source.info)
    if scales is None:
        raise ValueError(
            f"`model.kind` is {config.model.kind!r}, `scales` {config.scales!r} and `rules` "
            f"{config.rules!r}: what is checked is a target network whose gradients are multiplied by "
            "scales, so add --config.model.kind=target --config.scales=depth (or the folder of a search) "
            "--config.rules=both"
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

    return Check(
        model,
        scales,
        batches,
        optimizer=make_optimizer(config.optim, schedule, batch_size=config.batch_size, scales=scales),
        twin_optimizer=make_optimizer(config.optim, schedule, batch_size=config.batch_size),
        loss=lambda model, batch: task.objective(model, batch)[0],
        rngs=nnx.Rngs(config.seed),
    )
