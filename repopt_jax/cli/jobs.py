"""A command that several processes carry out together, and one that must be alone."""

import contextlib
import io
import os
import sys
from collections.abc import Callable, Iterator

from repopt_jax.cli.arguments import Arguments, UsageError, whole_number
from repopt_jax.cli.errors import fail, first_line, report


def joined(act: Callable[[Arguments], int]) -> Callable[[Arguments], int]:
    """A command of a job: of the processes that the flags or the environment tell of, or of this one."""

    def act_in_job(arguments: Arguments) -> int:
        with _in_job(arguments):
            return act(arguments)

    return act_in_job


def alone(act: Callable[[Arguments], int]) -> Callable[[Arguments], int]:
    """A command of one process, which several would do at once in the same folder."""

    def act_alone(arguments: Arguments) -> int:
        from repopt_jax.train import processes

        if processes.cluster(os.environ) == "slurm":
            raise UsageError("this command is one process, and this is a SLURM step of several: use srun -n1")
        return act(arguments)

    return act_alone


@contextlib.contextmanager
def _in_job(arguments: Arguments) -> Iterator[None]:
    """Joins the job of several processes that the flags or the environment tell of. Only the first of them
    writes to standard output, and one that fails ends at once."""
    flags = arguments.flags
    count, index = (
        whole_number(name, flags[name]) if flags[name] else None for name in ("processes", "process")
    )
    from repopt_jax.train import processes

    processes.join(flags["coordinator"], count, index)
    import jax

    if jax.process_count() == 1:
        yield
        return
    try:
        with contextlib.redirect_stdout(io.StringIO() if jax.process_index() else sys.stdout):
            yield
    except BaseException as error:
        # Leaving by the interpreter's way would wait for the others, who wait for this one in an exchange:
        # they learn of its end by its connections, which the system closes.
        os._exit(_end_of_process(error))


def _end_of_process(error: BaseException) -> int:
    """Says why this process of several ends, and gives its exit code."""
    import traceback

    import jax

    code = report(error)
    if code is None and isinstance(error, jax.errors.JaxRuntimeError):
        code = fail(
            error,
            code=1,
            text=f"process {jax.process_index()} ends: {first_line(error)}. Most often another process of "
            "the job has ended or cannot be reached: see what the others say, then run the command again",
        )
    elif code is None:
        traceback.print_exception(error)
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    return code
