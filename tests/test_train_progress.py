"""The next batch in a thread of its own, and the time that the device waits for it."""

import contextlib
import logging
import re
import threading

import pytest
from training import tiny_config, warned

from repopt_jax.train import loop, progress


class Batches:
    """An iterator that gives a batch when it is told to, at a time that is told."""

    def __init__(self):
        self.index, self.go = 0, threading.Semaphore(0)

    def __next__(self):
        assert self.go.acquire(timeout=60)
        self.index += 1
        if self.index == 4:
            raise OSError("the disk is gone")
        return self.index

    def get_state(self):
        return {"next_index": self.index}


class Result:
    """Of a step, that is done when it is told to."""

    def __init__(self):
        self.done = threading.Event()

    def block_until_ready(self):
        assert self.done.wait(60)
        return self


@pytest.fixture
def clock(monkeypatch):
    """Seconds that pass when a test says so."""

    class Clock:
        now = 0.0

        def __init__(self):
            self.then = []  # what happens right after the clock is read

        def perf_counter(self):
            read = self.now
            while self.then:
                self.then.pop()()
            return read

    found = Clock()
    monkeypatch.setattr(progress, "time", found)
    return found


def test_the_feeder_measures_what_the_device_waits(clock):
    batches, steps = Batches(), [Result() for _ in range(3)]
    feeder = progress.Feeder(batches)
    with contextlib.closing(feeder):
        feeder.request()
        assert feeder.position == {"next_index": 0}
        batches.go.release()
        assert feeder.take() == 1
        feeder.step_started(steps[0])
        assert feeder.position == {"next_index": 1}
        # The step takes 2 seconds, the batch, which is wanted by then, 5: the device waits for 3.
        clock.now = 2.0
        steps[0].done.set()
        assert feeder._done.result() == 2.0

        def comes_at_five():
            clock.now = 5.0
            batches.go.release()

        clock.then.append(comes_at_five)
        assert feeder.take() == 2
        feeder.step_started(steps[1])
        assert feeder.waited() == 3.0
        # The batch takes 1 second, the step 4: nobody waits.
        clock.now = 6.0
        batches.go.release()
        feeder._requested.result()
        clock.now = 9.0
        steps[1].done.set()
        feeder._done.result()
        assert feeder.take() == 3
        feeder.step_started(steps[2])
        assert feeder.waited() == 0.0
        # An error of the thread comes out where its batch is taken.
        batches.go.release()
        with pytest.raises(OSError, match="the disk is gone"):
            feeder.take()
        steps[2].done.set()
    assert not [t for t in threading.enumerate() if t.name.startswith(("next-batch", "step-done"))]


def test_a_pause_of_the_run_is_no_waiting(clock):
    """An evaluation of 10 seconds, in which the batch comes after 4: the device had other work."""
    batches, step = Batches(), Result()
    with contextlib.closing(progress.Feeder(batches)) as feeder:
        feeder.request()
        batches.go.release()
        feeder.take()
        feeder.step_started(step)
        clock.now = 1.0
        step.done.set()
        feeder._done.result()
        clock.now = 4.0
        batches.go.release()
        feeder._requested.result()
        clock.now = 10.0
        feeder.take()
        feeder.step_started(step, more=False)
        assert feeder.waited() == 0.0


def test_waiting_is_warned_of_once_an_epoch(caplog):
    warning = progress.WaitWarning("run", workers=3)
    looks = [(0.5, 1.0, 0), (0.05, 1.0, 0), (0.5, 0.1, 0), (0.5, 1.0, 0), (0.6, 1.0, 0), (0.25, 1.0, 1)]
    for share, seconds, epoch in looks:
        warning.check({"epoch": epoch, "data_wait": share, "images_per_s": 1234.5}, seconds=seconds)
    said = warned(caplog)
    assert [text.partition(" of")[0] for text in said] == ["run: 50 %", "run: 25 %"]
    assert "1,234 images/s" in said[0]
    assert "`data.workers` (now 3; this machine has" in said[0]


# -- lines without a terminal
# ---


@pytest.fixture
def seconds(monkeypatch):
    """The clock of the bar, in a list of one number."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "perf_counter", lambda: now[0])
    return now


@pytest.fixture
def lines(caplog):
    """What has been logged, without the name, each with the time of day before it."""
    caplog.set_level(logging.INFO, logger="repopt_jax")

    def found():
        said = [record.getMessage() for record in caplog.records]
        assert all(re.match(r"\d\d:\d\d:\d\d run: ", line) for line in said), said
        return [line[14:] for line in said]

    return found


def make_bar():
    return progress.ProgressBar("run", "classify", split="test", shown=False)


def test_a_long_epoch_has_a_first_line_within_a_minute_and_then_fewer(seconds, lines):
    with make_bar() as bar:
        bar.say("compiling")
        bar.begin(total=100_000, start=0)
        told = []
        for step in range(1, 7201):  # two hours
            seconds[0] = float(step)
            before = len(lines())
            bar.tick(step)
            told += [step] if len(lines()) > before else []
            if step == 20:
                bar.update({"step": 20, "loss": 2.5, "images_per_s": 64.0, "data_wait": 0.0})
    assert told[:6] == [30, 90, 210, 450, 930, 1530]
    assert told[-1] - told[-2] == progress.LONGEST_S
    assert lines()[:2] == ["compiling", "step 30 of 100000, loss 2.500, 64 images/s"]


def test_short_epochs_need_no_other_lines(seconds, lines):
    with make_bar() as bar:
        bar.begin(total=100, start=0)
        for step in range(1, 101):
            seconds[0] += 5.0
            bar.tick(step)
            if step % 4 == 0:
                bar.end_epoch(step // 4, None)
    assert lines() == [f"epoch {n}" for n in range(1, 26)]


def test_data_that_take_long_to_open_are_said_and_others_not(lines):
    with make_bar() as bar:
        bar.say("loading data", after=600)
        bar.say("compiling")
    assert lines() == ["compiling"]
    with make_bar() as bar:
        bar.say("loading data", after=0.001)
        assert bar._waiting is not None
        bar._waiting.join(60)
    assert lines() == ["compiling", "loading data"]


def test_a_run_says_that_its_data_take_long_before_they_are_open(digits, tmp_path, monkeypatch, caplog):
    """Where standard error is no terminal, here as in a pipe: data that are open once this has been said."""
    said = threading.Event()

    class Seen(logging.Handler):
        def emit(self, record):
            if record.getMessage().endswith(" tiny: loading data"):
                said.set()

    def slow(config):
        assert said.wait(60)
        raise LookupError("the data are open")

    logger, handler = logging.getLogger(progress.__name__), Seen()
    caplog.set_level(logging.INFO, logger=progress.__name__)
    monkeypatch.setattr(loop, "LOADING_S", 0.001)
    monkeypatch.setattr(loop, "open_feed", slow)
    logger.addHandler(handler)
    try:
        with pytest.raises(LookupError, match="the data are open"):
            loop.run(tiny_config("plain", digits), tmp_path / "run")
    finally:
        logger.removeHandler(handler)
