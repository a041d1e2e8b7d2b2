"""Checkpoints of a run: state, position in the data and clock as one unit. The only module that knows how
Orbax writes a run.

checkpoints/8/     the checkpoint of step 8, one Orbax checkpoint of the items
  model, ema       the network, and its moving average where there is one: each can be read alone
  trainer          the optimizer's state and what else a step reads
  progress         the position in the data, the clock, and whether an evaluation is still to be made
  manifest.json    size and checksum of every file; written last: with it the checkpoint is complete
checkpoints/damaged/    checkpoints that were found damaged or incomplete, as they were found

Orbax writes the files beside their final place while training goes on and renames them when they are
complete. Then the manifest is written, and only then older checkpoints are removed. So a process killed at
any moment leaves a complete checkpoint, and a file that a disk or a copy damages later is found by its
checksum. This order is why older checkpoints are removed here and not by Orbax's own `Checkpointer`: it
removes them before the manifest is there, and file by file, so that a process killed meanwhile would leave
what looks damaged.

Restored arrays go to the shardings that the caller asks for: the number of devices and of processes may
differ from those that wrote them.
"""

import contextlib
import hashlib
import itertools
import json
import logging
import os
import re
import shutil
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any, Final, NamedTuple

from orbax.checkpoint import v1 as ocp

from repopt_jax import jsontext
from repopt_jax.train.processes import gather_texts, in_all_processes, is_first
from repopt_jax.train.rundir import MANIFEST, os_errors, replace_file
from repopt_jax.train.state import TrainState, abstract

logger: Final = logging.getLogger(__name__)

_ITEMS = ("model", "trainer", "progress")  # those that every checkpoint has
_REMOVED = ".removed"  # suffix of a checkpoint that is being deleted


class Progress(NamedTuple):
    """What a checkpoint holds beside the state.

    Attributes:
      data: state of the iterator whose next batch is that of the step after; the same in every process.
      seconds: training time so far.
      evaluation_pending: whether the evaluation that belongs to this step is still to be made.
      devices: of the job that wrote it.
    """

    data: Any
    seconds: float
    evaluation_pending: bool = False
    devices: int | None = None


class Checkpoints:
    """The checkpoints of one run. A context manager."""

    def __init__(
        self,
        directory: str | Path,
        *,
        writing: bool = False,
        keep_last: int = 1,
        keep_best: int = 0,
        scores: Mapping[int, float] | None = None,
        completed: Callable[[int], None] = lambda step: None,
    ):
        """Opens `directory`, for the run that writes it or for reading.

        The writer makes it if it is missing, removes what an interrupted save left, and moves checkpoints
        that are incomplete or damaged aside, newest first, until it finds one that is whole; each is named in
        a warning. With several processes the first one does this for all. A reader skips them, with the same
        warning, and changes nothing.

        Args:
          directory: of the checkpoints.
          writing: whether this is the run that writes them.
          keep_last: how many of the newest scheduled checkpoints are kept.
          keep_best: and how many of those with the highest score.
          scores: step -> number, higher is better; may grow while the run goes on.
          completed: called in the first process with the step of each checkpoint that is complete.

        Raises:
          FileNotFoundError: reading, and the directory is missing.
          ValueError: writing, and no checkpoint can be used although there are some. Nothing is changed then.
          OSError: writing, and the directory cannot be read or written.
        """
        self.directory: Path = Path(directory).absolute()
        if not writing and not self.directory.is_dir():
            raise FileNotFoundError(f"{self.directory.parent} has no checkpoint yet: let the run train")
        self._writing, self._keep_last, self._keep_best = writing, keep_last, keep_best
        self._scores = {} if scores is None else scores
        self._completed = completed
        self._checked: dict[int, bool] = {}
        self._latest: int | None = None
        self._saving: Future | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._quiet = contextlib.ExitStack()
        if writing:
            with contextlib.ExitStack() as quiet:
                quiet.enter_context(_no_duplicate_tracebacks())
                self._latest = _of_first_process(self._open_for_writing)
                self._quiet = quiet.pop_all()

    @property
    def latest(self) -> int | None:
        """The step of the newest checkpoint that is whole, None if there is none."""
        return self._latest if self._writing else self._first_whole(sorted(self._complete(), reverse=True))

    @property
    def best(self) -> int | None:
        """The step of the checkpoint with the highest score of those that are whole, None if none has a
        score."""
        scored = [step for step in self._complete() if step in self._scores]
        return self._first_whole(sorted(scored, key=lambda step: (self._scores[step], step), reverse=True))

    def find(self, asked: str | int) -> int:
        """The step that "latest", "best" or a number of steps means.

        Raises:
          FileNotFoundError: there is no such checkpoint, or it is damaged.
          ValueError: `asked` is something else.
        """
        if asked in ("latest", "best"):
            if (step := getattr(self, str(asked))) is None:
                raise FileNotFoundError(self._why_none(best=asked == "best"))
            return step
        if not _NUMBER.fullmatch(str(asked)):
            raise ValueError(f"`checkpoint`={asked!r} must be latest, best or the number of a step")
        step, steps = int(asked), sorted(self._complete())
        if step not in steps:
            raise FileNotFoundError(
                f"{self.directory.parent} has no checkpoint of step {step}; there are "
                f"{', '.join(map(str, steps)) or 'none'}"
            )
        if not self._is_whole(step):
            raise FileNotFoundError(f"the checkpoint of step {step} in {self.directory} is damaged")
        return step

    def _why_none(self, *, best: bool) -> str:
        run, complete = self.directory.parent, sorted(self._complete())
        scored = [step for step in complete if step in self._scores]
        among = scored if best and scored else complete
        if among and self._first_whole(among) is None:
            with_score = "that were evaluated " if among != complete else ""
            return (
                f"the checkpoints of {run} {with_score}(steps {', '.join(map(str, among))}) are all damaged, "
                "see the warnings above: put a copy of one of them in its place"
            )
        lacks = "has an evaluation at its step" if best and complete else "has been written yet"
        return f"{run} has no checkpoint that is whole and {lacks}: let it train"

    def save(
        self, step: int, state: TrainState, progress: Progress, *, scheduled: bool = True, wait: bool = False
    ) -> None:
        """Starts to write one checkpoint, after the one before is complete. When this returns, the state may
        be donated: nothing reads its buffers any more.

        Args:
          step: its number.
          state: the state after `step` steps.
          progress: what belongs to it.
          scheduled: False for an extra checkpoint, written only because the run is stopping; it is removed at
            the next one.
          wait: return when it is complete.

        Raises:
          OSError: it cannot be written; or the one before could not.
        """
        self.wait()
        with os_errors(f"write the checkpoint of step {step}"), _progress_as_json():
            # Where no folder can be made, Orbax would leave its own tasks unfinished.
            tempfile.TemporaryFile(dir=self.directory).close()
            response = ocp.save_checkpointables_async(str(self._folder(step)), _items(state, progress))
        self._saving = self._thread.submit(self._finalize, step, scheduled, response)
        if wait:
            self.wait()

    def check(self) -> None:
        """Raises the error of a save that failed meanwhile; does not wait."""
        if self._saving is not None and self._saving.done():
            self.wait()

    def wait(self) -> None:
        """Waits until the last save is complete.

        Raises:
          OSError: it could not be written. Raised once.
        """
        saving, self._saving = self._saving, None
        if saving is not None:
            self._latest = saving.result()

    def remove_old(self) -> None:
        """Removes the checkpoints that are no longer to be kept once the newest has a score, which a run that
        goes on may give it late. The first process does this for all."""
        self.wait()
        if is_first():
            self._remove_old()

    def restore(self, state: TrainState) -> tuple[TrainState, Progress]:
        """Reads the newest checkpoint.

        Args:
          state: its shapes, dtypes and shardings are those to restore to; its values are not used.
        """
        loaded = self._load(self.latest, _items(abstract(state), None))
        fields = {**loaded["model"], "ema": loaded.get("ema", {}), **loaded["trainer"]}
        return TrainState(**fields), Progress(**loaded["progress"])

    def load_network(self, params: Any, non_trainable: Any, *, step: int | None = None) -> tuple[Any, Any]:
        """Reads the network alone: its moving average where there is one, else what was trained.

        Args:
          params, non_trainable: their shapes, dtypes and shardings are those to read to.
          step: of the checkpoint, as `find` gives it; the newest when None.
        """
        step = self.latest if step is None else step
        item = "ema" if step is not None and (self._folder(step) / "ema").is_dir() else "model"
        target = abstract({"params": params, "non_trainable": non_trainable})
        loaded = self._load(step, {item: target})[item]
        return loaded["params"], loaded["non_trainable"]

    def close(self) -> None:
        """Waits for the last save; does not raise its error."""
        self._thread.shutdown(wait=True)
        self._quiet.close()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type[BaseException] | None, *exc: object) -> None:
        try:
            if kind is None:
                self.wait()
        finally:
            self.close()

    def _finalize(self, step: int, scheduled: bool, response: Any) -> int:
        """In the thread: waits for the files, writes the manifest, and removes older checkpoints."""
        with os_errors(f"write the checkpoint of step {step}"):
            response.result()
            if is_first():
                write_manifest(self._folder(step), scheduled=scheduled)
                self._completed(step)
                self._remove_old()
        return step

    def _remove_old(self) -> None:
        # One whose manifest is damaged counts as scheduled.
        scheduled = {s: read_manifest(self._folder(s)).get("scheduled", True) for s in self._complete()}
        keep = kept(scheduled, self._scores, last=self._keep_last, best=self._keep_best)
        for step in set(scheduled) - keep:
            folder = self._folder(step)
            # Renamed first: killed in the middle, it leaves nothing that looks like a damaged checkpoint.
            removed = folder.with_name(folder.name + _REMOVED)
            try:
                folder.replace(removed)
            except OSError as error:
                logger.warning("cannot remove the old checkpoint %s: %s", folder, error.strerror or error)
            shutil.rmtree(removed, ignore_errors=True)

    def _open_for_writing(self) -> int | None:
        """Moves what cannot be used aside and removes leftovers; returns the step to go on from."""
        self.directory.mkdir(parents=True, exist_ok=True)
        problems: dict[int, str] = {}
        newest = None
        for step in sorted({*self._numbered(), *self._files()}, reverse=True):
            if (problem := manifest_problem(self._folder(step))) is None:
                newest = step
                break
            problems[step] = problem
        # If the first save of a run was killed, and only then, there is nothing to lose.
        first_save = len(problems) == 1 and not self._complete() and not self._files()
        if problems and newest is None and not first_save:
            found = "; ".join(f"step {step}: {problem}" for step, problem in problems.items())
            raise ValueError(
                f"no checkpoint in {self.directory} can be used ({found}). Nothing was changed. Put a copy "
                "of one of them in its place, or train from the beginning in another `out_dir`"
            )
        for step, problem in problems.items():
            logger.warning(
                "the checkpoint of step %d in %s cannot be used: %s. It was moved to %s; the run goes on "
                "from %s",
                *(step, self.directory, problem, self._move_aside(step)),
                "its beginning" if newest is None else f"the checkpoint of step {newest}",
            )
        self._remove_leftovers()
        if newest is not None:
            self._remove_old()
        return newest

    def _move_aside(self, step: int) -> Path:
        folders = map(self.directory.joinpath, _numbered_names("damaged"))
        folder = next(path for path in folders if path.is_dir() or not path.exists())
        folder.mkdir(exist_ok=True)
        places = map(folder.joinpath, _numbered_names(str(step)))
        return self._folder(step).rename(next(path for path in places if not path.exists()))

    def _remove_leftovers(self) -> None:
        """Removes the files of a save or of a removal that was interrupted."""
        for path in self.directory.iterdir():
            interrupted = re.fullmatch(r"(\d+)\.orbax-checkpoint-tmp.*", path.name)
            if interrupted:
                logger.warning(
                    "a save of step %s was interrupted; its unfinished files are removed", interrupted[1]
                )
            if interrupted or path.name.endswith(_REMOVED):
                shutil.rmtree(path, ignore_errors=True)

    def _load(self, step: int | None, items: dict[str, Any]) -> dict[str, Any]:
        if step is None:
            raise FileNotFoundError(f"{self.directory} holds no checkpoint that is whole")
        with _progress_as_json():
            return ocp.load_checkpointables(str(self._folder(step)), items)

    def _folder(self, step: int) -> Path:
        return self.directory / str(step)

    def _numbered(self) -> list[int]:
        """Steps of the folders that are named as `_folder` names them; 030 is nobody's."""
        return [step for step in self._names() if self._folder(step).is_dir()]

    def _files(self) -> list[int]:
        """Steps for whose folder there is a file."""
        return [step for step in self._names() if not self._folder(step).is_dir()]

    def _names(self) -> list[int]:
        return [int(path.name) for path in self.directory.iterdir() if _NUMBER.fullmatch(path.name)]

    def _complete(self) -> list[int]:
        """Steps of the checkpoints that were written to their end, damaged since or not."""
        return [step for step in self._numbered() if (self._folder(step) / MANIFEST).is_file()]

    def _first_whole(self, steps: list[int]) -> int | None:
        return next((step for step in steps if self._is_whole(step)), None)

    def _is_whole(self, step: int) -> bool:
        if step not in self._checked:
            problem = manifest_problem(self._folder(step))
            self._checked[step] = problem is None
            # Where there is no folder any more, the run that writes here has removed it.
            if problem is not None and self._folder(step).is_dir():
                logger.warning(
                    "the checkpoint of step %d in %s is skipped: %s", step, self.directory, problem
                )
        return self._checked[step]


def kept(scheduled: Mapping[int, bool], scores: Mapping[int, float], *, last: int, best: int) -> set[int]:
    """Which checkpoints are kept: of the scheduled ones the `last` newest and the `best` with the highest
    scores (the later of equals), and the newest of all.

    Of the scheduled ones, this gives the same set at the end of a run wherever the run was interrupted.
    """
    regular = sorted(step for step in scheduled if scheduled[step])
    scored = sorted((s for s in regular if s in scores), key=lambda s: (scores[s], s), reverse=True)
    return {*regular[-last:], *scored[:best], *sorted(scheduled)[-1:]}


def _numbered_names(name: str) -> Iterator[str]:
    """name, name-2, name-3 and so on."""
    yield name
    yield from (f"{name}-{number}" for number in itertools.count(2))


def _items(state: TrainState, progress: Progress | None) -> dict[str, Any]:
    """The items of a checkpoint. What JSON keeps is asked for as None."""
    fields = state._asdict()
    items = {"model": {name: fields.pop(name) for name in ("params", "non_trainable")}}
    if ema := fields.pop("ema"):
        items["ema"] = ema
    return {**items, "trainer": fields, "progress": progress and progress._asdict()}


def _progress_as_json() -> ocp.Context:
    registry = ocp.handlers.local_registry()
    registry.add(ocp.handlers.JsonHandler, checkpointable_name="progress")
    context = ocp.Context()
    context.checkpointables.registry = registry
    return context


def _of_first_process(decide: Callable[[], int | None]) -> int | None:
    """What the first process decides, in every process; its error is raised in all."""
    found = in_all_processes("open the checkpoints", lambda: decide() if is_first() else None)
    first = gather_texts("" if found is None else str(found))[0]
    return int(first) if first else None


# -- the manifest of a folder: size and checksum of every file in it


def write_manifest(folder: Path, **notes: Any) -> None:
    """Writes the manifest of all files in `folder`, with `notes`.

    Raises:
      OSError: a file cannot be read, or the manifest not be written.
    """
    files = {
        name: {"bytes": (folder / name).stat().st_size, "blake2b": _checksum(folder / name)}
        for name in _files_in(folder)
    }
    replace_file(folder / MANIFEST, json.dumps({**notes, "files": files}, indent=1))


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of `folder`; empty if it is missing or damaged."""
    with contextlib.suppress(OSError, ValueError):
        values = jsontext.parse((folder / MANIFEST).read_text(encoding="utf-8"), MANIFEST)
        if isinstance(values, dict) and _are_files(values.get("files")):
            return values
    return {}


def _are_files(files: Any) -> bool:
    """Whether this is what `write_manifest` makes of files: names inside the folder, sizes, checksums."""
    return isinstance(files, dict) and all(
        isinstance(entry, dict)
        and type(entry.get("bytes")) is int
        and isinstance(entry.get("blake2b"), str)
        and not PurePosixPath(name).is_absolute()
        and ".." not in PurePosixPath(name).parts
        for name, entry in files.items()
    )


def manifest_problem(folder: Path) -> str | None:
    """What is wrong with a checkpoint according to its manifest, None if nothing is. Reads every file."""
    try:
        if not folder.is_dir():
            return "it is a file, where a folder should be"
        if not (folder / MANIFEST).is_file():
            return f"its {MANIFEST} is missing: it was not written to the end"
    except OSError as error:
        return f"it cannot be read: {error.strerror or error}"
    if not (manifest := read_manifest(folder)):
        return f"its {MANIFEST} cannot be read"
    for name, expected in manifest["files"].items():
        path = folder / name
        try:
            if (size := path.stat().st_size) != expected["bytes"]:
                return f"its file {name} has {size} bytes, not {expected['bytes']}"
            if _checksum(path) != expected["blake2b"]:
                return f"its file {name} does not hold what was written to it"
        except FileNotFoundError:
            return f"its file {name} is missing"
        except (OSError, ValueError) as error:  # ValueError: a name with a null character
            reason = getattr(error, "strerror", None) or error
            return f"its file {name} cannot be read: {reason}"
    listed = manifest["files"].keys()
    # Hidden ones an operating system or a network file system may have added.
    extra = (name for name in _files_in(folder) if name not in listed)
    if unlisted := [name for name in extra if not PurePosixPath(name).name.startswith(".")]:
        return f"its {MANIFEST} leaves {len(unlisted)} files out, the first of them {unlisted[0]}"
    if lacking := [item for item in _ITEMS if not any(name.startswith(f"{item}/") for name in listed)]:
        return f"its {MANIFEST} has no file of {', '.join(lacking)}"
    return None


def _files_in(folder: Path) -> list[str]:
    """The files of a checkpoint but its manifest, relative to its folder, in order."""
    found = []
    for place, _, names in os.walk(folder):
        relative = Path(place).relative_to(folder)
        found += [(relative / n).as_posix() for n in names if not n.startswith(MANIFEST)]
    return sorted(found)


_NUMBER = re.compile(r"0|[1-9][0-9]*")


def _checksum(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


@contextlib.contextmanager
def _no_duplicate_tracebacks() -> Iterator[None]:
    """Silences the duplicate tracebacks that Orbax logs and TensorStore prints when a save fails: the error
    is still raised, once."""

    def is_no_duplicate(record: logging.LogRecord) -> bool:
        return "_SignalingThread.run() raised an exception" not in str(record.msg)

    def print_others(unraisable: Any) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            before(unraisable)

    log, before = logging.getLogger("absl"), sys.unraisablehook
    log.addFilter(is_no_duplicate)
    sys.unraisablehook = print_others
    try:
        yield
    finally:
        for thread in threading.enumerate():
            if type(thread).__name__ == "_SignalingThread":
                threading.Thread.join(thread)  # its own `join` raises the error again
        if sys.unraisablehook is print_others:
            sys.unraisablehook = before
        log.removeFilter(is_no_duplicate)
