"""Huge pages for the memory of long commands on Linux, where a process must ask for them before it starts."""

import os
import signal
import sys
from collections.abc import Mapping
from pathlib import Path

TUNABLE = "glibc.malloc.hugetlb"
ENABLED = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def restart() -> None:
    """Starts this process anew, as the same process, with huge pages; returns where that changes nothing.

    XLA's CPU backend returns the memory of intermediate results after each training step, and takes it from
    the system again in the next. In pages of 4 KB that is a quarter of the step of a small network (60,000
    page faults, jax 0.10 to 0.12). `GLIBC_TUNABLES=glibc.malloc.hugetlb=0` prevents it.
    """
    try:
        enabled = ENABLED.read_text()
        libc = os.confstr("CS_GNU_LIBC_VERSION") or ""
    except (AttributeError, OSError, ValueError):  # another system, or another C library
        return
    environment = with_huge_pages(os.environ, enabled, libc)
    if environment is not None and len(sys.orig_argv) > 1:
        sys.stdout.flush()
        # A Ctrl-C waits until the new program can answer it: `__main__` lets it through.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)


def with_huge_pages(environment: Mapping[str, str], enabled: str, libc: str) -> dict[str, str] | None:
    """Returns the environment in which malloc asks for huge pages, or None where it does or cannot.

    Args:
      environment: this process's.
      enabled: the kernel's setting, such as "always [madvise] never".
      libc: name and version of the C library, such as "glibc 2.36"; since 2.35 it can ask.
    """
    tunables = environment.get("GLIBC_TUNABLES", "")
    name, _, version = libc.partition(" ")
    if TUNABLE in tunables or "[madvise]" not in enabled or name != "glibc":
        return None
    if tuple(map(int, version.split(".")[:2])) < (2, 35):
        return None
    asked = f"{TUNABLE}=1"
    return {**environment, "GLIBC_TUNABLES": f"{tunables}:{asked}" if tunables else asked}
