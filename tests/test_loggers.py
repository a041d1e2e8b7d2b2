"""Loggers beside a run's own log: they get every record, go on with the run, and never lose a training."""

import json
import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from training import assert_same_run, killed_config, stop_after_step, tiny_config, warned

from repopt_jax import train
from repopt_jax.train import loggers, loop
from repopt_jax.train.checkpoint import Checkpoints
from repopt_jax.train.loggers import Session, TensorBoard, numbers
from repopt_jax.train.rundir import read_records

pytestmark = pytest.mark.once

ROOT = Path(__file__).parents[1]


class Own:
    """A logger of a user's own, which remembers what it is told; `failing` is a method that raises."""

    def __init__(self, failing=""):
        self.failing, self.calls, self.records = failing, [], []

    def _called(self, method, note=None):
        self.calls.append((method, note) if note is not None else method)
        if method == self.failing:
            raise RuntimeError("no\nluck")

    def begin(self, session):
        self.session = session
        self._called("begin")

    def write(self, record):
        self._called("write", record["step"])
        self.records.append(dict(record))

    def sync(self):
        self._called("sync")

    def close(self):
        self._called("close")


@pytest.fixture(scope="module")
def unbroken(digits, tmp_path_factory):
    """A run without loggers."""
    folder = tmp_path_factory.mktemp("unbroken") / "run"
    train.run(killed_config(digits), folder, progress=False)
    return folder


def without_time(records):
    return [{name: value for name, value in record.items() if name != "time"} for record in records]


def logged(run_dir):
    return without_time(read_records(Path(run_dir) / "metrics.jsonl"))


# -- what they are told


def test_a_logger_of_your_own_gets_every_record(digits, tmp_path, unbroken, monkeypatch):
    own, out = Own(), tmp_path / "run"
    save = Checkpoints.save
    monkeypatch.setattr(
        Checkpoints,
        "save",
        lambda self, step, *a, **k: own._called("save", step) or save(self, step, *a, **k),
    )
    train.run(killed_config(digits), out, progress=False, loggers=[own])
    assert_same_run(out, unbroken)
    assert own.records == logged(out)
    assert own.session.directory == out
    assert (own.session.name, own.session.step) == ("tiny", None)
    assert own.session.config["optim"]["ema"] == 0.9
    assert (own.calls[0], own.calls[-1]) == ("begin", "close")
    saves = [index for index, call in enumerate(own.calls) if call[0] == "save"]
    assert len(saves) == 5
    assert all(own.calls[index - 1] == "sync" for index in saves)
    again = Own()
    assert train.run(killed_config(digits), out, progress=False, loggers=[again]).reused
    assert again.calls == []


def test_what_a_logger_does_with_a_record_changes_nothing(tmp_path):
    class Clearing(Own):
        def write(self, record):
            record.clear()

    good, record = Own(), {"kind": "train", "step": 1, "loss": 1.0}
    with loggers.Loggers(Own(), [Clearing(), good], Session(tmp_path, "tiny")) as all_of_them:
        all_of_them.write(record)
    assert good.records == [record]
    assert record["loss"] == 1.0


def test_only_the_first_process_has_loggers(digits, tmp_path, monkeypatch):
    own = Own()
    monkeypatch.setattr(loop, "is_first", lambda: False)
    train.run(tiny_config("plain", digits, epochs=1), tmp_path / "run", progress=False, loggers=[own])
    assert own.calls == []


# -- when they fail


@pytest.mark.parametrize("method", ["begin", "write", "sync", "close"])
def test_one_that_fails_is_named_once_and_left_out(tmp_path, caplog, method):
    log, bad, good = Own(), Own(failing=method), Own()
    records = [{"kind": "train", "step": step, "loss": 1.0} for step in range(3)]
    with loggers.Loggers(log, [bad, good], Session(tmp_path, "tiny")) as all_of_them:
        for record in records:
            all_of_them.write(dict(record))
            all_of_them.sync()
    assert log.records == good.records == records
    assert good.calls[1:] == log.calls
    (warning,) = warned(caplog)
    assert warning == (
        f"tiny: logger Own failed in `{method}` (RuntimeError: no luck) and gets no more records; "
        "metrics.jsonl has all"
    )
    names = [call if isinstance(call, str) else call[0] for call in bad.calls]
    assert names.count(method) == 1
    # Closed, and told nothing after that.
    assert names[-2:] == {"close": ["sync", "close"]}.get(method, [method, "close"])


def test_the_log_itself_is_not_left_out(tmp_path):
    """An error of its own is raised, before others get the record, and all are closed."""

    class Full(Own):
        def write(self, record):
            raise OSError(28, "No space left on device")

    log, own = Full(), Own()
    with (
        pytest.raises(OSError, match="No space left"),
        loggers.Loggers(log, [own], Session(tmp_path, "tiny")) as both,
    ):
        both.write({"kind": "train", "step": 1})
    assert own.calls == ["begin", "close"]
    assert log.calls == ["close"]


def test_an_interruption_is_not_taken_for_a_failure(digits, tmp_path):
    class Interrupted(Own):
        def write(self, record):
            raise KeyboardInterrupt

    own = Interrupted()
    with pytest.raises(KeyboardInterrupt):
        train.run(tiny_config("plain", digits), tmp_path / "run", progress=False, loggers=[own])
    assert own.calls[-1] == "close"


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        (
            {"loggers": ("wanb",)},
            ["`loggers`='wanb' must be one of tensorboard, wandb (did you mean 'wandb'?)"],
        ),
        ({"loggers": "wandb"}, ["`loggers`='wandb' must hold texts"]),
        ({"loggers": ("wandb",)}, ["`loggers`=('wandb',) needs wandb: install `repopt_jax[wandb]`"]),
        ({"loggers": ("tensorboard", "wandb")}, ["needs tensorboardX", "needs wandb"]),
        ({"tensorboard": True}, ["`tensorboard`=True needs tensorboardX: install `repopt_jax[tensorboard]`"]),
    ],
)
def test_loggers_that_cannot_be(digits, monkeypatch, changes, parts):
    for package in ("tensorboardX", "wandb"):
        monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ValueError, match="this config cannot run") as error:
        train.validate(tiny_config("plain", digits, **changes))
    for part in parts:
        assert part in str(error.value)


def test_names_of_numbers():
    record = {"kind": "scales", "step": 3, "epoch": 0.5, "note": "no number", "none": None}
    record["layers"] = {"stages/0/conv": {"3x3": {"mean": 1.0, "negative": 2}}}
    assert numbers(record) == {
        "scales/epoch": 0.5,
        "scales/layers/stages/0/conv/3x3/mean": 1.0,
        "scales/layers/stages/0/conv/3x3/negative": 2,
    }


# -- TensorBoard


def events(folder):
    """The events of the files of a folder, in the order of the files' names."""
    from tensorboardX.proto import event_pb2

    for path in sorted((folder / "tensorboard").iterdir(), key=lambda p: int(p.name.rpartition(".")[2])):
        content, at = path.read_bytes(), 0
        while at < len(content):  # length, its checksum, the event, its checksum
            (length,) = struct.unpack_from("<Q", content, at)
            event = event_pb2.Event()
            event.ParseFromString(content[at + 12 : at + 12 + length])
            yield event
            at += 16 + length


@pytest.fixture(scope="module")
def stopped(digits, tmp_path_factory):
    """A run with TensorBoard, stopped after step 9 and gone on with; and a logger of our own of each part."""
    pytest.importorskip("tensorboardX")
    out, own = tmp_path_factory.mktemp("stopped") / "run", [Own(), Own()]
    config = killed_config(digits, tensorboard=True, loggers=("tensorboard",))
    train.run(config, out, progress=False, stop=stop_after_step(9), loggers=own[:1])
    train.run(config, out, progress=False, loggers=own[1:])
    return out, *own


def test_a_run_that_goes_on_says_where(stopped, unbroken):
    out, first, second = stopped
    assert_same_run(out, unbroken)
    assert first.calls[-1] == "close"
    assert second.session.step == 9
    assert first.records + second.records == logged(out)
    assert {record["step"] > 9 for record in second.records} == {True}


def test_tensorboard_has_the_numbers_of_the_log(stopped):
    out, *_ = stopped
    found = list(events(out))
    starts = [event.step for event in found if event.HasField("session_log")]
    assert starts == [10]
    written = [
        (event.step, {value.tag: value.simple_value for value in event.summary.value})
        for event in found
        if event.HasField("summary")
    ]
    expected = [(record["step"], numbers(record)) for record in logged(out)]
    assert len(written) == len(expected) > 10
    for (step, values), (wanted_step, wanted) in zip(written, expected):
        assert step == wanted_step
        assert values == {name: float(np.float32(value)) for name, value in wanted.items()}


def test_a_disk_that_is_full_ends_tensorboard_and_not_the_others(tmp_path, caplog):
    """The records of a run; that a run goes on without a logger is below."""
    pytest.importorskip("tensorboardX")
    log, board = Own(), TensorBoard()
    records = [{"kind": "train", "step": step, "loss": 1.0} for step in (3, 6, 9, 12)]
    with loggers.Loggers(log, [board], Session(tmp_path, "tiny")) as both:
        for record in records:
            if record["step"] == 9:
                board._file._writer.close()
                board._file._writer = open("/dev/full", "wb")  # noqa: SIM115
            both.write(dict(record))
            both.sync()
    assert log.records == records
    (warning,) = warned(caplog)
    assert "logger TensorBoard failed in `write` (OSError: [Errno 28] No space left on device)" in warning
    steps = [event.step for event in events(tmp_path) if event.HasField("summary")]
    assert steps == [3, 6]


def test_a_loop_of_your_own_can_use_it(tmp_path):
    pytest.importorskip("tensorboardX")
    for step in (None, 2):
        board = TensorBoard()
        board.begin(Session(tmp_path / "mine", "mine", step=step))
        for number in (1, 2) if step is None else (3,):
            board.write({"kind": "train", "step": number, "loss": 0.5 / number})
        board.close()
    found = [event for event in events(tmp_path / "mine") if event.HasField("summary")]
    assert [(event.step, event.summary.value[0].simple_value) for event in found] == [
        *((1, 0.5), (2, 0.25), (3, float(np.float32(0.5 / 3))))
    ]


# -- Weights & Biases


def environment(folder, **settings):
    """Of a process of its own: nothing of the user's is read or written, and nothing is sent."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    home = {name: str(folder / "home") for name in ("HOME", "XDG_CONFIG_HOME", "XDG_CACHE_HOME")}
    (folder / "home").mkdir(exist_ok=True)
    quiet = {"WANDB_SILENT": "true", "WANDB_ERROR_REPORTING": "false", "WANDB_X_DISABLE_STATS": "true"}
    return kept | home | quiet | {"PYTHONPATH": str(ROOT), "WANDB_MODE": "offline"} | settings


def rows(run_folder):
    """The run and its rows in the files of its sessions, as wandb itself reads them."""
    program = shutil.which("wandb", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    sessions = []
    for session in sorted((run_folder / "wandb").glob("offline-run-*")):
        done = subprocess.run(
            [program, "leet", "inspect", "--json", next(session.glob("*.wandb"))],
            env=environment(run_folder.parent),
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        records = [json.loads(line) for line in done.stdout.splitlines()]
        (run,) = (record["run"] for record in records if record["type"] == "run")
        items = [record["history"]["item"] for record in records if record["type"] == "history"]
        sessions.append((run, items))
    return sessions


STOPPED = """
import sys
from repopt_jax import train
config = train.load_config("digits:plain,smoke")
config.data.data_dir, config.loggers = sys.argv[1], ("wandb",)
answers = iter([False, True])
done = train.run(config, sys.argv[2], progress=False, stop=lambda: next(answers, True))
assert not done.finished and done.steps == 2, done
if len(sys.argv) > 3:
    assert train.run(config, sys.argv[2], progress=False).finished
"""


@pytest.mark.parametrize("goes_on", ["here", pytest.param("by the command", marks=pytest.mark.long)])
def test_wandb_has_the_numbers_of_the_log_in_one_run(digits, tmp_path, goes_on):
    """A run that is stopped, and goes on."""
    pytest.importorskip("wandb")
    out = tmp_path / "run"
    programs = [["-c", STOPPED, str(digits), str(out)]]
    if goes_on == "here":
        programs[0].append(goes_on)
    else:
        command = ["-m", "repopt_jax", "train", "--config=digits:plain,smoke", f"--out={out}"]
        programs.append([*command, f"--config.data.data_dir={digits}", "--config.loggers=wandb"])
    for program in programs:
        done = subprocess.run(
            [sys.executable, *program], env=environment(tmp_path), capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        assert "logger" not in done.stderr, done.stderr
    (first, before), (second, after) = rows(out)
    own = (out / "wandb" / "run-id").read_text().strip()
    assert first["run_id"] == second["run_id"] == own
    assert first["display_name"] == "digits-plain-smoke"
    assert first["project"] == "repopt_jax"
    assert first["config"]["update"]["optim"]["learning_rate"] == 0.1
    written = [{k: v for k, v in row.items() if not k.startswith("_")} for row in before + after]
    assert written == [{"step": record["step"], **numbers(record)} for record in logged(out)]
    assert {row["step"] for row in before} == {1, 2}
    assert len(after) > 3


def test_wandb_without_an_account_does_not_lose_the_training(digits, tmp_path):
    pytest.importorskip("wandb")
    out = tmp_path / "run"
    command = ["-m", "repopt_jax", "train", "--config=digits:plain,smoke", f"--out={out}"]
    command += [f"--config.data.data_dir={digits}", "--config.loggers=wandb"]
    # An address that nobody answers at: nothing leaves this machine.
    env = environment(tmp_path, WANDB_MODE="online", WANDB_BASE_URL="http://127.0.0.1:9")
    done = subprocess.run(
        [sys.executable, *command], env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("logger Wandb failed in `begin`") == 1
    assert "metrics.jsonl has all" in done.stderr
    assert json.loads((out / "summary.json").read_text())["finished"]


def test_an_own_run_of_wandb_is_opened_with_own_options(tmp_path, monkeypatch):
    """What is given to `wandb.init`, without wandb."""

    class Fake:
        class Settings(dict):
            pass

        def init(self, **options):
            opened.append(options)
            return self

        def define_metric(self, name, step_metric=None):
            defined.append((name, step_metric))

    opened, defined = [], []
    monkeypatch.setitem(sys.modules, "wandb", Fake())
    monkeypatch.setenv("WANDB_PROJECT", "cats")
    session = Session(tmp_path / "run", "mine", {"seed": 1})
    for options in ({}, {"project": "dogs", "tags": ["a"]}):
        loggers.Wandb(**options).begin(session)
    assert [one["project"] for one in opened] == ["cats", "dogs"]
    assert [one["name"] for one in opened] == ["mine", "mine"]
    assert opened[0]["id"] == opened[1]["id"]
    assert (opened[1]["tags"], opened[1]["config"], opened[1]["resume"]) == (["a"], {"seed": 1}, "allow")
    assert defined[:2] == [("step", None), ("*", "step")]
