"""The install without extras: its tests can run in it, and what needs an extra says which."""

import ast
import re
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from test_layout import PACKAGE, imports

import repopt_jax
from repopt_jax import extras

TESTS = Path(__file__).parent
ROOT = TESTS.parent

# What `pip install repopt_jax` brings, and what `test-light` adds.
BASE = {"jax", "jaxlib", "numpy", "optax", "ml_dtypes", "scipy", "repopt_jax"}
TEST_TOOLS = {"chex", "hypothesis", "pytest"}

# The tests of `core` and `optim`: `.ci/run` runs them where nothing else is installed.
OPTIMIZER_HALF = (
    *("test_adaptive", "test_algebra", "test_branches", "test_check", "test_jaxprs"),
    *("test_light", "test_optim", "test_optimizers", "test_reparameterize", "test_resrep", "test_variants"),
)

# The subpackages that a light install cannot import -> a package that they miss, and its extra.
NEEDS = {
    **dict.fromkeys(("nn", "models", "surgery", "verify", "quantize", "export", "interop"), ("flax", "flax")),
    **dict.fromkeys(("data", "detection"), ("PIL", "train")),
    **dict.fromkeys(("train", "deploy", "report", "bench"), ("flax", "train")),
}


def project():
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def imported_at_once(path):
    """What importing a file imports: names of its import statements outside of functions."""
    body = ast.Module([n for n in ast.parse(path.read_text()).body if not isinstance(n, ast.FunctionDef)], [])
    return set(imports(ast.unparse(body)))


@pytest.mark.parametrize("name", OPTIMIZER_HALF)
def test_a_light_install_can_import_the_tests_of_its_half(name):
    seen, queue, foreign = set(), [name], set()
    while queue:
        seen.add(file := queue.pop())
        for one in imported_at_once(TESTS / f"{file}.py"):
            root = one.partition(".")[0]
            if (TESTS / f"{root}.py").exists():
                queue += {root} - seen
            elif one.startswith("repopt_jax."):
                part = one.split(".")[1]
                foreign |= {part} & set(NEEDS) | {repopt_jax._HOME.get(part)} & set(NEEDS)
            elif root not in sys.stdlib_module_names:
                foreign |= {root} - BASE - TEST_TOOLS
    assert foreign == set()


def test_every_package_that_is_imported_has_an_extra():
    roots = {name.partition(".")[0] for path in PACKAGE.rglob("*.py") for name in imports(path.read_text())}
    # JAX itself imports flatbuffers, where a program is written to a file.
    assert roots - set(sys.stdlib_module_names) - BASE == set(extras.EXTRAS) - {"flatbuffers"}


def test_the_extras_are_those_of_the_project():
    """By the names of distributions, which are others than those of packages: Pillow brings PIL."""
    optional = project()["optional-dependencies"]
    homes = metadata.packages_distributions()

    def included(extra):
        """Other extras that an extra brings."""
        groups = re.findall(r"repopt_jax\[([\w,-]+)\]", " ".join(optional[extra]))
        direct = {one for group in groups for one in group.split(",")}
        return direct.union(*map(included, direct))

    def distributions(extra):
        rows = [re.match(r"[\w-]+", row)[0] for one in {extra} | included(extra) for row in optional[one]]
        return {re.sub(r"[-_]+", "-", row).lower() for row in rows}

    for extra, packages in extras.PACKAGES.items():
        assert included(extra) & set(extras.PACKAGES) == set(extras.INCLUDED.get(extra, ())), extra
        for package in packages:
            if package in homes:  # installed here
                found = {re.sub(r"[-_]+", "-", home).lower() for home in homes[package]}
                assert found & distributions(extra), (extra, package)


def test_the_base_is_small():
    names = {re.match(r"[\w-]+", row)[0] for row in project()["dependencies"]}
    assert names == {"jax", "numpy", "optax"}


BLOCKED = f"import sys\nsys.modules.update(dict.fromkeys({sorted(extras.EXTRAS)!r}))\n"


@pytest.fixture
def in_a_light_process(tmp_path):
    """Runs code where no package of an extra can be imported, and nothing lies beside it."""

    def run(code):
        command = [sys.executable, "-c", BLOCKED + code]
        return subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)

    return run


@pytest.mark.parametrize("statement", ["from repopt_jax import {}", "import repopt_jax.{}"])
@pytest.mark.parametrize("unit", sorted(NEEDS))
def test_a_part_that_is_missing_names_its_extra(in_a_light_process, unit, statement):
    run = in_a_light_process(f"import repopt_jax\n{statement.format(unit)}")
    last = run.stderr.strip().splitlines()[-1]
    package, extra = NEEDS[unit]
    assert last.startswith(f"ModuleNotFoundError: repopt_jax.{unit} needs {package}"), run.stderr
    assert last.endswith(f"pip install 'repopt_jax[{extra}]'")


@pytest.mark.parametrize("name", ["fuse", "verify_equivalence", "depth_scales"])
def test_a_name_that_is_missing_names_its_extra(in_a_light_process, name):
    run = in_a_light_process(f"import repopt_jax\nrepopt_jax.{name}")
    assert "pip install 'repopt_jax[flax]'" in run.stderr


def test_files_of_scales_name_their_extra(in_a_light_process):
    run = in_a_light_process("import repopt_jax\nrepopt_jax.load_scales('x')")
    assert "needs orbax and etils, which are not installed: pip install 'repopt_jax[scales]'" in run.stderr


@pytest.mark.parametrize("command", ["train --config=digits --out=x", "bench update", "eval --run=x"])
def test_the_command_line_says_it_in_a_sentence(in_a_light_process, command):
    code = f"from repopt_jax.cli.main import main\nsys.exit(main({command.split()!r}))"
    run = in_a_light_process(code)
    assert (run.returncode, run.stderr.count("\n")) == (1, 1), run.stderr
    assert re.fullmatch(r"repopt: .* not installed.*: pip install 'repopt_jax\[[\w,]+\]'\n", run.stderr)


def test_the_package_is_typed():
    assert (PACKAGE / "py.typed").exists()


@pytest.mark.parametrize("unit", ["", *sorted({*NEEDS, "core", "optim", "cli"})])
def test_every_public_part_lists_its_names(unit):
    if unit in NEEDS:
        pytest.importorskip(NEEDS[unit][0])
    module = __import__(f"repopt_jax.{unit}".rstrip("."), fromlist=["x"])
    assert len(set(module.__all__)) == len(module.__all__)
    assert [name for name in module.__all__ if not hasattr(module, name)] == []
