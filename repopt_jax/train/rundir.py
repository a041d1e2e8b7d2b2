"""The folder of a run: which run may write into it, its log, and the small files that say what it holds.

run.lock                     who writes here now; see `lock`
config.json, dataset.json    what is trained on what; written first, never changed
metrics.jsonl                the log; loggers beside it write to tensorboard/ and wandb/
checkpoints/                 state; see `checkpoint`
progress.json                the step of the newest checkpoint: were all lost, the run would know of it
scales/                      what a search found
summary.json                 written last: with it the run is finished
"""

import contextlib
import dataclasses
import datetime
import errno
import importlib.metadata
import itertools
import json
import logging
import os
import platform
import re
import statistics
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, TypeVar

import jax
import numpy as np
import optax

from repopt_jax import jsontext
from repopt_jax._version import __version__
from repopt_jax.arguments import is_of, must_be
from repopt_jax.data import DatasetInfo, DetectionInfo
from repopt_jax.train.config import (
    Config,
    differing_fields,
    evaluated_on,
    from_json,
    to_json,
    tuples,
)
from repopt_jax.train.lock import LOCK, Lock, held
from repopt_jax.train.processes import barrier, in_all_processes, is_first
from repopt_jax.train.rules import MOUNTED, check_fields
from repopt_jax.train.state import TrainState
from repopt_jax.train.tasks import METRICS

logger: Final = logging.getLogger(__name__)

R = TypeVar("R")

Info = DatasetInfo | DetectionInfo

PART = ".part"  # suffix of a file that is being written
MANIFEST = "manifest.json"  # of a checkpoint: written last


@dataclasses.dataclass(frozen=True)
class Summary:
    """What a run came to; `summary.json` holds the same fields.

    Attributes:
      name, mode, scales, seed, epochs: as in the config.
      steps: training steps done.
      test_accuracy, test_loss, test_count: of the last evaluation (accuracy in [0, 1]); None before the
        first, and what a task does not have.
      train_parameters: trained numbers in the network.
      step_ms_median: median over the log's lines of the mean time of a step, without compilation, evaluation
        and checkpoints; images_per_s follows from it. None if no step was timed.
      wall_s: seconds from the start of training to its end, over all sessions.
      finished: False if the run was asked to stop before its end.
      versions, device: what it ran on.
      task: "classify" or "detect".
      test: all numbers of the last evaluation by name, as `tasks.METRICS` has them for this task.
      data_wait: median over the log's lines of the share of the time that the device waited for data.
      published: the test accuracy that the authors of the recipe report, if the config has it.
      split: the images of the evaluations, "test" or, of a run that holds some out, "validation".
      reused: True if the run was already finished and nothing was done.
    """

    name: str
    mode: str
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
    task: str
    test: dict[str, float | None]
    data_wait: float | None
    published: float | None
    split: str
    reused: bool = False


def summarize(
    config: Config, records: Sequence[Mapping[str, Any]], state: TrainState, *, seconds: float, finished: bool
) -> Summary:
    """The summary of a run, from its config, its log and its last state."""
    trained = [record for record in records if record["kind"] == "train"]
    speed = statistics.median(record["images_per_s"] for record in trained) if trained else None
    test = next((record for record in reversed(records) if record["kind"] == "eval"), {})
    libraries = ("jax", "flax", "optax", "orbax-checkpoint", "grain")
    versions = {name: importlib.metadata.version(name) for name in libraries}
    return Summary(
        name=config.name,
        mode=config.model.mode,
        scales=config.scales,
        seed=config.seed,
        epochs=config.epochs,
        steps=int(jax.device_get(state.step)),
        test_accuracy=test.get("accuracy"),
        test_loss=test.get("loss"),
        test_count=test.get("count"),
        train_parameters=optax.tree.size(state.params),
        step_ms_median=None if speed is None else 1e3 * config.batch_size / speed,
        images_per_s=speed,
        wall_s=seconds,
        finished=finished,
        versions={"python": platform.python_version(), "repopt_jax": __version__, **versions},
        device=f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        task=config.task,
        test={metric.name: test.get(metric.name) for metric in METRICS[config.task]} if test else {},
        data_wait=statistics.median(record["data_wait"] for record in trained) if trained else None,
        published=config.published,
        split=evaluated_on(config),
    )


class RunFolder:
    """A folder that is to hold one run, or does."""

    def __init__(self, path: str | Path):
        """Raises ValueError if `path` is a URL."""
        if "://" in str(path):
            raise ValueError(f"`out_dir` {path} is a URL: {MOUNTED}")
        self.path: Path = Path(path).expanduser().absolute()
        self.checkpoints: Path = self.path / "checkpoints"
        self.scales: Path = self.path / "scales"
        self.metrics: Path = self.path / "metrics.jsonl"
        self.progress: Path = self.path / "progress.json"

    def finished(self, config: Config) -> Summary | None:
        """The summary, if this folder holds the finished run of `config`; None if that run can start or go on
        here.

        Raises:
          ValueError: another run, or files that are no run.
          OSError: the folder cannot be looked at.
        """
        with self._os_errors("read"):
            stored = self._stored_config()
            done = read_json(self.path / "summary.json")
        if stored is not None:
            self._check_same(stored, config)
        if stored is None or done is None:
            return None
        return from_record(Summary, done, self.path / "summary.json", reused=True)

    @contextlib.contextmanager
    def hold(self) -> Iterator[Lock | None]:
        """Holds the folder for this job: no other writes to it meanwhile. Gives the lock in the first process
        of the job, None in the others. A folder that is made for it and stays empty is removed again.

        Raises:
          BlockingIOError: another job holds it; the message says who, and since when.
          OSError: it cannot be made or written.
        """

        def acquire() -> Lock | None:
            if not is_first():
                return None
            with self._os_errors("write to", unless=BlockingIOError):
                return stack.enter_context(held(self.path))

        with contextlib.ExitStack() as stack:
            yield in_all_processes("hold `out_dir`", acquire)

    def claim(self, config: Config, info: Info) -> None:
        """Makes the folder that of this run. Call after `finished`, holding the folder.

        Raises:
          ValueError: the run began on other data.
          OSError: no permission, or not a folder.
        """
        dataset = json.dumps(dataclasses.asdict(info), indent=2)

        def write() -> None:
            with self._os_errors("write to"):
                self.path.mkdir(parents=True, exist_ok=True)
                for name, text in (("config.json", to_json(config)), ("dataset.json", dataset)):
                    if is_first() and not (self.path / name).exists():
                        replace_file(self.path / name, text + "\n")

        def check() -> None:
            stored, found = self.read()
            self._check_same(stored, config)
            if found != info:
                raise ValueError(f"`out_dir` {self.path} holds a run that began on {found}, not on {info}")

        barrier("folder looked at")  # no process may find what another one has just written
        in_all_processes("write to `out_dir`", write)
        in_all_processes("find its own run in `out_dir`", check)

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
          ValueError: one of the files is damaged, or of another version.
        """
        names = ("config.json", "dataset.json")
        if missing := [name for name in names if not (self.path / name).is_file()]:
            raise FileNotFoundError(f"{self.path} holds no run: {', '.join(missing)} is missing")
        try:
            config = from_json((self.path / names[0]).read_bytes())
            check_fields(config)
        except ValueError as error:
            raise ValueError(
                f"{self.path} has a config.json that this version did not write ({error})"
            ) from error
        return config, info_from_json(config.task, read_json(self.path / names[1]), self.path / names[1])

    def check_progress(self) -> None:
        """Looks, before a run begins or goes on here, whether what it left is still there.

        Raises:
          ValueError: a file where a folder should be, or the other way round; a line of the log that is none;
            the checkpoints are gone although the run had some.
        """
        kinds = {self.checkpoints: Path.is_dir, self.scales: Path.is_dir}
        kinds |= dict.fromkeys((self.metrics, self.progress, self.path / "summary.json"), Path.is_file)
        if wrong := [path.name for path, is_kind in kinds.items() if path.exists() and not is_kind(path)]:
            raise ValueError(
                f"`out_dir` {self.path} has a file where a folder should be, or the other way round: "
                f"{', '.join(wrong)}; move it away, and put back what was there"
            )
        stored = read_json(self.progress, default={})
        step = stored.get("checkpoint") if isinstance(stored, dict) else None
        logged = [record["step"] for record in read_records(self.metrics)]
        complete = [p for p in self.checkpoints.glob(f"*/{MANIFEST}") if p.parent.name.isdecimal()]
        if isinstance(step, int) and not complete:
            found = f"a run that had a checkpoint of step {step}"
        elif logged and not self.checkpoints.is_dir():  # which is made before the log is opened
            found = f"the log of a run until step {max(logged)}"
        else:
            return
        raise ValueError(
            f"`out_dir` {self.path} holds {found}, but no complete checkpoint is in {self.checkpoints}. "
            "Nothing was changed. Put back the checkpoints, or train from the beginning in another `out_dir`"
        )

    def note_checkpoint(self, step: int) -> None:
        """Records in the first process that the checkpoint of `step` is complete."""
        replace_file(self.progress, json.dumps({"checkpoint": step}) + "\n")

    def scores(self, task: str) -> dict[int, float]:
        """Step -> first number of the evaluation there, by which the best checkpoint is found."""
        name = METRICS[task][0].name
        evaluated = (r for r in read_records(self.metrics) if r["kind"] == "eval")
        return {r["step"]: r[name] for r in evaluated if r.get(name) is not None}

    def evaluated(self) -> set[int]:
        """The steps whose evaluations are in the log."""
        return {record["step"] for record in read_records(self.metrics) if record["kind"] == "eval"}

    def finish(self, summary: Summary) -> None:
        """Writes the summary."""
        values: dict[str, Any] = dataclasses.asdict(summary)
        values.pop("reused")
        with self._os_errors("write to"):
            if is_first():
                replace_file(self.path / "summary.json", json.dumps(values, indent=2) + "\n")

    def _os_errors(self, verb: str, **options: Any) -> contextlib.AbstractContextManager[None]:
        return os_errors(f"{verb} `out_dir` {self.path}", "; choose another folder", **options)

    def _stored_config(self) -> Config | None:
        path = self.path / "config.json"
        if path.exists():
            try:
                return from_json(path.read_bytes())
            except ValueError as error:
                raise ValueError(
                    f"`out_dir` {self.path} has a config.json that this version did not write ({error}); "
                    "choose another folder"
                ) from error
        refuse_strangers(self.path, "run", lambda name: name.endswith(PART) or name == LOCK)
        return None


def info_from_json(task: str, fields: Any, path: Path) -> Info:
    """What is known of a data set, from the fields that JSON kept of it in the file at `path`.

    Raises:
      ValueError: they do not describe one of `task`.
    """
    kind = {"classify": DatasetInfo, "detect": DetectionInfo}[task]
    return from_record(kind, fields, path)


# -- files


def replace_file(path: Path, text: str) -> None:
    """Writes a file beside its place and renames it, so that it is either whole and on disk or not there.

    Raises:
      OSError: it cannot be written.
    """
    part = path.with_name(path.name + PART)
    with open(part, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        _sync(file.fileno())
    part.replace(path)


def refuse_strangers(out_dir: Path, noun: str, known: Callable[[str], bool]) -> None:
    """Raises ValueError if a folder that holds no `noun` holds something else; `known` says of a name that
    it is what an interrupted call has left."""
    names = sorted(path.name for path in out_dir.iterdir()) if out_dir.exists() else []
    if strangers := [name for name in names if not known(name)]:
        raise ValueError(
            f"`out_dir` {out_dir} is not empty and holds no {noun} (it has {', '.join(strangers[:3])}); "
            "choose an empty or a new folder"
        )


def read_json(path: Path, *, default: Any = None) -> Any:
    """The content of a JSON file, or `default` where there is no such file.

    Raises:
      ValueError: the file is not JSON.
    """
    if not path.is_file():
        return default
    return jsontext.parse(path.read_bytes(), path)


def from_record(kind: type[R], record: Any, path: Path, **changes: Any) -> R:
    """Returns the dataclass `kind` of the fields that the file at `path` held, with some of them changed.

    Raises:
      ValueError: the record lacks a field or has others, or a value is not what the field holds.
    """
    record = {**(record if isinstance(record, dict) else {}), **changes}
    types = typing.get_type_hints(kind)
    names = {field.name for field in dataclasses.fields(kind)}  # pyright: ignore[reportArgumentType]
    hints = {name: types[name] for name in sorted(names & record.keys())}
    record |= {name: _with_tuples(record[name], hint) for name, hint in hints.items()}
    lacking, others = sorted(names - record.keys()), sorted(record.keys() - names)
    problems = []
    if lacking or others:
        lists = (", ".join(found) or "nothing" for found in (lacking, others))
        problems.append("it lacks {} and has {} beside".format(*lists))
    problems += [
        f"`{name}`={record[name]!r:.100} must {must_be(hint)}"
        for name, hint in hints.items()
        if not is_of(record[name], hint)
    ]
    try:
        if not problems:
            return kind(**record)
    except ValueError as error:  # values that do not fit together
        problems.append(str(error))
    raise ValueError(
        f"{path} is damaged or of another version: {'; '.join(problems)}; remove its folder, or choose "
        "another one"
    )


def _with_tuples(value: Any, hint: Any) -> Any:
    """A value that JSON gave back, with tuples in place of lists where the type of its field has them."""
    origins = {typing.get_origin(one): one for one in (hint, *typing.get_args(hint))}
    if isinstance(value, list) and tuple in origins:
        return tuples(value)
    if isinstance(value, dict) and dict in origins:
        entries = typing.get_args(origins[dict])[1]
        return {name: _with_tuples(entry, entries) for name, entry in value.items()}
    return value


def _sync(file: int) -> None:
    try:
        os.fsync(file)
    except OSError as error:  # os.devnull and some network file systems cannot
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EROFS):
            raise


@contextlib.contextmanager
def os_errors(
    doing: str, advice: str = "", *, unless: type[Exception] | tuple[type[Exception], ...] = ()
) -> Iterator[None]:
    """Raises an error of the file system again, whatever Orbax made of it, as one `OSError` with what could
    not be done, and what to do; but not those of type `unless`, which say it themselves."""
    try:
        yield
    except Exception as error:
        if isinstance(error, unless) or (reason := _file_error(error)) is None:
            raise
        raise type(reason)(f"cannot {doing}: {reason.strerror or reason}{advice}") from error


def _file_error(error: BaseException | None) -> OSError | None:
    """The error of the file system behind `error`, if there is one. TensorStore has it in its text only."""
    while error is not None:
        if isinstance(error, OSError):
            return error
        if found := re.search(r"os_error_code='(\d+)'", str(error)):
            number = int(found[1])
            return OSError(number, os.strerror(number))
        if "RESOURCE_EXHAUSTED" in str(error):
            return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        error = error.__cause__ or error.__context__
    return None


# -- the log


class MetricsWriter:
    """Appends records to `metrics.jsonl`, one JSON object a line. A context manager."""

    def __init__(
        self,
        directory: str | Path,
        *,
        resume_step: int | None,
        evaluated: bool = True,
    ):
        """Opens the file for a run that starts after `resume_step`, or anew for None.

        Lines past that step were written by a run that was killed after its last checkpoint. They are
        dropped, so that the file ends as that of an unbroken run; and so is the evaluation of that step,
        unless it counts as `evaluated`. A run that starts anew moves lines that are there aside, to
        metrics-before.jsonl. Where the file of a run that goes on is gone, its records begin with one that
        says so, of kind "resumed". Both give a warning.

        Raises:
          ValueError: a line that is no record. Nothing is changed then. `check_records` finds missing ones.
          OSError: the file cannot be written.
        """
        # The first process writes; the others hold the same numbers and drop them.
        path = Path(directory) / "metrics.jsonl"
        self._path = path if is_first() else Path(os.devnull)
        with os_errors(f"write to {self._path}"):
            if is_first():
                _make_ready(path, resume_step, evaluated)
            # Without a buffer: what could not be written is not tried again when the file is closed.
            self._file = open(self._path, "ab", buffering=0)  # noqa: SIM115

    def write(self, record: Mapping[str, Any]) -> None:
        """Writes one record, which has a "kind" and a "step", and the time of day as "time".

        Raises:
          OSError: it cannot be written.
        """
        line = (json.dumps({**record, "time": _now()}) + "\n").encode()
        with os_errors(f"write to {self._path}"):
            while line:
                line = line[self._file.write(line) or 0 :]

    def sync(self) -> None:
        """Waits until all records are on disk: a checkpoint promises the lines up to its step.

        Raises:
          OSError: they cannot be written.
        """
        with os_errors(f"write to {self._path}"):
            _sync(self._file.fileno())

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def read_records(path: str | Path) -> list[dict[str, Any]]:
    """The lines of a metrics file, without a half-written last one; none if there is no file.

    Raises:
      ValueError: a line is no record; the message has the file and the number of the line.
    """
    path = Path(path)
    if not path.exists():
        return []
    lines = path.read_bytes().splitlines(keepends=True)
    return [_record(line, path, number) for number, line in enumerate(lines, 1) if line.endswith(b"\n")]


def _record(line: bytes, path: Path, number: int) -> dict[str, Any]:
    advice = "put back a copy of the file, or move it away to go on without its records"
    try:
        found = jsontext.parse(line, "it")
    except ValueError as error:
        raise ValueError(f"line {number} of {path} is no record ({error}): {advice}") from error
    valid = isinstance(found, dict) and isinstance(found.get("kind"), str) and type(found.get("step")) is int
    if not valid:
        raise ValueError(f"line {number} of {path} is no record with a kind and a step: {advice}")
    fields = _FIELDS.get(found["kind"], {})
    if wrong := [name for name, kind in fields.items() if not is_of(found.get(name), kind)]:
        raise ValueError(
            f"line {number} of {path} is no record of kind {found['kind']!r}: "
            + "; ".join(f"`{name}`={found.get(name)!r:.100} must {must_be(fields[name])}" for name in wrong)
            + f": {advice}"
        )
    return found


# Kind of a record -> what is read of it again, beside its step.
_FIELDS: dict[str, dict[str, Any]] = {
    "train": {"epoch": float, "lr": float, "images_per_s": float, "data_wait": float},
    "eval": {"epoch": float},
    "scales": {"epoch": float, "layers": dict[str, dict[str, dict[str, float]]]},
    "prune": {"masked": int},
}


def check_records(path: Path, step: int, *, log_every: int) -> None:
    """Looks whether a log still has what the checkpoint of `step` promises: a "train" record for every
    `log_every` steps up to it.

    Raises:
      ValueError: lines are missing, from its end or in between, or one is no record. A log that is gone
        altogether is no error: nothing of it can be overwritten.
    """
    if not path.exists():
        return
    records = read_records(path)
    begun = [r["step"] for r in records if r["kind"] == RESUMED]
    there = {r["step"] for r in records if r["kind"] == "train"}
    first = max(begun) if begun else 0
    missing = [s for s in range(log_every, step + 1, log_every) if s > first and s not in there]
    if missing:
        raise ValueError(
            f"{path} was cut or changed: its {len(records)} lines lack {len(missing)} records of training "
            f"steps up to the checkpoint of step {step}, the first of step {missing[0]}. Nothing was "
            "changed. Put back a copy of the file, or move it away to go on without its records"
        )


RESUMED = "resumed"  # the kind of a record that stands for all before it, which are lost


def _make_ready(path: Path, step: int | None, evaluated: bool) -> None:
    """Makes a log end at `step`; see `MetricsWriter`."""
    there = path.exists()
    if step is None:
        if there and path.stat().st_size:
            _move_aside(path)
        records = []
    elif there:
        records = [r for r in read_records(path) if r["step"] <= step]
    else:
        logger.warning(
            "%s is missing: its records up to step %d are lost, and the run goes on without them", path, step
        )
        records = [{"kind": RESUMED, "step": step, "note": "the records before this step are lost"}]
    if not evaluated:
        records = [r for r in records if not (r["kind"] == "eval" and r["step"] == step)]
    replace_file(path, "".join(json.dumps(record) + "\n" for record in records))


def _move_aside(path: Path) -> None:
    for number in itertools.count(1):
        aside = path.with_name(f"{path.stem}-before{'' if number == 1 else number}{path.suffix}")
        if not aside.exists():
            break
    path.rename(aside)
    logger.warning(
        "%s has records, but there is no checkpoint to go on from: they were moved to %s, and the run starts "
        "at its beginning",
        *(path, aside.name),
    )


def _now() -> str:
    """The time of day, with its offset from UTC, to the second."""
    return datetime.datetime.now().astimezone().isoformat(timespec="seconds")


def scale_statistics(
    scales: Mapping[str, Mapping[str, Any]], previous: Mapping[str, Mapping[str, Any]]
) -> dict[str, dict[str, dict[str, float]]]:
    """Statistics of each scale vector, and how far it moved.

    Args:
      scales: layer path -> branch -> (out,) vector.
      previous: the same at the record before; pass `scales` again for the first one.

    Returns:
      Layer path -> branch -> mean, std, min, max, rms (root mean square), negative (a count) and rms_change
      (root mean square of the difference from `previous`).
    """

    def statistics_of(vector: Any, before: Any) -> dict[str, float]:
        v, moved = np.asarray(vector, np.float64), np.asarray(vector, np.float64) - before
        return {
            **{name: float(getattr(v, name)()) for name in ("mean", "std", "min", "max")},
            "rms": float(np.sqrt((v**2).mean())),
            "negative": int((v < 0).sum()),
            "rms_change": float(np.sqrt((moved**2).mean())),
        }

    return jax.tree.map(statistics_of, dict(scales), dict(previous))
