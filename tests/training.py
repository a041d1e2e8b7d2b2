"""A network and a config small enough to train in a test; also run as a program, to be killed.

    python tests/training.py OUT_DIR KIND DATA_DIR step|save NUMBER

trains `tiny_config` on four devices and kills itself: after a step, or while it writes a checkpoint.
"""

import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import jax

from repopt_jax import train
from repopt_jax.models import VGG_VARIANTS, VGGVariant
from repopt_jax.train.checkpoint import Checkpoints

for name, last_width in (("tiny", 8), ("tiny-wider", 12)):
    VGG_VARIANTS[name] = VGGVariant(name, (2, 1, 1, 1), (4, 4, 4, 8, last_width), (1, 1, 2, 1, 1))


def tiny_config(kind: str, data_dir: str | Path, **changes) -> train.Config:
    """Three epochs of six steps; checkpoints every four, inside epochs and inside windows of the log."""
    config = train.Config(
        name="tiny", epochs=3, batch_size=8, eval_batch_size=12, log_every=3, checkpoint_every=4
    )
    config.model = train.ModelConfig(variant="tiny", kind=kind)
    config.data = train.DataConfig(
        source="digits", data_dir=str(data_dir), image_size=8, crop_padding=1, train_limit=50, eval_limit=37
    )
    config.optim = train.OptimConfig(learning_rate=0.05, warmup_epochs=0.5, label_smoothing=0.1)
    for name, value in changes.items():
        owner, _, field = name.rpartition("__")
        setattr(getattr(config, owner) if owner else config, field, value)
    return config


def _kill_after_step(number: int) -> Callable[[], bool]:
    asked = iter(range(1, number + 1))

    def kill_or_go_on() -> bool:
        if next(asked) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return False

    return kill_or_go_on


def _kill_in_save(when: int) -> None:
    """From now on, this process is killed as soon as files of the checkpoint of step `when` appear."""
    save = Checkpoints.save

    def watched(self, step, *args, **kwargs):
        if step == when:
            threading.Thread(target=_kill_at_first_file, args=(self.directory, step), daemon=True).start()
        save(self, step, *args, **kwargs)

    Checkpoints.save = watched


def _kill_at_first_file(directory: Path, step: int) -> None:
    while not any(path.name.startswith(str(step)) for path in directory.iterdir()):
        pass
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", 4)
    out_dir, kind, data_dir, moment, number = sys.argv[1:]
    if moment == "save":
        _kill_in_save(int(number))
    stop = _kill_after_step(int(number)) if moment == "step" else None
    train.run(tiny_config(kind, data_dir), out_dir, progress=False, stop=stop)
