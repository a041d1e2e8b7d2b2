"""The training loop: one for search, target and baselines, which differ only in their configs.

The only module of the trainer that acts: it reads data, writes the run's folder and moves the state. The
order inside a step is part of its meaning. A step is started, and while it runs the next batch is made. Then
the step is logged and evaluated, as the config asks; then the state is saved, with the position of that next
batch; only then the batch is used. So a checkpoint always holds the data position that belongs to its state,
and all lines of the log up to its step are on disk before it is.

A run that is asked to stop does not wait for an evaluation: the checkpoint says that it is pending, and the
run makes it first when it goes on; so it does where the log with that evaluation is gone. State and log end
as those of an unbroken run.
"""

import contextlib
import dataclasses
import functools
import logging
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Final

import jax
import numpy as np
from jax.sharding import Mesh

from repopt_jax.arguments import check_path
from repopt_jax.core import paths
from repopt_jax.core.scales import ScalesMetadata, save_scales
from repopt_jax.data.check import SPLITS, listed
from repopt_jax.optim.resrep import get_masks, masks_are_due, resrep_masks, row_norms, set_masks
from repopt_jax.surgery.prepare import Mode
from repopt_jax.surgery.search import extract_scales
from repopt_jax.train.build import Feed, Program, build_program, check_scales_folder, make_task, open_feed
from repopt_jax.train.checkpoint import Checkpoints, Progress
from repopt_jax.train.config import Config, check_config, evaluated_on, logger_names, to_json
from repopt_jax.train.lock import Lock
from repopt_jax.train.loggers import LOGGERS, Logger, Loggers, Session
from repopt_jax.train.processes import barrier, in_all_processes, is_first
from repopt_jax.train.progress import LOADING_S, Feeder, ProgressBar, Stopwatch, WaitWarning
from repopt_jax.train.rules import validate
from repopt_jax.train.rundir import (
    MetricsWriter,
    RunFolder,
    Summary,
    check_records,
    read_records,
    scale_statistics,
    summarize,
)
from repopt_jax.train.searchlaw import SearchLaw, search_law
from repopt_jax.train.state import TrainState, all_finite, make_mesh, merge_model, put_batch
from repopt_jax.train.tasks import METRICS

logger: Final = logging.getLogger(__name__)

# Scales that another version of a library computes may differ this much, relatively.
SAME_SCALES = 1e-6


def run(
    config: Config,
    out_dir: str | Path,
    *,
    progress: bool = True,
    stop: Callable[[], bool] | None = None,
    loggers: Iterable[Logger] = (),
) -> Summary:
    """Trains as `config` says and leaves everything in `out_dir`; see `rundir` for what is there.

    Started again with an equal config, a finished run is returned as it is and an unfinished one goes on from
    its last checkpoint, to the state and the log that it would have reached unbroken.

    Args:
      config: the run.
      out_dir: its folder: new, empty, or of this run.
      progress: shows a bar where standard error is a terminal; else one line an epoch goes to `logging`.
      stop: called after each step and before each batch of an evaluation, until it returns True; then a
        checkpoint is written and the run returns unfinished. With several processes it must give the same
        answer in all of them, as `processes.stop_on_signals` does.
      loggers: take the records too, beside the log and the loggers that `config` names; see `loggers`. One
        that fails gives a warning and is left out.

    Raises:
      ValueError: a config that cannot run (all problems listed), data or scales that do not fit, or an
        `out_dir` that holds something else, or checkpoints of which none can be used, or that began with
        other scales, or whose log or checkpoints were cut, changed or removed.
      BlockingIOError: another run is writing to `out_dir`.
      OSError: `out_dir`, the data or the scales cannot be read or written; the last checkpoint is kept.
      FloatingPointError: loss or parameters that are not finite; the checkpoint before is kept.
    """
    check_config(config)
    check_path("out_dir", out_dir)
    # What is wrong with a config, its folder, its data or its scales is raised before anything is written.
    in_all_processes("run this config", lambda: validate(config))
    folder = RunFolder(out_dir)

    def finished() -> Summary | None:
        return in_all_processes(
            "look at `out_dir`",
            lambda: folder.finished(config),
            describe=lambda found: "no finished run" if found is None else "a finished run",
        )

    if (summary := finished()) is not None:
        return summary
    with folder.hold() as lock:
        # Once more: another job may have finished it just before.
        if (summary := finished()) is not None:
            return summary
        in_all_processes("go on in `out_dir`", folder.check_progress)
        with ProgressBar(config.name, config.task, split=evaluated_on(config), shown=progress) as bar:
            return _run(config, folder, lock, bar, stop or (lambda: False), loggers)


def _run(
    config: Config,
    folder: RunFolder,
    lock: Lock | None,
    bar: ProgressBar,
    ask: Callable[[], bool],
    loggers: Iterable[Logger],
) -> Summary:
    """`run` in a folder that is held, of a run that is not finished."""
    in_all_processes("read the scales", lambda: check_scales_folder(config))
    bar.say("loading data", after=LOADING_S)
    feed = in_all_processes("open the data", lambda: open_feed(config), describe=_describe_data)
    bar.say("making the network", after=LOADING_S)
    mesh = make_mesh(config.mesh.fsdp, data=config.mesh.data)
    program, state = build_program(config, feed, mesh)

    folder.claim(config, feed.source.info)
    with contextlib.ExitStack() as stack:
        batches = stack.enter_context(contextlib.closing(iter(feed.train)))
        scores, evaluated = folder.scores(config.task), folder.evaluated()
        checkpoints = stack.enter_context(
            Checkpoints(
                folder.checkpoints,
                writing=True,
                scores=scores,
                keep_last=config.keep_last,
                keep_best=config.keep_best,
                completed=folder.note_checkpoint,
            )
        )
        start = checkpoints.latest
        if start is not None:
            in_all_processes(
                "read the log", lambda: check_records(folder.metrics, start, log_every=config.log_every)
            )
        state, resumed = _first_state(config, state, checkpoints, mesh)
        if start is not None:
            batches.set_state(resumed.data)
        log = MetricsWriter(folder.path, resume_step=start, evaluated=not resumed.evaluation_pending)
        session = Session(folder.path, config.name, dataclasses.asdict(config), start)
        others = [LOGGERS[name]() for name in logger_names(config)]
        metrics = stack.enter_context(Loggers(log, [*others, *loggers] if is_first() else (), session))
        total = config.epochs * feed.steps_per_epoch
        bar.begin(total=total, start=start or 0)
        job = _Job(
            *(config, folder, feed, mesh, program, checkpoints, scores, total, resumed.seconds),
            ask=ask,
            lock=lock,
            feeder=stack.enter_context(contextlib.closing(Feeder(batches))),
            metrics=metrics,
            bar=bar,
            warning=WaitWarning(config.name, workers=config.data.workers),
            law=search_law(config, feed.steps_per_epoch, folder.metrics),
        )
        lost = start is not None and job.evaluates_at(start) and start not in evaluated
        state, finished = _train(job, state, start or 0, evaluate_first=resumed.evaluation_pending or lost)
        return _finish(job, state, finished=finished)


def _first_state(
    config: Config, fresh: TrainState, checkpoints: Checkpoints, mesh: Mesh
) -> tuple[TrainState, Progress]:
    """What a run starts from, the first that there is:

      1. the finished run in `out_dir`, which `run` returns as it is;
      2. the last checkpoint in `out_dir`: state, data position and clock. The scales come with the
         optimizer's state, and re-initialisation, which belongs to step 0, is overwritten;
      3. scales: `fresh` was re-initialised by them in `build_program`;
      4. a fresh draw from the seed, also there.

    Raises:
      ValueError: the run began with other scales.
    """
    if checkpoints.latest is None:
        return fresh, Progress(None, 0.0)
    state, resumed = checkpoints.restore(fresh)
    if config.model.mode == Mode.REPOPT:
        check_scales(fresh, state, source=config.scales)
    _warn_of_other_devices(config, resumed, mesh)
    return state, resumed


@dataclasses.dataclass
class _Job:
    """What the steps of a run share."""

    config: Config
    folder: RunFolder
    feed: Feed
    mesh: Mesh
    program: Program
    checkpoints: Checkpoints
    scores: dict[int, float]
    total: int
    seconds_before: float
    ask: Callable[[], bool]
    lock: Lock | None
    feeder: Feeder
    metrics: Loggers
    bar: ProgressBar
    warning: WaitWarning
    law: SearchLaw | None = None
    stopping: bool = False
    began: float = dataclasses.field(default_factory=time.perf_counter)

    def asked_to_stop(self) -> bool:
        """Whether the run is to stop; not asked again after the first True."""
        self.stopping = self.stopping or self.ask()
        return self.stopping

    @property
    def seconds(self) -> float:
        """Training time of all sessions until now."""
        return self.seconds_before + time.perf_counter() - self.began

    def epoch(self, step: int) -> float:
        return step / self.feed.steps_per_epoch

    def evaluates_at(self, step: int) -> bool:
        epoch, inside = divmod(step, self.feed.steps_per_epoch)
        return inside == 0 and (epoch % self.config.eval_every == 0 or step == self.total)

    def saves_at(self, step: int) -> bool:
        every = self.config.checkpoint_every or self.feed.steps_per_epoch
        # The best checkpoints can be kept only where there are evaluated ones.
        best = self.config.keep_best > 0 and self.evaluates_at(step)
        return step % every == 0 or step == self.total or best

    def prunes_at(self, step: int) -> bool:
        prune = self.config.prune
        before = round(prune.before_epochs * self.feed.steps_per_epoch)
        return self.program.plan is not None and masks_are_due(step, before=before, interval=prune.interval)


class _Stopped(Exception):
    """Raised between the batches of an evaluation, to leave it."""


def _train(job: _Job, state: TrainState, start: int, *, evaluate_first: bool) -> tuple[TrainState, bool]:
    """Makes the steps `start` + 1 to the last, after the evaluation of step `start` where it is still to be
    made; the second result is False if the run was stopped before the end."""
    if evaluate_first:
        if _evaluate(job, state, start) is None:
            return state, False
        job.checkpoints.remove_old()
    if start == job.total:
        return state, True
    if start == 0:
        _record_skipped(job)
        if job.law is not None:
            logger.info("%s", job.law.describe())
        state = _record_scales(job, state, 0)
    job.feeder.request()
    batch = put_batch(job.feeder.take(), job.mesh)
    job.bar.say("compiling")
    # Compiled ahead: no line of the log times a compilation, and a second one, which would mean that a step
    # returns another kind of state than it was given, is an error.
    train_step = job.program.train_step.lower(state, batch).compile()
    watch = Stopwatch()
    for step in range(start + 1, job.total + 1):
        with jax.transfer_guard("disallow"):
            state, means = train_step(state, batch)
        watch.tick()
        job.bar.tick(step)
        epoch_ends, last = step % job.feed.steps_per_epoch == 0, step == job.total
        job.feeder.step_started(means, more=not last)
        job.asked_to_stop()
        with _explain_write_error(job):
            job.checkpoints.check()
        if step % job.config.log_every == 0 or last:
            _log(job, means, step, watch)
        if job.prunes_at(step):
            with watch.paused():
                state = _choose_masks(job, state, step)
        if epoch_ends or job.stopping or job.saves_at(step):
            jax.block_until_ready(state)  # so that the pause does not hide the end of the last step
            with watch.paused():
                state = _between_steps(job, state, step, epoch_ends)
        if job.stopping:
            return state, False
        if not last:
            batch = put_batch(job.feeder.take(), job.mesh)
    return state, True


def _record_skipped(job: _Job) -> None:
    """Records and logs the images that are left out because they cannot be read."""
    bad = job.feed.source.skipped
    if not bad:
        return
    skipped = {name: sum(one.split == name for one in bad) for name in SPLITS}
    logger.warning(
        "%s: %d images for training and %d for evaluation cannot be read and are left out: %s",
        *(job.config.name, *skipped.values(), listed(bad)),
    )
    record = {"kind": "data", "step": 0, "epoch": 0.0}
    _write(job, record | {f"skipped_{name}": count for name, count in skipped.items()})


def _between_steps(job: _Job, state: TrainState, step: int, epoch_ends: bool) -> TrainState:
    """Records scales, evaluates and saves, in this order: see the module's docstring."""
    pending = False
    if epoch_ends:
        state = _record_scales(job, state, step)
        evaluation = _evaluate(job, state, step) if job.evaluates_at(step) else None
        pending = job.evaluates_at(step) and evaluation is None
        if not pending:
            job.bar.end_epoch(step // job.feed.steps_per_epoch, evaluation)
    if job.stopping or job.saves_at(step):
        _save(job, state, step, pending=pending, wait=job.stopping or step == job.total)
    return state


def _log(job: _Job, means: dict[str, jax.Array], step: int, watch: Stopwatch) -> None:
    """Waits for `step`, writes its "train" record, and raises if the loss was not finite until here."""
    values = {name: value.item() for name, value in jax.device_get(means).items()}
    _check_finite(job, values.pop("bad_step"))
    seconds, steps = watch.read()
    wait = min(job.feeder.waited() / seconds, 1.0)
    record = {"kind": "train", "step": step, "epoch": job.epoch(step), **values}
    record |= {"images_per_s": job.config.batch_size * steps / seconds, "data_wait": wait}
    _write(job, record)
    job.bar.update(record)
    job.warning.check(record, seconds=seconds)


def _choose_masks(job: _Job, state: TrainState, step: int) -> TrainState:
    """In a run that prunes, chooses the masks of the compactors anew and writes what they come to."""
    plan, prune = job.program.plan, job.config.prune
    assert plan is not None
    norms, masks = jax.device_get((_row_norms(state.params, plan.compactors), get_masks(state.opt_state)))
    masks = resrep_masks(
        norms,
        masks,
        plan.macs,
        target=prune.target,
        granularity=prune.granularity,
        at_least=prune.at_least,
    )
    masked = sum(int((~mask).sum()) for mask in masks.values())
    record = {"kind": "prune", "step": step, "epoch": job.epoch(step), "masked": masked}
    _write(job, record | {"kept_macs": plan.macs(masks) / plan.total})
    return state._replace(opt_state=set_masks(state.opt_state, masks))


_row_norms = functools.partial(jax.jit, static_argnums=1)(row_norms)


def _record_scales(job: _Job, state: TrainState, step: int) -> TrainState:
    """In a search, writes the statistics of the scale vectors and keeps the vectors for the next record."""
    if job.config.model.mode != Mode.SEARCH:
        return state
    model = merge_model(job.program.graphdef, state.params, state.non_trainable)
    scales = extract_scales(model)
    vectors = jax.device_get(scales.vectors)
    previous = jax.device_get(state.previous_scales)
    record = {"kind": "scales", "step": step, "epoch": job.epoch(step)}
    record |= {"layers": scale_statistics(vectors, previous)}
    if job.law is not None:
        record |= {"law": job.law.record(scales.branch_sets, vectors, previous, step)}
    _write(job, record)
    # Copied: on a CPU the arrays above can be the parameters' own memory, which the next step reuses.
    copies = jax.tree.map(lambda v: v.copy(), vectors)
    return state._replace(previous_scales=jax.device_put(copies, job.program.sharding.previous_scales))


def _evaluate(job: _Job, state: TrainState, step: int) -> dict[str, Any] | None:
    """Writes and returns the "eval" record: every test image once, with running statistics. None if the run
    is to stop before the last of them."""

    def batches() -> Iterator[Any]:
        for batch in job.feed.eval:
            if job.asked_to_stop():
                raise _Stopped
            yield batch

    try:
        measured = job.program.evaluate(*state.network, batches())
    except _Stopped:
        return None
    record = {"kind": "eval", "step": step, "epoch": job.epoch(step), **measured}
    _write(job, record)
    if (score := record[METRICS[job.config.task][0].name]) is not None:
        job.scores[step] = score
    return record


def _save(job: _Job, state: TrainState, step: int, *, pending: bool, wait: bool) -> None:
    """Starts a checkpoint.

    Raises:
      FloatingPointError: the state is not worth one.
    """
    bad_step, finite = jax.device_get((state.bad_step, all_finite(state.params)))
    _check_finite(job, int(bad_step))
    if not finite:
        raise _not_finite(job, f"a parameter after step {step}")
    with _explain_write_error(job):
        if job.lock is not None:
            job.lock.check()
        job.metrics.sync()
        progress = Progress(job.feeder.position, job.seconds, pending, job.mesh.size)
        job.checkpoints.save(step, state, progress, scheduled=job.saves_at(step), wait=wait)


def _write(job: _Job, record: dict[str, Any]) -> None:
    with _explain_write_error(job):
        job.metrics.write(record)


def _check_finite(job: _Job, bad_step: int) -> None:
    if bad_step >= 0:
        raise _not_finite(job, f"the loss of step {bad_step}")


def _not_finite(job: _Job, what: str) -> FloatingPointError:
    return FloatingPointError(
        f"{what} is not finite; {_last_checkpoint(job)}. "
        "A lower `optim.learning_rate` or a longer `optim.warmup_epochs` usually helps"
    )


@contextlib.contextmanager
def _explain_write_error(job: _Job) -> Iterator[None]:
    """Adds to an error of writing what is left of the run, and how to go on."""
    try:
        yield
    except OSError as error:
        kept = _last_checkpoint(job)
        if job.checkpoints.latest is None:
            then = "Make it possible to write there, and run the same again from its beginning"
        else:
            kept += ", and nothing up to it is lost"
            then = "Make it possible to write there, and run the same again to go on"
        raise type(error)(f"{error}; {kept}. {then}") from error


def _last_checkpoint(job: _Job) -> str:
    with contextlib.suppress(OSError):  # the error that is being raised says more
        job.checkpoints.wait()
    step = job.checkpoints.latest
    if step is None:
        return "no checkpoint was written before"
    return f"the checkpoint of step {step} is kept in {job.checkpoints.directory}"


def _finish(job: _Job, state: TrainState, *, finished: bool) -> Summary:
    """Returns the summary; of a finished run it is also written, after the scales of a search."""
    barrier("all records written")
    config, folder = job.config, job.folder
    summary = summarize(config, read_records(folder.metrics), state, seconds=job.seconds, finished=finished)
    if not finished:
        return summary
    # The scales are there already if the run was killed before its summary; the same state wrote them.
    if config.model.mode == Mode.SEARCH and not folder.scales.exists():
        metadata = ScalesMetadata(
            architecture=make_task(config).architecture(),
            dataset=job.feed.source.info.name,
            config=to_json(config),
            step=summary.steps,
        )
        model = merge_model(job.program.graphdef, *state.network)
        save_scales(folder.scales, extract_scales(model, metadata=metadata))
    folder.finish(summary)
    return summary


def _describe_data(feed: Feed) -> str:
    info = feed.source.info
    return (
        f"{info.name}: {info.num_train} training and {info.num_eval} test images, {info.num_classes} classes"
    )


# -- whether a run goes on as it began


def _warn_of_other_devices(config: Config, resumed: Progress, mesh: Mesh) -> None:
    """With statistics of each device their number is part of what is computed."""
    if config.mesh.statistics == "device" and resumed.devices not in (None, mesh.size):
        before, now = (config.batch_size // count for count in (resumed.devices, mesh.size))
        logger.warning(
            "%s: batch norm took its statistics over the %d images of each of %d devices, and from here on "
            "takes them over %d on each of %d: the training differs from here on",
            *(config.name, before, resumed.devices, now, mesh.size),
        )


def check_scales(fresh: TrainState, restored: TrainState, *, source: str) -> None:
    """Refuses to go on with other scales than those that a run began with.

    Args:
      fresh: the state of mode repopt as the config's scales give it, which are in its optimizer's state.
      restored: the state of the checkpoint.
      source: what the config calls its scales.

    Raises:
      ValueError: naming the layers and branches whose scales differ.
    """
    here, there = (_scales_in(state.opt_state) for state in (fresh, restored))
    differing = [
        f"{name} (channel {channel}: {here[name][channel]:.6g} there, {there[name][channel]:.6g} in the "
        "checkpoint)"
        for name in sorted(here)
        if (channel := _most_different(here[name], there[name])) is not None
    ]
    if differing:
        raise ValueError(
            f"`scales` {source} are not those that this run began with; {len(differing)} of {len(here)} "
            f"vectors differ, here where they differ most: {', '.join(differing)}. Put back the scales that "
            "were there, or begin a new run in another folder"
        )


def _scales_in(opt_state: Any) -> dict[str, np.ndarray]:
    """ "Layer branch" -> vector, of the leaves below an entry `scales` of an optimizer's state."""
    found = {}
    for path, leaf in paths.named_leaves(opt_state)[0].items():
        _, mark, name = f"/{path}".partition("/scales/")
        if mark:
            found[" ".join(name.rsplit("/", 1))] = np.ravel(jax.device_get(leaf))
    return found


def _most_different(first: np.ndarray, second: np.ndarray) -> int | None:
    distance = np.abs(first.astype(np.float64) - second)
    channel = int(distance.argmax())
    return channel if distance[channel] > SAME_SCALES * np.abs(first).max() else None
