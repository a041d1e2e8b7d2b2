"""The programs of `examples/`, each run for a few steps; one of them is the guide in docs/own_network.md."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import programs
import pytest
from flax import nnx
from networks import assert_close, relative

from repopt_jax import Scales, default_branches, load_scales
from repopt_jax.cli import main
from repopt_jax.core import paths
from repopt_jax.deploy import load_any, prune_config
from repopt_jax.models import registry
from repopt_jax.optim.sgd import gradient_multipliers
from repopt_jax.train import build_model, load_config
from repopt_jax.train.build import pruning_plan as plan_of

ROOT = Path(__file__).parent.parent
STEPS = 25
FALLS_TO = 0.5  # times the loss at the start, after STEPS steps; measured: 0.06 to 0.14
MOVES = 1e-3  # least change of a searched scale; measured: 4e-2
GUIDE_LINES = 40
SAME = 1e-12  # float64, relative, after STEPS steps on one device and on four; measured: 2e-15
DIFFERENT = 1e-2  # without the scales, or without the mean over the devices; measured: 1.8 and more

# Example -> the kernels that it re-parameterizes, and the shape of one of them.
FRAMEWORKS = {
    "with_dicts": (("body/kernel", "stem/kernel"), (3, 3, 16, 16)),
    "with_linen": (("body/kernel", "stem/kernel"), (3, 3, 16, 16)),
    "with_equinox": (("convs/0/weight", "convs/1/weight"), (16, 16, 3, 3)),
}


def guide():
    """The part of the program that the guide shows."""
    text = (ROOT / "examples" / "your_model.py").read_text()
    return text.split("# guide: begin\n")[1].split("# guide: end")[0].strip()


@pytest.mark.parametrize("name", FRAMEWORKS)
def test_a_framework(name, tmp_path, capsys):
    kernels, shape = FRAMEWORKS[name]
    result = programs.load(f"examples/{name}.py").main(search_steps=STEPS, steps=STEPS, folder=tmp_path)
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


def test_pmap(capsys):
    result = programs.load("examples/with_pmap.py").main(steps=STEPS)
    assert len(result["losses"]) == STEPS
    assert np.mean(result["losses"][-5:]) < FALLS_TO * result["losses"][0]
    assert "4 devices" in capsys.readouterr().out


def test_pmap_trains_as_one_device_does(x64, monkeypatch):
    """Against a loop on one device that multiplies its gradients itself. The controls: without the scales,
    and without the mean over the devices."""
    example = programs.load("examples/with_pmap.py")
    rng = np.random.default_rng(0)
    batches = [(rng.normal(size=(16, 8, 8, 1)), rng.integers(0, 10, 16)) for _ in range(STEPS)]
    params = example.init(jax.random.key(0))
    kernels = {f"{name}/kernel": params[name]["kernel"] for name in ("stem", "body")}
    branch_sets = {path: default_branches(kernel.shape) for path, kernel in kernels.items()}
    scales = Scales.depth_rule(branch_sets, {"stem/kernel": 0, "body/kernel": 1})
    multipliers = gradient_multipliers(params, scales)
    nothing = Scales({})

    def one_device(scaled):
        tx = example.chain(nothing, STEPS)

        @jax.jit
        def step(params, state, images, labels):
            grads = jax.grad(example.loss_of)(params, images, labels)
            if scaled:
                grads = jax.tree.map(jnp.multiply, grads, multipliers)
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        trained, state = params, tx.init(params)
        for batch in batches:
            trained, state = step(trained, state, *batch)
        return trained

    def distance(a, b):
        return max(map(relative, jax.tree.leaves(a), jax.tree.leaves(b)))

    def on_four():
        return example.train(params, example.chain(scales, STEPS), batches, jax.devices())[0]

    found = on_four()
    assert_close(found, one_device(scaled=True), SAME)
    assert distance(found, one_device(scaled=False)) > DIFFERENT
    monkeypatch.setattr(jax.lax, "pmean", lambda tree, axis_name: tree)
    assert distance(on_four(), found) > DIFFERENT


def test_the_guide(tmp_path, capsys):
    deployed, accuracy = programs.load("examples/your_model.py").run(steps=STEPS, folder=tmp_path)
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


@pytest.mark.once
def test_own_network_in_the_trainer(tmp_path, monkeypatch, capsys):
    """Each command is another program, which does not know the network before it reads the run."""

    def repopt(command, *options):
        known = {name: e for name, e in registry.NETWORKS.items() if name in registry.SHIPPED}
        monkeypatch.setattr(registry, "NETWORKS", known)
        assert main([command, *options]) == 0
        return capsys.readouterr().out

    monkeypatch.chdir(tmp_path)
    file, small = (
        str(ROOT / "examples" / "own_network_in_trainer.py"),
        [
            *("--config.epochs=1", "--config.data.train_limit=64", "--config.data.eval_limit=32"),
            *("--config.optim.warmup_epochs=0", f"--config.data.data_dir={tmp_path / 'digits'}"),
        ],
    )
    repopt("train", f"--config={file}:depth", "--out=run", *small)
    monkeypatch.setattr(registry, "NETWORKS", {n: registry.NETWORKS[n] for n in registry.SHIPPED})
    trained = load_any("run")
    repopt("deploy", "--run=run", "--out=deployed")
    assert "of 32 images" in repopt("eval", "--run=deployed")
    deployed = load_any("deployed")
    assert not any(isinstance(m, nnx.BatchNorm) for _, m in nnx.iter_modules(deployed.model))
    images = np.random.default_rng(0).uniform(size=(4, 8, 8, 1)).astype(np.float32)
    np.testing.assert_allclose(deployed.model(images), trained.model(images), atol=1e-4)
    repopt("quantize", "--run=run", "--out=quantized", "--images=32")
    pruning = prune_config("run", target=0.8)
    assert pruning.model.file == file
    assert plan_of(pruning, trained.info).total > 0
    # The norms of RepVGG's branches take the place of those of the network.
    branched = load_config(f"{file}:repvgg")
    model = nnx.eval_shape(lambda: build_model(branched, trained.info)[0])
    norms = [path for path, m in nnx.iter_modules(model) if isinstance(m, nnx.BatchNorm)]
    assert len(norms) > 8
    assert all("norms" in path for path in norms)
    # What is printed is a config file too, and leads to the network as well.
    (tmp_path / "printed.py").write_text(repopt("train", f"--config={file}:depth", "--print-config"))
    assert load_config("printed.py").model.file == file


def test_the_guide_is_short():
    lines = [line for line in guide().splitlines() if line.strip()]
    assert len(lines) < GUIDE_LINES


def test_the_readme_shows_the_guide():
    assert f"```python\n{guide()}\n```" in (ROOT / "docs" / "own_network.md").read_text()
