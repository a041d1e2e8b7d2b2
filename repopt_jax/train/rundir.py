"""The folder of a run: who may write into it, and the small files that say what it holds.

config.json, dataset.json    what is trained on what; written first, never changed
metrics.jsonl, tensorboard/  how it goes
checkpoints/                 state; `checkpoint` says what is in there
scales/                      what a search found
summary.json                 written last: its presence means that the run is finished
"""

import contextlib
import dataclasses
import importlib.metadata
import json
import platform
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from repopt_jax._version import __version__
from repopt_jax.data import DatasetInfo, DetectionInfo
from repopt_jax.train.config import MOUNTED, Config, differing_fields, from_json, to_json
from repopt_jax.train.metrics import read_records
from repopt_jax.train.processes import together
from repopt_jax.train.records import completed, read_json
from repopt_jax.train.sharding import meet
from repopt_jax.train.state import TrainState
from repopt_jax.train.tasks import METRICS

Info = DatasetInfo | DetectionInfo


@dataclasses.dataclass(frozen=True)
class Summary:
    """What a run came to; `summary.json` holds the same fields.

    Attributes:
      name, kind, scales, seed, epochs: as in the config.
      steps: training steps done.
      test_accuracy, test_loss, test_count: of the last evaluation (accuracy in [0, 1]); None before the
        first, and what a task does not have.
      train_parameters: trained numbers in the network.
      step_ms_median: median over the log's lines of the mean time of a step, without compilation, evaluation
        and checkpoints; images_per_s follows from it. None if no step was timed.
      wall_s: seconds from the start of training to its end, all sessions together.
      finished: False if the run was asked to stop before its end.
      versions, device: what it ran on.
      reused: True if the run was already finished and nothing was done.
      task: "classify" or "detect".
      test: all numbers of the last evaluation by name, as `tasks.METRICS` has them for this task.
      data_wait: median over the log's lines of the share of the time that the device waited for data.
      published: the test accuracy that the authors of the recipe report, if the config has it.
    """

    name: str
    kind: str
    scales: str
    seed: int
    epochs: int
    steps: int
    test_accuracy: float | None
    test_loss: float | None
    test_count: int | None
    train_parameters: int
    step_ms_median: float | None
    images_per_s: float | None
    wall_s: float
    finished: bool
    versions: dict[str, str]
    device: str
    reused: bool = False
    task: str = "classify"
    test: dict[str, Any] = dataclasses.field(default_factory=dict)
    data_wait: float | None = None
    published: float | None = None


def summarize(
    config: Config, records: Sequence[Mapping[str, Any]], state: TrainState, *, seconds: float, finished: bool
) -> Summary:
    """The summary of a run, from its config, its log and its last state."""
    speeds = [record["images_per_s"] for record in records if record["kind"] == "train"]
    speed = statistics.median(speeds) if speeds else None
    waits = [r["data_wait"] for r in records if r["kind"] == "train" and "data_wait" in r]
    tests = [record for record in records if record["kind"] == "eval"]
    test = tests[-1] if tests else {}
    return Summary(
        name=config.name,
        kind=config.model.kind,
        scales=config.scales,
        seed=config.seed,
        epochs=config.epochs,
        steps=int(jax.device_get(state.step)),
        test_accuracy=test.get("accuracy"),
        test_loss=test.get("loss"),
        test_count=test.get("count"),
        train_parameters=sum(leaf.size for leaf in jax.tree.leaves(state.params)),
        step_ms_median=None if speed is None else 1e3 * config.batch_size / speed,
        images_per_s=speed,
        wall_s=seconds,
        finished=finished,
        versions=_versions(),
        device=f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        task=config.task,
        test={metric.name: test.get(metric.name) for metric in METRICS[config.task]} if test else {},
        data_wait=statistics.median(waits) if waits else None,
        published=config.published,
    )


class RunFolder:
    """A folder that is to hold one run, or does."""

    def __init__(self, path: str | Path):
        """Raises ValueError if `path` is a URL."""
        if "://" in str(path):
            raise ValueError(f"`out_dir` {path} is a URL: {MOUNTED}")
        self.path = Path(path).expanduser().absolute()
        self.checkpoints = self.path / "checkpoints"
        self.scales = self.path / "scales"
        self.metrics = self.path / "metrics.jsonl"

    def finished(self, config: Config) -> Summary | None:
        """The summary, if this folder holds the finished run of `config`; None if that run can start or go on
        here.

        Raises:
          ValueError: another run, or files that are no run.
          OSError: the folder cannot be looked at.
        """
        with _clear_os_error(self.path, "read"):
            stored = self._stored_config()
            summary = self.path / "summary.json"
            done = read_json(summary) if summary.exists() else None
        if stored is not None:
            self._check_same(stored, config)
        if stored is None or done is None:
            return None
        return Summary(**{**completed(done), "reused": True})

    def claim(self, config: Config, info: Info) -> None:
        """Makes the folder that of this run. Call after `finished`.

        Raises:
          ValueError: the run began on other data.
          OSError: no permission, or not a folder.
        """
        meet("folder looked at")  # no process may find what another one has just written
        together("write to `out_dir`", lambda: self._write_claim(config, info))
        found = together("find its own run in `out_dir`", lambda: self._read_own(config))
        if found != info:
            raise ValueError(f"`out_dir` {self.path} holds a run that began on {found}, not on {info}")

    def _write_claim(self, config: Config, info: Info) -> None:
        with _clear_os_error(self.path, "write to"):
            self.path.mkdir(parents=True, exist_ok=True)
            for name, text in (
                ("config.json", to_json(config)),
                ("dataset.json", json.dumps(dataclasses.asdict(info), indent=2)),
            ):
                if not (self.path / name).exists():
                    self._write(name, text)

    def _read_own(self, config: Config) -> Info:
        stored, info = self.read()
        self._check_same(stored, config)
        return info

    def _check_same(self, stored: Config, config: Config) -> None:
        if differing := differing_fields(stored, config):
            raise ValueError(
                f"`out_dir` {self.path} holds another run; it differs in {', '.join(differing)} "
                "(there and here). Choose another folder, or remove that one"
            )

    def read(self) -> tuple[Config, Info]:
        """The config and the data set of the run that is here.

        Raises:
          FileNotFoundError: no run is here.
        """
        names = ("config.json", "dataset.json")
        if missing := [name for name in names if not (self.path / name).is_file()]:
            raise FileNotFoundError(f"{self.path} holds no run: {', '.join(missing)} is missing")
        config, info = ((self.path / name).read_text(encoding="utf-8") for name in names)
        config = from_json(config)
        return config, info_from_json(config.task, json.loads(info))

    def scores(self, task: str) -> dict[int, float]:
        """Step -> first number of the evaluation there, by which the best checkpoint is told."""
        name = METRICS[task][0].name
        evaluated = (r for r in read_records(self.metrics) if r["kind"] == "eval")
        return {r["step"]: r[name] for r in evaluated if r.get(name) is not None}

    def finish(self, summary: Summary) -> None:
        """Writes the summary."""
        values: dict[str, Any] = dataclasses.asdict(summary)
        values.pop("reused")
        with _clear_os_error(self.path, "write to"):
            self._write("summary.json", json.dumps(values, indent=2))

    def _stored_config(self) -> Config | None:
        path = self.path / "config.json"
        if path.exists():
            try:
                return from_json(path.read_text(encoding="utf-8"))
            except (ValueError, TypeError, AttributeError) as error:
                raise ValueError(
                    f"`out_dir` {self.path} has a config.json that this version did not write ({error}); "
                    "choose another folder"
                ) from error
        if self.path.exists() and (strangers := [p.name for p in self.path.iterdir() if p.suffix != _PART]):
            raise ValueError(
                f"`out_dir` {self.path} is not empty and holds no run "
                f"(it has {', '.join(sorted(strangers)[:3])}); choose an empty or a new folder"
            )
        return None

    def _write(self, name: str, text: str) -> None:
        if jax.process_index() != 0:
            return
        # Renamed into place, so that a file is either whole or not there.
        part = self.path / (name + _PART)
        part.write_text(text + "\n", encoding="utf-8")
        part.replace(self.path / name)


def info_from_json(task: str, fields: Mapping[str, Any]) -> Info:
    """What is known of a data set, from the fields that JSON kept of it."""
    kind = {"classify": DatasetInfo, "detect": DetectionInfo}[task]
    return kind(**{name: _tuples(value) for name, value in fields.items()})


def _tuples(value: Any) -> Any:
    """JSON has lists where there were tuples."""
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


_PART = ".part"


def _versions() -> dict[str, str]:
    names = ("jax", "flax", "optax", "orbax-checkpoint", "grain")
    found = {"python": platform.python_version(), "repopt_jax": __version__}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "unknown"  # no reason to lose a run that is finished
    return found


@contextlib.contextmanager
def _clear_os_error(path: Path, verb: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise type(error)(f"cannot {verb} `out_dir` {path}: {reason}; choose another folder") from error
