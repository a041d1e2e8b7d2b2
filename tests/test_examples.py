"""The programs of `examples/`, each run for a few steps, and the guide in the README that is one of them."""

import importlib.util
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from repopt_jax import load_scales, paths

ROOT = Path(__file__).parent.parent
STEPS = 25
FALLS_TO = 0.5  # times the loss at the start, after STEPS steps; measured: 0.06 to 0.14
MOVES = 1e-3  # least change of a searched scale; measured: 4e-2
GUIDE_LINES = 40

# Example -> the kernels that it re-parameterizes, and the shape of one of them.
FRAMEWORKS = {
    "with_dicts": (("body/kernel", "stem/kernel"), (3, 3, 16, 16)),
    "with_linen": (("body/kernel", "stem/kernel"), (3, 3, 16, 16)),
    "with_equinox": (("convs/0/weight", "convs/1/weight"), (16, 16, 3, 3)),
}


def load(name):
    spec = importlib.util.spec_from_file_location(f"examples_{name}", ROOT / "examples" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def guide():
    """The part of the program that the README shows."""
    text = (ROOT / "examples" / "your_model.py").read_text()
    return text.split("# guide: begin\n")[1].split("# guide: end")[0].strip()


@pytest.mark.parametrize("name", FRAMEWORKS)
def test_a_framework(name, tmp_path, capsys, quick_to_compile):
    kernels, shape = FRAMEWORKS[name]
    result = load(name).main(search_steps=STEPS, steps=STEPS, folder=tmp_path)
    for losses in (result["search"], result["train"]):
        assert len(losses) == STEPS
        assert np.mean(losses[-5:]) < FALLS_TO * losses[0]
    scales = result["scales"]
    assert tuple(sorted(scales.entries)) == kernels
    assert shape in {entry.branches.kernel for entry in scales.entries.values()}
    # All of them started at one.
    assert min(np.abs(np.asarray(v) - 1).max() for v in jax.tree.leaves(scales)) > MOVES
    assert set(kernels) <= set(paths.named_leaves(result["params"])[0])
    assert "test accuracy" in capsys.readouterr().out


def test_the_guide(tmp_path, capsys, quick_to_compile):
    deployed, accuracy = load("your_model").run(steps=STEPS, folder=tmp_path)
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    searched, trained = ((float(words[1]), float(words[3])) for words in lines if words[0] == "loss")
    assert searched[1] < FALLS_TO * searched[0]
    assert trained[1] < FALLS_TO * trained[0]
    assert accuracy > 0.5
    assert list(load_scales(tmp_path / "scales").entries) == [
        "blocks/0/conv/kernel",
        "blocks/1/conv/kernel",
        "stem/conv/kernel",
    ]
    assert not any(isinstance(m, nnx.BatchNorm) for _, m in nnx.iter_modules(deployed))
    assert deployed.stem.conv.bias is not None
    assert jnp.isfinite(deployed(jnp.ones((1, 8, 8, 1)))).all()


def test_the_guide_is_short():
    lines = [line for line in guide().splitlines() if line.strip()]
    assert len(lines) < GUIDE_LINES


def test_the_readme_shows_the_guide():
    assert f"```python\n{guide()}\n```" in (ROOT / "README.md").read_text()
