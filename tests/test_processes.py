"""Jobs of several processes on this machine: joining, failing together, and the command line in two."""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import chex
import jax
import parallel
import pytest
import tolerances
from flax import nnx

from repopt_jax import train
from repopt_jax.train import processes
from repopt_jax.train.rundir import read_records

pytestmark = pytest.mark.once

ROOT = Path(__file__).parent.parent


PROGRAM = """
import sys
from repopt_jax.cli.main import main
from repopt_jax.train import processes
processes.HEARTBEAT_S = 15
{more}
sys.exit(main())
"""
# In place of a training, which takes long to compile: the processes exchange texts for ever.
EXCHANGING = """
from pathlib import Path
from repopt_jax import train
def exchange(config, out_dir, **options):
    while True:
        texts = processes.gather_texts(f"begun{int(processes.is_first())}")
        for text in texts:
            Path(out_dir).with_name(text).touch()
train.run = exchange
"""


@pytest.fixture
def repopt():
    """Starts `repopt ARGUMENTS` in two processes of two devices each, of which one that dies is noticed after
    15 seconds in place of 100; they run lines of `more` before."""

    def start(*arguments, more="", **environment):
        flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=2"
        variables = {**os.environ, "XLA_FLAGS": flags, **environment}
        program = [sys.executable, "-c", PROGRAM.format(more=more), *map(str, arguments)]
        return parallel.start(program, 2, env=variables)

    return start


def training(digits, out, *more):
    """A short run of the digits with every part of the loop: two epochs of 4 steps."""
    config = ROOT / "configs" / "digits.py"
    fields = {"data.data_dir": digits, "epochs": 2, "batch_size": 16, "log_every": 4, "checkpoint_every": 4}
    fields |= {"data.train_limit": 64, "data.eval_limit": 20, "eval_batch_size": 8, "optim.ema": 0.9}
    overrides = [f"--config.{name}={value}" for name, value in fields.items()]
    return ["train", f"--config={config}:depth", *overrides, *more, f"--out={out}"]


def arrays(run_dir):
    return jax.device_get(nnx.to_pure_dict(nnx.state(train.load_trained(run_dir).model)))


def sentences(error_text):
    return [line for line in error_text.splitlines() if line.startswith("repopt: ")]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("node0:1234", 2, None), "--process=None belong together"),
        (("", 2, 0), "--coordinator=None, --processes=2 and --process=0 belong together"),
        (("node0:1234", 2, 2), "--process=2 of --processes=2: they are counted from 0 to 1"),
        (("node0", 2, 1), "--coordinator='node0' must be host:port"),
    ],
)
def test_half_a_job_is_refused(given, message):
    with pytest.raises(ValueError, match=message):
        processes.join(*given)


def test_nobody_answers(monkeypatch):
    monkeypatch.setattr(processes, "WAIT_S", 0)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    with pytest.raises(OSError, match=f"nobody answers at --coordinator=127.0.0.1:{port} .*start that one"):
        processes.join(f"127.0.0.1:{port}", 2, 1)


def test_one_process_needs_nothing(monkeypatch):
    for name in ("SLURM_STEP_NODELIST", "SLURM_NTASKS"):
        monkeypatch.delenv(name, raising=False)
    processes.join()
    processes.join("localhost:1", 1, 0)
    assert processes.is_first()
    assert processes.gather_texts("a") == ["a"]
    assert processes.in_all_processes("count", lambda: 3) == 3


def test_clusters_are_told_by_their_environment(tmp_path, monkeypatch):
    step = {"SLURM_STEP_NODELIST": "node[1-2]", "SLURM_NTASKS": "8"}
    assert processes.cluster(step, devices=str(tmp_path)) == "slurm"
    assert processes.cluster({**step, "SLURM_NTASKS": "1"}, devices=str(tmp_path)) is None
    assert processes.cluster({}, devices=str(tmp_path)) is None
    (tmp_path / "vfio").mkdir()
    (tmp_path / "vfio" / "0").touch()
    monkeypatch.setattr(processes.importlib.util, "find_spec", lambda name: name == "libtpu")
    assert processes.cluster({}, devices=str(tmp_path)) == "tpu"
    assert processes.cluster({"JAX_PLATFORMS": "cpu"}, devices=str(tmp_path)) is None


@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash")
def test_a_job_of_slurm_hands_its_cores_to_its_tasks(tmp_path):
    """`srun`, which is another program here, reads their number from a variable of its own."""
    program = tmp_path / "srun"
    program.write_text('#!/bin/sh\necho "$SRUN_CPUS_PER_TASK cores: $*"\n')
    program.chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", ROOT / "scripts" / "slurm.sbatch", "--out=runs/B1"],
        env=environment | {"SLURM_CPUS_PER_TASK": "12"},
        capture_output=True,
        text=True,
    )
    assert done.stdout == "12 cores: repopt train --config.data.workers=7 --out=runs/B1\n", done.stderr


@pytest.fixture(scope="module")
def in_one_process(digits, tmp_path_factory):
    from repopt_jax.cli.main import main

    out = tmp_path_factory.mktemp("one") / "run"
    assert main(training(digits, out)) == 0
    return out


def test_two_processes_leave_the_run_of_one(digits, tmp_path, repopt, in_one_process):
    out = tmp_path / "run"
    (code, said, log), (other_code, other_said, other_log) = parallel.ends_of(repopt(*training(digits, out)))
    assert (code, other_code) == (0, 0), log + other_log
    assert "test accuracy" in said
    assert "test accuracy" not in other_said
    assert "epoch" not in other_log
    close = tolerances.PROCESSES
    chex.assert_trees_all_close(arrays(out), arrays(in_one_process), rtol=close, atol=close)
    kinds = [(record["kind"], record["step"]) for record in read_records(out / "metrics.jsonl")]
    assert kinds == [(r["kind"], r["step"]) for r in read_records(in_one_process / "metrics.jsonl")]
    summary = json.loads((out / "summary.json").read_text())
    assert (summary["steps"], summary["test_count"], summary["finished"]) == (8, 20, True)


# In the ordinary run the command line's tests stop one process, and above two end together.
@pytest.mark.long
def test_sigterm_stops_both_and_one_goes_on(digits, tmp_path, repopt, in_one_process):
    """SIGTERM to one of them; the run is finished by one process on four devices."""
    from repopt_jax.cli.main import main

    out = tmp_path / "run"
    long = ["--config.epochs=400", "--config.checkpoint_every=10000", "--config.eval_every=400"]
    running = repopt(*training(digits, out, *long))
    wait_for(running, lambda: read_records(out / "metrics.jsonl"))
    running[1].send_signal(signal.SIGTERM)
    ends = parallel.ends_of(running)
    assert [code for code, *_ in ends] == [143, 143], ends
    step = train.load_trained(out).step
    assert step > 0
    # Two epochs more than it had, so that it goes on with another number of processes.
    stopped = train.RunFolder(out).read()[0]
    assert stopped.epochs == 400
    epochs = step // 4 + 2
    rewrite(out, epochs=epochs)
    assert main(training(digits, out, *long, f"--config.epochs={epochs}")) == 0
    assert json.loads((out / "summary.json").read_text())["steps"] == epochs * 4


@pytest.mark.parametrize(
    "number",
    [
        pytest.param(signal.SIGKILL, id="dies"),
        pytest.param(signal.SIGSTOP, id="hangs", marks=pytest.mark.long),
    ],
)
def test_a_process_of_a_job_that_is_gone_ends_the_other(digits, tmp_path, repopt, number):
    """One that hangs sends no heartbeats; the other one says that it is gone."""
    running = repopt(*training(digits, tmp_path / "run"), more=EXCHANGING)
    wait_for(running, lambda: all((tmp_path / f"begun{i}").exists() for i in (0, 1)))
    running[1].send_signal(number)
    try:
        assert running[0].wait(90) not in (0, None)
    finally:
        running[1].kill()
    (_, _, log), _ = parallel.ends_of(running, timeout=60)
    assert "another process of the job has ended" in log or "another task died" in log, log


# The test above has this, and the next one, of a job that does not train.
@pytest.mark.long
def test_a_process_that_dies_ends_the_other(digits, tmp_path, repopt, in_one_process):
    """In a run that one process began, two went on with, and one finishes."""
    from repopt_jax.cli.main import main

    out, endless = tmp_path / "run", ("--config.checkpoint_every=10000", "--config.eval_every=400")
    shutil.copytree(in_one_process, out)
    (out / "summary.json").unlink()
    rewrite(out, epochs=400, checkpoint_every=10000, eval_every=400)
    running = repopt(*training(digits, out, *endless, "--config.epochs=400"))
    wait_for(running, lambda: read_records(out / "metrics.jsonl")[-1]["step"] > 8)
    running[1].kill()
    (code, _, log), _ = parallel.ends_of(running, timeout=60)
    assert code not in (0, None)
    assert "another process of the job has ended" in log or "another task died" in log, log
    assert train.load_trained(out).step == 8
    rewrite(out, epochs=4)
    assert main(training(digits, out, *endless, "--config.epochs=4")) == 0
    assert json.loads((out / "summary.json").read_text())["steps"] == 16


@pytest.mark.long
def test_a_process_that_hangs_ends_the_other(digits, tmp_path, repopt):
    """Stopped, it sends no heartbeats; the other one says that it is gone."""
    endless = ("--config.epochs=4000", "--config.checkpoint_every=10000", "--config.eval_every=4000")
    running = repopt(*training(digits, tmp_path / "run", *endless))
    wait_for(running, lambda: read_records(tmp_path / "run" / "metrics.jsonl"))
    os.kill(running[1].pid, signal.SIGSTOP)
    try:
        assert running[0].wait(90) not in (0, None)
    finally:
        os.kill(running[1].pid, signal.SIGCONT)
        running[1].kill()
    (_, _, log), _ = parallel.ends_of(running, timeout=60)
    assert "another process of the job has ended" in log or "another task died" in log, log


@pytest.mark.long
def test_a_process_that_dies_in_a_save_ends_the_other(digits, tmp_path, repopt):
    """There it is noticed by its heartbeats."""
    often = ("--config.epochs=400", "--config.checkpoint_every=1")
    running = repopt(*training(digits, tmp_path / "run", *often))
    wait_for(running, lambda: any((tmp_path / "run").glob("checkpoints/*/manifest.json")))
    running[1].kill()
    (code, *_), _ = parallel.ends_of(running, timeout=60)
    assert code not in (0, None)
    assert train.load_trained(tmp_path / "run").step > 0


def rewrite(run_dir, **fields):
    """Makes an unfinished run one of another config."""
    path = run_dir / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def wait_for(running, happened):
    """Looks ten times a second; the processes must live."""
    while not happened():
        with contextlib.suppress(subprocess.TimeoutExpired):
            running[0].wait(0.1)
        assert all(process.poll() is None for process in running), parallel.ends_of(running)


def test_data_that_one_process_does_not_see(tmp_path, repopt):
    """The other one says so as well, and neither hangs."""
    config = tmp_path / "config.py"
    config.write_text(
        "import jax\nfrom repopt_jax.train import load_config\n\n\n"
        "def get_config(arg):\n"
        f"    config = load_config({str(ROOT / 'configs' / 'digits.py')!r} + ':plain')\n"
        f"    here = {str(tmp_path / 'images')!r}\n"
        "    config.data.source = 'folder'\n"
        "    config.data.data_dir = here + ('' if jax.process_index() == 0 else '/nowhere')\n"
        "    return config\n"
    )
    (tmp_path / "images" / "train").mkdir(parents=True)
    ends = parallel.ends_of(repopt("train", f"--config={config}", f"--out={tmp_path / 'run'}"))
    assert [code for code, *_ in ends] == [1, 1], ends
    for _, _, log in ends:
        assert len(sentences(log)) == 1, log
    assert "nowhere" in sentences(ends[0][2])[0] or "train" in sentences(ends[0][2])[0]
    assert not (tmp_path / "run").exists()
