"""The folder of a run: one run at a time writes into it, and what was lost or changed in it is said, never
written over."""

import contextlib
import dataclasses
import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import types

import pytest
import training
from hypothesis import given, settings
from hypothesis import strategies as st
from training import (
    assert_same_run,
    checkpoints_in,
    killed_config,
    stop_after_step,
    tiny_config,
    told,
    warned,
)

from repopt_jax import deploy, interop, jsontext, train
from repopt_jax.report import gallery
from repopt_jax.train import checkpoint, lock
from repopt_jax.train.checkpoint import Checkpoints
from repopt_jax.train.rundir import RunFolder, check_records, read_records, summarize

pytestmark = pytest.mark.once


@pytest.fixture(scope="module")
def stopped(digits, tmp_path_factory):
    """A run that was asked to stop after step 9; it has the checkpoints of steps 4 (removed), 8 and 9."""
    folder = tmp_path_factory.mktemp("stopped") / "run"
    train.run(killed_config(digits), folder, progress=False, stop=stop_after_step(9))
    return folder


@pytest.fixture
def stopped_summary(stopped):
    """What the run that was stopped came to."""
    config, _ = RunFolder(stopped).read()
    state = types.SimpleNamespace(step=9, params={})
    records = read_records(stopped / "metrics.jsonl")
    return summarize(config, records, state, seconds=1.0, finished=False)  # pyright: ignore[reportArgumentType]


@pytest.fixture
def run_dir(stopped, tmp_path):
    shutil.copytree(stopped, tmp_path / "run")
    return tmp_path / "run"


def contents(folder):
    return {p: p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def refused(digits, run_dir, error, match):
    """A run there is refused, a second time too, and nothing changes."""
    before = contents(run_dir)
    for _ in range(2):
        with pytest.raises(error, match=match) as raised:
            train.run(killed_config(digits), run_dir, progress=False)
        assert "\n" not in str(raised.value)
    assert contents(run_dir) == before


# -- one run at a time
# ---


def test_a_second_run_is_refused_while_the_first_goes_on(digits, tmp_path):
    """The second one asks in the middle of the first, and is refused before it opens its data."""
    said = []

    def opened(config):
        raise LookupError("its data are opened")

    def second():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(train.loop, "open_feed", opened)
            with pytest.raises(BlockingIOError) as raised:
                train.run(tiny_config("plain", digits), tmp_path / "run", progress=False)
            said.append(str(raised.value))
            with pytest.raises(LookupError):  # the control: in a folder of its own it opens them
                train.run(tiny_config("plain", digits), tmp_path / "third", progress=False)
        return False

    config = tiny_config("plain", digits)
    done = train.run(config, tmp_path / "run", progress=False, stop=training.stop_at(5, second))
    assert done.finished
    (message,) = said
    assert f"run is being written by process {os.getpid()} of " in message
    assert "(since 20" in message
    assert message.endswith("wait until it has ended, stop it, or choose another folder")
    assert not (tmp_path / "run" / "run.lock").exists()
    train.run(config, tmp_path / "other", progress=False)
    assert_same_run(tmp_path / "run", tmp_path / "other")


@pytest.mark.parametrize("made", [False, True])
def test_a_run_whose_data_are_missing_leaves_no_folder_and_no_lock(tmp_path, made):
    config = tiny_config("plain", tmp_path / "nowhere")
    config.data.source, out = "folder", tmp_path / "runs" / "run"
    if made:
        out.mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match="is not a folder"):
        train.run(config, out, progress=False)
    assert sorted(tmp_path.rglob("*")) == ([tmp_path / "runs", out] if made else [])


def test_a_folder_that_cannot_be_written_is_refused_before_the_data(digits, tmp_path, monkeypatch):
    opened = []
    monkeypatch.setattr(train.loop, "open_feed", opened.append)
    tmp_path.chmod(0o555)
    with (
        training.without_privileges(),
        pytest.raises(PermissionError, match=r"^cannot (read|write to) `out_dir` .*; choose another folder$"),
    ):
        train.run(tiny_config("plain", digits), tmp_path / "run", progress=False)
    assert opened == []


@pytest.mark.parametrize("start", [train.run, lambda config, out, **_: train.build.config_check(config)])
def test_scales_that_are_none_are_said_before_the_data_are_opened(digits, tmp_path, monkeypatch, start):
    opened = []
    for module in (train.loop, train.build):
        monkeypatch.setattr(module, "open_feed", opened.append)
    (tmp_path / "scales").mkdir()
    config = tiny_config("repopt", digits, scales=str(tmp_path / "scales"), batch_size=12, eval_batch_size=12)
    with pytest.raises(ValueError, match="scales is not a scales directory"):
        start(config, tmp_path / "run", progress=False)
    assert opened == []
    assert not (tmp_path / "run").exists()


HOLDER = """
import sys
from pathlib import Path
from repopt_jax.train.lock import held
with held(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path):
    """A process that holds the folder, until its standard input ends."""
    program = [sys.executable, "-c", HOLDER, str(tmp_path / "run")]
    with subprocess.Popen(program, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
        if process.poll() is None:
            os.kill(process.pid, signal.SIGCONT)
            process.kill()


def test_what_a_killed_owner_left_is_taken_over_and_one_that_was_stopped_keeps_it(tmp_path, holder, caplog):
    folder = tmp_path / "run"
    os.kill(holder.pid, signal.SIGSTOP)
    with (
        pytest.raises(BlockingIOError, match=f"written by process {holder.pid} of"),
        lock.held(folder),
    ):
        pass
    holder.kill()
    holder.wait()
    assert (folder / "run.lock").is_file()
    with lock.held(folder) as ours:
        (message,) = warned(caplog)
        ours.check()
    assert f"process {holder.pid} of" in message
    assert message.endswith("has ended without releasing it; this process takes it over")
    assert not (folder / "run.lock").exists()


STARTER = """
import subprocess, sys
from pathlib import Path
from repopt_jax.train.lock import held
with held(Path(sys.argv[1])) as own:
    child = [sys.executable, "-c", "import sys; sys.stdin.read()"]
    subprocess.Popen(child, pass_fds=(own.descriptor,))
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.mark.parametrize("ends", [True, False])
def test_processes_that_a_killed_owner_started_end_first(tmp_path, caplog, monkeypatch, ends):
    """The child reads the same standard input, and ends when that does: when the lock is waited for."""
    waited = []

    class Moments(threading.Event):
        def wait(self, timeout=None):
            if timeout != 0.2:
                return super().wait(timeout)
            waited.append(timeout)
            if ends:
                process.stdin.close()
            return False

    if not ends:
        monkeypatch.setattr(lock, "STALE_S", 0.0)
    ours = lock.Lock(tmp_path / "run")
    ours._ending = Moments()
    program = [sys.executable, "-c", STARTER, str(tmp_path / "run")]
    with subprocess.Popen(program, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        process.kill()
        process.wait()
        if ends:
            ours.acquire()
            ours.release()
        else:
            with pytest.raises(BlockingIOError, match=f"written by process {process.pid} of"):
                ours.acquire()
    assert waited or not ends
    first, *others = warned(caplog)
    assert f"process {process.pid} of" in first
    assert "has ended, and processes that it started are ending" in first
    assert [line.endswith("this process takes it over") for line in others] == [True] * ends


def elsewhere(folder):
    """The lock of a process on another machine, which this machine does not see."""
    owner = {"host": "node7", "process": 12, "user": "ada", "since": "2026-01-01T00:00:00+00:00"}
    folder.mkdir(exist_ok=True)
    (folder / "run.lock").write_text(json.dumps(owner))
    return folder / "run.lock"


def test_an_owner_on_another_machine_lives_as_long_as_it_touches_its_file(tmp_path, caplog, monkeypatch):
    path = elsewhere(tmp_path / "run")
    touched = os.stat(path).st_mtime_ns + 10**9
    seen = threading.Event()
    wait = threading.Event.wait

    def touch_meanwhile(event, timeout=None):
        if not seen.is_set():
            seen.set()
            os.utime(path, ns=(touched, touched))
        return wait(event, timeout)

    with monkeypatch.context() as patch:
        patch.setattr(threading.Event, "wait", touch_meanwhile)
        with pytest.raises(BlockingIOError, match=r"process 12 of ada on node7 \(since 2026-01-01"):
            lock.Lock(tmp_path / "run").acquire()
    assert seen.is_set()
    assert "this waits up to" in warned(caplog)[0]
    # The control: untouched for longer, it has ended, and nobody waits.
    caplog.clear()
    old = time.time() - lock.STALE_S - 5
    os.utime(path, (old, old))
    ours = lock.Lock(tmp_path / "run")
    ours.acquire()
    (message,) = warned(caplog)
    assert "process 12 of ada on node7" in message
    assert "takes it over" in message
    # Should that one go on after all, it sees that it no longer owns the folder.
    elsewhere(tmp_path / "run")
    with pytest.raises(OSError, match=r"was taken over by process 12 of ada on node7"):
        ours.check()
    ours.release()
    assert path.exists(), "the lock of another owner stays"


@pytest.mark.parametrize("removed", ["its lock", "its folder"])
def test_an_owner_on_another_machine_that_ends_meanwhile_leaves_the_folder_free(
    tmp_path, caplog, monkeypatch, removed
):
    path = elsewhere(tmp_path / "run")
    wait = threading.Event.wait

    def end_meanwhile(event, timeout=None):
        if "node7" in path.read_text():
            path.unlink()
            if removed == "its folder":
                path.parent.rmdir()
        return wait(event, timeout)

    monkeypatch.setattr(threading.Event, "wait", end_meanwhile)
    with lock.held(tmp_path / "run") as ours:
        monkeypatch.undo()
        ours.check()
    (message,) = warned(caplog)
    assert "process 12 of ada on node7" in message
    assert "this waits up to" in message, "nothing is taken over"


def test_the_owner_touches_its_file(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "TOUCH_S", 0.001)
    with lock.held(tmp_path) as ours:
        os.utime(ours.path, (0, 0))
        end = time.monotonic() + 60
        while not ours.path.stat().st_mtime and time.monotonic() < end:
            pass
        assert ours.path.stat().st_mtime > 0
        ours.path.unlink()
        with pytest.raises(OSError, match="was removed while"):
            ours.check()


@given(
    text=st.text(max_size=60)
    | st.recursive(st.none() | st.integers(), st.lists, max_leaves=5).map(json.dumps)
)
@settings(max_examples=40, deadline=None)
def test_whatever_stands_in_the_lock_of_a_process_that_has_ended(text, tmp_path_factory):
    folder = tmp_path_factory.mktemp("locked")
    path = folder / "run.lock"
    path.write_text(text, encoding="utf-8")
    os.utime(path, (0, 0))
    with lock.held(folder) as ours:
        ours.check()
    assert not path.exists()


# -- checkpoints that are gone
# ---


def without_checkpoints(run_dir):
    shutil.rmtree(run_dir / "checkpoints")
    return "had a checkpoint of step 9"


def without_manifests(run_dir):
    for path in (run_dir / "checkpoints").glob("*/manifest.json"):
        path.unlink()
    return "had a checkpoint of step 9"


def with_one_without_manifest(run_dir):
    """What looks as if the first save had been interrupted."""
    shutil.rmtree(run_dir / "checkpoints" / "8")
    return without_manifests(run_dir)


def without_any_word_of_them(run_dir):
    (run_dir / "progress.json").unlink()
    shutil.rmtree(run_dir / "checkpoints")
    return "the log of a run until step 9"


@pytest.mark.parametrize(
    "lose", [without_checkpoints, without_manifests, with_one_without_manifest, without_any_word_of_them]
)
def test_a_run_whose_checkpoints_are_gone_does_not_begin_again(digits, run_dir, lose):
    says = lose(run_dir)
    match = (
        rf"holds .*{says}, but no complete checkpoint is in .*checkpoints\. Nothing was changed\. Put back"
    )
    refused(digits, run_dir, ValueError, match)


def test_records_of_a_run_without_a_checkpoint_are_moved_aside(digits, tmp_path, caplog):
    """Killed before its first save: it begins again, and what it had logged stays."""
    run_dir, config = tmp_path / "run", killed_config(digits)
    with pytest.raises(KeyboardInterrupt):
        train.run(config, run_dir, progress=False, stop=stop_after_step(3, interrupt))
    before = (run_dir / "metrics.jsonl").read_bytes()
    assert read_records(run_dir / "metrics.jsonl")
    assert checkpoints_in(run_dir) == []
    train.run(config, run_dir, progress=False, stop=stop_after_step(2))
    assert (run_dir / "metrics-before.jsonl").read_bytes() == before
    (message,) = warned(caplog)
    assert "moved to metrics-before.jsonl, and the run starts at its beginning" in message


def interrupt():
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("name", "spoil"),
    [
        ("checkpoints", lambda path: (shutil.rmtree(path), path.write_text(""))),
        ("scales", lambda path: path.write_text("")),
        ("metrics.jsonl", lambda path: (path.unlink(), path.mkdir())),
        ("summary.json", lambda path: path.mkdir()),
        ("progress.json", lambda path: (path.unlink(), path.mkdir())),
    ],
)
def test_a_file_where_a_folder_should_be_is_refused(digits, run_dir, name, spoil):
    spoil(run_dir / name)
    match = rf"has a file where a folder should be, or the other way round: {name}; move it away"
    refused(digits, run_dir, ValueError, match)


# -- the log
# ---


def edited(run_dir, change):
    path = run_dir / "metrics.jsonl"
    path.write_bytes(b"".join(change(path.read_bytes().splitlines(keepends=True))))
    return path


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (
            lambda lines: [*lines[:2], b"{\n", *lines[2:]],
            r"line 3 of .*metrics\.jsonl is no record \(it is not JSON",
        ),
        (lambda lines: [b"[1]\n", *lines], r"line 1 of .*metrics\.jsonl is no record with a kind and a step"),
        (
            lambda lines: [*lines, b"\xff\xfe\n"],
            r"line \d+ of .*metrics\.jsonl is no record \(it is not JSON",
        ),
        (
            lambda lines: [b"[" * 9999 + b"\n", *lines],
            r"line 1 of .*metrics\.jsonl is no record \(.*too deeply",
        ),
        (
            lambda lines: lines[:2],
            r"metrics\.jsonl was cut or changed: its 2 lines lack \d records .* of step 6\.",
        ),
        # In the ordinary run `test_every_cut_of_a_log_is_found` has these.
        pytest.param(
            lambda lines: [],
            r"metrics\.jsonl was cut or changed: its 0 lines lack 3 records .*first of step 3\.",
            marks=pytest.mark.long,
        ),
        pytest.param(
            lambda lines: [*lines[:3], lines[3][:9]],
            r"metrics\.jsonl was cut or changed",
            marks=pytest.mark.long,
        ),
    ],
)
def test_a_log_that_was_changed_is_not_written_over(digits, run_dir, change, match):
    edited(run_dir, change)
    refused(digits, run_dir, ValueError, match)


@pytest.mark.parametrize(
    ("kind", "change", "match"),
    [
        (
            "train",
            {"images_per_s": None, "lr": "x"},
            "`lr`='x' must be .*; `images_per_s`=None must be a fin",
        ),
        ("eval", {"epoch": []}, r"`epoch`=\[\] must be a finite number"),
        ("scales", {"layers": {"fc": 1}}, "`layers`={'fc': 1} must be an object of fields"),
    ],
)
def test_a_record_that_lacks_what_is_read_of_it_is_none(run_dir, kind, change, match):
    path = run_dir / "metrics.jsonl"
    record = next(
        (r for r in read_records(path) if r["kind"] == kind), {"kind": kind, "step": 0, "epoch": 0.0}
    )
    path.write_text(json.dumps(record | change) + "\n")
    with pytest.raises(
        ValueError, match=rf"^line 1 of .*metrics\.jsonl is no record of kind '{kind}': {match}"
    ):
        read_records(path)


def test_a_log_that_is_gone_is_told_of_and_the_run_goes_on(digits, run_dir, caplog):
    """As often as the run is stopped; the records say where they begin."""
    (run_dir / "metrics.jsonl").unlink()
    assert train.run(killed_config(digits), run_dir, progress=False, stop=stop_after_step(1)).steps == 10
    assert any(
        "metrics.jsonl is missing: its records up to step 9 are lost" in text for text in warned(caplog)
    )
    assert told(run_dir)[0] == {"kind": "resumed", "step": 9, "note": "the records before this step are lost"}
    assert train.run(killed_config(digits), run_dir, progress=False).finished
    assert [r["step"] for r in told(run_dir) if r["kind"] == "train"] == [12, 15, 18]


def test_a_log_that_is_gone_after_the_last_step_leaves_a_result(digits, tmp_path):
    """The last evaluation, which was in it, is made again."""
    config = tiny_config("plain", digits, epochs=1)
    done = train.run(config, tmp_path, progress=False)
    for name in ("metrics.jsonl", "summary.json"):
        (tmp_path / name).unlink()
    again = train.run(config, tmp_path, progress=False)
    assert again.finished
    assert (again.test, again.test_count) == (done.test, done.test_count)
    assert [(r["kind"], r["step"]) for r in told(tmp_path)] == [("resumed", 6), ("eval", 6)]


def test_every_cut_of_a_log_is_found(run_dir):
    """Cut anywhere, it lacks records of the checkpoint, or only what is not of it."""
    path = run_dir / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    last = max(i for i, line in enumerate(lines) if json.loads(line)["kind"] == "train")
    check_records(path, 9, log_every=3)
    for count in range(len(lines)):
        path.write_bytes(b"".join(lines[:count]))
        if count > last:
            check_records(path, 9, log_every=3)
        else:
            with pytest.raises(ValueError, match="was cut or changed"):
                check_records(path, 9, log_every=3)


def test_records_tell_the_time(stopped):
    records = read_records(stopped / "metrics.jsonl")
    assert records
    assert all(record["time"][:2] == "20" and record["time"][10] == "T" for record in records)


# -- manifests
# ---


def manifest_of(folder):
    return json.loads((folder / "manifest.json").read_text())


def drop_a_file_from_the_manifest(folder, values):
    name = next(iter(values["files"]))
    del values["files"][name]
    return f"manifest.json leaves 1 files out, the first of them {name}"


def rename_a_key(folder, values):
    values["flies"] = values.pop("files")
    return "manifest.json cannot be read"


def rename_the_size(folder, values):
    entry = next(iter(values["files"].values()))
    entry["size"] = entry.pop("bytes")
    return "manifest.json cannot be read"


def put_a_list(folder, values):
    values["files"] = list(values["files"])
    return "manifest.json cannot be read"


def name_a_file_outside(folder, values):
    values["files"]["../8/manifest.json"] = {"bytes": 1, "blake2b": ""}
    return "manifest.json cannot be read"


def list_nothing(folder, values):
    values["files"] = {}
    return r"manifest.json leaves \d+ files out"


def lose_an_item(folder, values):
    shutil.rmtree(folder / "progress")
    values["files"] = {n: e for n, e in values["files"].items() if not n.startswith("progress/")}
    return "manifest.json has no file of progress"


def nest_deeply(folder, values):
    values["files"] = json.loads("[" * 100 + "]" * 100)
    return "manifest.json cannot be read"


SPOILT = (
    drop_a_file_from_the_manifest,
    rename_a_key,
    rename_the_size,
    put_a_list,
    name_a_file_outside,
    list_nothing,
    lose_an_item,
    nest_deeply,
)


def find_the_one_before(run_dir, caplog, says):
    """Reading and writing; the checkpoint of step 9 is spoilt, and `says` why."""
    caplog.clear()
    with Checkpoints(run_dir / "checkpoints") as reader:
        assert (reader.latest, reader.find("latest")) == (8, 8)
    with Checkpoints(run_dir / "checkpoints", writing=True, keep_last=2) as writer:
        assert writer.latest == 8
    pattern = rf"the checkpoint of step 9 in .*{says}"
    assert any(re.search(pattern, text) for text in warned(caplog)), warned(caplog)


@pytest.mark.parametrize("spoil", SPOILT)
def test_a_damaged_manifest_is_no_whole_checkpoint(run_dir, caplog, spoil):
    folder = run_dir / "checkpoints" / "9"
    values = manifest_of(folder)
    says = spoil(folder, values)
    (folder / "manifest.json").write_text(json.dumps(values))
    find_the_one_before(run_dir, caplog, says)


def test_a_manifest_that_is_a_folder_or_nested_without_end(run_dir, caplog):
    path = run_dir / "checkpoints" / "9" / "manifest.json"
    path.write_text('{"files":' * 100_000)
    assert checkpoint.manifest_problem(path.parent) == "its manifest.json cannot be read"
    path.unlink()
    path.mkdir()
    find_the_one_before(run_dir, caplog, "")


def test_files_where_folders_should_be(run_dir, caplog):
    folder = run_dir / "checkpoints"
    shutil.rmtree(folder / "9" / "model")
    (folder / "9" / "model").write_text("")
    assert "cannot be read: Not a directory" in str(checkpoint.manifest_problem(folder / "9"))
    shutil.rmtree(folder / "9")
    (folder / "9").write_text("mine")
    (folder / "damaged").write_text("also mine")
    with Checkpoints(folder) as reader:
        assert reader.latest == 8
    with Checkpoints(folder, writing=True, keep_last=2) as writer:
        assert writer.latest == 8
    assert (folder / "damaged-2" / "9").read_text() == "mine"
    assert (folder / "damaged").read_text() == "also mine"


def test_folders_that_only_look_like_a_step(digits, run_dir):
    """Python takes them for numbers."""
    for name in ("030", "٣", "²", "1_0", " 11"):
        shutil.copytree(run_dir / "checkpoints" / "9", run_dir / "checkpoints" / name)
    with Checkpoints(run_dir / "checkpoints") as reader:
        assert reader.latest == 9
        for asked in ("٣", "1_0", "²"):
            with pytest.raises(ValueError, match="must be latest, best or the number of a step"):
                reader.find(asked)
    assert train.run(killed_config(digits), run_dir, progress=False).finished


def test_a_hidden_file_of_the_system_does_no_harm(run_dir):
    (run_dir / "checkpoints" / "9" / ".DS_Store").write_text("")
    assert checkpoint.manifest_problem(run_dir / "checkpoints" / "9") is None
    (run_dir / "checkpoints" / "9" / "model" / "more").write_text("")
    assert "leaves 1 files out, the first of them model/more" in str(
        checkpoint.manifest_problem(run_dir / "checkpoints" / "9")
    )


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["files", "bytes", "blake2b", "a\0b", "/etc", "kind", "step"]), inner
        )
    ),
    max_leaves=10,
)


@given(values=JSON, files=JSON, entry=JSON, cut=st.integers(0, 400))
@settings(max_examples=200, deadline=None)
def test_no_manifest_but_the_true_one_is_whole(tmp_path_factory, stopped, values, files, entry, cut):
    """Whatever stands in it, the answer is what is wrong."""
    folder = tmp_path_factory.getbasetemp() / "fuzzed"
    if not folder.exists():
        shutil.copytree(stopped / "checkpoints" / "9", folder)
    true = manifest_of(stopped / "checkpoints" / "9")
    name = sorted(true["files"])[0]
    candidates = (
        json.dumps(values),
        json.dumps({"files": files}),
        json.dumps({"files": {**true["files"], name: entry}}),
        json.dumps(true)[:-cut] if cut else "",
    )
    for text in candidates:
        (folder / "manifest.json").write_text(text, encoding="utf-8")
        assert isinstance(checkpoint.manifest_problem(folder), str)


# -- JSON
# ---


@pytest.mark.parametrize(
    ("file", "change", "match"),
    [
        ("config.json", {"task": "clasify"}, r"`task`='clasify' .*did you mean 'classify'"),
        ("config.json", {"seed": "0", "epochs": 0.5}, "`seed`='0' must be .*; `epochs`=0.5 must be a whole"),
        (
            "dataset.json",
            {"class_names": 3},
            r"dataset\.json is damaged .*: `class_names`=3 must hold texts; rem",
        ),
        ("dataset.json", {"channels": "1"}, "`channels`='1' must be a whole number; remove its folder"),
        ("dataset.json", {"image_shape": [8, 8]}, r"`image_shape`=\(8, 8\) must hold whole numbers"),
        ("summary.json", {"test": None}, r"summary\.json is damaged .*: `test`=None must be an object"),
        (
            "summary.json",
            {"test": {"accuracy": "x"}},
            r"`test`={'accuracy': 'x'} must be an object of numbers",
        ),
        (
            "summary.json",
            {"wall_s": None, "test_count": "x"},
            "`test_count`='x' must be .*; `wall_s`=None must",
        ),
    ],
)
def test_a_value_of_another_kind_is_named_with_its_file(run_dir, stopped_summary, file, change, match):
    run, path = RunFolder(run_dir), run_dir / file
    config, _ = run.read()
    run.finish(stopped_summary)
    assert run.finished(config) == dataclasses.replace(stopped_summary, reused=True)
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=match) as error:
        run.finished(config) if file == "summary.json" else run.read()
    assert str(run_dir) in str(error.value)


@contextlib.contextmanager
def named(folder):
    """A ValueError names the folder."""
    try:
        yield
    except ValueError as error:
        if str(folder) not in str(error):
            raise AssertionError(f"the message does not name its file: {error}") from error


@given(text=st.text(max_size=40) | JSON.map(json.dumps))
@settings(max_examples=100, deadline=None)
def test_records_of_a_run_are_read_or_refused_by_name(text, tmp_path_factory):
    """config.json, dataset.json, summary.json, progress.json and the log, whatever they hold."""
    folder = tmp_path_factory.getbasetemp() / "records"
    for name in ("config.json", "dataset.json", "summary.json", "progress.json", "metrics.jsonl"):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        whole = {"config.json": train.to_json(train.Config()), "dataset.json": "{}", name: text + "\n"}
        for file, content in whole.items():
            (folder / file).write_text(content, encoding="utf-8")
        run = RunFolder(folder)
        for read in (run.read, lambda run=run: run.finished(train.Config()), run.check_progress):
            with contextlib.suppress(FileNotFoundError), named(folder):
                read()


def test_depth_is_bounded():
    for depth, inside in ((50, True), (51, False)):
        text = "[" * depth + "]" * depth
        if inside:
            jsontext.parse(text, "x")
        else:
            with pytest.raises(
                ValueError, match=r"^x has more than 50 lists and objects inside one another$"
            ):
                jsontext.parse(text, "x")
        jsontext.parse(text, "x", depth=None)
    with pytest.raises(ValueError, match=r"^x is nested too deeply to be read$"):
        jsontext.parse("[" * 10**6, "x", depth=None)
    with pytest.raises(ValueError, match=r"^x is not JSON: "):
        jsontext.parse("1" * 5000, "x")


@given(text=st.text(max_size=20) | JSON.map(json.dumps))
@settings(max_examples=100, deadline=None)
def test_other_records_are_read_or_refused_by_name(text, tmp_path_factory):
    """Of a deployment and of a converted file."""
    folder = tmp_path_factory.getbasetemp() / "others"
    (folder / "weights").mkdir(parents=True, exist_ok=True)
    for name, read in (("deploy.json", deploy.load_deployed), ("convert.json", interop.load_converted)):
        (folder / name).write_text(text, encoding="utf-8")
        # "null" is as good as no record.
        with pytest.raises((ValueError, FileNotFoundError), match=re.escape(str(folder))):
            read(folder)


# -- what is said
# ---


def test_a_run_that_cannot_write_its_first_checkpoint_does_not_say_that_nothing_is_lost(
    digits, tmp_path, monkeypatch
):
    def full(folder, **notes):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(checkpoint, "write_manifest", full)
    with pytest.raises(OSError, match=r"^cannot write the checkpoint of step 4: No space left") as error:
        train.run(killed_config(digits), tmp_path / "run", progress=False)
    assert "; no checkpoint was written before. Make it possible to write there" in str(error.value)
    assert "lost" not in str(error.value)


def test_a_picture_overwrites_neither_its_image_nor_another_file(tmp_path):
    trained = types.SimpleNamespace(config=train.Config(task="detect"))
    image, other = tmp_path / "image.png", tmp_path / "other.png"
    image.write_bytes(b"mine")
    other.write_bytes(b"also mine")
    (tmp_path / "link.png").symlink_to(image)
    for out, said in (
        (image, "is the image itself"),
        (tmp_path / "link.png", "is the image itself"),
        (other, "there"),
    ):
        with pytest.raises(FileExistsError, match=rf"`out` .*{said}.*give another name"):
            gallery.predict(trained, image, out)  # pyright: ignore[reportArgumentType]
    assert (image.read_bytes(), other.read_bytes()) == (b"mine", b"also mine")
