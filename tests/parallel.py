"""The same training on one device, on several, and in several processes; also run as a program, for those.

    python tests/parallel.py OUT_DIR DATA_DIR CASES --coordinator=HOST:PORT --processes=N --process=I

has two devices. It trains by the cases of `IN_PROCESSES` whose numbers are in CASES, as in 0,2, and process 0
leaves the parameters of case k in OUT_DIR/k.npz.
"""

import contextlib
import socket
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from training import tiny_config

from repopt_jax.core import paths
from repopt_jax.detection import Detections
from repopt_jax.train import processes
from repopt_jax.train.build import build_program, open_feed
from repopt_jax.train.state import AXES, make_mesh, put_batch, put_state
from repopt_jax.train.tasks import allgather_detections

STEPS = 20
TESTS = Path(__file__).parent


class Case(NamedTuple):
    """One way to train: axes of the mesh, and the dtype of everything."""

    fsdp: int
    dtype: str


CASES = (Case(1, "float32"), Case(4, "float32"), Case(1, "float64"), Case(4, "float64"))
# The first, from the command line, in two processes: tests/test_processes.py.
IN_PROCESSES = CASES[1:]


def config_of(data_dir, fsdp: int, **changes):
    return tiny_config(
        "repopt",
        data_dir,
        **{
            "scales": "depth",
            "mesh__fsdp": fsdp,
            "optim__learning_rate": 0.02,
            "optim__weight_decay": 1e-3,
            **changes,
        },
    )


def train(data_dir, case: Case, *, devices=None, **changes):
    """The state after STEPS steps of the digits, on all devices of the job or on those given."""
    config = config_of(data_dir, case.fsdp, **changes)
    with jax.enable_x64(case.dtype == "float64"):
        feed = open_feed(config)
        mesh = make_mesh(config.mesh.fsdp, devices=devices)
        program, state = build_program(config, feed, mesh)
        state = put_state(jax.tree.map(lambda leaf: wide(leaf, case.dtype), whole(state)), program.sharding)
        batches = iter(feed.train)
        with contextlib.closing(batches):
            for _ in range(STEPS):
                batch = {name: wide(value, case.dtype) for name, value in next(batches).items()}
                state, _ = program.train_step(state, put_batch(batch, mesh))
        return state


def whole(tree):
    """The arrays of a tree, each as one NumPy array, in every process; gathered by one program."""
    mesh = jax.tree.leaves(tree)[0].sharding.mesh
    everywhere = jax.jit(lambda tree: tree, out_shardings=NamedSharding(mesh, PartitionSpec()))
    return jax.device_get(everywhere(tree))


def wide(leaf, dtype):
    return np.asarray(leaf).astype(dtype) if leaf.dtype in (np.float32, np.float64) else np.asarray(leaf)


def start(command, count: int, **options) -> list[subprocess.Popen]:
    """`command` with --process=0, 1, ... of one job."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    shared = [f"--coordinator=127.0.0.1:{port}", f"--processes={count}"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return [subprocess.Popen([*command, *shared, f"--process={i}"], **pipes, **options) for i in range(count)]


def ends_of(running, timeout=300) -> list[tuple[int, str, str]]:
    """(exit code, standard output, standard error) of each process; none outlives this."""
    try:
        texts = [process.communicate(timeout=timeout) for process in running]
    finally:
        for process in running:
            process.kill()
            process.communicate()
    return [(process.returncode, *text) for process, text in zip(running, texts, strict=True)]


def main() -> None:
    out_dir, data_dir, cases, *flags = sys.argv[1:]
    coordinator, count, index = (flag.partition("=")[2] for flag in flags)
    jax.config.update("jax_num_cpu_devices", 2)
    processes.join(coordinator, int(count), int(index))
    for k in map(int, cases.split(",")):
        params = whole(train(data_dir, IN_PROCESSES[k]).params)
        if processes.is_first():
            np.savez(Path(out_dir) / f"{k}.npz", **paths.named_leaves(params)[0])
    rows = gathered_rows()
    np.savez(Path(out_dir) / f"rows{index}.npz", **rows)


def gathered_rows():
    """What an evaluation of a detector gathers of a batch with numbered rows, on a mesh whose devices are
    not in the order of the processes, as those of a TPU pod are not."""
    a, b, c, d = jax.devices()
    mesh = jax.sharding.Mesh(np.array([a, c, d, b]).reshape(4, 1), AXES)
    mine = np.arange(4, dtype=np.int32) + 4 * jax.process_index()
    images = put_batch({"image": mine}, mesh)["image"]
    found = Detections(*[images] * len(Detections._fields))
    found, real = allgather_detections(found, {"index": mine}, mesh)
    one_after_the_other = jax.experimental.multihost_utils.process_allgather(mine, tiled=True)
    return {"found": found[0], "index": real["index"], "by_process": one_after_the_other}


if __name__ == "__main__":
    main()
