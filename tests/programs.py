"""Programs of the repository that are no part of the package: examples, scripts, configs, by their place."""

import importlib.util
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parents[1]


def load(place: str) -> ModuleType:
    """A module made of the file at a place such as "scripts/tables.py", anew at each call."""
    path = ROOT / place
    spec = importlib.util.spec_from_file_location(place.removesuffix(".py").replace("/", "_"), path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
