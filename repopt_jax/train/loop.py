"""The training loop: one for search, target and baselines, which differ by their config alone.

The only module of the trainer that acts: it reads data, writes the run's folder and moves the state. The order inside
a step is part of its meaning. A step is started; what is due at it is logged, recorded and evaluated; only then it is
saved; only then the next batch is taken. So a checkpoint always holds the data position that belongs to its state, and
all lines of the log up to its step are on disk before it is.
"""

import contextlib
import dataclasses
import importlib.metadata
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from repopt_jax import data
from repopt_jax.scales import ScalesMetadata, save_scales
from repopt_jax.surgery import extract_scales
from repopt_jax.train.build import build_model, open_data
from repopt_jax.train.checkpoint import Checkpoints
from repopt_jax.train.config import Config, validate
from repopt_jax.train.config_io import to_json
from repopt_jax.train.metrics import (
    MetricsWriter,
    ProgressBar,
    Stopwatch,
    read_records,
    scale_statistics,
)
from repopt_jax.train.optimizer import make_optimizer, make_schedule
from repopt_jax.train.rundir import RunFolder, Summary
from repopt_jax.train.sharding import make_mesh, put_batch, replicated, state_sharding
from repopt_jax.train.state import (
    TrainState,
    all_finite,
    init_state,
    make_eval_step,
    make_train_step,
    merge_model,
    split_model,
    start_sums,
    sums_to_means,
)

Stop = Callable[[], bool]


def run(
    config: Config, out_dir: str | Path, *, progress: bool = True, stop: Stop | None = None
) -> Summary:
    """Trains as `config` says and leaves everything in `out_dir`; see `rundir` for what is there.

    Started again with an equal config, a finished run is returned as it is and an unfinished one goes on from its last
    checkpoint, to the state and the log that it would have reached unbroken.

    Args:
      config: the run.
      out_dir: its folder: new, empty, or of this run.
      progress: shows a bar where standard error is a terminal; else one line an epoch goes to `logging`.
      stop: asked after each step; when it returns True, a checkpoint is written and the run returns unfinished. With
        several processes it must give the same answer in all of them.

    Raises:
      ValueError: a config that cannot run (all problems listed), data or scales that do not fit, or an `out_dir` that
        holds something else.
      OSError: `out_dir`, the data or the scales cannot be read or written.
      FloatingPointError: loss or parameters that are not finite; the checkpoint before is kept.
    """
    # Everything that can be refused is refused before anything is written.
    validate(config)
    folder = RunFolder(out_dir)
    if (summary := folder.finished(config)) is not None:
        return summary
    source, transform = open_data(config.data)
    steps_per_epoch = data.steps_per_epoch(
        source, config.batch_size, limit=config.data.train_limit
    )
    eval_batches = data.eval_batches(
        source, transform, **_reading(config, config.eval_batch_size, config.data.eval_limit)
    )
    batches = data.train_batches(
        source,
        transform,
        seed=config.seed,
        **_reading(config, config.batch_size, config.data.train_limit),
    )

    # Network, optimizer, and the state on its devices.
    model, scales = build_model(config, source.info)
    schedule = make_schedule(config.optim, epochs=config.epochs, steps_per_epoch=steps_per_epoch)
    tx = make_optimizer(config.optim, schedule, scales=scales)
    network = split_model(model)
    marks = extract_scales(model).vectors if config.model.kind == "search" else None
    state = init_state(network, tx, marks=marks)
    mesh = make_mesh(config.fsdp)
    sharding = state_sharding(mesh, state)
    state = jax.device_put(state, sharding)
    train_step = make_train_step(
        network.graphdef,
        tx,
        schedule,
        label_smoothing=config.optim.label_smoothing,
        log_every=config.log_every,
        sharding=sharding,
    )

    folder.claim(config, source.info)
    with contextlib.ExitStack() as stack:
        iterator = stack.enter_context(contextlib.closing(iter(batches)))
        checkpoints = stack.enter_context(Checkpoints(folder.checkpoints))
        # What a run starts from, the first that there is:
        #   1. the finished run in `out_dir`, which is returned as it is (above);
        #   2. the last checkpoint in `out_dir`: state, data position and clock. The scales come with the optimizer's
        #      state, and re-initialisation, which belongs to step 0, is overwritten;
        #   3. scales: the network is re-initialised by them;
        #   4. a fresh draw from the seed.
        start, seconds = checkpoints.latest, 0.0
        if start is not None:
            state, seconds = checkpoints.restore(state, iterator)
        metrics = stack.enter_context(
            MetricsWriter(folder.path, resume_step=start, tensorboard=config.tensorboard)
        )
        total = config.epochs * steps_per_epoch
        bar = stack.enter_context(
            ProgressBar(config.name, total=total, start=start or 0, shown=progress)
        )
        session = _Session(
            config, folder, source.info, network.graphdef, mesh, sharding, train_step,
            make_eval_step(network.graphdef), iterator, eval_batches, steps_per_epoch, total,
            checkpoints, metrics, bar, seconds, stop or _never,
        )  # fmt: skip
        state, finished = _train(session, state, start or 0)
        return _finish(session, state, finished=finished)


@dataclasses.dataclass
class _Session:
    """What the steps of a run share."""

    config: Config
    folder: RunFolder
    info: data.DatasetInfo
    graphdef: Any
    mesh: Mesh
    sharding: TrainState
    train_step: Any
    eval_step: Any
    batches: Any
    eval_batches: Any
    steps_per_epoch: int
    total: int
    checkpoints: Checkpoints
    metrics: MetricsWriter
    bar: ProgressBar
    seconds_before: float
    stop: Stop
    began: float = dataclasses.field(default_factory=time.perf_counter)

    @property
    def seconds(self) -> float:
        return self.seconds_before + time.perf_counter() - self.began

    def epoch(self, step: int) -> float:
        return step / self.steps_per_epoch


def _train(run: _Session, state: TrainState, start: int) -> tuple[TrainState, bool]:
    """Steps `start` + 1 to the last; the second result is False if the run was stopped before."""
    if start == run.total:
        return state, True
    if start == 0:
        state = _record_scales(run, state, 0)
    batch = put_batch(next(run.batches), run.mesh)
    # Compiled ahead: no window of the clock holds a compilation, and a second one, which would mean that a step
    # returns another kind of state than it was given, is an error.
    train_step = run.train_step.lower(state, batch).compile()
    watch = Stopwatch()
    for step in range(start + 1, run.total + 1):
        with jax.transfer_guard("disallow"):
            state, means = train_step(state, batch)
        watch.tick()
        epoch_ends, last = step % run.steps_per_epoch == 0, step == run.total
        stopping = run.stop() and not last
        if step % run.config.log_every == 0 or last:
            _log(run, means, step, watch)
        if epoch_ends or stopping or _save_due(run, step):
            jax.block_until_ready(state)  # so that the pause does not hide the end of the window
            with watch.paused():
                state = _between_steps(run, state, step, epoch_ends, stopping)
        if stopping:
            return state, False
        if not last:
            batch = put_batch(next(run.batches), run.mesh)
    return state, True


def _between_steps(
    run: _Session, state: TrainState, step: int, epoch_ends: bool, stopping: bool
) -> TrainState:
    """Statistics of the scales, evaluation, checkpoint: in this order, see the module's text."""
    if epoch_ends:
        state = _record_scales(run, state, step)
        epoch = step // run.steps_per_epoch
        evaluated = epoch % run.config.eval_every == 0 or step == run.total
        run.bar.end_epoch(epoch, _evaluate(run, state, step) if evaluated else None)
    if stopping or step == run.total or _save_due(run, step):
        _save(run, state, step)
    return state


def _save_due(run: _Session, step: int) -> bool:
    return step % (run.config.checkpoint_every or run.steps_per_epoch) == 0


def _log(run: _Session, means: dict[str, jax.Array], step: int, watch: Stopwatch) -> None:
    """Waits for `step`, writes its "train" record, and looks whether the loss was finite until here."""
    values = {name: value.item() for name, value in jax.device_get(means).items()}
    bad_step = values.pop("bad_step")
    if bad_step >= 0:
        raise FloatingPointError(_not_finite(run, f"the loss of step {bad_step}"))
    images_per_s = run.config.batch_size / watch.seconds_per_step()
    record = {"kind": "train", "step": step, "epoch": run.epoch(step), **values}
    record["images_per_s"] = images_per_s
    run.metrics.write(record)
    run.bar.update(record)


def _record_scales(run: _Session, state: TrainState, step: int) -> TrainState:
    """In a search, writes the statistics of the scale vectors and remembers them for the next record."""
    if run.config.model.kind != "search":
        return state
    model = merge_model(run.graphdef, state.params, state.rest)
    vectors = jax.device_get(extract_scales(model).vectors)
    layers = scale_statistics(vectors, jax.device_get(state.marks))
    run.metrics.write(
        {"kind": "scales", "step": step, "epoch": run.epoch(step), "layers": layers}
    )
    # A copy on the devices: on a CPU the arrays above can be the parameters' own memory, which the next step reuses.
    copies = jax.tree.map(lambda v: v.copy(), vectors)
    return state._replace(marks=jax.device_put(copies, run.sharding.marks))


def _evaluate(run: _Session, state: TrainState, step: int) -> dict[str, Any]:
    """Writes and returns the "eval" record: every test image once, with running statistics."""
    sums = start_sums(replicated(run.mesh))
    for batch in run.eval_batches:
        sums = run.eval_step(state.params, state.rest, sums, put_batch(batch, run.mesh))
    record = {"kind": "eval", "step": step, "epoch": run.epoch(step), **sums_to_means(sums)}
    run.metrics.write(record)
    return record


def _save(run: _Session, state: TrainState, step: int) -> None:
    """Writes a checkpoint, unless the state is not worth one."""
    if (bad_step := int(jax.device_get(state.bad_step))) >= 0:
        raise FloatingPointError(_not_finite(run, f"the loss of step {bad_step}"))
    if not bool(jax.device_get(all_finite(state.params))):
        raise FloatingPointError(_not_finite(run, f"a parameter after step {step}"))
    run.metrics.sync()
    run.checkpoints.save(step, state, run.batches, seconds=run.seconds)


def _not_finite(run: _Session, what: str) -> str:
    kept = run.checkpoints.latest
    where = "no checkpoint was written" if kept is None else f"the checkpoint of step {kept} is kept"
    return (
        f"{what} is not finite; {where} in {run.checkpoints.directory}. "
        "A lower `optim.learning_rate` or a longer `optim.warmup_epochs` usually helps"
    )


def _finish(run: _Session, state: TrainState, *, finished: bool) -> Summary:
    """The summary; of a finished run it is also written, after the scales of a search."""
    records = read_records(run.folder.metrics)
    speeds = [r["images_per_s"] for r in records if r["kind"] == "train"]
    speed = statistics.median(speeds) if speeds else None
    tests = [r for r in records if r["kind"] == "eval"]
    test = tests[-1] if tests else {"accuracy": None, "loss": None, "count": None}
    steps = int(jax.device_get(state.step))
    summary = Summary(
        name=run.config.name,
        kind=run.config.model.kind,
        scales=run.config.scales,
        seed=run.config.seed,
        epochs=run.config.epochs,
        steps=steps,
        test_accuracy=test["accuracy"],
        test_loss=test["loss"],
        test_count=test["count"],
        train_parameters=sum(leaf.size for leaf in jax.tree.leaves(state.params)),
        step_ms_median=None if speed is None else 1e3 * run.config.batch_size / speed,
        images_per_s=speed,
        wall_s=run.seconds,
        finished=finished,
        versions=_versions(),
        device=f"{jax.device_count()} x {jax.devices()[0].device_kind}",
    )
    if finished:
        _save_scales(run, state, steps)
        run.folder.finish(summary)
    return summary


def _save_scales(run: _Session, state: TrainState, step: int) -> None:
    # They are there already if the run was killed between this and its summary; the same state wrote them.
    if run.config.model.kind != "search" or run.folder.scales.exists():
        return
    metadata = ScalesMetadata(
        architecture=run.config.model.variant,
        dataset=run.info.name,
        config=to_json(run.config),
        step=step,
    )
    model = merge_model(run.graphdef, state.params, state.rest)
    save_scales(run.folder.scales, extract_scales(model, metadata=metadata))


def _reading(config: Config, batch_size: int, limit: int | None) -> dict[str, Any]:
    return {
        "batch_size": batch_size,
        "limit": limit,
        "process_index": jax.process_index(),
        "process_count": jax.process_count(),
        "workers": config.data.workers,
        "prefetch": config.data.prefetch,
    }


def _versions() -> dict[str, str]:
    names = ("repopt_jax", "jax", "flax", "optax", "orbax-checkpoint", "grain")
    installed = {name: importlib.metadata.version(name) for name in names}
    return {"python": platform.python_version(), **installed}


def _never() -> bool:
    return False
