"""The trainer's structure modes: every structure with its options, trained for two steps and fused."""

import jax
import numpy as np
import pytest
import tiers
import tolerances
from flax import nnx
from forms import is_of_small_windows
from networks import relative
from training import tiny_config

from repopt_jax import data, fuse, train
from repopt_jax.core import paths
from repopt_jax.core.published import STRUCTURES
from repopt_jax.nn.branched import StructuredLayer
from repopt_jax.surgery.choose import parse_options
from repopt_jax.surgery.modules import named_modules
from repopt_jax.train import build
from repopt_jax.train.state import make_mesh, merge_model, put_batch

# Structure -> its options, and the norms of the layer that is looked at.
MODES = {
    "repvgg": ("", {"3x3", "1x1", "identity"}),
    "mobileone": ("copies=2", {"3x3_0", "3x3_1", "1x1", "identity"}),
    "repghost": ("raw_identity=true", {"3x3"}),
    "acnet": ("gamma=1/3", {"3x3", "3x1", "1x3"}),
    "dbb": ("middle=2, single_init=true", {"3x3", "1x1", "average_0", "average_1", "1x1_3x3_0", "1x1_3x3_1"}),
    "replknet": ("small=1", {"3x3", "1x1"}),
    "qarepvgg": ("pool=true", {"3x3"}),
    "qarepvgg2": ("", {"3x3"}),
}


def structure_config(mode, digits, **changes):
    return tiny_config(mode, digits, epochs=1, batch_size=24, checkpoint_every=0, **changes)


def of_digits():
    """The structures that have branches in a network of digits, whose windows are 3x3."""
    options = {name: parse_options(MODES.get(name, ("", None))[0]) for name in STRUCTURES}
    return [name for name in STRUCTURES if is_of_small_windows(name, options[name])]


# Among these are an identity without a norm, norms that start elsewhere, windows of two sizes, a norm behind
# the sum, averages, layers one behind the other and fixed frequencies.
OFTEN = ("repghost", "acnet", "replknet", "qarepvgg", "orepa")


@pytest.mark.parametrize("mode", tiers.often(of_digits(), *OFTEN))
def test_a_structure_trains_and_fuses(mode, digits):
    options, norms = MODES.get(mode, ("", None))
    config = structure_config(mode, digits, model__structure_options=options)
    train.validate(config)
    feed, mesh = build.open_feed(config), make_mesh()
    program, state = build.build_program(config, feed, mesh)
    before = jax.device_get(state.params)
    batches = iter(feed.train)
    for _ in range(2):
        state, means = program.train_step(state, put_batch(next(batches), mesh))
    assert int(state.step) == 2
    assert np.isfinite(float(means["loss"]))
    moved = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), before, jax.device_get(state.params))
    assert min(v for path, v in paths.named_leaves(moved)[0].items() if "/weights/" in path) > 0
    model = merge_model(program.graphdef, *state.network)
    model.eval()
    layer = model.stages[1][1].conv
    assert isinstance(layer, StructuredLayer)
    assert norms is None or set(layer.norms) == norms
    if mode == "acnet":
        assert relative(layer.norms["3x1"].scale[...], np.full(4, 1 / 3)) < 0.5
    fused = fuse(model)
    assert not [m for _, m in named_modules(fused) if isinstance(m, (StructuredLayer, nnx.BatchNorm))]
    images = np.asarray(next(iter(feed.eval))["image"])
    assert relative(fused(images), model(images)) <= tolerances.FUSED_FLOAT32


def test_a_structure_that_no_layer_can_be_is_refused(digits):
    config = structure_config("unireplknet", digits)
    with pytest.raises(
        ValueError, match=r"no layer of `model` becomes `structure`: stages/0/0/conv: the window"
    ):
        build.build_model(config, data.open_source("digits", data_dir=digits).info)


@pytest.mark.parametrize(
    ("mode", "options", "message"),
    [
        ("plain", "gamma=1/3", "does nothing with `model.mode`='plain'"),
        ("acnet", "gama=1/3", "acnet has no option 'gama' (did you mean 'gamma'?)"),
        ("acnet", "gamma", "`model.structure_options`='gamma': 'gamma' of 'gamma' is not `name=value`"),
        ("repvgg", "copies=4", "repvgg has no option 'copies': it takes none"),
    ],
)
def test_wrong_options_are_refused_before_the_data_are_read(mode, options, message):
    with pytest.raises(ValueError) as error:
        train.validate(train.Config(model=train.ModelConfig(mode=mode, structure_options=options)))
    assert message in str(error.value)
