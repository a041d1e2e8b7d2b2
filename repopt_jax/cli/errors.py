"""Errors on the command line: one sentence on standard error, and an exit code."""

import os
import sys

# Packages that only some commands need -> the extra that installs them.
EXTRAS = {
    "matplotlib": "quickstart",
    "sklearn": "quickstart",
    "tensorboardX": "quickstart",
    "wandb": "wandb",
    "pycocotools": "detect",
    "torch": "torch",
    "argcomplete": "train",
    **dict.fromkeys(("onnx", "onnxruntime", "flatbuffers"), "export"),
}

OUT_OF_MEMORY = (
    "it does not fit in the memory of the device: lower `batch_size`, or raise `optim.accumulate` (parts of "
    "a batch, computed one after the other) or `mesh.fsdp` (devices over which the state is sharded)"
)


class UsageError(Exception):
    """The command line itself is wrong."""


def report(error: BaseException) -> int | None:
    """Prints what the user can do about `error` and returns the exit code.

    For an error that is not the user's mistake it prints nothing and returns None.
    """
    if isinstance(error, UsageError):
        return fail(error, code=2)
    if isinstance(error, KeyboardInterrupt):
        return fail(error, code=130, text=str(error) or "interrupted; run the same command again")
    if isinstance(error, ValueError | TypeError | KeyError | OSError | FloatingPointError | ImportError):
        return fail(error, code=1)
    # The class is recognised by its name, so that other errors do not import JAX.
    if type(error).__name__ == "JaxRuntimeError" and "RESOURCE_EXHAUSTED" in str(error):
        return fail(error, code=1, text=f"{first_line(error)}: {OUT_OF_MEMORY}")
    return None


def fail(error: BaseException, *, code: int, text: str | None = None) -> int:
    """Prints `text`, by default the error's own sentence, and returns `code`.

    With REPOPT_TRACEBACK=1 in the environment, the traceback is printed first.
    """
    if os.environ.get("REPOPT_TRACEBACK") == "1":
        import traceback

        traceback.print_exception(error)
    print_error(text or sentence(error))
    return code


def print_error(text: str) -> None:
    """Writes `text` to standard error as one line."""
    sys.stderr.write(f"repopt: {' '.join(text.split())}\n")


def first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0]


def sentence(error: BaseException) -> str:
    """Returns the message of an error for the user of the command line."""
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"cannot use {error.filename}: {error.strerror}"
    # The text of a KeyError is its argument's repr.
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    if isinstance(error, ModuleNotFoundError) and error.name in EXTRAS:
        if text.startswith(f"{error.name} is not installed"):
            return text
        where = "" if text.startswith("No module named") else f" ({text})"
        return f"{error.name} is not installed{where}: pip install 'repopt_jax[{EXTRAS[error.name]}]'"
    if isinstance(error, (KeyError, TypeError)):
        # More often a bug than the user's mistake: say how to find where it was raised.
        text = f"{type(error).__name__}: {text} (REPOPT_TRACEBACK=1 shows where)"
    return text or type(error).__name__
