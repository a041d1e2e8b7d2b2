"""Ways of training compared: the same seeds and the same grid for each, the choice made on held-out images.

    OUT/comparison.json                what is compared; a folder holds one comparison
    OUT/searches/<search>/             hyper-searches whose scales some ways take
    OUT/runs/<way>/<point>/<seed>/     a run for each way, point of the grid and seed; its test.json has the
                                       numbers on the test images
    OUT/.lock                          held by the processes that work here

Each way is trained at every point of the grid with the first seeds. The point with the best mean on the
held-out training images is the way's own, and the other seeds are trained there. At the end, and of these
runs only, the test images are read. Everything finished stays: the same call, made again, goes on where it
was.
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

from repopt_jax import userfile
from repopt_jax.report.depth import gradient_by_layer
from repopt_jax.report.statistics import Difference, difference
from repopt_jax.train import processes, workers
from repopt_jax.train.build import load_trained
from repopt_jax.train.config import (
    Config,
    config_file,
    differing_fields,
    evaluated_on,
    from_json,
    load_config,
    to_json,
    validate,
)
from repopt_jax.train.deploy import evaluate
from repopt_jax.train.loop import run
from repopt_jax.train.rundir import PART, Summary, read_json, replace_file
from repopt_jax.train.tasks import METRICS, format_metrics

Log = Callable[[str], None]

SEARCH = "search:"  # before the name of one of the comparison's searches, in `Config.scales`
SPEC = "comparison.json"
LOCK = ".lock"
DIVERGED = "diverged.json"  # in the folder of a run: why it ended
OWN = ("seed", "name", "task", "scales", "data.validation")  # fields that a comparison sets, or must not vary


@dataclasses.dataclass(frozen=True)
class Comparison:
    """What is compared.

    Attributes:
      title: heading of its page.
      ways: name -> config of a run. Its `scales` may be "search:NAME", those that a search of the comparison
        finds. Seed and name are set by the comparison.
      searches: name -> config of mode "search".
      labels: way -> what tables call it; by default its name.
      differences: pairs (way, other way), whose difference is reported seed by seed.
      seeds: number of runs of each way, with the seeds 0, 1, ... added to that of its config.
      grid: field of a config -> the values that are tried, the same for every way:
        {"optim.learning_rate": (0.03, 0.1, 0.3)}. Of several fields all combinations are tried. Empty for
        the configs as they are.
      tuning_seeds: how many of the seeds try the whole grid; None for all.
      validation: training images that are held out and decide between the points of the grid; 0 without a
        grid: then there is nothing to decide, and all images train.
      about: paragraphs for the head of the page: what is compared, and what the table shows.

    Raises:
      ValueError: values that do not fit together; it lists all problems.
    """

    title: str
    ways: Mapping[str, Config]
    searches: Mapping[str, Config] = dataclasses.field(default_factory=dict)
    labels: Mapping[str, str] = dataclasses.field(default_factory=dict)
    differences: Sequence[tuple[str, str]] = ()
    seeds: int = 3
    grid: Mapping[str, Sequence[Any]] = dataclasses.field(default_factory=dict)
    tuning_seeds: int | None = None
    validation: int = 0
    about: Sequence[str] = ()

    def __post_init__(self):
        problems = list(self._problems())
        if problems:
            raise ValueError("this comparison cannot run: " + "; ".join(problems))

    def _problems(self) -> Iterator[str]:
        if not self.ways:
            yield "`ways` is empty"
        if self.seeds < 1:
            yield f"`seeds`={self.seeds} must be at least 1"
        if self.tuning_seeds is not None and not self.tuning_seeds >= 1:
            yield f"`tuning_seeds`={self.tuning_seeds} must be at least 1, or None"
        if len(self.points) > 1 and self.validation < 1:
            yield (
                f"`grid` has {len(self.points)} points and `validation` is {self.validation}: hold out "
                "training images to choose by; the test images must not decide"
            )
        if own := [field for field in self.grid if field in OWN]:
            yield f"`grid` cannot be over {', '.join(own)}: make ways of them"
        if empty := [field for field, values in self.grid.items() if len(values) == 0]:
            yield f"`grid` has no values of {', '.join(empty)}"
        if unknown := sorted(set(self.labels) - set(self.ways)):
            yield f"`labels` of ways that are not compared: {', '.join(unknown)}"
        named = set(itertools.chain(*self.differences))
        if unknown := sorted(named - set(self.ways)):
            yield f"`differences` of ways that are not compared: {', '.join(unknown)}"
        for way, config in self.ways.items():
            if config.scales.startswith(SEARCH) and search_of(config) not in self.searches:
                yield f"way {way!r} takes `scales`={config.scales!r}, and there is no such search"
        if len(seeds := {config.seed for config in self.ways.values()}) > 1:
            yield f"`ways` have different seeds, {', '.join(map(str, sorted(seeds)))}: they cannot be paired"
        labels = [self.label(way) for way in self.ways]
        if twice := sorted({label for label in labels if labels.count(label) > 1}):
            yield f"`labels` name several ways {', '.join(map(repr, twice))}"
        if both := sorted(set(self.ways) & set(self.searches)):
            yield f"`searches` have names of `ways`: {', '.join(both)}"
        tasks = {config.task for config in (*self.ways.values(), *self.searches.values())}
        if len(tasks) > 1:
            yield f"`ways` are of different tasks, {' and '.join(sorted(tasks))}"
        for name in (*self.ways, *self.searches):
            if not name or "/" in name or name in (".", ".."):
                yield f"name {name!r} cannot be that of a folder"

    @property
    def points(self) -> tuple[dict[str, Any], ...]:
        """The points of the grid, each as field -> value; one without fields if there is no grid."""
        return tuple(dict(zip(self.grid, values)) for values in itertools.product(*self.grid.values()))

    @property
    def tuned_by(self) -> int:
        """How many seeds try the whole grid."""
        return self.seeds if self.tuning_seeds is None else min(self.tuning_seeds, self.seeds)

    @property
    def task(self) -> str:
        return next(iter(self.ways.values())).task

    @property
    def metric(self) -> str:
        """The name of the number that ways are compared by."""
        return METRICS[self.task][0].name

    def label(self, way: str) -> str:
        return self.labels.get(way, way)


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
        seeds than before.
      count: processes that make runs side by side, each on its share of the cores; 0 for this process alone.
        By default one for each core (at most `workers.MOST`) where the device is a CPU, else 0.
      source: the config file that the comparison is from, as `load_comparison` takes it: the processes import
        it as well, for what it registers.
      log: called with a line for each finished run.

    Raises:
      ValueError: a config that cannot run, an `out_dir` that holds something else.
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
    for config in plan.first_configs():
        validate(config, device_count=1 if count else None)
    _refuse_others(comparison, out_dir)
    first = None if source is None else (load_comparison, (source,))
    with (
        _locked(out_dir, log) as held,
        contextlib.nullcontext() if count else processes.stop_on_signals() as stop,
        workers.Workers(count, first=first, inherit=held, stop=stop or (lambda: False)) as pool,
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

    def first_configs(self) -> Iterator[Config]:
        """One run of each way and each search, as far as it can be checked before a search has run."""
        for name in self.comparison.searches:
            yield self.search(name).config
        for way in self.comparison.ways:
            for point in self.comparison.points:
                config = self.run(way, point, 0).config
                if self.comparison.ways[way].scales.startswith(SEARCH):
                    config.scales, config.scales_mean = "depth", False  # these are not there yet
                yield config

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
            for a, b in self.comparison.differences
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
            measured = self.done.get(("test", job.folder)) or {**summary.test, "count": summary.test_count}
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


def search_of(config: Config) -> str:
    """The name of the search that a config takes its scales from."""
    return config.scales.removeprefix(SEARCH)


def point_name(point: Mapping[str, Any]) -> str:
    """The name of the folder of a point: `learning_rate=0.1`."""
    parts = (f"{field.rpartition('.')[2]}={value}" for field, value in point.items())
    return ",".join(parts).replace("/", "_") or "default"


def point_text(point: Mapping[str, Any]) -> str:
    """A point in words: `learning rate 0.1`."""
    return ", ".join(f"{f.rpartition('.')[2].replace('_', ' ')} {value}" for f, value in point.items())


def diverged(summary: Any) -> bool:
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
        return _kept(folder / "test.json", lambda: evaluate(load_trained(folder)))
    if kind == "gradients":
        return _kept(folder / "gradients.json", lambda: gradient_by_layer(config))
    if (stored := read_json(folder / DIVERGED)) is not None:
        return str(stored["reason"])
    try:
        summary = run(config, folder, progress=False, stop=stop)
    except FloatingPointError as error:
        replace_file(folder / DIVERGED, json.dumps({"reason": str(error)}) + "\n")
        return str(error)
    if not summary.finished:
        raise InterruptedError(f"stopped at step {summary.steps}")
    return summary


def _kept(path: Path, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What `measure` gives, or has given and is in the file."""
    stored = read_json(path)
    if stored is None:
        stored = measure()
        replace_file(path, json.dumps(stored) + "\n")
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
        ours = (SPEC + PART, LOCK)
        if others := [p.name for p in sorted(out_dir.glob("*")) if p.name not in ours]:
            raise ValueError(
                f"`out_dir` {out_dir} is not empty and holds no comparison "
                f"(it has {', '.join(others[:3])}); choose an empty or a new folder"
            )
    elif differing := list(_differing(stored, _spec(comparison))):
        raise ValueError(
            f"`out_dir` {out_dir} holds another comparison; it differs in {', '.join(differing)}. Choose "
            "another folder, or remove that one"
        )


def _claim(comparison: Comparison, out_dir: Path) -> None:
    """Writes what is compared to the folder, of which this process has the lock."""
    _refuse_others(comparison, out_dir)
    if not (out_dir / SPEC).exists():
        replace_file(out_dir / SPEC, json.dumps(_spec(comparison), indent=1) + "\n")


def _spec(comparison: Comparison) -> dict[str, Any]:
    """What makes two comparisons the same, as JSON gives it back."""
    configs = {
        kind: {name: json.loads(to_json(config)) for name, config in given.items()}
        for kind, given in (("ways", comparison.ways), ("searches", comparison.searches))
    }
    choice = {"grid": comparison.grid, "tuning_seeds": comparison.tuning_seeds}
    return json.loads(json.dumps({**configs, **choice, "validation": comparison.validation}))


def _differing(stored: Mapping[str, Any], spec: Mapping[str, Any]) -> Iterator[str]:
    for kind in ("ways", "searches"):
        before, now = stored.get(kind, {}), spec[kind]
        if before.keys() != now.keys():
            yield f"`{kind}` ({', '.join(before)} there and {', '.join(now)} here)"
        for name in before.keys() & now.keys():
            pair = (from_json(json.dumps(config)) for config in (before[name], now[name]))
            yield from (f"{name}: {field}" for field in differing_fields(*pair))
    for field in ("grid", "tuning_seeds", "validation"):
        if stored.get(field) != spec[field]:
            yield f"`{field}` ({stored.get(field)} there and {spec[field]} here)"


@contextlib.contextmanager
def _locked(out_dir: Path, log: Log) -> Iterator[tuple[int, ...]]:
    """Holds the folder for this process and its workers, which inherit the descriptors: what an earlier call
    that was killed has left running ends first."""
    out_dir.mkdir(parents=True, exist_ok=True)
    try:
        import fcntl
    except ImportError:  # Windows
        yield ()
        return
    with open(out_dir / LOCK, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log(f"Waiting for another comparison in {out_dir} to end")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield (file.fileno(),)


# -- files


def load_comparison(file_and_arg: str) -> Comparison | Config:
    """The comparison that `path/to/file.py:arg` defines, or where the file defines none, its config.

    Raises:
      FileNotFoundError: no such file.
      ValueError: the file is no Python file with a `get_comparison` or a `get_config`.
      TypeError: the file returns something else.
    """
    name, _, arg = file_and_arg.partition(":")
    path = config_file(name)
    if not userfile.defines(path, "get_comparison"):
        return load_config(file_and_arg)
    comparison = userfile.call(path, "get_comparison", arg, noun="comparison")
    if not isinstance(comparison, Comparison):
        raise TypeError(f"`get_comparison` of {path} returned {type(comparison).__name__}, not `Comparison`")
    return comparison
