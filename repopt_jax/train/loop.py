"""The training loop: one for search, target and baselines, which differ by their config alone.

The only module of the trainer that acts: it reads data, writes the run's folder and moves the state. The
order inside a step is part of its meaning. A step is started; what is due at it is logged, recorded and
evaluated; only then it is saved; only then the next batch is taken. So a checkpoint always holds the data
position that belongs to its state, and all lines of the log up to its step are on disk before it is.
"""

import contextlib
import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from repopt_jax.scales import ScalesMetadata, save_scales
from repopt_jax.surgery import extract_scales
from repopt_jax.train.build import Feed, Program, build_program, make_task, open_feed
from repopt_jax.train.checkpoint import Checkpoints
from repopt_jax.train.config import Config
from repopt_jax.train.config_io import to_json
from repopt_jax.train.metrics import (
    MetricsWriter,
    ProgressBar,
    Stopwatch,
    read_records,
    scale_statistics,
)
from repopt_jax.train.rundir import RunFolder, Summary, summarize
from repopt_jax.train.sharding import make_mesh, meet, put_batch
from repopt_jax.train.state import TrainState, all_finite, merge_model
from repopt_jax.train.validation import validate

Stop = Callable[[], bool]


def run(config: Config, out_dir: str | Path, *, progress: bool = True, stop: Stop | None = None) -> Summary:
    """Trains as `config` says and leaves everything in `out_dir`; see `rundir` for what is there.

    Started again with an equal config, a finished run is returned as it is and an unfinished one goes on from
    its last checkpoint, to the state and the log that it would have reached unbroken.

    Args:
      config: the run.
      out_dir: its folder: new, empty, or of this run.
      progress: shows a bar where standard error is a terminal; else one line an epoch goes to `logging`.
      stop: asked after each step; when it returns True, a checkpoint is written and the run returns
        unfinished. With several processes it must give the same answer in all of them.

    Raises:
      ValueError: a config that cannot run (all problems listed), data or scales that do not fit, or an
        `out_dir` that holds something else.
      OSError: `out_dir`, the data or the scales cannot be read or written.
      FloatingPointError: loss or parameters that are not finite; the checkpoint before is kept.
    """
    # Everything that can be refused is refused before anything is written.
    validate(config)
    folder = RunFolder(out_dir)
    if (summary := folder.finished(config)) is not None:
        return summary
    feed = open_feed(config)
    mesh = make_mesh(config.mesh.fsdp, data=config.mesh.data)
    program, state = build_program(config, feed, mesh)

    folder.claim(config, feed.source.info)
    with contextlib.ExitStack() as stack:
        batches = stack.enter_context(contextlib.closing(iter(feed.train)))
        checkpoints = stack.enter_context(Checkpoints(folder.checkpoints, writing=True))
        # What a run starts from, the first that there is:
        #   1. the finished run in `out_dir`, which is returned as it is (above);
        #   2. the last checkpoint in `out_dir`: state, data position and clock. The scales come with the
        #      optimizer's state, and re-initialisation, which belongs to step 0, is overwritten;
        #   3. scales: the network was re-initialised by them in `build_program`;
        #   4. a fresh draw from the seed, also there.
        start, seconds = checkpoints.latest, 0.0
        if start is not None:
            state, seconds = checkpoints.restore(state, batches)
        metrics = stack.enter_context(
            MetricsWriter(folder.path, resume_step=start, tensorboard=config.tensorboard)
        )
        total = config.epochs * feed.steps_per_epoch
        bar = stack.enter_context(
            ProgressBar(config.name, config.task, total=total, start=start or 0, shown=progress)
        )
        job = _Job(config, folder, feed, mesh, program, batches, checkpoints, metrics, bar, total, seconds)
        state, finished = _train(job, state, start or 0, stop or _never)
        return _finish(job, state, finished=finished)


@dataclasses.dataclass
class _Job:
    """What the steps of a run share."""

    config: Config
    folder: RunFolder
    feed: Feed
    mesh: Mesh
    program: Program
    batches: Any
    checkpoints: Checkpoints
    metrics: MetricsWriter
    bar: ProgressBar
    total: int
    seconds_before: float
    began: float = dataclasses.field(default_factory=time.perf_counter)

    @property
    def seconds(self) -> float:
        """Training time of all sessions until now."""
        return self.seconds_before + time.perf_counter() - self.began

    def epoch(self, step: int) -> float:
        return step / self.feed.steps_per_epoch


def _train(job: _Job, state: TrainState, start: int, stop: Stop) -> tuple[TrainState, bool]:
    """Steps `start` + 1 to the last; the second result is False if the run was stopped before."""
    if start == job.total:
        return state, True
    if start == 0:
        state = _record_scales(job, state, 0)
    batch = put_batch(next(job.batches), job.mesh)
    # Compiled ahead: no window of the clock holds a compilation, and a second one, which would mean that a
    # step returns another kind of state than it was given, is an error.
    train_step = job.program.train_step.lower(state, batch).compile()
    watch = Stopwatch()
    for step in range(start + 1, job.total + 1):
        with jax.transfer_guard("disallow"):
            state, means = train_step(state, batch)
        watch.tick()
        epoch_ends, last = step % job.feed.steps_per_epoch == 0, step == job.total
        stopping = stop() and not last
        if step % job.config.log_every == 0 or last:
            _log(job, means, step, watch)
        if epoch_ends or stopping or _save_due(job, step):
            jax.block_until_ready(state)  # so that the pause does not hide the end of the window
            with watch.paused():
                state = _between_steps(job, state, step, epoch_ends, stopping)
        if stopping:
            return state, False
        if not last:
            batch = put_batch(next(job.batches), job.mesh)
    return state, True


def _between_steps(job: _Job, state: TrainState, step: int, epoch_ends: bool, stopping: bool) -> TrainState:
    """Statistics of the scales, evaluation, checkpoint: in this order, see the module's text."""
    if epoch_ends:
        state = _record_scales(job, state, step)
        epoch = step // job.feed.steps_per_epoch
        evaluated = epoch % job.config.eval_every == 0 or step == job.total
        job.bar.end_epoch(epoch, _evaluate(job, state, step) if evaluated else None)
    if stopping or step == job.total or _save_due(job, step):
        _save(job, state, step)
    return state


def _save_due(job: _Job, step: int) -> bool:
    return step % (job.config.checkpoint_every or job.feed.steps_per_epoch) == 0


def _log(job: _Job, means: dict[str, jax.Array], step: int, watch: Stopwatch) -> None:
    """Waits for `step`, writes its "train" record, and looks whether the loss was finite until here."""
    values = {name: value.item() for name, value in jax.device_get(means).items()}
    bad_step = values.pop("bad_step")
    if bad_step >= 0:
        raise FloatingPointError(_not_finite(job, f"the loss of step {bad_step}"))
    images_per_s = job.config.batch_size / watch.seconds_per_step()
    record = {"kind": "train", "step": step, "epoch": job.epoch(step), **values}
    record["images_per_s"] = images_per_s
    job.metrics.write(record)
    job.bar.update(record)


def _record_scales(job: _Job, state: TrainState, step: int) -> TrainState:
    """In a search, writes the statistics of the scale vectors and remembers them for the next record."""
    if job.config.model.kind != "search":
        return state
    model = merge_model(job.program.graphdef, state.params, state.rest)
    vectors = jax.device_get(extract_scales(model).vectors)
    layers = scale_statistics(vectors, jax.device_get(state.marks))
    job.metrics.write({"kind": "scales", "step": step, "epoch": job.epoch(step), "layers": layers})
    # A copy on the devices: on a CPU the arrays above can be the parameters' own memory, which the next step
    # reuses.
    copies = jax.tree.map(lambda v: v.copy(), vectors)
    return state._replace(marks=jax.device_put(copies, job.program.sharding.marks))


def _evaluate(job: _Job, state: TrainState, step: int) -> dict[str, Any]:
    """Writes and returns the "eval" record: every test image once, with running statistics."""
    measured = job.program.evaluate(state.params, state.rest, job.feed.eval)
    record = {"kind": "eval", "step": step, "epoch": job.epoch(step), **measured}
    job.metrics.write(record)
    return record


def _save(job: _Job, state: TrainState, step: int) -> None:
    """Writes a checkpoint, unless the state is not worth one."""
    if (bad_step := int(jax.device_get(state.bad_step))) >= 0:
        raise FloatingPointError(_not_finite(job, f"the loss of step {bad_step}"))
    if not bool(jax.device_get(all_finite(state.params))):
        raise FloatingPointError(_not_finite(job, f"a parameter after step {step}"))
    job.metrics.sync()
    job.checkpoints.save(step, state, job.batches, seconds=job.seconds)


def _not_finite(job: _Job, what: str) -> str:
    kept = job.checkpoints.latest
    where = "no checkpoint was written" if kept is None else f"the checkpoint of step {kept} is kept"
    return (
        f"{what} is not finite; {where} in {job.checkpoints.directory}. "
        "A lower `optim.learning_rate` or a longer `optim.warmup_epochs` usually helps"
    )


def _finish(job: _Job, state: TrainState, *, finished: bool) -> Summary:
    """The summary; of a finished run it is also written, after the scales of a search."""
    meet("all records written")
    summary = summarize(
        job.config, read_records(job.folder.metrics), state, seconds=job.seconds, finished=finished
    )
    if finished:
        _save_scales(job, state, summary.steps)
        job.folder.finish(summary)
    return summary


def _save_scales(job: _Job, state: TrainState, step: int) -> None:
    # They are there already if the run was killed between this and its summary; the same state wrote them.
    if job.config.model.kind != "search" or job.folder.scales.exists():
        return
    metadata = ScalesMetadata(
        architecture=make_task(job.config).architecture(),
        dataset=job.feed.source.info.name,
        config=to_json(job.config),
        step=step,
    )
    model = merge_model(job.program.graphdef, state.params, state.rest)
    save_scales(job.folder.scales, extract_scales(model, metadata=metadata))


def _never() -> bool:
    return False
