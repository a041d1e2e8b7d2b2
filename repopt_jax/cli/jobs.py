"""Commands that run in several processes, and commands that must run in one."""

import argparse
import contextlib
import functools
import io
import os
import sys
from collections.abc import Callable, Iterator

from repopt_jax.cli.errors import UsageError, fail, first_line, report

Command = Callable[[argparse.Namespace], int]


def distributed(command: Command) -> Command:
    """Makes a command join a job of several processes, given by options or found in the environment.

    Without such a job the command runs in this process only.
    """

    @functools.wraps(command)
    def run(args: argparse.Namespace) -> int:
        with _joined(args):
            return command(args)

    return run


def single_process(command: Command) -> Command:
    """Makes a command refuse to run in a SLURM step of several tasks, which would all write to one folder."""

    @functools.wraps(command)
    def run(args: argparse.Namespace) -> int:
        from repopt_jax.train import processes

        if processes.cluster(os.environ) == "slurm":
            raise UsageError(
                "this command runs in one process, and this is a SLURM step of several: use srun -n1"
            )
        return command(args)

    return run


@contextlib.contextmanager
def _joined(args: argparse.Namespace) -> Iterator[None]:
    """Joins a job: only the first process writes to standard output, and one that fails exits at once."""
    from repopt_jax.train import processes

    processes.join(args.coordinator, args.processes, args.process)
    import jax

    if jax.process_count() == 1:
        yield
        return
    try:
        with contextlib.redirect_stdout(io.StringIO() if jax.process_index() else sys.stdout):
            yield
    except BaseException as error:
        # The interpreter's ordinary exit would wait for the other processes, which wait for this one in a
        # collective operation. They notice that its connections are closed.
        os._exit(_exit_code(error))


def _exit_code(error: BaseException) -> int:
    """Prints why this process of a job ends, and returns its exit code."""
    import traceback

    import jax

    code = report(error)
    if code is None and isinstance(error, jax.errors.JaxRuntimeError):
        code = fail(
            error,
            code=1,
            text=f"process {jax.process_index()} ends: {first_line(error)}. Most often another process of "
            "the job has ended or cannot be reached: see what the others print, then run the command again",
        )
    elif code is None:
        traceback.print_exception(error)
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    return code
