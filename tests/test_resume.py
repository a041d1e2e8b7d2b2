"""Runs that are killed, stopped, damaged or refused a disk, and go on: bit by bit to where an unbroken run
ends."""

import errno
import gc
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import training
from hypothesis import given, settings
from hypothesis import strategies as st
from training import (
    STEPS,
    arrays,
    assert_same_run,
    checkpoints_in,
    killed_config,
    stop_after_step,
    stop_at,
    tiny_config,
    told,
    warned,
    without_privileges,
)

from repopt_jax import data, save_scales, train
from repopt_jax.cli.main import main
from repopt_jax.train import checkpoint, loop, processes
from repopt_jax.train.checkpoint import Checkpoints, Progress, kept
from repopt_jax.train.rundir import MetricsWriter
from repopt_jax.train.state import TrainState


@pytest.fixture(scope="module")
def unbroken(digits, tmp_path_factory):
    folder = tmp_path_factory.mktemp("unbroken") / "run"
    train.run(killed_config(digits), folder, progress=False)
    return folder


@pytest.fixture(scope="module")
def stopped(digits, tmp_path_factory):
    """A run that was asked to stop after step 9."""
    folder = tmp_path_factory.mktemp("stopped") / "run"
    done = train.run(killed_config(digits), folder, progress=False, stop=stop_after_step(9))
    assert (done.finished, done.steps) == (False, 9)
    return folder


def copied(run_dir, tmp_path):
    shutil.copytree(run_dir, tmp_path / "run")
    return tmp_path / "run"


def killed(out, digits, *moment):
    """Trains in a process of its own, which ends as `training` says."""
    program = [sys.executable, training.__file__, out, digits, *map(str, moment)]
    return subprocess.run(program, capture_output=True, text=True, timeout=600)


# -- killed
# ---


# Moments of one run, one after the other: what kills it, and what the next process says of what it finds.
KILLS = (
    ("evaluation", 1, ""),  # of step 6, on from step 4
    ("step", 3, ""),  # step 7, on from step 4 again
    ("save", 8, "a save of step 8 was interrupted"),
    ("renaming", 8, "a save of step 8 was interrupted"),
    ("manifest", 8, r"step 8 in .* manifest.json is missing: .* goes on from the checkpoint of step 4"),
)
# Each leaves another folder: with a save that was interrupted, and with one that lacks its manifest.
OFTEN = tuple(kill for kill in KILLS if kill[0] in ("renaming", "manifest"))


@pytest.mark.once
@pytest.mark.parametrize("kills", [OFTEN, pytest.param(KILLS, marks=pytest.mark.long)], ids=["some", "all"])
def test_run_killed_again_and_again_ends_the_same(digits, tmp_path, unbroken, caplog, kills):
    run_dir = tmp_path / "run"
    expected = ""
    for moment, number, says in kills:
        done = killed(run_dir, digits, moment, number)
        assert done.returncode == -signal.SIGKILL, done.stderr
        assert checkpoints_in(run_dir) == [4], moment
        assert re.search(expected, done.stderr), (moment, done.stderr)
        expected = says
        # A line that was being written when the process died.
        with (run_dir / "metrics.jsonl").open("a") as log:
            log.write('{"kind": "train", "step": 17, "lo')
    assert train.run(killed_config(digits), run_dir, progress=False).finished
    (message,) = [text for text in warned(caplog) if "step 8" in text]
    assert re.search(expected, message)
    assert_same_run(run_dir, unbroken)
    assert checkpoints_in(run_dir) == checkpoints_in(unbroken) == [16, 18]
    assert {path.name for path in (run_dir / "checkpoints").iterdir()} == {"16", "18", "damaged"}


def test_run_whose_first_save_was_killed_begins_again(tmp_path, caplog):
    with Checkpoints(tmp_path, writing=True) as checkpoints:
        checkpoints.save(4, small_state(), Progress({}, 0.0), wait=True)
    (tmp_path / "4" / "manifest.json").unlink()
    with Checkpoints(tmp_path, writing=True) as checkpoints:
        assert checkpoints.latest is None
    (message,) = warned(caplog)
    assert "step 4" in message
    assert message.endswith("goes on from its beginning")


@pytest.mark.once
@pytest.mark.long
def test_twenty_runs_killed_at_random_moments(digits, tmp_path):
    seed = 20260101
    rng = random.Random(seed)
    config = killed_config(digits, checkpoint_every=1)
    train.run(config, tmp_path / "unbroken", progress=False)
    landed = []
    for number in range(20):
        out = tmp_path / f"run{number}"
        moment = rng.randrange(1000, 1000 * STEPS)
        began = time.perf_counter()
        done = killed(out, digits, "random", moment)
        folder = out / "checkpoints"
        saving = any("tmp" in p.name or not (p / "manifest.json").exists() for p in folder.glob("[0-9]*"))
        landed.append((moment, max(checkpoints_in(out), default=0), saving))
        assert done.returncode in (-signal.SIGKILL, 0), done.stderr
        train.run(config, out, progress=False)
        assert_same_run(out, tmp_path / "unbroken")
        assert checkpoints_in(out) == checkpoints_in(tmp_path / "unbroken")
        sys.stdout.write(f"seed {seed}, run {number}: {landed[-1]}, {time.perf_counter() - began:.0f} s\n")
    assert len({step for _, step, _ in landed}) >= 8, "the moments must differ"
    assert any(saving for *_, saving in landed), "some must fall into a save"


# -- asked to stop
# ---


# Questions of a session until it is stopped, and the step at which it then stops.
STOPS = (
    (5, 5),  # after a step
    (3, 6),  # in the evaluation of step 6, before its second batch
    (6, 8),  # that evaluation and two steps later, where a checkpoint is due anyway
    (4, 12),  # at a step that is to be evaluated: the evaluation is not begun
    (1, 12),  # in the evaluation that is owed
    (12, 18),  # in the last one
)


@pytest.mark.once
def test_run_stopped_again_and_again_ends_the_same(digits, tmp_path, unbroken):
    run_dir, config = tmp_path / "run", killed_config(digits)
    for question, step in STOPS:
        done = train.run(config, run_dir, progress=False, stop=stop_at(question))
        assert (done.finished, done.steps) == (False, step)
        assert not (run_dir / "summary.json").exists()
        assert max(checkpoints_in(run_dir)) == step
    assert train.run(config, run_dir, progress=False).finished
    assert_same_run(run_dir, unbroken)
    assert checkpoints_in(run_dir) == checkpoints_in(unbroken)


@pytest.mark.once
def test_sigterm_in_an_evaluation_saves_within_ten_seconds(digits, tmp_path, unbroken):
    """In a step: see the command line's tests."""
    asked = []

    with processes.stop_on_signals() as request:

        def stop():
            asked.append(time.perf_counter())
            if len(asked) == 9:
                os.kill(os.getpid(), signal.SIGTERM)
            return request()

        done = train.run(killed_config(digits), tmp_path / "run", progress=False, stop=stop)
    assert time.perf_counter() - asked[-1] < 10
    assert (done.finished, done.steps) == (False, 6)
    assert [r["kind"] for r in told(tmp_path / "run") if r["step"] == 6] == ["train", "scales"]
    assert request.exit_code == 143
    train.run(killed_config(digits), tmp_path / "run", progress=False)
    assert_same_run(tmp_path / "run", unbroken)


# Ctrl-C in a process of its own: see the command line's tests.
@pytest.mark.once
@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGTERM, 143), pytest.param(signal.SIGINT, 130, marks=pytest.mark.long)],
)
def test_command_line_tells_how_to_go_on(digits, tmp_path, monkeypatch, capfd, number, code):
    (tmp_path / "config.py").write_text(
        f"import training\n\ndef get_config(arg):\n    return training.killed_config({str(digits)!r})\n"
    )
    log = loop._log

    def press_at_three(job, means, step, watch):
        log(job, means, step, watch)
        os.kill(os.getpid(), number)

    monkeypatch.setattr(loop, "_log", press_at_three)
    before = signal.getsignal(number)
    # The signal comes after the question of step 3.
    assert main(["train", f"--config={tmp_path}/config.py", f"--out={tmp_path}/run"]) == code
    assert signal.getsignal(number) is before
    said = capfd.readouterr().err.splitlines()
    first, compiling, told_at_once, *_, last = [
        line for line in said if not re.search(": (loading|making)", line)
    ]
    assert first.startswith("This search has Lambda")
    assert compiling.endswith("tiny: compiling")
    assert told_at_once.startswith("repopt: stopping after this step, with a checkpoint")
    assert last.startswith("repopt: stopped at step 4; the last checkpoint (step 4, in ")
    assert last.endswith("is complete: run the same command again to continue from it")


def test_second_signal_ends_at_once():
    with processes.stop_on_signals() as request:
        assert not request()
        os.kill(os.getpid(), signal.SIGINT)
        assert request()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_outside_the_main_thread_nothing_is_caught():
    found = []

    def look():
        with processes.stop_on_signals() as request:
            found.append(request())

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    assert found == [False]


@pytest.mark.once
def test_interrupt_leaves_the_last_checkpoint_whole(digits, tmp_path, unbroken):
    """A second Ctrl-C."""

    def press():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train.run(killed_config(digits), tmp_path / "run", progress=False, stop=stop_after_step(10, press))
    assert checkpoints_in(tmp_path / "run") == [4, 8]
    for step in (4, 8):
        assert checkpoint.manifest_problem(tmp_path / "run" / "checkpoints" / str(step)) is None
    train.run(killed_config(digits), tmp_path / "run", progress=False)
    assert_same_run(tmp_path / "run", unbroken)


# -- damaged
# ---


def largest_file(folder):
    return max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: (p.stat().st_size, p))


def truncate(folder):
    path = largest_file(folder)
    os.truncate(path, path.stat().st_size - 1)
    return rf"{path.name} has \d+ bytes, not \d+"


def flip(folder):
    path = largest_file(folder)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    return f"{path.name} does not hold what was written to it"


def lose_a_file(folder):
    path = largest_file(folder / "model")
    path.unlink()
    return f"{path.name} is missing"


def lose_the_manifest(folder):
    (folder / "manifest.json").unlink()
    return "manifest.json is missing: it was not written to the end"


def spoil_the_manifest(folder):
    os.truncate(folder / "manifest.json", 40)
    return "manifest.json cannot be read"


DAMAGE = (truncate, flip, lose_a_file, lose_the_manifest, spoil_the_manifest)


@pytest.mark.once
@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_checkpoint_is_named_and_the_one_before_used(tmp_path, stopped, caplog, damage):
    run_dir = copied(stopped, tmp_path)
    folder = run_dir / "checkpoints"
    before = train.load_trained(run_dir).step
    says = damage(folder / "9")
    caplog.clear()
    with Checkpoints(folder) as reader:
        assert (before, reader.latest) == (9, 8)
        assert (reader.find("latest"), reader.find(8)) == (8, 8)
        with pytest.raises(FileNotFoundError, match=r"step 9"):
            reader.find(9)
    reads = warned(caplog)
    assert (folder / "9").is_dir(), "readers change nothing"
    with Checkpoints(folder, writing=True, keep_last=2) as writer:
        assert writer.latest == 8
    assert (folder / "damaged" / "9").is_dir()
    moves = warned(caplog)[len(reads) :]
    pattern = re.compile(rf"the checkpoint of step 9 in .*{says}")
    assert len(moves) == 1
    assert pattern.search(moves[0])
    assert "moved to" in moves[0]
    if damage is not lose_the_manifest:  # without one, it never counted
        assert len(reads) == 1
        assert pattern.search(reads[0])


@pytest.mark.once
@pytest.mark.parametrize("asked", ["latest", "best"])
def test_where_all_checkpoints_are_damaged_training_on_is_not_the_advice(tmp_path, stopped, caplog, asked):
    run_dir = copied(stopped, tmp_path)
    folder, steps = run_dir / "checkpoints", checkpoints_in(run_dir)
    for step in steps:
        flip(folder / str(step))
    caplog.clear()
    with Checkpoints(folder, scores={8: 0.5}) as reader, pytest.raises(FileNotFoundError) as raised:
        reader.find(asked)
    which = f"(steps {', '.join(map(str, steps))})" if asked == "latest" else "that were evaluated (steps 8)"
    assert str(raised.value) == (
        f"the checkpoints of {run_dir} {which} are all damaged, see the warnings above: put a copy of one of "
        "them in its place"
    )
    named = [f"the checkpoint of step {step} " in caplog.text for step in steps]
    assert named == [asked == "latest" or step == 8 for step in steps]
    # The controls: one that is whole but was not evaluated, and none at all.
    flip(folder / "9")
    with Checkpoints(folder, scores={}) as reader, pytest.raises(FileNotFoundError, match="let it train"):
        reader.find("best")
    for step in steps:
        shutil.rmtree(folder / str(step))
    with Checkpoints(folder) as reader, pytest.raises(FileNotFoundError, match="let it train"):
        reader.find(asked)


@pytest.mark.once
def test_run_with_a_damaged_checkpoint_ends_the_same(digits, tmp_path, stopped, unbroken):
    run_dir = copied(stopped, tmp_path)
    flip(run_dir / "checkpoints" / "9")
    assert train.run(killed_config(digits), run_dir, progress=False).finished
    assert_same_run(run_dir, unbroken)


@pytest.mark.once
def test_a_manifest_tells_what_the_folder_holds(tmp_path, stopped):
    run_dir = copied(stopped, tmp_path)
    folder = run_dir / "checkpoints" / "9"
    flip(folder)
    assert checkpoint.manifest_problem(folder) is not None
    checkpoint.write_manifest(folder)
    assert checkpoint.manifest_problem(folder) is None


@pytest.mark.once
def test_no_checkpoint_that_can_be_used_is_an_error(digits, tmp_path, stopped):
    run_dir = copied(stopped, tmp_path)
    for step, damage in ((4, truncate), (8, lose_a_file), (9, flip)):
        damage(run_dir / "checkpoints" / str(step))
    before = sorted(run_dir.rglob("*"))
    for _ in range(2):  # nor may the second attempt begin anew
        with pytest.raises(
            ValueError, match=r"no checkpoint in .*\(step 9: .* step 4: .*\)\. Nothing was changed"
        ):
            train.run(killed_config(digits), run_dir, progress=False)
    assert sorted(run_dir.rglob("*")) == before


@pytest.mark.once
def test_folder_of_checkpoints_all_without_manifest_is_an_error(tmp_path, stopped):
    run_dir = copied(stopped, tmp_path)
    for path in (run_dir / "checkpoints").glob("*/manifest.json"):
        path.unlink()
    with pytest.raises(ValueError, match="can be used"):
        Checkpoints(run_dir / "checkpoints", writing=True)


# -- which stay
# ---


@settings(max_examples=60, deadline=None)
@given(
    saves=st.lists(st.tuples(st.booleans(), st.none() | st.integers(0, 4)), min_size=1, max_size=12),
    last=st.integers(1, 3),
    best=st.integers(0, 3),
)
def test_what_stays_does_not_hang_on_where_a_run_was_broken(saves, last, best):
    """Removed one by one as the run goes on, with checkpoints of stops among them, the same stay in the end
    as of all due ones at once."""
    saves = [*saves, (True, None)]  # the last step is due
    scores = {step: score for step, (_, score) in enumerate(saves) if score is not None}
    there: dict[int, bool] = {}
    for step, (due, _) in enumerate(saves):
        there[step] = due
        stay = kept(there, {s: scores[s] for s in scores if s <= step}, last=last, best=best)
        assert step in stay
        there = {s: there[s] for s in there if s in stay}
    regular = {step: True for step, (due, _) in enumerate(saves) if due}
    assert set(there) == kept(regular, scores, last=last, best=best)


@pytest.mark.once
def test_best_and_last_are_kept_also_of_a_broken_run(digits, tmp_path):
    """The evaluations, after steps 6, 12 and 18, fall on checkpoints because the best are to be kept."""
    config = tiny_config("plain", digits, checkpoint_every=4, keep_last=1, keep_best=1)
    train.run(config, tmp_path / "whole", progress=False)
    for question in (9, 8):
        train.run(config, tmp_path / "broken", progress=False, stop=stop_at(question))
    train.run(config, tmp_path / "broken", progress=False)
    scores = {r["step"]: r["accuracy"] for r in told(tmp_path / "whole") if r["kind"] == "eval"}
    best = max(scores, key=lambda step: (scores[step], step))
    assert checkpoints_in(tmp_path / "whole") == checkpoints_in(tmp_path / "broken") == sorted({best, 18})
    with Checkpoints(tmp_path / "whole" / "checkpoints", scores=scores) as checkpoints:
        assert checkpoints.find("best") == checkpoints.best == best
        with pytest.raises(FileNotFoundError, match="no checkpoint of step 7; there are"):
            checkpoints.find("7")
        with pytest.raises(ValueError, match="must be latest, best or the number of a step"):
            checkpoints.find("newest")
    assert train.load_trained(tmp_path / "whole", checkpoint="best").step == best


def test_an_evaluation_that_was_pending_counts_for_what_is_kept(digits, tmp_path, monkeypatch):
    """The last one is the best, and was interrupted: the best until then has to go when it is made."""
    evaluate = loop._evaluate

    def better_each_time(job, state, step):
        record = evaluate(job, state, step)
        job.scores |= {} if record is None else {step: float(step)}
        return record

    monkeypatch.setattr(loop, "_evaluate", better_each_time)
    config = tiny_config("plain", digits, epochs=2, checkpoint_every=4, keep_last=1, keep_best=1)
    assert not train.run(config, tmp_path, progress=False, stop=stop_at(12 + 4 + 1)).finished
    assert checkpoints_in(tmp_path) == [6, 12]
    assert train.run(config, tmp_path, progress=False).finished
    assert checkpoints_in(tmp_path) == [12]


# -- saving while training goes on
# ---


def small_state(value=0.0, size=8, **changes):
    fields = {
        "step": jnp.zeros((), jnp.int32),
        "params": {"w": jnp.full((size, size), value)},
        "non_trainable": {"m": jnp.zeros(size)},
        "ema": {},
        "opt_state": (),
        "metric_sums": {"loss": jnp.zeros(())},
        "bad_step": jnp.full((), -1, jnp.int32),
        "previous_scales": {},
    }
    return TrainState(**{**fields, **changes})


def test_what_is_saved_is_the_state_at_the_save(tmp_path):
    """Bit by bit, although the next steps are given its buffers while the files are written. The control: the
    steps change every number, and are done before the save is."""
    step = jax.jit(lambda tree: jax.tree.map(lambda x: x * 1.5 + 1, tree), donate_argnums=0)
    params = {
        "w": jax.random.normal(jax.random.key(0), (1024, 512)),
        "key": jax.random.normal(jax.random.key(1), (7,)),
    }
    finished = threading.Event()
    write = checkpoint.write_manifest

    def late(folder, **notes):
        assert finished.wait(60)
        write(folder, **notes)

    with (
        pytest.MonkeyPatch.context() as patch,
        Checkpoints(tmp_path, writing=True, keep_last=9) as checkpoints,
    ):
        patch.setattr(checkpoint, "write_manifest", late)
        wanted = {}
        for number in range(1, 4):
            wanted[number] = jax.tree.map(lambda x: np.array(x, copy=True), params)
            finished.clear()
            checkpoints.save(number, small_state(params=params), Progress({"next_index": number}, 1.0))
            for _ in range(5):
                params = step(params)
            jax.block_until_ready(params)
            assert not (tmp_path / str(number) / "manifest.json").exists()
            finished.set()
            checkpoints.wait()
        for number in wanted:
            assert not np.array_equal(wanted[number]["w"], params["w"])
            target = jax.tree.map(jnp.zeros_like, params)
            found, _ = checkpoints.load_network(target, {"m": jnp.zeros(8)}, step=number)
            jax.tree.map(np.testing.assert_array_equal, found, wanted[number])


def test_random_keys_and_position_come_back(tmp_path):
    state = small_state(
        non_trainable={"rngs": {"key": jax.random.key(3), "count": jnp.uint32(4)}},
        ema={"params": {"w": jnp.ones((2, 2))}, "non_trainable": {}},
    )
    with Checkpoints(tmp_path, writing=True) as checkpoints:
        checkpoints.save(5, state, Progress({"next_index": 6}, 2.5, evaluation_pending=True), wait=True)
        found, progress = checkpoints.restore(state)
        assert checkpoints.latest == 5
    assert progress == Progress({"next_index": 6}, 2.5, evaluation_pending=True)
    assert jax.random.bits(found.non_trainable["rngs"]["key"]) == jax.random.bits(jax.random.key(3))
    assert found.ema["params"]["w"].shape == (2, 2)


@pytest.mark.once
def test_error_of_a_save_comes_out_once_and_keeps_the_one_before(digits, tmp_path, monkeypatch, unbroken):
    write = checkpoint.write_manifest

    def full(folder, **notes):
        if folder.name == "8":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(folder, **notes)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "write_manifest", full)
        with pytest.raises(
            OSError,
            match=r"^cannot write the checkpoint of step 8: No space left on device; the checkpoint of "
            r"step 4 is kept in .*, and nothing up to it is lost",
        ):
            train.run(killed_config(digits), tmp_path / "run", progress=False)
    assert checkpoints_in(tmp_path / "run") == [4]
    train.run(killed_config(digits), tmp_path / "run", progress=False)
    assert_same_run(tmp_path / "run", unbroken)


# In the ordinary run the test above and the one of a full file system have its parts.
@pytest.mark.long
@pytest.mark.once
def test_full_disk_ends_with_one_sentence(digits, tmp_path, unbroken):
    done = killed(tmp_path / "run", digits, "limit", 8)
    assert done.returncode == 1
    # Where other work takes the processor, the log also says that the step waited for its data.
    (line,) = [said for said in done.stderr.splitlines() if "waits for data" not in said]
    assert "File too large; the checkpoint of step 4 is kept in" in line
    train.run(killed_config(digits), tmp_path / "run", progress=False)
    assert_same_run(tmp_path / "run", unbroken)


@pytest.fixture
def failed_saves_forgotten():
    """What Orbax leaves undone when a save fails is collected here, not in the middle of another test."""
    yield
    gc.collect()


# In the words of Python, which tells of work that nobody waited for.
undone = pytest.mark.filterwarnings(
    "ignore:.*was never awaited:RuntimeWarning",
    "ignore:.*was never awaited:pytest.PytestUnraisableExceptionWarning",
)


@undone
@pytest.mark.usefixtures("failed_saves_forgotten")
def test_full_file_system_ends_with_one_sentence(tmp_path):
    place = tmp_path / "small"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(place)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no file system can be mounted here")
    try:
        with Checkpoints(place, writing=True, keep_last=2) as checkpoints:
            checkpoints.save(1, small_state(), Progress({}, 0.0), wait=True)
            big = small_state(params={"w": jax.random.normal(jax.random.key(0), (512, 512))})
            with pytest.raises(
                OSError, match=r"^cannot write the checkpoint of step 2: No space left on device$"
            ):
                checkpoints.save(2, big, Progress({}, 0.0), wait=True)
            assert checkpoints.latest == 1
        with Checkpoints(place, writing=True) as checkpoints:
            assert checkpoints.latest == 1
    finally:
        subprocess.run(["umount", str(place)], check=True)


@undone
@pytest.mark.usefixtures("failed_saves_forgotten")
def test_folder_that_became_read_only(tmp_path):
    with Checkpoints(tmp_path / "checkpoints", writing=True) as checkpoints:
        checkpoints.save(1, small_state(), Progress({}, 0.0), wait=True)
        (tmp_path / "checkpoints").chmod(0o555)
        with (
            without_privileges(),
            pytest.raises(
                PermissionError, match=r"^cannot write the checkpoint of step 2: Permission denied$"
            ),
        ):
            checkpoints.save(2, small_state(), Progress({}, 0.0), wait=True)
        (tmp_path / "checkpoints").chmod(0o755)
        checkpoints.save(2, small_state(), Progress({}, 0.0), wait=True)
        assert checkpoints.latest == 2


@pytest.mark.once
def test_log_that_cannot_be_written(digits, tmp_path, monkeypatch, unbroken):
    def fill(writer, record):
        if record["step"] == 9:
            writer._file.close()
            writer._file = open("/dev/full", "ab", buffering=0)  # noqa: SIM115
        return write(writer, record)

    write = MetricsWriter.write
    with monkeypatch.context() as patch:
        patch.setattr(MetricsWriter, "write", fill)
        with pytest.raises(
            OSError, match=r"^cannot write to .*metrics.jsonl: No space left .* step 8 is kept in"
        ):
            train.run(killed_config(digits), tmp_path / "run", progress=False)
    train.run(killed_config(digits), tmp_path / "run", progress=False)
    assert_same_run(tmp_path / "run", unbroken)


# -- other devices
# ---

# float32, 5 steps; measured 1e-6 at most of the largest value of an array.
OTHER_DEVICES = 1e-5


def scaled_config(digits, scales_dir, **changes):
    return tiny_config(
        "repopt", digits, scales=str(scales_dir), checkpoint_every=4, optim__ema=0.9, **changes
    )


@pytest.fixture(scope="module")
def some_scales(digits, tmp_path_factory):
    """A folder of scales that no rule gives."""
    return write_scales(tmp_path_factory.mktemp("scales") / "scales", digits, 1.25)


def write_scales(folder, digits, factor):
    config = tiny_config("repopt", digits, scales="depth")
    info = data.open_source("digits", data_dir=digits).info
    scales = train.build.make_task(config).resolve_scales("depth", info)
    save_scales(folder, jax.tree.map(lambda vector: factor * vector, scales))
    return folder


@pytest.fixture(scope="module")
def stopped_target(digits, some_scales, tmp_path_factory):
    """On a mesh of 2 x 2, after step 13; and the folder of the run that then went on there."""
    folder = tmp_path_factory.mktemp("target")
    config = scaled_config(digits, some_scales, mesh__fsdp=2)
    train.run(config, folder / "stopped", progress=False, stop=stop_after_step(13))
    shutil.copytree(folder / "stopped", folder / "whole")
    train.run(config, folder / "whole", progress=False)
    return folder


@pytest.mark.parametrize(
    ("count", "fsdp"), [(2, 1), *(pytest.param(n, 1, marks=pytest.mark.long) for n in (1, 4))]
)
@pytest.mark.once
def test_other_devices_can_resume(digits, tmp_path, monkeypatch, some_scales, stopped_target, count, fsdp):
    run_dir = copied(stopped_target / "stopped", tmp_path)
    mesh = loop.make_mesh(fsdp, devices=jax.devices()[:count])
    monkeypatch.setattr(loop, "make_mesh", lambda *args, **options: mesh)
    seen = []
    monkeypatch.setattr(
        loop, "_warn_of_other_devices", lambda _, resumed, mesh: seen.append((resumed.devices, mesh.size))
    )
    assert train.run(scaled_config(digits, some_scales, mesh__fsdp=fsdp), run_dir, progress=False).finished

    def close(a, b):
        if np.issubdtype(a.dtype, np.floating):
            assert np.abs(a - b).max(initial=0) <= OTHER_DEVICES * max(np.abs(a).max(initial=0), 1)

    assert seen == [(4, count)]
    found, wanted = arrays(run_dir), arrays(stopped_target / "whole")
    jax.tree.map(close, found, wanted)
    last = [r["loss"] for r in told(run_dir) if r["kind"] == "train"][-1]
    assert last == pytest.approx(
        [r["loss"] for r in told(stopped_target / "whole") if r["kind"] == "train"][-1], abs=OTHER_DEVICES
    )


def test_other_devices_are_told_of_where_their_number_is_part_of_the_training(digits, caplog):
    config = killed_config(digits, mesh__statistics="device")
    for before, now, said in ((4, 4, 0), (None, 4, 0), (4, 2, 1)):
        caplog.clear()
        mesh = loop.make_mesh(devices=jax.devices()[:now])
        loop._warn_of_other_devices(config, Progress({}, 0.0, devices=before), mesh)
        assert len(warned(caplog)) == said
    assert "2 images of each of 4 devices, and from here on takes them over 4 on each of 2" in caplog.text
    caplog.clear()
    loop._warn_of_other_devices(killed_config(digits), Progress({}, 0.0, devices=4), mesh)
    assert warned(caplog) == []


# -- other scales
# ---


@pytest.mark.once
def test_other_scales_than_the_run_began_with_are_refused(digits, tmp_path, stopped_target, some_scales):
    run_dir = copied(stopped_target / "stopped", tmp_path)
    kept_aside = tmp_path / "scales"
    shutil.move(some_scales, kept_aside)
    try:
        write_scales(some_scales, digits, 1.5)
        with pytest.raises(
            ValueError,
            match=r"are not those that this run began with; \d+ of \d+ vectors differ.*"
            r"stages/1/0/conv/kernel 3x3 \(channel \d+: [\d.]+ there, [\d.]+ in the checkpoint\).*Put back",
        ):
            train.run(scaled_config(digits, some_scales, mesh__fsdp=2), run_dir, progress=False)
    finally:
        shutil.rmtree(some_scales)
        shutil.move(kept_aside, some_scales)


def test_scales_are_compared_in_the_optimizers_state():
    def state_with(s):
        return small_state(opt_state=({"scales": {"a/kernel": {"3x3": jnp.array([1.0, s])}}},))

    fresh = state_with(2.0)
    loop.check_scales(fresh, state_with(2.0 + 1e-7), source="x")
    with pytest.raises(ValueError, match=r"1 of 1 vectors .* 3x3 \(channel 1: 2 there, 2.001 in"):
        loop.check_scales(fresh, state_with(2.001), source="x")


@pytest.mark.once
def test_the_share_is_recorded(unbroken):
    records = [r for r in train.loop.read_records(unbroken / "metrics.jsonl") if r["kind"] == "train"]
    assert len(records) == STEPS // 3
    assert all(0 <= r["data_wait"] <= 1 for r in records)
    folder = train.rundir.RunFolder(unbroken)
    summary = folder.finished(folder.read()[0])
    assert summary.data_wait == pytest.approx(np.median([r["data_wait"] for r in records]))
