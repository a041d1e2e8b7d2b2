"""The machine that something was measured on."""

import os
import platform
from pathlib import Path


def processor() -> str:
    """The processor's name and how many cores this process may use."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{processor_name()}, {cores} core{'' if cores == 1 else 's'}"


def processor_name() -> str:
    """The processor's name, or its kind where the system does not tell the name."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    for line in lines:
        field, _, value = line.partition(":")
        if field.strip() == "model name" and value.strip() not in ("", "unknown"):
            return value.strip()
    return platform.processor() or platform.machine()
