"""What a config says, as objects: the task, the data, the network with its scales, the compiled program, a
trained network read back, and a check of the training's equivalence.
"""

import functools
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, NamedTuple

import jax
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh

from repopt_jax import data, models
from repopt_jax.arguments import check_kind, check_path
from repopt_jax.core.scales import Scales, load_scales
from repopt_jax.data.check import listed
from repopt_jax.optim.check import check_optimizer
from repopt_jax.optim.resrep import resrep
from repopt_jax.quantize.layers import Scheme, check_paths, find_quantizable, with_quantizers
from repopt_jax.surgery.choose import parse_options
from repopt_jax.surgery.custom_l2 import custom_l2
from repopt_jax.surgery.decay import scale_paths, weight_decay_mask
from repopt_jax.surgery.fuse import fuse
from repopt_jax.surgery.prepare import Mode, prepare
from repopt_jax.surgery.reinitialize import sample_weights
from repopt_jax.surgery.resrep import PruningPlan, plan_pruning, to_resrep
from repopt_jax.surgery.search import csla_twin, extract_scales
from repopt_jax.train.checkpoint import Checkpoints
from repopt_jax.train.config import Config, check_config, from_json, needs_no_folder, scales_folder, to_json
from repopt_jax.train.optimizer import hold_scales, make_optimizer, make_schedule, weight_decay
from repopt_jax.train.own import register_own
from repopt_jax.train.processes import in_all_processes
from repopt_jax.train.rules import validate
from repopt_jax.train.rundir import RunFolder
from repopt_jax.train.state import (
    Objective,
    TrainState,
    abstract,
    first_device,
    init_state,
    make_train_step,
    merge_model,
    put_state,
    split_model,
    state_sharding,
)
from repopt_jax.train.tasks import Classification, Detection, Evaluator, Task
from repopt_jax.verify.equivalence import Check, scale_by_layer_means

logger: Final = logging.getLogger(__name__)

TASKS: dict[str, type[Task]] = {"classify": Classification, "detect": Detection}


class Feed(NamedTuple):
    """The data of a run."""

    source: Any
    train: Any
    eval: Any
    steps_per_epoch: int


class Program(NamedTuple):
    """What is compiled, and where the state that it moves lies; of a run that prunes also its plan."""

    graphdef: Any
    train_step: Any
    evaluate: Evaluator
    sharding: TrainState
    plan: PruningPlan | None = None


class Trained(NamedTuple):
    """A network read back from a run, in evaluation mode; its config, data and number of steps."""

    model: Any
    config: Config
    info: Any
    step: int


# -- the data


def make_task(config: Config) -> Task:
    """The task of a config, by its `task`; its network is then known.

    Raises:
      FileNotFoundError, ModuleNotFoundError, ValueError: as `register_own`.
    """
    register_own(config)
    return TASKS[config.task](config)


def check_scales_folder(config: Config) -> None:
    """Checks that the folder that a config's `scales` name holds readable scales. Whether they fit is known
    when the data are open.

    Raises:
      FileNotFoundError, ValueError: as `load_scales`.
    """
    if config.scales and not needs_no_folder(config.scales):
        load_scales(scales_folder(config.scales))


def open_data(config: Config) -> tuple[Any, Any]:
    """The data set of a run and what is done to its images.

    Raises:
      FileNotFoundError, ValueError: as `data.open_source`.
    """
    check_config(config)
    return make_task(config).open_data(config.data)


def open_feed(config: Config) -> Feed:
    """The data of a run, this process's part of them.

    Raises:
      FileNotFoundError, ValueError: as `data.open_source`.
    """
    task, settings = make_task(config), config.data
    source, transform = task.open_data(settings)
    if bad := [] if settings.skip_bad else data.check_quickly(source):
        raise ValueError(
            f"images that cannot be read: {listed(bad)}. `repopt check-data` finds all of them, and "
            "--config.data.skip_bad=True leaves them out"
        )
    shared: dict[str, Any] = {
        "process_index": jax.process_index(),
        "process_count": jax.process_count(),
        "workers": settings.workers,
        "prefetch": settings.prefetch,
    }
    size, limit = config.batch_size, settings.train_limit
    # The limit is for the test images; of those that are held out, all are evaluated.
    eval_limit = None if settings.validation else settings.eval_limit
    shown = {"batch_size": config.eval_batch_size, "limit": eval_limit}
    return Feed(
        source,
        task.train_batches(source, transform, batch_size=size, seed=config.seed, limit=limit, **shared),
        task.eval_batches(source, transform, **shown, **shared),
        data.steps_per_epoch(source, size, limit=limit),
    )


# -- the network


def build_model(config: Config, info: Any) -> tuple[Any, Scales | None]:
    """A fresh network for `info`, and the scales that its gradients are to be multiplied by, if any.

    Raises:
      FileNotFoundError, ValueError: the scales are missing or do not fit the network.
    """
    check_config(config)
    check_kind("info", info, (data.DatasetInfo, data.DetectionInfo), "the `info` of a data set")
    scales = _scales(config, info)
    return _network(config, info, scales), _multiplier(config, scales)


def pruning_plan(config: Config, info: Any) -> PruningPlan | None:
    """What can be pruned of the config's network, with the costs of one image; None if nothing is pruned.

    Raises:
      ValueError: as `plan_pruning`.
    """
    return _plan(to_json(config), info) if config.prune.run else None


@functools.lru_cache(maxsize=2)  # the training, its evaluation and its deployment need the same one
def _plan(config_text: str, info: Any) -> PruningPlan:
    config = from_json(config_text)
    task = make_task(config)
    model = nnx.eval_shape(lambda: task.new_model(info, seed=config.seed))
    return plan_pruning(model, _image(config, info), select=config.prune.select or None)


def _network(
    config: Config, info: Any, scales: Scales | None, plan: PruningPlan | None = None, key: Any = None
) -> Any:
    """The config's network, ready for its mode. Without scales a network of mode repopt is left plain. `key`
    is that of the config's seed, where it is traced."""
    key = jax.random.key(config.seed) if key is None else key
    model = make_task(config).new_model(info, seed=key)
    mode = Mode.parse(config.model.mode)
    if mode is Mode.REPOPT and (scales is None or config.rules == "multiplier"):
        mode, scales = Mode.PLAIN, None
    # A key of its own: the branches' draws must not repeat the network's.
    key = jax.random.fold_in(key, 1)
    options = parse_options(config.model.structure_options)
    # The norms of branches take the place of those after the layers, which the blocks of this package know.
    by_flow = mode.is_structure and not isinstance(model, models.Network)
    example = (_image(config, info),) if by_flow else None
    prepared = prepare(model, mode, scales=scales, options=options, example=example, rngs=nnx.Rngs(key)).model
    return _aware(config, info, prepared if plan is None else to_resrep(prepared, plan))


def fused(config: Config, info: Any, model: Any) -> Any:
    """The config's network, in evaluation mode, as plain convolutions. Which batch norm follows which layer
    the blocks of this package know; in a network of the user's own it is found by the flow of data."""
    if isinstance(model, models.Network):
        return fuse(model)
    return fuse(model, example=(_image(config, info),))


def _image(config: Config, info: Any) -> jax.ShapeDtypeStruct:
    """A batch of one image, as the network takes it."""
    side = config.data.image_size
    return jax.ShapeDtypeStruct((1, side, side, info.channels), "float32")


def _aware(config: Config, info: Any, model: Any) -> Any:
    """The network of quantization-aware training, where the config is for it; ranges are not yet known."""
    quantize = config.quantize
    if not quantize.bits:
        return model
    model.eval()
    model = fused(config, info, model) if quantize.fused else model
    layers = find_quantizable(model)
    check_paths(model, quantize.keep_float, "quantize.keep_float", layers)
    ranges = {path: (0.0, 0.0) for path in layers if path not in quantize.keep_float}
    options = {"momentum": quantize.momentum, "frozen_after": quantize.freeze_after}
    return with_quantizers(model, Scheme.of(vars(quantize)), ranges, **options)


def _scales(config: Config, info: Any) -> Scales | None:
    """The scales that a config names."""
    if not config.scales:
        return None
    scales = make_task(config).resolve_scales(config.scales, info)
    return scales.channel_means() if config.scales_mean else scales


def _multiplier(config: Config, scales: Scales | None) -> Scales | None:
    """Those of them that gradients are multiplied by."""
    return scales if config.model.mode == Mode.REPOPT and config.rules != "init" else None


def _at_once(make: Callable[[Any], Any], key: jax.Array) -> Any:
    """`make(key)`, a network, drawn by one program. Layer by layer, each shape's draw would be compiled by
    itself, which takes longer than the training step does. The program is the same for every seed, so that it
    is compiled once where compiled programs are kept."""
    graphdefs = []

    @jax.jit
    def draw(key):
        graphdef, state = nnx.split(make(key))
        graphdefs.append(graphdef)
        return state

    # Compiled quickly: it runs once.
    options = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
    state = draw.lower(key).compile(options if jax.default_backend() == "cpu" else None)(key)
    return nnx.merge(graphdefs[-1], state)


# -- the program


def build_program(config: Config, feed: Feed, mesh: Mesh) -> tuple[Program, TrainState]:
    """Network and optimizer as jitted steps, and the state before the first one, on its devices.

    Raises:
      ValueError: scales that do not fit the network, a mesh that divides none of its arrays, layers that
        cannot be pruned.
      FileNotFoundError: the scales or the run to prune are missing.
    """
    info = feed.source.info
    if (plan := pruning_plan(config, info)) is not None:
        model = to_resrep(load_source(config).model, plan)
        return _program(config, model, None, mesh, feed.steps_per_epoch, feed.source, plan)
    # Not every host may see the same folders.
    scales = in_all_processes("load the scales", lambda: _scales(config, info))
    if config.quantize.run:
        model = _aware(config, info, load_source(config).model)
    else:
        key = jax.random.key(config.seed)
        model = _at_once(lambda key: _network(config, info, scales, key=key), key)
    return _program(config, model, _multiplier(config, scales), mesh, feed.steps_per_epoch, feed.source)


def abstract_program(
    config: Config, info: Any, mesh: Mesh, *, steps_per_epoch: int
) -> tuple[Program, TrainState]:
    """`build_program` without an array: the state is made of `jax.ShapeDtypeStruct` with shardings, for
    `program.train_step.lower(state, batch)`. The mesh may be of devices that are not there.

    Its `evaluate` cannot be used, as there are no images. Errors are those of `build_program`.
    """
    scales, plan = _scales(config, info), pruning_plan(config, info)  # real scales: their values are checked
    model = nnx.eval_shape(lambda: _network(config, info, scales, plan))
    return _program(config, model, _multiplier(config, scales), mesh, steps_per_epoch, None, plan)


def _program(
    config: Config,
    model: Any,
    scales: Scales | None,
    mesh: Mesh,
    steps_per_epoch: int,
    source: Any,
    plan: PruningPlan | None = None,
) -> tuple[Program, TrainState]:
    """The program and the first state of a network: without a data set of an abstract one, else of a real
    one."""
    task, optim, network = make_task(config), config.optim, split_model(model)
    schedule = _schedule(config, steps_per_epoch)
    decayed = weight_decay_mask(model, custom_l2=optim.custom_l2)
    tx = make_optimizer(
        optim,
        schedule,
        scales=scales,
        batch_size=config.batch_size,
        decayed=decayed,
        normalise=config.normalise,
    )
    objective = task.objective
    if optim.custom_l2:
        objective = with_custom_l2(objective, weight_decay(optim, config.batch_size))
    if plan is not None:
        prune = config.prune
        tx = resrep(tx, plan.compactors, schedule, strength=prune.strength, momentum=prune.momentum)
        _warn_if_short(config, schedule, steps_per_epoch)
    if config.freeze_scales is not None:
        after = round(config.freeze_scales * config.epochs * steps_per_epoch)
        tx = hold_scales(tx, scale_paths(model), after=after)
    if scales is not None and source is not None:
        check_optimizer(tx, scales, network.params)

    def first_state(params: Any, rest: Any) -> TrainState:
        searched = None
        if config.model.mode == Mode.SEARCH:
            searched = extract_scales(merge_model(network.graphdef, params, rest)).vectors
        drawn = network._replace(params=params, non_trainable=rest)
        return init_state(drawn, tx, sums=task.sums, previous_scales=searched, ema=optim.ema is not None)

    arrays = network.params, network.non_trainable
    shapes = jax.eval_shape(first_state, *arrays)
    sharding = state_sharding(mesh, shapes)
    train_step = make_train_step(
        network.graphdef,
        tx,
        schedule,
        objective,
        log_every=config.log_every,
        accumulate=optim.accumulate,
        ema=optim.ema,
        statistics_mesh=mesh if config.mesh.statistics == "device" else None,
        sharding=sharding,
    )
    if source is None:
        return Program(network.graphdef, train_step, _no_images, sharding, plan), abstract(shapes, sharding)
    evaluate = task.make_evaluator(network.graphdef, source, mesh)
    state = put_state(first_state(*arrays), sharding)
    return Program(network.graphdef, train_step, evaluate, sharding, plan), state


def _warn_if_short(config: Config, schedule: optax.Schedule, steps_per_epoch: int) -> None:
    """Warns if training is too short for a row to become zero.

    Each row begins with the norm 1, and the lasso moves it by at most rate * strength / (1 - momentum) in a
    step.
    """
    prune, total = config.prune, config.epochs * steps_per_epoch
    first = round(prune.before_epochs * steps_per_epoch) + prune.interval
    rates = sum(np.asarray(schedule(step)).item() for step in range(min(first, total), total))
    moved = rates * prune.strength / (1 - prune.momentum)
    if prune.target < 1 and moved < 1:
        logger.warning(
            "%s: after the first masks (step %d of %d) the lasso moves a row by %.2g at most, and rows begin "
            "with the norm 1, so that none will become zero: train longer, or raise prune.strength or "
            "optim.learning_rate",
            *(config.name, first, total, moved),
        )


def with_custom_l2(objective: Objective, decay: float) -> Objective:
    """The objective with decay / 2 * `surgery.custom_l2` in its loss, by the variances after this step."""

    def penalised(model, batch):
        loss, sums = objective(model, batch)
        return loss + decay / 2 * custom_l2(model), sums

    return penalised


def _no_images(params: Any, non_trainable: Any, batches: Any) -> Any:
    raise ValueError("an abstract program has no images to evaluate")


def _schedule(config: Config, steps_per_epoch: int) -> optax.Schedule:
    lengths = {"epochs": config.epochs, "steps_per_epoch": steps_per_epoch}
    return make_schedule(config.optim, **lengths, batch_size=config.batch_size)


def config_check(config: Config) -> Check:
    """What a config trains, as a check of its equivalence: network, scales, data, loss and optimizer as the
    trainer would build them, and the optimizer without scales for the twin. The batches are endless.

    Raises:
      ValueError: the config is wrong, or trains nothing that could be equivalent: its mode is not "repopt",
        or its rules leave the multiplier out.
      FileNotFoundError: as `open_data` and `build_model`.
    """
    validate(config, device_count=1)
    check_scales_folder(config)
    if config.quantize.bits:
        raise ValueError(
            f"`quantize.bits`={config.quantize.bits}: the branches of a quantized network are not made here; "
            "check it in floating point, with --config.quantize.bits=0"
        )
    task, feed = make_task(config), open_feed(config)
    model, scales = build_model(config, feed.source.info)
    if scales is None:
        raise ValueError(
            f"`model.mode` is {config.model.mode!r} and `rules` {config.rules!r}: what is checked is a "
            "network whose gradients are multiplied by scales, so add --config.model.mode=repopt "
            "--config.scales=depth (or the folder of a search) --config.rules=both"
        )
    model.train()
    # The network with branches, of which only the paths matter: it decays branches where `model` has kernels.
    twin = nnx.eval_shape(
        lambda: csla_twin(model, scales, sample_weights(scales, jax.random.key(config.seed)))
    )
    schedule = _schedule(config, feed.steps_per_epoch)
    make = functools.partial(make_optimizer, config.optim, schedule, batch_size=config.batch_size)
    return Check(
        model,
        scales,
        feed.train,
        optimizer=make(scales=scales, decayed=weight_decay_mask(model), normalise=config.normalise),
        twin_optimizer=make(
            decayed=weight_decay_mask(twin),
            rates=scale_by_layer_means(scales) if config.normalise else None,
        ),
        loss=lambda model, batch: task.objective(model, batch)[0],
        rngs=nnx.Rngs(config.seed),
    )


# -- a run's network, read back


def load_trained(run_dir: str | Path, *, checkpoint: str | int = "latest") -> Trained:
    """The network of a run, finished or not, on the first local device; its moving average where there is
    one.

    Args:
      run_dir: folder of the run.
      checkpoint: "latest", "best" (by the first number of its evaluations, see `tasks.METRICS`), or a step.

    Raises:
      FileNotFoundError: no run, or no such checkpoint, in `run_dir`.
      ValueError: `checkpoint` is something else.
    """
    check_path("run_dir", run_dir)
    folder = RunFolder(run_dir)
    config, info = folder.read()
    plan = pruning_plan(config, info)
    network = split_model(nnx.eval_shape(lambda: _network(config, info, None, plan)))
    _, params, rest = abstract(network, first_device())
    with open_checkpoints(folder, config) as checkpoints:
        step = checkpoints.find(checkpoint)
        params, rest = checkpoints.load_network(params, rest, step=step)
    model = merge_model(network.graphdef, params, rest)
    model.eval()
    return Trained(model, config, info, step)


def load_source(config: Config) -> Trained:
    """The network that a run that prunes, or is quantization-aware, starts from.

    Raises:
      FileNotFoundError: there is no such run or checkpoint any more.
      ValueError: it is another network.
    """
    section, start = ("prune", config.prune) if config.prune.run else ("quantize", config.quantize)
    source = load_trained(start.run, checkpoint="latest" if start.step is None else start.step)
    names = ("name", "post_se", "activation")
    here, there = ({name: getattr(c.model, name) for name in names} for c in (config, source.config))
    if here != there:
        raise ValueError(
            f"`{section}.run` {start.run} has trained the network {there}, and `model` is {here}: leave "
            "it as it was trained"
        )
    if section == "quantize" and source.config.prune.run:
        raise ValueError(
            f"`quantize.run` {start.run} has compactors: quantize its deployed network after training"
        )
    return source


def open_checkpoints(folder: RunFolder, config: Config) -> Checkpoints:
    """The checkpoints of a run, for reading, with the scores of its evaluations so far.

    Raises:
      FileNotFoundError: there are none.
    """
    return Checkpoints(folder.checkpoints, scores=folder.scores(config.task))
