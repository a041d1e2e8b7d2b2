"""Ways of training compared: the same seeds and the same grid for each, the choice made on held-out images.

    OUT/comparison.json                what is compared; a folder holds one comparison
    OUT/searches/<search>/             hyper-searches whose scales some ways take
    OUT/runs/<way>/<point>/<seed>/     a run for each way, point of the grid and seed; its test.json has the
                                       numbers on the test images
    OUT/run.lock                       who works here: one comparison at a time, with its processes

Each way is trained at every point of the grid with the first seeds. The point with the best mean on the
held-out training images is the way's own, and the other seeds are trained there. When all of that is done,
and of these runs only, the test images are read. Everything finished stays: the same call, made again, goes
on.
"""

import contextlib
import dataclasses
import itertools
import json
import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from copy import deepcopy
from pathlib import Path
from typing import Any

import jax

from repopt_jax.arguments import is_of
from repopt_jax.deploy.evaluation import evaluate
from repopt_jax.report import workers
from repopt_jax.report.comparison import (
    Comparison,
    differing,
    joined_spec,
    load_comparison,
    point_name,
    point_text,
    search_of,
    spec,
)
from repopt_jax.report.depth import gradient_by_layer
from repopt_jax.report.statistics import Difference, difference
from repopt_jax.train import processes
from repopt_jax.train.build import load_trained
from repopt_jax.train.config import SEARCH, Config, evaluated_on
from repopt_jax.train.lock import LOCK, held
from repopt_jax.train.loop import run
from repopt_jax.train.rules import problems_of
from repopt_jax.train.rundir import PART, Summary, read_json, refuse_strangers, replace_file
from repopt_jax.train.tasks import METRICS, format_metrics

Log = Callable[[str], None]

SPEC = "comparison.json"
DIVERGED = "diverged.json"  # in the folder of a run: why it ended


@dataclasses.dataclass(frozen=True)
class WayResult:
    """What one way of training came to.

    Attributes:
      way: its name.
      point: its point of the grid, chosen on the held-out images.
      tuning: the mean validation metric at each point of the grid, in the order of `Comparison.points`;
        empty if nothing was held out. NaN counts as the worst: a run there diverged.
      test: metric -> seed -> value in [0, 1] on the test images. A run that diverged counts as 0.
      count: number of test images.
      folders: seed -> folder of the run.
      summary: of the first run that did not diverge, as summary.json has it; empty if there is none.
      step_ms: median over the seeds of the time of a training step, in ms; None if it was not timed.
      gradients: layer -> size of its gradient at the start of the first run, see `gradient_by_layer`; empty
        if that run diverged.
    """

    way: str
    point: Mapping[str, Any]
    tuning: Sequence[float]
    test: Mapping[str, Mapping[int, float]]
    count: int
    folders: Mapping[int, Path]
    summary: Mapping[str, Any]
    step_ms: float | None
    gradients: Mapping[str, float]

    @property
    def finished(self) -> list[Path]:
        """The folders of the runs that did not diverge."""
        return [folder for folder in self.folders.values() if not (folder / DIVERGED).exists()]


@dataclasses.dataclass(frozen=True)
class Results:
    """What `compare` found: a `WayResult` for each way, the differences of the first metric, and search ->
    its folder."""

    comparison: Comparison
    ways: Mapping[str, WayResult]
    differences: Sequence[Difference]
    searches: Mapping[str, Path]


def compare(
    comparison: Comparison,
    out_dir: str | Path,
    *,
    count: int | None = None,
    source: str | None = None,
    log: Log = lambda line: None,
) -> Results:
    """Makes every run of a comparison that is not there yet, and returns what they came to.

    Args:
      comparison: what is compared.
      out_dir: a new or empty folder, or that of the same comparison, which goes on. It may be given more
        seeds than before, and other parts (`Comparison.of`).
      count: processes that make runs side by side, each on its share of the cores; 0 for this process alone.
        By default one for each core (at most `workers.MOST`) where the device is a CPU, else 0.
      source: the config file that the comparison is from, as `load_comparison` takes it: the processes import
        it as well, for what it registers.
      log: called with a line for each finished run.

    Raises:
      ValueError: a config that cannot run, an `out_dir` that holds something else.
      BlockingIOError: another comparison is being made in `out_dir`.
      ChildProcessError, OSError: as `loop.run`, and processes that die. What is finished stays.
      KeyboardInterrupt: after the running steps, with their checkpoints.
    """
    out_dir = Path(out_dir).expanduser().resolve()
    if count is None:
        count = workers.default_count() if jax.default_backend() == "cpu" else 0
    elif count and jax.default_backend() != "cpu":
        raise ValueError(
            f"`count`={count}: processes side by side would share the {jax.default_backend()}, whose memory "
            "each of them takes; use 0"
        )
    plan = _Plan(comparison, out_dir)
    plan.validate(device_count=1 if count else None)
    _refuse_others(comparison, out_dir)
    first = None if source is None else (load_comparison, (source,))
    with (
        held(out_dir) as lock,
        contextlib.nullcontext() if count else processes.stop_on_signals() as stop,
        workers.Workers(count, first=first, inherit=(lock.descriptor,), stop=stop or (lambda: False)) as pool,
    ):
        _claim(comparison, out_dir)
        _make(plan, pool, log)
    return plan.results()


# -- what there is to do


@dataclasses.dataclass(frozen=True)
class _Job:
    """A call that leaves its result in `folder`: "train" makes the run, "test" reads the test images for it,
    "gradients" measures the gradient of each layer at its start."""

    kind: str
    folder: Path
    config: Config
    label: str


class _Plan:
    """The jobs of a comparison, and the results of those that are done."""

    def __init__(self, comparison: Comparison, out_dir: Path):
        self.comparison = comparison
        self.out_dir = out_dir
        self.done: dict[tuple[str, Path], Any] = {}

    def search(self, name: str) -> _Job:
        config = self._held_out(self.comparison.searches[name])
        config.name = name
        return _Job("train", self.out_dir / "searches" / name, config, f"search {name}")

    def run(self, way: str, point: Mapping[str, Any], seed: int) -> _Job:
        config = self._held_out(self.comparison.ways[way])
        config.name, config.seed = way, config.seed + seed
        if config.scales.startswith(SEARCH):
            config.scales = str(self.search(search_of(config)).folder / "scales")
        for field, value in point.items():
            *parts, last = field.split(".")
            owner = config
            for part in parts:
                owner = getattr(owner, part, None)
            if not hasattr(owner, last):
                raise ValueError(f"`grid` has the field {field!r}, and a config has none of this name")
            setattr(owner, last, value)
        folder = self.out_dir / "runs" / way / point_name(point) / f"seed{config.seed}"
        label = " ".join(filter(None, (self.comparison.label(way), point_text(point))))
        return _Job("train", folder, config, f"{label}, seed {config.seed}")

    def _held_out(self, config: Config) -> Config:
        config = deepcopy(config)
        config.data.validation = self.comparison.validation
        return config

    def validate(self, *, device_count: int | None) -> None:
        """Raises ValueError with every problem of every way and search; one of several is said once."""
        found: dict[str, list[str]] = {}
        for name, config in self._first_configs():
            for problem in problems_of(config, device_count=device_count):
                found.setdefault(problem, []).append(name)
        if found:
            listed = "; ".join(f"{', '.join(names)}: {problem}" for problem, names in found.items())
            raise ValueError(f"this comparison cannot run: {listed}")

    def _first_configs(self) -> Iterator[tuple[str, Config]]:
        """One run of each way and each search with what it is called, as far as it can be checked before a
        search has run."""
        for name in self.comparison.searches:
            yield f"search {name!r}", self.search(name).config
        for way in self.comparison.ways:
            for point in self.comparison.points:
                config = self.run(way, point, 0).config
                if self.comparison.ways[way].scales.startswith(SEARCH):
                    config.scales, config.scales_mean = "depth", False  # these are not there yet
                yield " with ".join(filter(None, (f"way {way!r}", point_text(point)))), config

    def jobs(self) -> Iterator[_Job]:
        """Everything that can be done now, what others wait for first."""
        for name in self.comparison.searches:
            yield self.search(name)
        seeds, tuned_by = self.comparison.seeds, self.comparison.tuned_by
        ready = [way for way in self.comparison.ways if self._is_ready(way)]
        for seed, way in itertools.product(range(tuned_by), ready):
            yield from (self.run(way, point, seed) for point in self.comparison.points)
        chosen = {way: point for way in ready if (point := self.choice(way)) is not None}
        finals = [self.run(w, point, s) for s, (w, point) in itertools.product(range(seeds), chosen.items())]
        yield from finals
        for job in finals:
            trained = self.done.get(("train", job.folder))
            if trained is None or diverged(trained):
                continue
            if job.config.seed == self.comparison.ways[job.config.name].seed:
                yield dataclasses.replace(job, kind="gradients")
        # The test images last, when nothing is left to be chosen or trained.
        if len(chosen) == len(self.comparison.ways) and all(("train", j.folder) in self.done for j in finals):
            for job in finals:
                trained = self.done[("train", job.folder)]
                if not diverged(trained) and trained.split != "test":
                    yield dataclasses.replace(job, kind="test")

    def _is_ready(self, way: str) -> bool:
        config = self.comparison.ways[way]
        if not config.scales.startswith(SEARCH):
            return True
        return ("train", self.search(search_of(config)).folder) in self.done

    def choice(self, way: str) -> dict[str, Any] | None:
        """The point of the grid that is best for a way; None while runs that decide it are missing."""
        points = self.comparison.points
        if len(points) == 1:
            return points[0]
        means = self.tuning(way)
        if means is None:
            return None
        return points[max(range(len(points)), key=lambda i: -1.0 if math.isnan(means[i]) else means[i])]

    def tuning(self, way: str) -> list[float] | None:
        """The mean over the tuning seeds at each point, or None while runs are missing."""
        means = []
        for point in self.comparison.points:
            values = []
            for seed in range(self.comparison.tuned_by):
                summary = self.done.get(("train", self.run(way, point, seed).folder))
                if summary is None:
                    return None
                value = None if diverged(summary) else summary.test.get(self.comparison.metric)
                values.append(math.nan if value is None else value)
            means.append(statistics.fmean(values))
        return means

    def results(self) -> Results:
        found = {way: self._result(way) for way in self.comparison.ways}
        # The metric is not defined in a run of a detector that finds nothing: no difference without it.
        tests = {way: result.test.get(self.comparison.metric, {}) for way, result in found.items()}
        differences = [
            difference(a, b, tests[a], tests[b])
            for a, b in self.comparison.pairs
            if tests[a].keys() & tests[b].keys()
        ]
        searches = {name: self.search(name).folder for name in self.comparison.searches}
        return Results(self.comparison, found, differences, searches)

    def _result(self, way: str) -> WayResult:
        point = self.choice(way)
        assert point is not None
        test: dict[str, dict[int, float]] = {metric.name: {} for metric in METRICS[self.comparison.task]}
        folders, summaries, counts = {}, [], []
        for number in range(self.comparison.seeds):
            job = self.run(way, point, number)
            seed, folders[job.config.seed] = job.config.seed, job.folder
            summary = self.done[("train", job.folder)]
            if diverged(summary):
                for values in test.values():
                    values[seed] = 0.0
                continue
            summaries.append(dataclasses.asdict(dataclasses.replace(summary, reused=False)))
            if summary.split == "test":
                measured = {**summary.test, "count": summary.test_count}
            else:
                measured = self.done["test", job.folder]
            counts.append(measured["count"])
            for name, values in test.items():
                if measured.get(name) is not None:
                    values[seed] = measured[name]
        times = [s["step_ms_median"] for s in summaries if s["step_ms_median"] is not None]
        return WayResult(
            way=way,
            point=point,
            tuning=(self.tuning(way) or []) if self.comparison.validation else [],
            test={name: values for name, values in test.items() if values},
            count=min(counts, default=0),
            folders=folders,
            summary=summaries[0] if summaries else {},
            step_ms=statistics.median(times) if times else None,
            gradients=self.done.get(("gradients", self.run(way, point, 0).folder), {}),
        )


def diverged(summary: Any) -> bool:
    """Whether a run has diverged: what is kept of it is then its message, in place of numbers."""
    return isinstance(summary, str)


# -- doing it


def _make(plan: _Plan, pool: workers.Workers, log: Log) -> None:
    """Does the jobs of a plan as they become possible."""
    running: dict[Future, _Job] = {}
    while True:
        begun = {(job.kind, job.folder) for job in running.values()}
        for job in plan.jobs():
            if (key := (job.kind, job.folder)) in plan.done or key in begun:
                continue
            running[pool.submit(_do, job.kind, job.folder, job.config)] = job
            begun.add(key)
            if not pool.count:
                break  # done already, and others may be possible now
        if not running:
            return
        finished, _ = wait(running, return_when=FIRST_COMPLETED)
        for future in finished:
            job = running.pop(future)
            try:
                result = future.result()
            except InterruptedError as error:
                raise KeyboardInterrupt(f"{job.label}: {error}") from error
            if diverged(result) and job.config.name in plan.comparison.searches:
                raise FloatingPointError(
                    f"the search {job.config.name!r} diverged ({result}): its ways have no scales; lower its "
                    "`optim.learning_rate`, and choose a new `out_dir`"
                )
            plan.done[(job.kind, job.folder)] = result
            if job.kind == "train":
                log(f"{job.label}: {_outcome(job, result)}")


def _do(kind: str, folder: Path, config: Config, *, stop: Callable[[], bool]) -> Any:
    """Does one job and returns its result: of a run its summary, or the reason why it diverged; of a test its
    numbers."""
    if kind == "test":
        return _kept(folder / "test.json", lambda: evaluate(load_trained(folder)), needed=("count",))
    if kind == "gradients":
        return _kept(folder / "gradients.json", lambda: gradient_by_layer(config))
    if (stored := read_json(path := folder / DIVERGED)) is not None:
        if not isinstance(stored, dict) or not isinstance(stored.get("reason"), str):
            raise ValueError(f"{path} is damaged, it has no reason: remove it, and the run goes on")
        return stored["reason"]
    try:
        summary = run(config, folder, progress=False, stop=stop)
    except FloatingPointError as error:
        replace_file(folder / DIVERGED, json.dumps({"reason": str(error)}) + "\n")
        return str(error)
    if not summary.finished:
        raise InterruptedError(f"stopped at step {summary.steps}")
    return summary


def _kept(path: Path, measure: Callable[[], dict[str, Any]], *, needed: Sequence[str] = ()) -> dict[str, Any]:
    """What `measure` gives, or has given and is in the file: numbers by name, or None where one is not
    defined."""
    stored = read_json(path)
    if stored is None:
        stored = measure()
        replace_file(path, json.dumps(stored) + "\n")
    elif not is_of(stored, dict[str, float | None]) or not all(name in stored for name in needed):
        raise ValueError(f"{path} is damaged, it does not hold numbers by name: remove it, it is made anew")
    return stored


def _outcome(job: _Job, result: Summary | str) -> str:
    if isinstance(result, str):
        return f"diverged ({result})"
    measured = format_metrics(result.task, result.test, split=evaluated_on(job.config))
    speed = "" if result.step_ms_median is None else f", {result.step_ms_median:.1f} ms a step"
    return f"{measured}{speed}, {result.wall_s:.0f} s{' (was there)' if result.reused else ''}"


def _refuse_others(comparison: Comparison, out_dir: Path) -> None:
    """Raises ValueError for a folder that is neither new, empty nor of this comparison."""
    stored = read_json(out_dir / SPEC)
    if stored is None:
        refuse_strangers(out_dir, "comparison", lambda name: name == SPEC + PART or name.startswith(LOCK))
        return
    try:
        others = list(differing(stored, spec(comparison)))
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        raise ValueError(
            f"{out_dir / SPEC} is damaged or of another version ({error}): choose another folder, or remove "
            "that one"
        ) from error
    if others:
        raise ValueError(
            f"`out_dir` {out_dir} holds another comparison; it differs in {', '.join(others)}. Choose "
            "another folder, or remove that one"
        )


def _claim(comparison: Comparison, out_dir: Path) -> None:
    """Writes what is compared to the folder, of which this process has the lock."""
    _refuse_others(comparison, out_dir)
    stored = read_json(out_dir / SPEC)
    whole = joined_spec(stored or {}, spec(comparison))
    if stored != whole:
        replace_file(out_dir / SPEC, json.dumps(whole, indent=1) + "\n")
