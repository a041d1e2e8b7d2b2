"""The training loop: one for search, target and baselines, which differ by their config alone.

The only module of the trainer that acts: it reads data, writes the run's folder and moves the state. The
order inside a step is part of its meaning. A step is started, and while it runs the next batch is made; what
is due at the step is logged, recorded and evaluated; only then it is saved, with the position of that batch;
only then the batch is used. So a checkpoint always holds the data position that belongs to its state, and all
lines of the log up to its step are on disk before it is.

A run that is asked to stop does not wait for an evaluation: the checkpoint says that it is owed, and the run
makes it first when it goes on. State and log end as those of an unbroken run.
"""

import contextlib
import dataclasses
import logging
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from repopt_jax.core.scales import ScalesMetadata, save_scales
from repopt_jax.surgery.search import extract_scales
from repopt_jax.train.build import Feed, Program, build_program, make_task, open_feed
from repopt_jax.train.checkpoint import Checkpoints, Progress
from repopt_jax.train.config import Config, to_json, validate
from repopt_jax.train.feeding import Feeder, WaitWarning
from repopt_jax.train.metrics import ProgressBar, Stopwatch, scale_statistics
from repopt_jax.train.processes import together
from repopt_jax.train.rundir import MetricsWriter, RunFolder, Summary, read_records, summarize
from repopt_jax.train.same_scales import check_scales
from repopt_jax.train.sharding import make_mesh, meet, put_batch
from repopt_jax.train.state import TrainState, all_finite, merge_model
from repopt_jax.train.tasks import METRICS

logger = logging.getLogger(__name__)

Stop = Callable[[], bool]


def run(config: Config, out_dir: str | Path, *, progress: bool = True, stop: Stop | None = None) -> Summary:
    """Trains as `config` says and leaves everything in `out_dir`; see `rundir` for what is there.

    Started again with an equal config, a finished run is returned as it is and an unfinished one goes on from
    its last checkpoint, to the state and the log that it would have reached unbroken.

    Args:
      config: the run.
      out_dir: its folder: new, empty, or of this run.
      progress: shows a bar where standard error is a terminal; else one line an epoch goes to `logging`.
      stop: asked after each step and before each batch of an evaluation, until it returns True; then a
        checkpoint is written and the run returns unfinished. With several processes it must give the same
        answer in all of them. `stopping.stop_on_signals` has one.

    Raises:
      ValueError: a config that cannot run (all problems listed), data or scales that do not fit, or an
        `out_dir` that holds something else, or checkpoints of which none can be used, or that began with
        other scales.
      OSError: `out_dir`, the data or the scales cannot be read or written; the last checkpoint is kept.
      FloatingPointError: loss or parameters that are not finite; the checkpoint before is kept.
    """
    # What a config, its data and its scales can be refused for is said before anything is written.
    together("run this config", lambda: validate(config))
    folder = RunFolder(out_dir)
    summary = together(
        "look at `out_dir`",
        lambda: folder.finished(config),
        seen=lambda found: "no finished run" if found is None else "a finished run",
    )
    if summary is not None:
        return summary
    feed = together("open the data", lambda: open_feed(config), seen=lambda feed: _told(feed.source.info))
    mesh = make_mesh(config.mesh.fsdp, data=config.mesh.data)
    program, state = build_program(config, feed, mesh)

    folder.claim(config, feed.source.info)
    with contextlib.ExitStack() as stack:
        batches = stack.enter_context(contextlib.closing(iter(feed.train)))
        scores = folder.scores(config.task)
        keep: dict[str, Any] = {"keep_last": config.keep_last, "keep_best": config.keep_best}
        checkpoints = stack.enter_context(
            Checkpoints(folder.checkpoints, writing=True, scores=scores, **keep)
        )
        # What a run starts from, the first that there is:
        #   1. the finished run in `out_dir`, which is returned as it is (above);
        #   2. the last checkpoint in `out_dir`: state, data position and clock. The scales come with the
        #      optimizer's state, and re-initialisation, which belongs to step 0, is overwritten;
        #   3. scales: the network was re-initialised by them in `build_program`;
        #   4. a fresh draw from the seed, also there.
        start, resumed = checkpoints.latest, Progress(None, 0.0)
        if start is not None:
            fresh = state
            state, resumed = checkpoints.restore(fresh)
            check_scales(fresh, state, source=config.scales)
            del fresh
            _tell_of_other_devices(config, resumed, mesh)
            batches.set_state(resumed.data)
        feeder = stack.enter_context(contextlib.closing(Feeder(batches)))
        metrics = stack.enter_context(
            MetricsWriter(
                folder.path,
                resume_step=start,
                evaluated=not resumed.evaluation_pending,
                tensorboard=config.tensorboard,
            )
        )
        total = config.epochs * feed.steps_per_epoch
        bar = stack.enter_context(
            ProgressBar(config.name, config.task, total=total, start=start or 0, shown=progress)
        )
        job = _Job(
            *(config, folder, feed, mesh, program, feeder, checkpoints, scores, metrics, bar, total),
            seconds_before=resumed.seconds,
            stop=_Asked(stop or _never),
            waiting=WaitWarning(config.name, workers=config.data.workers),
        )
        if resumed.evaluation_pending and _evaluate(job, state, start or 0) is None:
            return _finish(job, state, finished=False)
        state, finished = _train(job, state, start or 0)
        return _finish(job, state, finished=finished)


def _tell_of_other_devices(config: Config, resumed: Progress, mesh: Mesh) -> None:
    """With statistics of each device their number is part of what is computed."""
    if config.mesh.statistics == "device" and resumed.devices not in (None, mesh.size):
        before, now = (config.batch_size // count for count in (resumed.devices, mesh.size))
        logger.warning(
            "%s: batch norm took its statistics over the %d images of each of %d devices, and from here on "
            "takes them over %d on each of %d: the training is another from here on",
            *(config.name, before, resumed.devices, now, mesh.size),
        )


class _Asked:
    """Asks whether to stop, until the answer is yes."""

    def __init__(self, stop: Stop):
        self._stop, self.said_yes = stop, False

    def __call__(self) -> bool:
        self.said_yes = self.said_yes or self._stop()
        return self.said_yes


@dataclasses.dataclass
class _Job:
    """What the steps of a run share."""

    config: Config
    folder: RunFolder
    feed: Feed
    mesh: Mesh
    program: Program
    feeder: Feeder
    checkpoints: Checkpoints
    scores: dict[int, float]
    metrics: MetricsWriter
    bar: ProgressBar
    total: int
    seconds_before: float
    stop: _Asked
    waiting: WaitWarning
    began: float = dataclasses.field(default_factory=time.perf_counter)

    @property
    def seconds(self) -> float:
        """Training time of all sessions until now."""
        return self.seconds_before + time.perf_counter() - self.began

    def epoch(self, step: int) -> float:
        return step / self.feed.steps_per_epoch


class _Stopped(Exception):
    """Raised between the batches of an evaluation, to leave it."""


def _train(job: _Job, state: TrainState, start: int) -> tuple[TrainState, bool]:
    """Steps `start` + 1 to the last; the second result is False if the run was stopped before."""
    if start == job.total:
        return state, True
    if start == 0:
        state = _record_scales(job, state, 0)
    job.feeder.ask()
    batch = put_batch(job.feeder.take(), job.mesh)
    # Compiled ahead: no window of the clock holds a compilation, and a second one, which would mean that a
    # step returns another kind of state than it was given, is an error.
    train_step = job.program.train_step.lower(state, batch).compile()
    watch = Stopwatch()
    for step in range(start + 1, job.total + 1):
        with jax.transfer_guard("disallow"):
            state, means = train_step(state, batch)
        watch.tick()
        epoch_ends, last = step % job.feed.steps_per_epoch == 0, step == job.total
        job.feeder.stepped(means, more=not last)
        stopping = job.stop()
        with _nothing_lost(job):
            job.checkpoints.check()
        if step % job.config.log_every == 0 or last:
            _log(job, means, step, watch)
        if epoch_ends or stopping or _save_due(job, step):
            jax.block_until_ready(state)  # so that the pause does not hide the end of the window
            with watch.paused():
                state, stopping = _between_steps(job, state, step, epoch_ends)
        if stopping:
            return state, False
        if not last:
            batch = put_batch(job.feeder.take(), job.mesh)
    return state, True


def _between_steps(job: _Job, state: TrainState, step: int, epoch_ends: bool) -> tuple[TrainState, bool]:
    """Statistics of the scales, evaluation, checkpoint: in this order, see the module's text. The second
    result is whether the run stops here."""
    owed = False
    if epoch_ends:
        state = _record_scales(job, state, step)
        epoch = step // job.feed.steps_per_epoch
        due = _evaluation_due(job, step)
        evaluation = _evaluate(job, state, step) if due else None
        owed = due and evaluation is None
        if not owed:
            job.bar.end_epoch(epoch, evaluation)
    stopping = job.stop.said_yes
    if stopping or _save_due(job, step):
        _save(job, state, step, owed=owed, wait=stopping or step == job.total)
    return state, stopping


def _evaluation_due(job: _Job, step: int) -> bool:
    epoch, rest = divmod(step, job.feed.steps_per_epoch)
    return rest == 0 and (epoch % job.config.eval_every == 0 or step == job.total)


def _save_due(job: _Job, step: int) -> bool:
    every = job.config.checkpoint_every or job.feed.steps_per_epoch
    # The best ones can be kept only where there are evaluated ones.
    best = job.config.keep_best > 0 and _evaluation_due(job, step)
    return step % every == 0 or step == job.total or best


def _log(job: _Job, means: dict[str, jax.Array], step: int, watch: Stopwatch) -> None:
    """Waits for `step`, writes its "train" record, and looks whether the loss was finite until here."""
    values = {name: value.item() for name, value in jax.device_get(means).items()}
    bad_step = values.pop("bad_step")
    if bad_step >= 0:
        raise FloatingPointError(_not_finite(job, f"the loss of step {bad_step}"))
    seconds, steps = watch.read()
    share = min(job.feeder.waited() / seconds, 1.0)
    record = {"kind": "train", "step": step, "epoch": job.epoch(step), **values}
    record |= {"images_per_s": job.config.batch_size * steps / seconds, "data_wait": share}
    _write(job, record)
    job.bar.update(record)
    job.waiting.look(
        share, seconds=seconds, images_per_s=record["images_per_s"], epoch=step // job.feed.steps_per_epoch
    )


def _write(job: _Job, record: dict[str, Any]) -> None:
    with _nothing_lost(job):
        job.metrics.write(record)


def _record_scales(job: _Job, state: TrainState, step: int) -> TrainState:
    """In a search, writes the statistics of the scale vectors and remembers them for the next record."""
    if job.config.model.mode != "search":
        return state
    model = merge_model(job.program.graphdef, state.params, state.rest)
    vectors = jax.device_get(extract_scales(model).vectors)
    layers = scale_statistics(vectors, jax.device_get(state.marks))
    _write(job, {"kind": "scales", "step": step, "epoch": job.epoch(step), "layers": layers})
    # A copy on the devices: on a CPU the arrays above can be the parameters' own memory, which the next step
    # reuses.
    copies = jax.tree.map(lambda v: v.copy(), vectors)
    return state._replace(marks=jax.device_put(copies, job.program.sharding.marks))


def _evaluate(job: _Job, state: TrainState, step: int) -> dict[str, Any] | None:
    """Writes and returns the "eval" record: every test image once, with running statistics. None if the run
    is to stop before the last of them."""
    params, rest = state.network
    try:
        measured = job.program.evaluate(params, rest, _until_stopped(job.feed.eval, job.stop))
    except _Stopped:
        return None
    record = {"kind": "eval", "step": step, "epoch": job.epoch(step), **measured}
    _write(job, record)
    if (score := record[METRICS[job.config.task][0].name]) is not None:
        job.scores[step] = score
    return record


def _until_stopped(batches: Iterable[Any], stop: Stop) -> Iterator[Any]:
    for batch in batches:
        if stop():
            raise _Stopped
        yield batch


def _save(job: _Job, state: TrainState, step: int, *, owed: bool, wait: bool) -> None:
    """Starts a checkpoint, unless the state is not worth one."""
    if (bad_step := int(jax.device_get(state.bad_step))) >= 0:
        raise FloatingPointError(_not_finite(job, f"the loss of step {bad_step}"))
    if not bool(jax.device_get(all_finite(state.params))):
        raise FloatingPointError(_not_finite(job, f"a parameter after step {step}"))
    with _nothing_lost(job):
        job.metrics.sync()
        progress = Progress(job.feeder.position, job.seconds, owed, job.mesh.size)
        job.checkpoints.save(step, state, progress, scheduled=_save_due(job, step), wait=wait)


def _not_finite(job: _Job, what: str) -> str:
    return (
        f"{what} is not finite; {_kept(job)} in {job.checkpoints.directory}. "
        "A lower `optim.learning_rate` or a longer `optim.warmup_epochs` usually helps"
    )


@contextlib.contextmanager
def _nothing_lost(job: _Job) -> Iterator[None]:
    """Adds to an error of writing what is left of the run, and how to go on."""
    try:
        yield
    except OSError as error:
        raise type(error)(
            f"{error}; {_kept(job)} in {job.checkpoints.directory}, and nothing up to it is lost. Make it "
            "possible to write there, and run the same again to go on"
        ) from error


def _kept(job: _Job) -> str:
    with contextlib.suppress(OSError):  # told already, or less than what is being told
        job.checkpoints.wait()
    kept = job.checkpoints.latest
    return "no checkpoint was written" if kept is None else f"the checkpoint of step {kept} is kept"


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
    if job.config.model.mode != "search" or job.folder.scales.exists():
        return
    metadata = ScalesMetadata(
        architecture=make_task(job.config).architecture(),
        dataset=job.feed.source.info.name,
        config=to_json(job.config),
        step=step,
    )
    model = merge_model(job.program.graphdef, *state.network)
    save_scales(job.folder.scales, extract_scales(model, metadata=metadata))


def _told(info: Any) -> str:
    return (
        f"{info.name}: {info.num_train} training and {info.num_eval} test images, {info.num_classes} classes"
    )


def _never() -> bool:
    return False
