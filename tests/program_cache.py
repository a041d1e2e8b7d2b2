"""A folder where JAX keeps what it compiled for the tests, from one run to the next.

Most of the time of the tests is compilation, of programs that were compiled before. JAX finds a program again
by its text, its options and the version of jaxlib; the folder's name adds the processor, because machine code
is made for its instructions. JAX's own variables say where the folder is (`JAX_COMPILATION_CACHE_DIR`) and
turn it off (`JAX_ENABLE_COMPILATION_CACHE=0`).

JAX would bound the folder by `jax_compilation_cache_max_size`, but then lists all of it under a lock at every
program, which is slow with thousands of small ones. Here a run removes at its end what was not used for the
longest time. Processes write and remove without a lock: a file that is not whole, or has gone, makes JAX warn
and compile, and the settings of pytest let that warning pass.
"""

import atexit
import contextlib
import hashlib
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path

# The whole suite leaves 0.1 GB for each Python; this is room for a few versions.
MOST_BYTES = 1024**3
# Compiles loops as jaxlib did before it had another way, in two thirds of its time.
OLD_LOOPS = "--xla_cpu_use_fusion_emitters=false"


def compile_flags(environment: Mapping[str, str]) -> str:
    """What `XLA_FLAGS` is for the tests: as it was, and unless everything is to be compiled as in use, with a
    quicker way to compile. Only jaxlib 0.10 has both ways; an unknown flag would end the process."""
    flags = environment.get("XLA_FLAGS", "")
    as_in_use = environment.get("JAX_DISABLE_MOST_OPTIMIZATIONS") != "1"
    if as_in_use or OLD_LOOPS in flags or not metadata.version("jaxlib").startswith("0.10."):
        return flags
    return f"{flags} {OLD_LOOPS}".strip()


def flags_in_use(environment: Mapping[str, str]) -> str:
    """`XLA_FLAGS` without what `compile_flags` adds, for a process with another compiler than the CPU's: the
    TPU's reads the variable too, and ends the process at a flag that it does not know."""
    return environment.get("XLA_FLAGS", "").replace(OLD_LOOPS, "").strip()


def root() -> Path:
    """The folder of all versions and processors, in the user's cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "repopt_jax" / "tests"


def folder() -> Path:
    """The folder for this jaxlib, Python and processor, made; a temporary one where the user's cache is
    closed."""
    name = f"jaxlib-{metadata.version('jaxlib')}-python-{sys.version_info.major}.{sys.version_info.minor}"
    path = root() / f"{name}-{processor()}"
    with contextlib.suppress(OSError):
        path.mkdir(parents=True, exist_ok=True)
        if os.access(path, os.W_OK):
            return path
    path = Path(tempfile.mkdtemp(prefix="repopt-compiled-"))
    atexit.register(shutil.rmtree, path, ignore_errors=True)
    return path


def processor() -> str:
    """A short name for the processor and its instructions."""
    described = [platform.machine(), platform.processor()]
    with contextlib.suppress(OSError):  # Linux
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        kinds = ("model name", "flags", "Features", "CPU part")
        described += sorted({line for line in lines if line.startswith(kinds)})
    return f"{platform.machine()}-{hashlib.sha256(repr(described).encode()).hexdigest()[:12]}"


def trim(path: Path, most_bytes: int = MOST_BYTES) -> None:
    """Removes the files below `path` that were not used for longest, until `most_bytes` are left."""
    found = []
    for file in path.rglob("*"):
        with contextlib.suppress(FileNotFoundError):  # another run is trimming too
            if file.is_file():
                stat = file.stat()
                found.append((max(stat.st_atime, stat.st_mtime), stat.st_size, file))
    size = sum(length for _, length, _ in found)
    for _, length, file in sorted(found):
        if size <= most_bytes:
            return
        file.unlink(missing_ok=True)
        size -= length
