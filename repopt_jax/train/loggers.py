"""Where the records of a run go besides its own log: TensorBoard, Weights & Biases, a logger of your own.

`metrics.jsonl` (`rundir.MetricsWriter`) is the record of a run, so that an error there ends the run. A logger
beside it never does: one that fails is named in a warning and left out from then on. Only the first process
of a job has loggers.

    train.run(config, "runs/mine", loggers=[MyLogger()])

`MyLogger` is any class with the four methods of `Logger`. Those of this module also serve a loop of your own:

    board = TensorBoard()
    board.begin(Session(Path("runs/mine"), "mine"))
    board.write({"kind": "train", "step": 1, "loss": 0.5})
    board.close()
"""

import contextlib
import dataclasses
import logging
import os
import secrets
import socket
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Final, Protocol

from repopt_jax.core import paths

logger: Final = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Session:
    """What a logger is told before the first record.

    Attributes:
      directory: folder of the run, in which it may write.
      name: of the run.
      config: all that the run was given, nested dicts by field.
      step: records of later steps follow, and the evaluation of this one if it had not been made; others of
        it and of earlier ones were written by the session before. None for a run at its beginning.
    """

    directory: Path
    name: str
    config: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    step: int | None = None


class Logger(Protocol):
    """Takes the records of a run. Whatever it raises, the run goes on without it."""

    def begin(self, session: Session) -> None:
        """Called once, before the first record. A run that was killed and goes on writes the records after
        `session.step` again, with the same numbers."""
        ...

    def write(self, record: Mapping[str, Any]) -> None:
        """Takes one record, as in `metrics.jsonl` but without its "time": a "kind" ("train", "eval", ...), a
        "step", and numbers or nested dicts of numbers."""
        ...

    def sync(self) -> None:
        """Called before each checkpoint: keeps what was written."""
        ...

    def close(self) -> None:
        """Called once, at the end of the session, also after an error of the run or of `begin`."""
        ...


def numbers(record: Mapping[str, Any]) -> dict[str, int | float]:
    """The numbers of a record by name, `train/loss` or `scales/layers/stages/0/0/conv/kernel/3x3/mean`; its
    step is none of them."""
    found = paths.named_leaves(dict(record))[0]
    return {
        f"{record['kind']}/{name}": value
        for name, value in found.items()
        if isinstance(value, int | float) and name != "step"
    }


class TensorBoard:
    """Writes event files to `tensorboard/` in the run's folder. Needs tensorboardX.

    Each record is written and flushed before `write` returns. (tensorboardX's own `SummaryWriter` writes in a
    thread, which ends at the first error, such as a full disk; the program then waits for it for ever.)
    """

    def begin(self, session: Session) -> None:
        from tensorboardX.proto import event_pb2, summary_pb2
        from tensorboardX.record_writer import RecordWriter

        # Their classes are made when they are imported, where type checkers do not see them.
        self._events: Any = event_pb2
        self._summaries: Any = summary_pb2
        folder = session.directory / "tensorboard"
        folder.mkdir(parents=True, exist_ok=True)
        # Of a run that was killed before its first checkpoint and begins again there are events already.
        first = session.step + 1 if session.step is not None else 0 if any(folder.iterdir()) else None
        # TensorBoard looks for this part of a name, and reads the files in the order of their names.
        now = time.time_ns()
        name = f"events.out.tfevents.{now // 10**9}.{socket.gethostname()}.{now}"
        self._file = RecordWriter(str(folder / name))
        self._add(0, file_version="brain.Event:2")
        if first is not None:  # TensorBoard then drops what it has of this step and later ones
            start = self._events.SessionLog(status=self._events.SessionLog.START)
            self._add(first, session_log=start)
        self.sync()

    def write(self, record: Mapping[str, Any]) -> None:
        value = self._summaries.Summary.Value
        values = [value(tag=name, simple_value=number) for name, number in numbers(record).items()]
        self._add(record["step"], summary=self._summaries.Summary(value=values))
        self.sync()

    def sync(self) -> None:
        self._file.flush()

    def close(self) -> None:
        self._file.close()

    def _add(self, step: int, **content: Any) -> None:
        event = self._events.Event(wall_time=time.time(), step=step, **content)
        self._file.write(event.SerializeToString())


class Wandb:
    """Sends records to Weights & Biases, or keeps them in `wandb/` of the run's folder (WANDB_MODE=offline).
    Needs wandb.

    A folder is one run there: its id is in `wandb/run-id`, and a session that goes on has the same. Each
    record is a row, whose "step" is that of the training. A row cannot be taken back: where a run was killed,
    the rows after its last checkpoint are there twice, with the same numbers.

    Args:
      options: arguments of `wandb.init`; by default `project` is "repopt_jax", or what WANDB_PROJECT says,
        and `name` and `config` are those of the run.
    """

    def __init__(self, **options: Any):
        self._options = options

    def begin(self, session: Session) -> None:
        import wandb

        folder = session.directory / "wandb"
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / "run-id"
        if not file.exists():
            file.write_text(secrets.token_hex(8) + "\n", encoding="utf-8")
        options: dict[str, Any] = {
            "project": os.environ.get("WANDB_PROJECT", "repopt_jax"),
            "name": session.name,
            "config": dict(session.config),
            "dir": str(session.directory),
            "id": file.read_text(encoding="utf-8").strip(),
            "resume": "allow",
            "settings": wandb.Settings(console="off"),  # what is printed stays where it is
        }
        self._run = wandb.init(**options | self._options)
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def write(self, record: Mapping[str, Any]) -> None:
        self._run.log({"step": record["step"], **numbers(record)})

    def sync(self) -> None:
        """Does nothing, because a process of wandb's own writes each row at once."""

    def close(self) -> None:
        self._run.finish()


# Name in a config's `loggers`, which is also that of the extra that it needs -> its class.
LOGGERS: dict[str, Callable[[], Logger]] = {"tensorboard": TensorBoard, "wandb": Wandb}


class Loggers:
    """The log of a run and the loggers beside it, as one. A context manager."""

    def __init__(self, log: Any, others: Iterable[Logger], session: Session):
        """`log` has `write`, `sync` and `close`; an error of its own is raised."""
        self._log = log
        self._name = session.name
        self._others: list[Logger] = []
        self._open = contextlib.ExitStack()  # each is closed, whatever the others do
        self._open.callback(log.close)
        try:
            for other in others:
                self._others.append(other)
                self._open.callback(self._close, other)
                self._call(other, "begin", session)
        except BaseException:  # a Ctrl-C while one of them waits for its server
            self.close()
            raise

    def write(self, record: Mapping[str, Any]) -> None:
        self._log.write(record)
        for other in tuple(self._others):
            self._call(other, "write", dict(record))

    def sync(self) -> None:
        self._log.sync()
        for other in tuple(self._others):
            self._call(other, "sync")

    def close(self) -> None:
        self._open.close()

    def _close(self, other: Logger) -> None:
        if any(one is other for one in self._others):
            self._call(other, "close")

    def __enter__(self) -> "Loggers":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _call(self, other: Logger, method: str, *args: Any) -> None:
        try:
            getattr(other, method)(*args)
        except Exception as error:
            self._others = [one for one in self._others if one is not other]
            logger.warning(
                "%s: logger %s failed in `%s` (%s: %s) and gets no more records; metrics.jsonl has all",
                *(self._name, type(other).__name__, method, type(error).__name__),
                " ".join(str(error).split()) or "no message",
            )
            if method != "close":
                self._abandon(other)

    def _abandon(self, other: Logger) -> None:
        """Closes a logger that has failed, which may fail again, or has nothing to close yet."""
        try:
            other.close()
        except Exception:
            logger.debug("it could not be closed either", exc_info=True)
