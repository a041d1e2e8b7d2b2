"""Four virtual CPU devices for every test, float64 where a test asks for it, no silent rank promotion, and
one memory of compiled programs."""

import atexit
import os
import shutil
import tempfile

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# What is compiled here runs seldom, and what is computed does not hang on the optimizations; with the
# variable at 0 everything is compiled as in use, which takes twice as long.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
# Most of the time of these tests is compilation, of the same small programs again and again. What one of them
# compiles serves all, also in the other process and in those that tests start: they inherit these variables.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="repopt-compiled-")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)

import jax
import pytest
from jax._src.interpreters import partial_eval

from repopt_jax import data

# NNX asks each array of a network that is being made under a trace where it lies. JAX answers by an error
# with an account of the program so far, which nobody sees and which takes two thirds of the time.
if hasattr(partial_eval.DynamicJaxprTracer, "_origin_msg"):
    partial_eval.DynamicJaxprTracer._origin_msg = lambda self: ""

jax.config.update("jax_num_cpu_devices", 4)
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(autouse=True, scope="module")
def forget_what_was_compiled():
    """JAX keeps what it compiles, up to a number of programs for the whole process: a file of tests must find
    neither that memory full nor gigabytes of other files' programs."""
    yield
    jax.clear_caches()


@pytest.fixture(scope="session")
def digits(tmp_path_factory):
    """A folder with the prepared digits, so that no test touches the user's cache. None writes there."""
    folder = tmp_path_factory.mktemp("digits")
    data.open_source("digits", data_dir=folder)
    return folder


@pytest.fixture
def x64():
    """Float64 for the length of one test: claims of exactness are made there."""
    with jax.enable_x64(True):
        yield


@pytest.fixture
def counted():
    """For tests that count compiled programs: JAX keeps a bounded number, and full it forgets the newest."""
    jax.clear_caches()
