"""Checkpoints of a run: state, position in the data and clock as one unit. The only module that knows
how Orbax writes a run.

checkpoints/8/                the checkpoint of step 8, one Orbax checkpoint of the items
  model, ema                  the network, and its moving average where there is one: read without the rest
  trainer                     the optimizer's state and what else a step reads
  progress                    where the data are, the clock, and what is still owed
  manifest.json               written last: from now on it counts
checkpoints/damaged/          what was found damaged or half-written, as it was found

Files are written beside their final place while training goes on, renamed when they are complete, and
counted when their manifest is there; only then older checkpoints go. So a process killed at any moment
leaves one that is whole, and a file that is damaged later is found by its checksum. What is restored goes to
the shardings that the caller asks for: the number of devices and of processes may be another one.
"""

import contextlib
import logging
import re
import shutil
import tempfile
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
from orbax.checkpoint import v1 as ocp

from repopt_jax.train import manifest
from repopt_jax.train.processes import exchange, is_first, together
from repopt_jax.train.save_errors import one_sentence, told_by_raising_only
from repopt_jax.train.state import TrainState

logger = logging.getLogger(__name__)

DAMAGED = "damaged"
_REMOVED = ".removed"  # suffix of what is being deleted


class Progress(NamedTuple):
    """What a checkpoint holds beside the state.

    Attributes:
      data: state of the iterator whose next batch is that of the step after; the same in every process.
      seconds: training time so far.
      owed: whether the evaluation that belongs to this step is still to be made.
      devices: of the job that wrote it; None where an earlier version did.
    """

    data: Any
    seconds: float
    owed: bool = False
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
    ):
        """Opens `directory`, for the run that writes it or for reading.

        The writer makes it if it is missing, removes what an interrupted save left, and moves checkpoints
        that are half-written or damaged aside, newest first, until it finds one that is whole; each is named
        in a warning. With several processes the first one does this and tells the others. A reader passes
        them over, with the same warning, and changes nothing.

        Args:
          directory: of the checkpoints.
          writing: whether this is the run that writes them.
          keep_last: of those saved with `due`, how many of the newest stay.
          keep_best: and how many of those with the highest score.
          scores: step -> number, higher is better; may grow while the run goes on.

        Raises:
          FileNotFoundError: reading, and the directory is missing.
          ValueError: writing, and no checkpoint can be used although there are some. Nothing is changed then.
          OSError: writing, and the directory cannot be read or written.
        """
        self.directory = Path(directory).absolute()
        if not writing and not self.directory.is_dir():
            raise FileNotFoundError(f"{self.directory.parent} has no checkpoint yet: let the run train")
        self._writing = writing
        self._keep_last, self._keep_best = keep_last, keep_best
        self._scores = {} if scores is None else scores
        self._whole: dict[int, bool] = {}
        self._latest: int | None = None
        self._saving: Future | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._quiet = contextlib.ExitStack()
        if writing:
            with contextlib.ExitStack() as quiet:
                quiet.enter_context(told_by_raising_only())
                self._latest = _agreed(self._open_for_writing)
                self._quiet = quiet.pop_all()

    @property
    def latest(self) -> int | None:
        """The step of the newest checkpoint that is whole, None if there is none."""
        return self._latest if self._writing else self._first_whole(sorted(self._steps(), reverse=True))

    @property
    def best(self) -> int | None:
        """The step of the checkpoint with the highest score of those that are whole, None if none has a
        score."""
        scored = [step for step in self._steps() if step in self._scores]
        return self._first_whole(sorted(scored, key=self._rank, reverse=True))

    def find(self, asked: str | int) -> int:
        """The step that "latest", "best" or a number of steps means.

        Raises:
          FileNotFoundError: there is no such checkpoint, or it is damaged.
          ValueError: `asked` is something else.
        """
        if asked in ("latest", "best"):
            if (step := getattr(self, str(asked))) is None:
                why = "an evaluation at its step" if asked == "best" and self._steps() else "been written yet"
                raise FileNotFoundError(
                    f"{self.directory.parent} has no checkpoint that is whole and has {why}: let it train"
                )
            return step
        if not str(asked).isdecimal():
            raise ValueError(f"`checkpoint`={asked!r} must be latest, best or the number of a step")
        step, steps = int(asked), sorted(self._steps())
        if step not in steps:
            there = ", ".join(map(str, steps)) or "none"
            raise FileNotFoundError(
                f"{self.directory.parent} has no checkpoint of step {step}; there are {there}"
            )
        if not self._is_whole(step):
            raise FileNotFoundError(f"the checkpoint of step {step} in {self.directory} is damaged")
        return step

    def save(
        self, step: int, state: TrainState, progress: Progress, *, due: bool = True, wait: bool = False
    ) -> None:
        """Starts to write one checkpoint, after the one before is complete. When this returns, the state may
        be given away: nothing reads its buffers any more.

        Args:
          step: its number.
          state: the state after `step` steps.
          progress: what belongs to it.
          due: False for a checkpoint that an unbroken run would not have; it stays until the next one.
          wait: return when it is complete.

        Raises:
          OSError: it cannot be written; or the one before could not.
        """
        self.wait()
        folder = self.directory / str(step)
        with one_sentence(step), _items_of_json():
            # Where no folder can be made, Orbax would leave its own work lying about, unfinished.
            tempfile.TemporaryFile(dir=self.directory).close()
            response = ocp.save_checkpointables_async(str(folder), _items(state, progress))
        self._saving = self._thread.submit(self._complete, step, due, response)
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

    def restore(self, state: TrainState) -> tuple[TrainState, Progress]:
        """Reads the newest checkpoint.

        Args:
          state: says which shapes, dtypes and shardings to restore to; its values are not used.
        """
        items = _items(jax.tree.map(_abstract, state), None)
        loaded = self._load(self.latest, items)
        fields = {**loaded["model"], "ema": loaded.get("ema", {}), **loaded["trainer"]}
        return TrainState(**fields), Progress(**loaded["progress"])

    def load_network(self, params: Any, rest: Any, *, step: int | None = None) -> tuple[Any, Any]:
        """The network alone: its moving average where there is one, else what was trained.

        Args:
          params, rest: say which shapes, dtypes and shardings to read to.
          step: of the checkpoint, as `find` gives it; the newest when None.
        """
        step = self.latest if step is None else step
        item = "ema" if (self.directory / str(step) / "ema").is_dir() else "model"
        target = jax.tree.map(_abstract, {"params": params, "rest": rest})
        loaded = self._load(step, {item: target})[item]
        return loaded["params"], loaded["rest"]

    def close(self) -> None:
        """Waits for the last save, without telling whether it failed."""
        self._thread.shutdown(wait=True)
        self._quiet.close()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        try:
            if kind is None:
                self.wait()
        finally:
            self.close()

    # -- writing

    def _complete(self, step: int, due: bool, response: Any) -> int:
        """In the thread: waits for the files, makes them count, and lets older ones go."""
        with one_sentence(step):
            response.result()
            if is_first():
                manifest.write(self.directory / str(step), step=step, due=due)
                self._remove_others()
        return step

    def _remove_others(self) -> None:
        due = {step: manifest.notes(self.directory / str(step)).get("due", True) for step in self._steps()}
        for step in set(due) - kept(due, self._scores, last=self._keep_last, best=self._keep_best):
            folder = self.directory / str(step)
            # Renamed first: killed in the middle, it leaves nothing that looks like a damaged checkpoint.
            doomed = folder.with_name(folder.name + _REMOVED)
            try:
                folder.replace(doomed)
            except OSError as error:
                logger.warning("cannot remove the old checkpoint %s: %s", folder, error.strerror or error)
            shutil.rmtree(doomed, ignore_errors=True)

    def _open_for_writing(self) -> int | None:
        """Puts the folder in order; the step to go on from."""
        self.directory.mkdir(parents=True, exist_ok=True)
        numbered = self._numbered()
        wrong: dict[int, str] = {}
        newest = None
        for step in sorted(numbered, reverse=True):
            if (found := self._problem(step)) is None:
                newest = step
                break
            wrong[step] = found
        # The first save of a run may have been killed: then, and only then, is there nothing to lose.
        first_save = len(wrong) == 1 and not any(self._counted(s) or self._earlier(s) for s in wrong)
        if wrong and newest is None and not first_save:
            raise ValueError(_unusable(self.directory, wrong))
        for step, found in wrong.items():
            aside = self._move_aside(step)
            logger.warning(
                "the checkpoint of step %d in %s cannot be used: %s. It was moved to %s; the run goes on "
                "from %s",
                *(step, self.directory, found, aside),
                "its beginning" if newest is None else f"the checkpoint of step {newest}",
            )
        self._clear_leftovers()
        if newest is not None:
            self._remove_others()
        return newest

    def _move_aside(self, step: int) -> Path:
        folder = self.directory / DAMAGED
        folder.mkdir(exist_ok=True)
        names = (f"{step}{again}" for again in ("", *(f"-{n}" for n in range(2, 10**6))))
        aside = next(folder / name for name in names if not (folder / name).exists())
        (self.directory / str(step)).rename(aside)
        return aside

    def _clear_leftovers(self) -> None:
        """Removes what is no checkpoint: files of a save, or of a removal, that was interrupted."""
        for path in self.directory.iterdir():
            if re.fullmatch(r"\d+\.orbax-checkpoint-tmp.*", path.name):
                step = path.name.partition(".")[0]
                logger.warning("a save of step %s was interrupted; its unfinished files are removed", step)
                shutil.rmtree(path, ignore_errors=True)
            elif path.name.endswith(_REMOVED):
                shutil.rmtree(path, ignore_errors=True)

    # -- reading

    def _load(self, step: int | None, items: dict[str, Any]) -> dict[str, Any]:
        if step is None:
            raise FileNotFoundError(f"{self.directory} holds no checkpoint that is whole")
        with _items_of_json():
            return ocp.load_checkpointables(str(self.directory / str(step)), items)

    def _numbered(self) -> list[int]:
        return [int(p.name) for p in self.directory.iterdir() if p.name.isdecimal() and p.is_dir()]

    def _steps(self) -> list[int]:
        """Of the checkpoints that count, whole or not."""
        return [step for step in self._numbered() if self._counted(step)]

    def _counted(self, step: int) -> bool:
        return manifest.written(self.directory / str(step)) or (not self._writing and self._earlier(step))

    def _earlier(self, step: int) -> bool:
        """Whether a version without manifests wrote it: there the renaming alone made it count, and where the
        data were was an item of its own."""
        folder = self.directory / str(step)
        return not (folder / "progress").exists() and (folder / "clock").is_dir()

    def _problem(self, step: int) -> str | None:
        folder = self.directory / str(step)
        if not manifest.written(folder) and self._earlier(step):
            if not self._writing:
                return None
            return "an earlier version wrote it, which kept other things; its network can be read"
        return manifest.problem(folder)

    def _first_whole(self, steps: list[int]) -> int | None:
        return next((step for step in steps if self._is_whole(step)), None)

    def _is_whole(self, step: int) -> bool:
        if step not in self._whole:
            found = self._problem(step)
            self._whole[step] = found is None
            # Where it is gone, the run that writes here has removed it.
            if found is not None and (self.directory / str(step)).is_dir():
                logger.warning(
                    "the checkpoint of step %d in %s is passed over: %s", step, self.directory, found
                )
        return self._whole[step]

    def _rank(self, step: int) -> tuple[float, int]:
        return self._scores[step], step


def kept(due: Mapping[int, bool], scores: Mapping[int, float], *, last: int, best: int) -> set[int]:
    """Which checkpoints stay: of those that were `due` the `last` newest and the `best` highest (the later of
    equals), and the newest of all.

    Of the due ones, this gives the same set at the end of a run wherever the run was broken.
    """
    regular = sorted(step for step in due if due[step])
    scored = sorted((s for s in regular if s in scores), key=lambda s: (scores[s], s), reverse=True)
    return {*regular[-last:], *scored[:best], *sorted(due)[-1:]}


def _items(state: TrainState, progress: Progress | None) -> dict[str, Any]:
    """The items of a checkpoint. What JSON keeps is asked for as None."""
    fields = state._asdict()
    items = {"model": {name: fields.pop(name) for name in ("params", "rest")}}
    if ema := fields.pop("ema"):
        items["ema"] = ema
    return {**items, "trainer": fields, "progress": progress and progress._asdict()}


def _items_of_json() -> ocp.Context:
    registry = ocp.handlers.local_registry()
    registry.add(ocp.handlers.JsonHandler, checkpointable_name="progress")
    context = ocp.Context()
    context.checkpointables.registry = registry
    return context


def _unusable(directory: Path, wrong: Mapping[int, str]) -> str:
    found = "; ".join(f"step {step}: {why}" for step, why in wrong.items())
    return (
        f"no checkpoint in {directory} can be used ({found}). Nothing was changed. Put a copy of one of them "
        "in its place, or train from the beginning in another `out_dir`"
    )


def _agreed(decide: Callable[[], int | None]) -> int | None:
    """What the first process decides, in every process; its error is raised in all."""
    found = together("open the checkpoints", lambda: decide() if is_first() else None)
    first = exchange("" if found is None else str(found))[0]
    return int(first) if first else None


def _abstract(leaf: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)
