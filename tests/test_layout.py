"""Who may import whom: a module uses only what stands on a lower level than itself."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import repopt_jax

PACKAGE = Path(repopt_jax.__file__).parent

# A package folder is one entry: its modules may import one another. Optimizers know no layers and layers know
# no optimizers.
LEVELS = {
    "_version": 0,
    "userfile": 0,
    "core": 1,
    "data": 0,
    "optim": 2,
    "nn": 2,
    "detection": 2,
    "models": 3,
    "surgery": 4,
    "verify": 5,
    "interop": 5,
    "train": 6,
    "report": 7,
    "bench": 8,
    "cli": 9,
    "__init__": 10,
    "__main__": 10,
}

# The half of the library that serves Linen, Equinox and plain dicts alike must not need Flax.
NO_FLAX = ("core", "optim")

HEAVY = ("torch", "sklearn", "matplotlib", "tensorflow", "tensorboardX", "equinox")

PUBLIC = (
    "Scales",
    "data",
    "extract_scales",
    "fuse",
    "gradient_multipliers",
    "load_scales",
    "models",
    "nn",
    "reinitialize",
    "repopt_mask",
    "repopt_sgd",
    "save_scales",
    "train",
    "verify_equivalence",
)


def unit_of(path: Path) -> str:
    """The entry of `LEVELS` that a file belongs to: its folder, or itself."""
    top = path.relative_to(PACKAGE).parts[0]
    return top.removesuffix(".py")


def imports(source: str) -> Iterator[str]:
    """Dotted names that a file imports, also inside functions; `from a import b` counts as a and a.b."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports are not used"
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def units_imported(source: str) -> set[str]:
    """Entries of `LEVELS` that a file's imports reach. A name of `repopt_jax` itself that is no entry, such
    as `Scales`, means that the module imports the package's own front, the highest level."""
    used = set()
    for name in imports(source):
        parts = name.split(".")
        if parts[0] == "repopt_jax" and len(parts) > 1:
            used.add(parts[1] if parts[1] in LEVELS else "__init__")
    return used


def violations(unit: str, source: str) -> list[str]:
    return sorted(u for u in units_imported(source) if u != unit and LEVELS[u] >= LEVELS[unit])


FILES = sorted(PACKAGE.rglob("*.py"))


def test_every_file_has_a_level():
    assert {unit_of(path) for path in FILES} <= set(LEVELS)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_a_module_imports_from_lower_levels_only(path):
    assert violations(unit_of(path), path.read_text()) == []


@pytest.mark.parametrize(
    ("unit", "source", "found"),
    [
        ("optim", "from repopt_jax.nn.csla import CSLAConv", ["nn"]),
        ("optim", "from repopt_jax import core, models", ["models"]),
        ("nn", "def f():\n    import repopt_jax.train.loop", ["train"]),
        ("models", "from repopt_jax.surgery.reinitialize import reinitialize", ["surgery"]),
        ("train", "from repopt_jax import Scales", ["__init__"]),
        (
            "train",
            "from repopt_jax.train.config import Config\nfrom repopt_jax.core.scales import Scales",
            [],
        ),
    ],
)
def test_the_rule_finds_what_it_should(unit, source, found):
    assert violations(unit, source) == found


@pytest.mark.parametrize("unit", NO_FLAX)
def test_the_optimizer_half_does_not_import_flax(unit):
    for file in (PACKAGE / unit).rglob("*.py"):
        roots = {name.split(".")[0] for name in imports(file.read_text())}
        assert not roots & {"flax", "equinox", "haiku"}, file


def test_importing_the_package_imports_no_extra():
    code = f"import sys, repopt_jax; sys.exit(' '.join(m for m in {HEAVY!r} if m in sys.modules) or 0)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize("name", PUBLIC)
def test_public_names(name):
    namespace: dict[str, object] = {}
    exec(f"from repopt_jax import {name}", namespace)
    assert namespace[name] is not None
