"""Four virtual CPU devices for every test, float64 where a test asks for it, no silent rank promotion,
compiled programs kept from run to run, and the longest files first."""

import fcntl
import gc
import importlib
import os
import traceback
from pathlib import Path

import hypothesis
import program_cache
import tiers

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# What is compiled here runs seldom, and what is computed does not depend on the optimizations; with the
# variable at 0 everything is compiled as in use, which takes twice as long.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
os.environ["XLA_FLAGS"] = program_cache.compile_flags(os.environ)
# The processes of pytest-xdist and those that tests start inherit the folder.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(program_cache.folder())
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")

import jax
import pytest

from repopt_jax import extras

jax.config.update("jax_num_cpu_devices", 4)
jax.config.update("jax_numpy_rank_promotion", "raise")

# What is drawn is the same in every run, whichever files are run. Most draws compile anew, so the ordinary
# suite takes few; `REPOPT_EXAMPLES=500 pytest tests/test_branches.py` takes more.
hypothesis.settings.register_profile(
    "repopt", deadline=None, max_examples=int(os.environ.get("REPOPT_EXAMPLES", "8")), derandomize=True
)
hypothesis.settings.load_profile("repopt")

# The files that take longest, with their seconds of CPU where everything is compiled already (Python 3.11, an
# AMD EPYC that other work shares). They start first, so that both processes end at about the same time.
LONGEST = {
    "test_resume.py": 70,
    "test_processes.py": 64,
    "test_compare.py": 62,
    "test_cli.py": 49,
    "test_onnx.py": 47,
    "test_cli_export.py": 45,
    "test_online.py": 36,
    "test_loggers.py": 35,
    "test_train_prune.py": 29,
    "test_structure.py": 27,
    "test_parallel.py": 26,
    "test_configs.py": 23,
    "test_run_folder.py": 23,
    "test_quantize_run.py": 23,
    "test_torch_blocks.py": 23,
    "test_interop_names.py": 22,
    "test_train_loop.py": 20,
    "test_shrink.py": 20,
    "test_quantize_aware.py": 18,
    "test_any_network.py": 18,
    "test_convolution.py": 18,
    "test_quantize.py": 18,
    "test_strangers.py": 18,
    "test_train_detection.py": 17,
    "test_optimizers.py": 17,
    "test_law.py": 16,
    "test_verify.py": 16,
    "test_examples.py": 16,
    "test_data.py": 15,
    "test_check.py": 15,
    "test_models_ghost.py": 14,
    "test_models_repmlp.py": 13,
    "test_torch_parity.py": 13,
    "test_normalise.py": 13,
    "test_models.py": 13,
    "test_report.py": 13,
    "test_compiled_step.py": 12,
    "test_docs.py": 12,
    "test_detection_model.py": 11,
    "test_choose.py": 11,
    "test_reparameterize.py": 10,
}


# -- An environment without the extras. What needs one is left out there, so that the optimizer half is tested
# with what `pip install repopt_jax` brings. Where Flax is installed, any missing package is an error.

LIGHT = not extras.installed("flax")
# Packages of the extras `test` and `docs` that only tests import.
OF_TESTS = ("equinox", "griffe", "latex2mathml", "markdown", "mkdocs", "nbclient", "nbformat", "qwix")
left_out: set[str] = set()


def is_of_an_extra(error: ModuleNotFoundError) -> bool:
    """Whether a package of an extra is missing where it may be: not in the optimizer half, unless that says
    so itself, as files of scales do."""
    files = [frame.filename for frame in traceback.extract_tb(error.__traceback__)]
    inside = any(f"/repopt_jax/{unit}/" in file for unit in ("core", "optim") for file in files)
    missing = (error.name or "").partition(".")[0] in {*extras.EXTRAS, *OF_TESTS}
    return missing and (not inside or "pip install" in str(error))


if LIGHT:

    def pytest_ignore_collect(collection_path):
        """Test files that cannot be imported without an extra."""
        if not collection_path.match("test_*.py"):
            return None
        try:
            importlib.import_module(collection_path.stem)
        except ModuleNotFoundError as error:
            if not is_of_an_extra(error):
                raise
        except pytest.skip.Exception:
            pass
        else:
            return None
        left_out.add(collection_path.stem)
        return True

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_setup():
        return (yield from skipped_without_extras())

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call():
        return (yield from skipped_without_extras())

    def skipped_without_extras():
        try:
            return (yield)
        except ModuleNotFoundError as error:
            if not is_of_an_extra(error):
                raise
            pytest.skip(str(error))

    def pytest_report_collectionfinish():
        return f"without extras: {len(left_out)} files of tests are left out"


def pytest_addoption(parser):
    parser.addoption(
        "--cases", type=int, metavar="N", help="of each test only the first N of the selected cases"
    )


@pytest.hookimpl(wrapper=True)
def pytest_collection():
    """In a new copy one process collects after the other, so that the second finds compiled what both import:
    6 seconds of a core in place of 20."""
    tests = Path(__file__).parent
    new = len([*tests.glob("__pycache__/test_*.pyc")]) < len([*tests.glob("test_*.py")])
    with Path(__file__).open() as lock:
        if new:
            fcntl.flock(lock, fcntl.LOCK_EX)
        return (yield)


@pytest.hookimpl(trylast=True)  # after the selection by marks: a test has its first cases of those
def pytest_collection_modifyitems(config, items):
    """The longest files first, the others in their order, in which pytest-xdist hands them out."""
    items.sort(key=lambda item: -LONGEST.get(item.path.name, 0))
    if (most := config.getoption("cases")) is not None:
        items[:], further = tiers.first_cases(items, most)
        config.hook.pytest_deselected(items=further)


def pytest_collection_finish():
    """What is imported stays, so that garbage is not looked for there; and it is looked for seldom: tracing
    makes millions of small objects, and with Python's own thresholds an eighth of the time went by it."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 50, 10)


def pytest_sessionfinish(session):
    if not hasattr(session.config, "workerinput"):  # once, by the process that started the others
        program_cache.trim(program_cache.root())


# JAX keeps a bounded number of calls with what they compiled, for the whole process, and when that is full it
# forgets the newest. It was full when 1337 programs had been compiled.
MANY_PROGRAMS = 400
programs = 0


def count_program(event, seconds, **_):
    global programs
    programs += event == "/jax/core/compile/backend_compile_duration"


def forget_programs():
    global programs
    jax.clear_caches()
    programs = 0


jax.monitoring.register_event_duration_secs_listener(count_program)


@pytest.fixture(autouse=True, scope="module")
def programs_of_one_file():
    """A file of tests finds neither JAX's memory full nor gigabytes of other files' programs."""
    yield
    forget_programs()


@pytest.fixture
def counted():
    """For tests that count the compiled programs of a function: JAX has room to keep them all."""
    if programs > MANY_PROGRAMS:
        forget_programs()


@pytest.fixture(scope="session")
def digits(tmp_path_factory):
    """A folder with the prepared digits, so that no test touches the user's cache. None writes there."""
    from repopt_jax import data

    folder = tmp_path_factory.mktemp("digits")
    data.open_source("digits", data_dir=folder)
    return folder


@pytest.fixture
def x64():
    """Float64 for the length of one test: claims of exactness are made there."""
    with jax.enable_x64(True):
        yield
