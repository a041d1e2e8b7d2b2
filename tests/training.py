"""A network and a config small enough to train in a test; also run as a program, to be killed.

    python tests/training.py OUT_DIR DATA_DIR MOMENT NUMBER

trains `killed_config` on four devices and kills itself at a moment: see `MOMENTS`.
"""

import contextlib
import functools
import json
import logging
import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
from flax import nnx
from orbax.checkpoint import v1 as ocp

from repopt_jax import models, train
from repopt_jax.train import checkpoint, loop
from repopt_jax.train.checkpoint import Checkpoints
from repopt_jax.train.rundir import read_records

STEPS = 18  # of a whole run of `tiny_config`
# Numbers of a record that depend on the clock.
CLOCK = ("images_per_s", "data_wait", "time")

for name, last_width in (("tiny", 8), ("tiny-wider", 12)):
    row = models.VGGVariant(name, (2, 1, 1, 1), (4, 4, 4, 8, last_width), (1, 1, 2, 1, 1))
    models.register(models.Entry(name, models.vgg, row))


def tiny_config(mode: str, data_dir: str | Path, **changes) -> train.Config:
    """Three epochs of six steps; a checkpoint at the end alone, as one takes a tenth of such a run."""
    config = train.Config(
        name="tiny", epochs=3, batch_size=8, eval_batch_size=12, log_every=3, checkpoint_every=STEPS
    )
    config.model = train.ModelConfig(name="tiny", mode=mode)
    config.data = train.DataConfig(
        source="digits", data_dir=str(data_dir), image_size=8, crop_padding=1, train_limit=50, eval_limit=37
    )
    config.optim = train.OptimConfig(learning_rate=0.05, warmup_epochs=0.5, label_smoothing=0.1)
    for name, value in changes.items():
        owner, _, field = name.rpartition("__")
        setattr(getattr(config, owner) if owner else config, field, value)
    return config


def killed_config(data_dir: str | Path, **changes) -> train.Config:
    """A search, whose log has the statistics of its scales, with moving averages; checkpoints every four
    steps, inside epochs and inside windows of the log."""
    return tiny_config("search", data_dir, **{"optim__ema": 0.9, "checkpoint_every": 4, **changes})


def arrays(run_dir):
    """Every array of a run's last checkpoint: the network as the evaluation reads it, and all that is
    stored."""
    model = train.load_trained(run_dir).model
    with Checkpoints(Path(run_dir) / "checkpoints") as checkpoints:
        stored = str(checkpoints.directory / str(checkpoints.latest))
    found = ocp.checkpointables_metadata(stored).metadata
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    wanted = {
        name: jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=here), found[name])
        for name in ("model", "ema", "trainer")
        if name in found
    }
    network = nnx.to_pure_dict(nnx.state(model))
    return jax.device_get([network, ocp.load_checkpointables(stored, wanted)])


def told(run_dir):
    """The log without what depends on the clock."""
    return [
        {name: value for name, value in record.items() if name not in CLOCK}
        for record in read_records(Path(run_dir) / "metrics.jsonl")
    ]


def warned(caplog):
    return [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING and "repopt" in r.name]


def assert_same_run(run_dir, other):
    """Bit by bit."""
    jax.tree.map(np.testing.assert_array_equal, arrays(run_dir), arrays(other))
    assert told(run_dir) == told(other)
    first, second = (json.loads((Path(d) / "summary.json").read_text()) for d in (run_dir, other))
    for name in ("steps", "test_accuracy", "test_loss", "test_count", "train_parameters", "finished"):
        assert first[name] == second[name]


def checkpoints_in(run_dir):
    """The steps of those that count."""
    return sorted(int(p.parent.name) for p in (Path(run_dir) / "checkpoints").glob("*/manifest.json"))


def stop_at(number: int, act: Callable[[], object] = lambda: True) -> Callable[[], bool]:
    """Asked for the `number`-th time, what `act` gives; before, to go on."""
    asked = iter(range(1, 10**6))
    return lambda: next(asked) == number and bool(act())


def stop_after_step(number: int, act: Callable[[], object] = lambda: True) -> Callable[[], bool]:
    """As `stop_at`, without the questions of evaluations, which `tiny_config` makes at the end of an epoch: a
    step's own question is the first after its number of steps."""
    return stop_at(number + (number - 1) // 6 * 4, act)


@contextlib.contextmanager
def without_privileges():
    """Permissions do not bind the superuser, as whom tests may run in a container."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def _kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _save_in_the_foreground() -> None:
    save = Checkpoints.save
    Checkpoints.save = lambda *args, **options: save(*args, **{**options, "wait": True})


def _kill_in_step(number: int) -> None:
    """While the `number`-th step of this process runs, and no save."""
    _save_in_the_foreground()
    stepped, steps = loop.Feeder.step_started, iter(range(1, STEPS + 1))

    def watched(*args, **options):
        if next(steps) == number:
            _kill()
        stepped(*args, **options)

    loop.Feeder.step_started = watched


def _kill_in_evaluation(number: int) -> None:
    """Before the third batch of the evaluation at the end of epoch `number`, while there is no save."""
    _save_in_the_foreground()
    loop.run = functools.partial(loop.run, stop=stop_at(10 * (number - 1) + 9, _kill))


def _kill_in_save(when: int) -> None:
    """As soon as files of the checkpoint of step `when` appear."""
    save = Checkpoints.save

    def watched(self, step, *args, **kwargs):
        if step == when:
            threading.Thread(target=_kill_at_first_file, args=(self.directory, step), daemon=True).start()
        save(self, step, *args, **kwargs)

    Checkpoints.save = watched


def _kill_at_first_file(directory: Path, step: int) -> None:
    while not any(path.name.startswith(str(step)) for path in directory.iterdir()):
        pass
    _kill()


def _kill_before_renaming(when: int) -> None:
    """When all files of the checkpoint of step `when` are written, beside their final place."""
    rename = os.rename

    def watched(source, target, **options):
        if Path(target).name == str(when):
            _kill()
        rename(source, target, **options)

    os.rename = watched


def _kill_before_manifest(when: int) -> None:
    """When the checkpoint of step `when` is in its place, before it counts."""
    write = checkpoint.write_manifest

    def watched(folder, **notes):
        if folder.name == str(when):
            _kill()
        write(folder, **notes)

    checkpoint.write_manifest = watched


def _kill_at_random(number: int) -> None:
    """In step `number` // 1000 of this process, after as many thousandths of the time that the step before
    took as `number` % 1000 says: in the step, in a save, or between them, on a machine of any speed."""
    which, share = divmod(number, 1000)
    stepped, began = loop.Feeder.step_started, []

    def watched(*args, **options):
        began.append(time.perf_counter())
        if len(began) == which:
            last = began[-1] - began[-2] if which > 1 else 0.0
            timer = threading.Timer(last * share / 1000, _kill)
            timer.daemon = True
            timer.start()
        return stepped(*args, **options)

    loop.Feeder.step_started = watched


def _limit_files(when: int) -> None:
    """From the checkpoint of step `when` on no file may grow beyond 15000 bytes: as on a full disk, some
    writes fail."""
    save = Checkpoints.save

    def limited(self, step, *args, **kwargs):
        if step == when:
            self.wait()
            resource.setrlimit(resource.RLIMIT_FSIZE, (15000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
        save(self, step, *args, **kwargs)

    Checkpoints.save = limited


MOMENTS = {
    "step": _kill_in_step,
    "evaluation": _kill_in_evaluation,
    "save": _kill_in_save,
    "renaming": _kill_before_renaming,
    "manifest": _kill_before_manifest,
    "random": _kill_at_random,
    "limit": _limit_files,
}


def main(out_dir: str, data_dir: str, moment: str, number: str) -> None:
    jax.config.update("jax_num_cpu_devices", 4)
    MOMENTS[moment](int(number))
    # Often, where the moment is any: then many of them are in a save.
    changes = {"checkpoint_every": 1} if moment == "random" else {}
    try:
        loop.run(killed_config(data_dir, **changes), out_dir, progress=False)
    except OSError as error:
        sys.exit(f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    main(*sys.argv[1:])
