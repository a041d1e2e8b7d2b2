"""What a config says, as objects: the task, the data, the network with its scales, and a trained network read
back."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import jax
from flax import nnx
from jax.sharding import Mesh

from repopt_jax import data
from repopt_jax.core.scales import Scales
from repopt_jax.optim.check import check_optimizer
from repopt_jax.surgery.decay import scale_paths, weight_decay_mask
from repopt_jax.surgery.prepare import Mode, prepare
from repopt_jax.surgery.search import extract_scales
from repopt_jax.train.checkpoint import Checkpoints
from repopt_jax.train.config import Config
from repopt_jax.train.optimizer import hold_scales, make_optimizer, make_schedule
from repopt_jax.train.processes import in_all_processes
from repopt_jax.train.rundir import RunFolder
from repopt_jax.train.state import (
    TrainState,
    init_state,
    make_train_step,
    merge_model,
    put_state,
    split_model,
    state_sharding,
)
from repopt_jax.train.tasks import Classification, Detection, Task

TASKS: dict[str, type[Task]] = {"classify": Classification, "detect": Detection}


class Feed(NamedTuple):
    """The data of a run."""

    source: Any
    train: Any
    eval: Any
    steps_per_epoch: int


class Program(NamedTuple):
    """What is compiled, and where the state that it moves lies.

    `evaluate(params, rest, batches)` gives the numbers of an evaluation.
    """

    graphdef: Any
    train_step: Any
    evaluate: Callable[[Any, Any, Iterable[dict[str, Any]]], dict[str, Any]]
    sharding: TrainState


class Trained(NamedTuple):
    """A network read back from a run, in evaluation mode; its config, data and number of steps."""

    model: Any
    config: Config
    info: Any
    step: int


def make_task(config: Config) -> Task:
    return TASKS[config.task](config)


def open_feed(config: Config) -> Feed:
    task = make_task(config)
    source, transform = task.open_data(config.data)
    train_limit, eval_limit = config.data.train_limit, config.data.eval_limit
    shared: dict[str, Any] = {
        "process_index": jax.process_index(),
        "process_count": jax.process_count(),
        "workers": config.data.workers,
        "prefetch": config.data.prefetch,
    }
    return Feed(
        source,
        task.train_batches(
            source,
            transform,
            batch_size=config.batch_size,
            seed=config.seed,
            limit=train_limit,
            **shared,
        ),
        task.eval_batches(source, transform, batch_size=config.eval_batch_size, limit=eval_limit, **shared),
        data.steps_per_epoch(source, config.batch_size, limit=train_limit),
    )


def build_program(config: Config, feed: Feed, mesh: Mesh) -> tuple[Program, TrainState]:
    """Network and optimizer as jitted steps, and the state before the first one, on its devices.

    Raises:
      ValueError: scales that do not fit the network, a mesh that divides none of its arrays.
      FileNotFoundError: the scales are missing.
    """
    steps, info = feed.steps_per_epoch, feed.source.info
    # Not every host may see the same folders.
    scales = in_all_processes("load the scales", lambda: _scales(config, info))
    model = _at_once(lambda: _network(config, info, scales))
    scales = _multiplier(config, scales)
    return _program(config, model, scales, mesh, steps_per_epoch=steps, source=feed.source)


def abstract_program(
    config: Config, info: Any, mesh: Mesh, *, steps_per_epoch: int
) -> tuple[Program, TrainState]:
    """`build_program` without an array: the state is made of `jax.ShapeDtypeStruct` with shardings, for
    `program.train_step.lower(state, batch)`. The mesh may be of devices that are not there.

    Its `evaluate` cannot be used, as there are no images. Errors are those of `build_program`.
    """
    scales = _scales(config, info)  # real ones: their values are checked
    model = nnx.eval_shape(lambda: _network(config, info, scales))
    scales = _multiplier(config, scales)
    return _program(config, model, scales, mesh, steps_per_epoch=steps_per_epoch, source=None)


def _program(
    config: Config, model: Any, scales: Scales | None, mesh: Mesh, *, steps_per_epoch: int, source: Any
) -> tuple[Program, TrainState]:
    task, optim = make_task(config), config.optim
    schedule = make_schedule(
        optim, epochs=config.epochs, steps_per_epoch=steps_per_epoch, batch_size=config.batch_size
    )
    decayed = weight_decay_mask(model)
    tx = make_optimizer(optim, schedule, scales=scales, batch_size=config.batch_size, decayed=decayed)
    if config.freeze_scales is not None:
        after = round(config.freeze_scales * config.epochs * steps_per_epoch)
        tx = hold_scales(tx, scale_paths(model), after=after)
    network = split_model(model)
    if scales is not None and source is not None:
        check_optimizer(tx, scales, network.params)
    marks = None
    if config.model.mode == Mode.SEARCH:
        find = lambda model: extract_scales(model).vectors  # noqa: E731
        marks = find(model) if source is not None else nnx.eval_shape(find, model)

    def first_state(params: Any, rest: Any, marks: Any) -> TrainState:
        network_of = network._replace(params=params, non_trainable=rest)
        return init_state(network_of, tx, sums=task.sums, previous_scales=marks, ema=optim.ema is not None)

    arrays = network.params, network.non_trainable, marks
    sharding = state_sharding(mesh, jax.eval_shape(first_state, *arrays))
    train_step = make_train_step(
        network.graphdef,
        tx,
        schedule,
        task.objective,
        log_every=config.log_every,
        accumulate=optim.accumulate,
        ema=optim.ema,
        statistics_mesh=mesh if config.mesh.statistics == "device" else None,
        sharding=sharding,
    )
    if source is None:
        shapes = jax.eval_shape(first_state, *arrays)
        state = jax.tree.map(
            lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), shapes, sharding
        )
        return Program(network.graphdef, train_step, _cannot_evaluate, sharding), state
    evaluate = task.make_evaluator(network.graphdef, source, mesh)
    state = put_state(first_state(*arrays), sharding)
    return Program(network.graphdef, train_step, evaluate, sharding), state


def _cannot_evaluate(params: Any, rest: Any, batches: Any) -> Any:
    raise ValueError("an abstract program has no images to evaluate")


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
    folder = RunFolder(run_dir)
    config, info = folder.read()
    network = split_model(nnx.eval_shape(lambda: _network(config, info, None)))
    place = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    network = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), network)
    with open_checkpoints(folder, config) as checkpoints:
        step = checkpoints.find(checkpoint)
        params, rest = checkpoints.load_network(network.params, network.non_trainable, step=step)
    model = merge_model(network.graphdef, params, rest)
    model.eval()
    return Trained(model, config, info, step)


def open_checkpoints(folder: RunFolder, config: Config) -> Checkpoints:
    """The checkpoints of a run, for reading, with the scores of its evaluations so far.

    Raises:
      FileNotFoundError: there are none.
    """
    return Checkpoints(folder.checkpoints, scores=folder.scores(config.task))


def build_model(config: Config, info: Any) -> tuple[Any, Scales | None]:
    """A fresh network for `info`, and the scales that its gradients are to be multiplied by, if any.

    Raises:
      FileNotFoundError, ValueError: the scales are missing or do not fit the network.
    """
    scales = _scales(config, info)
    return _network(config, info, scales), _multiplier(config, scales)


def _network(config: Config, info: Any, scales: Scales | None) -> Any:
    """The config's network, ready for its mode. Without scales a network of mode repopt is left plain."""
    model = make_task(config).new_model(info, seed=config.seed)
    mode = Mode.parse(config.model.mode)
    if mode is Mode.REPOPT and (scales is None or config.rules == "multiplier"):
        mode, scales = Mode.PLAIN, None
    # A key of its own: the branches' draws must not repeat the network's.
    key = jax.random.fold_in(jax.random.key(config.seed), 1)
    return prepare(model, mode, scales=scales, rngs=nnx.Rngs(key)).model


def _scales(config: Config, info: Any) -> Scales | None:
    """The scales that a config names."""
    if not config.scales:
        return None
    scales = make_task(config).resolve_scales(config.scales, info)
    return scales.channel_means() if config.scales_mean else scales


def _multiplier(config: Config, scales: Scales | None) -> Scales | None:
    """Those of them that gradients are multiplied by."""
    return scales if config.model.mode == Mode.REPOPT and config.rules != "init" else None


def _at_once(make: Callable[[], Any]) -> Any:
    """`make()`, a network, drawn by one program. Layer by layer, each shape's draw would be compiled by
    itself, which takes longer than the training step does."""
    graphdefs = []

    @jax.jit
    def draw():
        graphdef, state = nnx.split(make())
        graphdefs.append(graphdef)
        return state

    # Compiled quickly: it runs once.
    options = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
    state = draw.lower().compile(options if jax.default_backend() == "cpu" else None)()
    return nnx.merge(graphdefs[-1], state)


def open_data(config: Config) -> tuple[Any, Any]:
    """The data set of a run and what is done to its images.

    Raises:
      FileNotFoundError, ValueError: as `data.open_source`.
    """
    return make_task(config).open_data(config.data)
