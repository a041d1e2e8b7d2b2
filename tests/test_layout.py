"""Who may import whom: a module uses only what stands on a lower level than itself."""

import ast
import inspect
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import repopt_jax

pytestmark = pytest.mark.once

PACKAGE = Path(repopt_jax.__file__).parent

# A package folder is one entry: its modules may import one another. Optimizers know no layers and layers know
# no optimizers.
LEVELS = {
    "_version": 0,
    "arguments": -1,
    "extras": -1,
    "hints": 0,
    "jsontext": -1,
    "wholefile": -1,
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
    "quantize": 5,
    "export": 5,
    "train": 6,
    "deploy": 7,
    "report": 8,
    "bench": 9,
    "cli": 10,
    "__init__": 11,
    "__main__": 11,
}

# The half of the library that serves Linen, Equinox and plain dicts alike must not need Flax.
NO_FLAX = ("core", "optim")

# What only the trainer, the data and the models need.
TRAINER = (
    *("PIL", "chex", "etils", "flax", "grain", "ml_collections", "orbax", "rich", "safetensors"),
    "tensorflow_datasets",
)

# Extras, which nothing imports before it is used.
HEAVY = (
    "torch",
    "sklearn",
    "matplotlib",
    "tensorflow",
    "tensorboardX",
    "wandb",
    "equinox",
    "onnx",
    "onnxruntime",
    "qwix",
)

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


# A wheel has the recipes of configs/ in the package, where they are data and no module imports them.
FILES = sorted(path for path in PACKAGE.rglob("*.py") if unit_of(path) != "configs")


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


def in_a_new_process(code: str) -> str:
    """What `code` prints in an interpreter of its own."""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return run.stdout.strip()


# Prints the packages, without those of the standard library, that a statement imports.
IMPORTED = """
import sys
{first}
before = set(sys.modules)
{then}
roots = {{name.partition(".")[0] for name in set(sys.modules) - before}} - set(sys.stdlib_module_names)
print(*sorted(root for root in roots if not root.startswith("_")))
"""


def test_importing_the_package_imports_nothing_else():
    assert in_a_new_process(IMPORTED.format(first="", then="import repopt_jax")) == "repopt_jax"


@pytest.mark.parametrize("unit", ["core", "optim"])
def test_the_optimizer_half_imports_jax_optax_and_numpy_only(unit):
    code = IMPORTED.format(first="import jax, numpy, optax", then=f"import repopt_jax.{unit}")
    assert set(in_a_new_process(code).split()) <= {"jax", "numpy", "optax", "repopt_jax"}


def test_the_optimizer_half_works_where_nothing_else_is_installed():
    """Also without what JAX itself imports where it is installed, such as etils."""
    code = f"""
import sys
sys.modules.update(dict.fromkeys({TRAINER!r}))  # importing one of them is an ImportError
import jax, jax.numpy as jnp, optax
import repopt_jax
params = {{"conv": {{"kernel": jnp.ones((3, 3, 2, 2))}}}}
scales = repopt_jax.Scales.ones({{"conv/kernel": repopt_jax.default_branches((3, 3, 2, 2))}})
tx = optax.chain(repopt_jax.repopt_mask(scales), optax.sgd(1.0))
updates, _ = tx.update(params, tx.init(params), params)
print(float(-updates["conv"]["kernel"][1, 1, 0, 0]), float(-updates["conv"]["kernel"][0, 0, 0, 0]))
"""
    assert in_a_new_process(code) == "3.0 1.0"


def test_importing_everything_imports_no_extra():
    pytest.importorskip("flax", reason="everything is not there without extras")
    code = "import repopt_jax, sys\nfor name in dir(repopt_jax):\n    getattr(repopt_jax, name)\n"
    code += f"print(*(name for name in {HEAVY!r} if name in sys.modules))"
    assert in_a_new_process(code) == ""


@pytest.mark.parametrize(
    ("argv", "code_of_exit"),
    [
        *((["--help"], 0), (["train", "--help"], 0), (["--version"], 0), (["trian"], 2)),
        *((["eval", "--rnu=x"], 2), (["models", "repvgg*"], 0), (["completion", "bash"], 0)),
    ],
)
def test_the_command_line_reads_without_jax(argv, code_of_exit):
    if argv[0] == "completion":
        pytest.importorskip("argcomplete")
    code = f"""
import contextlib, io, sys
from repopt_jax.cli import main
with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
    code = main({argv!r})
print(code, "jax" in sys.modules, "numpy" in sys.modules)
"""
    assert in_a_new_process(code) == f"{code_of_exit} False False"


def test_the_lazy_names_are_those_that_type_checkers_see():
    seen = {}
    for node in ast.walk(ast.parse((PACKAGE / "__init__.py").read_text())):
        if isinstance(node, ast.ImportFrom) and node.module != "typing":
            seen |= {alias.asname: node.module for alias in node.names}
    del seen["__version__"]
    subpackages = [name for name, home in seen.items() if home == "repopt_jax"]
    assert subpackages == list(repopt_jax._SUBPACKAGES)
    assert {n: f"repopt_jax.{home}" for n, home in repopt_jax._HOME.items()} == {
        name: home for name, home in seen.items() if home != "repopt_jax"
    }


def test_the_lazy_names_are_listed_and_others_refused():
    assert {"fuse", "optim", "verify", "repopt_mask", "__version__"} <= set(dir(repopt_jax))
    assert inspect.isfunction(repopt_jax.fuse)
    assert inspect.ismodule(repopt_jax.verify)
    with pytest.raises(AttributeError, match="'repopt_jax' has no attribute 'repopt_msk'"):
        repopt_jax.repopt_msk  # noqa: B018


@pytest.mark.parametrize("name", PUBLIC)
def test_public_names(name):
    namespace: dict[str, object] = {}
    exec(f"from repopt_jax import {name}", namespace)
    assert namespace[name] is not None
