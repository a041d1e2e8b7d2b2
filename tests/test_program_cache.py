"""The compiled programs that the tests keep: where, how many, and what becomes of a broken one."""

import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import program_cache
import pytest
from jax.experimental.compilation_cache import compilation_cache


def write(path, size, used):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(bytes(size))
    os.utime(path, (used, used))
    return path


def test_the_folder_is_in_the_users_cache_and_made(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = program_cache.folder()
    assert folder.is_dir()
    assert folder.parent == tmp_path / "repopt_jax" / "tests"
    assert program_cache.folder() == folder
    assert program_cache.processor() in folder.name


def test_without_a_place_for_it_the_folder_is_a_temporary_one(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr(program_cache.tempfile, "mkdtemp", lambda prefix: str(tmp_path / prefix))
    assert program_cache.folder() == tmp_path / "repopt-compiled-"


def test_another_compiler_does_not_get_the_flag_of_the_cpus():
    for flags in ("", "--xla_dump_to=somewhere"):
        environment = {"XLA_FLAGS": flags, "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
        ours = {"XLA_FLAGS": program_cache.compile_flags(environment)}
        assert program_cache.flags_in_use(ours) == flags


def test_what_was_not_used_for_longest_is_removed(tmp_path):
    old = write(tmp_path / "jaxlib-1" / "a", 40, used=1)
    middle = write(tmp_path / "jaxlib-2" / "b", 40, used=2)
    new = write(tmp_path / "jaxlib-1" / "c", 40, used=3)
    program_cache.trim(tmp_path, 120)
    assert [path.exists() for path in (old, middle, new)] == [True, True, True]
    program_cache.trim(tmp_path, 80)
    assert [path.exists() for path in (old, middle, new)] == [False, True, True]
    program_cache.trim(tmp_path, 0)
    assert not any(path.exists() for path in (old, middle, new))
    program_cache.trim(tmp_path / "nowhere")


@pytest.fixture
def kept_in(tmp_path):
    """A cache of its own, so that the files of this test's program are all that is in it."""
    before = jax.config.jax_compilation_cache_dir
    for path in (tmp_path, before):
        compilation_cache.reset_cache()
        jax.config.update("jax_compilation_cache_dir", str(path))
        if path == tmp_path:
            yield tmp_path


@pytest.mark.skipif(not jax.config.jax_enable_compilation_cache, reason="turned off by JAX's variable")
def test_a_program_is_read_again_and_a_file_that_is_not_whole_makes_it_compile(kept_in: Path):
    def f(x):
        return 3 * x + 1

    def files():
        return [path for path in kept_in.iterdir() if path.name.startswith("jit_f")]

    x = np.arange(3.0, dtype=np.float32)
    jax.jit(f)(x)
    (file,) = files()
    whole = file.read_bytes()
    for part in (b"", whole[: len(whole) // 2]):
        file.write_bytes(part)
        jax.clear_caches()
        with pytest.warns(UserWarning, match="Error reading persistent compilation cache entry"):
            np.testing.assert_array_equal(jax.jit(f)(jnp.asarray(x)), 3 * x + 1)
