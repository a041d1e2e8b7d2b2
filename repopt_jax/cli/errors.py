"""How the command line tells what went wrong: one sentence on standard error, and an exit code."""

import os
import sys

from repopt_jax.cli.arguments import UsageError

# Packages that are needed for some commands only -> the extra that brings them.
EXTRAS = {
    "matplotlib": "quickstart",
    "sklearn": "quickstart",
    "tensorboardX": "quickstart",
    "pycocotools": "detect",
    "torch": "torch",
}

OUT_OF_MEMORY = (
    "it does not fit in the memory of the device: lower `batch_size`, or raise `optim.accumulate` (parts of "
    "a batch, one after the other) or `mesh.fsdp` (devices that share the state)"
)


def report(error: BaseException) -> int | None:
    """Says what a caller can do about `error` and gives the exit code; None if it is no caller's mistake."""
    if isinstance(error, UsageError):
        return fail(error, code=2)
    if isinstance(error, KeyboardInterrupt):
        return fail(error, code=130, text=str(error) or "interrupted; run the same command again")
    if isinstance(error, ValueError | TypeError | KeyError | OSError | FloatingPointError | ImportError):
        return fail(error, code=1)
    # What XLA raises, without importing JAX for an error of another kind.
    if type(error).__name__ == "JaxRuntimeError" and "RESOURCE_EXHAUSTED" in str(error):
        return fail(error, code=1, text=f"{first_line(error)}: {OUT_OF_MEMORY}")
    return None


def fail(error: BaseException, *, code: int, text: str | None = None) -> int:
    """Says `text`, or else the error's own sentence, and gives `code` back."""
    if os.environ.get("REPOPT_TRACEBACK") == "1":
        import traceback

        traceback.print_exception(error)
    complain(text or sentence(error))
    return code


def complain(text: str) -> None:
    """One line on standard error."""
    sys.stderr.write(f"repopt: {' '.join(text.split())}\n")


def first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0]


def sentence(error: BaseException) -> str:
    """An error in the words that a caller needs."""
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"cannot use {error.filename}: {error.strerror}"
    # The text of a KeyError is its argument's repr.
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    if isinstance(error, ModuleNotFoundError) and error.name in EXTRAS:
        return f"{error.name} is not installed: pip install 'repopt_jax[{EXTRAS[error.name]}]'"
    if isinstance(error, (KeyError, TypeError)):
        # Seldom a caller's mistake: say how to see whose it is.
        text = f"{type(error).__name__}: {text} (REPOPT_TRACEBACK=1 shows where)"
    return text or type(error).__name__
