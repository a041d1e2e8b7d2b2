"""Published blocks inside a network of one's own: PyTorch's keys and outputs, with branches and deployed, and
the same training."""

import dataclasses
import functools

import numpy as np
import optax
import pytest
import tolerances
from flax import nnx

from repopt_jax import Structure, fuse, interop, to_structure, weight_decay_mask
from repopt_jax.core.paths import map_named
from repopt_jax.core.published import dbb
from repopt_jax.interop import Layout, Scheme, block_scheme
from repopt_jax.interop.names import BIASED, block_rows, torch_names
from repopt_jax.nn.branched import Branched
from repopt_jax.surgery.modules import named_modules

torch = pytest.importorskip("torch")

import forms  # noqa: E402
import tiers  # noqa: E402
import torch_blocks as reference  # noqa: E402
from block_forms import CLASSES, FORMS, Layers, Shape  # noqa: E402
from networks import abstract  # noqa: E402
from torch_forms import VGG, arrays, relative, run_ours, run_torch, tensors  # noqa: E402
from torch_networks import randomise  # noqa: E402
from torch_training import (  # noqa: E402
    DECAY,
    MOMENTUM,
    RATE,
    running_variance,
    train_ours,
    train_torch,
    training_batches,
)

pytestmark = pytest.mark.once

torch.set_num_threads(1)

NORM = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


def keys(convolutions="", norms="", biased=""):
    """The keys of these layers, named in one text each."""
    return (
        {f"{name}.weight" for name in (convolutions + " " + biased).split()}
        | {f"{name}.{part}" for name in norms.split() for part in NORM}
        | {f"{name}.bias" for name in biased.split()}
    )


# OREPA's tensors, in both of its blocks, and its constants.
OREPA_TENSORS = "origin avg_conv pfir_conv 1x1_kxk_idconv1 1x1_kxk_conv2 gconv_dw gconv_pw avg_avg prior"
OREPA = {f"weight_orepa_{name}" for name in OREPA_TENSORS.split(" ")} | {"id_tensor"}

# Published keys of the second block of each network.
KEYS = {
    "acnet": keys("square_conv ver_conv hor_conv", "square_bn ver_bn hor_bn"),
    "dbb": keys(
        "dbb_origin.conv dbb_1x1.conv dbb_avg.conv dbb_1x1_kxk.idconv1 dbb_1x1_kxk.conv2",
        "dbb_origin.bn dbb_1x1.bn dbb_avg.bn.bn dbb_avg.avgbn dbb_1x1_kxk.bn1.bn dbb_1x1_kxk.bn2",
    ),
    "dbb, depthwise": keys(
        "dbb_origin.conv dbb_1x1_kxk.conv1 dbb_1x1_kxk.conv2",
        "dbb_origin.bn dbb_avg.avgbn dbb_1x1_kxk.bn1.bn dbb_1x1_kxk.bn2",
    ),
    "replknet": keys("lkb_origin.conv small_conv.conv", "lkb_origin.bn small_conv.bn"),
    "slak": keys("Decom1.conv Decom2.conv small_conv.conv", "Decom1.bn Decom2.bn small_conv.bn"),
    "unireplknet": keys(
        "lk_origin dil_conv_k5_1 dil_conv_k5_2 dil_conv_k3_3 dil_conv_k3_4",
        "origin_bn dil_bn_k5_1 dil_bn_k5_2 dil_bn_k3_3 dil_bn_k3_4",
    ),
    "unireplknet, larger": keys(
        "lk_origin dil_conv_k5_1 dil_conv_k7_2 dil_conv_k3_3 dil_conv_k3_4 dil_conv_k3_5",
        "origin_bn dil_bn_k5_1 dil_bn_k7_2 dil_bn_k3_3 dil_bn_k3_4 dil_bn_k3_5",
    ),
    "qarepvgg": keys("rbr_dense.conv rbr_1x1", "rbr_dense.bn bn"),
    "qarepvgg2": keys("rbr_dense.conv rbr_1x1", "rbr_dense.bn bn"),
    "repvgg": keys("rbr_dense.conv rbr_1x1.conv", "rbr_dense.bn rbr_1x1.bn rbr_identity"),
    "mobileone": keys(
        "rbr_conv.0.conv rbr_conv.1.conv rbr_scale.conv",
        "rbr_conv.0.bn rbr_conv.1.bn rbr_scale.bn rbr_skip",
    ),
    "repghost": keys("cheap_operation.0", "cheap_operation.1 fusion_bn.0"),
    "orepa": keys("", "bn") | OREPA | {"weight_orepa_1x1", "vector"},
    "orepa_repvgg": keys("rbr_1x1.conv", "rbr_dense.bn rbr_1x1.bn rbr_identity")
    | {f"rbr_dense.{name.replace('orepa', 'rbr')}" for name in OREPA | {"vector"}},
}
# The constants of any block of a network, which are computed on both sides.
CONSTANTS = {
    f"layers.{i}.{module}_{name}"
    for i in range(3)
    for module in ("weight_orepa", "rbr_dense.weight_rbr")
    for name in ("avg_avg", "prior")
}


def drawn(form, **more):
    """PyTorch's network of random numbers, with zeros in the rows of OREPA's scales that no branch has."""
    network = randomise(form.network(**more).double())
    for module in network.modules():
        if isinstance(module, reference.SixScales):
            module.vector.data[len(module.branches) :] = 0
    return network


def image():
    """An odd and an even side at once."""
    return np.random.default_rng(0).normal(size=(2, 13, 14, 3))


# Options of a block, and windows, whose kinds are in other forms too.
SELDOM = ("dbb, middle", "unireplknet, larger", "orepa, depthwise")


@pytest.mark.parametrize("name", tiers.seldom(FORMS, *SELDOM))
def test_keys_and_outputs_with_branches_and_deployed(name, x64):
    form = FORMS[name]
    network = drawn(form)
    state, x, scheme = arrays(network), image(), form.scheme()
    if name in KEYS:
        prefix = "layers.1."
        assert {key.removeprefix(prefix) for key in state if key.startswith(prefix)} == KEYS[name]
    model = interop.from_torch(state, form.model(), scheme)
    expected = run_torch(network, x)
    assert relative(run_ours(model, x), expected) <= tolerances.BLOCKS
    back = interop.to_torch(model, scheme)
    assert set(back) == set(state)
    constants = CONSTANTS & set(state)
    assert all(np.array_equal(back[key], value) for key, value in state.items() if key not in constants)
    assert all(np.abs(back[key] - state[key]).max() <= tolerances.COSINES for key in constants)
    network.load_state_dict(tensors(back), strict=True)

    plain = form.deployed_network().double()
    deployed = fuse(model, pairs=form.pairs)
    assert not [m for _, m in named_modules(deployed) if isinstance(m, (Branched, nnx.BatchNorm))]
    plain.load_state_dict(tensors(interop.to_torch(deployed, scheme)), strict=True)
    assert relative(run_torch(plain.eval(), x), expected) <= tolerances.BLOCKS
    # And from there to here.
    again = interop.from_torch(arrays(plain), deployed, scheme)
    assert relative(run_ours(again, x), expected) <= tolerances.BLOCKS


def exchanged(state):
    """With the names of ACNet's thin kernels the other way round."""
    other = {"ver_conv": "hor_conv", "hor_conv": "ver_conv"}
    names = {key: key.split(".") for key in state}
    swapped = {key: ".".join(other.get(part, part) for part in parts) for key, parts in names.items()}
    return {key: state[swapped[key]].reshape(value.shape) for key, value in state.items()}


def without_border(network):
    """DBB with zeros around what its first stages give."""
    for module in network.modules():
        if isinstance(module, reference.NormAndPad):
            module.border = 0


def other_rows(state):
    """With two of OREPA's scales exchanged."""
    return {key: v[[0, 1, 2, 4, 3, 5]] if key.endswith("vector") else v for key, v in state.items()}


def group_after_group(state):
    """With the outputs of OREPA's depthwise branch in the order in which all other tensors have them."""
    key = "layers.1.weight_orepa_gconv_pw"  # of six groups
    by_group = state[key].reshape(2, 6, *state[key].shape[1:]).swapaxes(0, 1)
    return state | {key: by_group.reshape(state[key].shape)}


MISTAKES = {"acnet": exchanged, "dbb": dict, "orepa": other_rows, "orepa, grouped": group_after_group}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_show(name, x64):
    """Negative controls of the test above."""
    form = FORMS[name]
    network = drawn(form)
    state = arrays(network)
    if name == "dbb":
        without_border(network)
    model = interop.from_torch(MISTAKES[name](state), form.model(), form.scheme())
    assert relative(run_ours(model, image()), run_torch(network, image())) > tolerances.BLOCKS_WRONG


# -- training

# The blocks that are trained, and further arguments of PyTorch's: DBB pads with the running variance, which
# PyTorch takes over n - 1 and we over n, so that it trains there with ours.
TRAINED = {
    "acnet": {},
    "dbb": {"norm": reference.BiasedNorm},
    "dbb, depthwise": {"norm": reference.BiasedNorm},
    "orepa": {},
    "orepa, depthwise": {},
    "orepa, grouped": {},
    "orepa_repvgg": {},
    "qarepvgg2": {},
    "replknet": {},
    "repvgg": {},
    "slak": {},
    "unireplknet": {},
}
# Between them these have padding after a norm, scales, a norm of a sum, pooling, a large kernel and an
# identity; the others have the same in other windows and groups.
TRAINED_OFTEN = ("dbb", "orepa", "orepa_repvgg", "qarepvgg2", "replknet", "repvgg")


def trained(form, network, *, decay=None):
    """(PyTorch's start, its end, ours, what its norms saw) of twenty steps."""
    start, batches = arrays(network), training_batches(CLASSES, (9, 10))
    model = interop.from_torch(start, form.model(), form.scheme())
    mask = weight_decay_mask(model) if decay is None else decay
    tx = optax.chain(optax.add_decayed_weights(DECAY, mask), optax.sgd(RATE, MOMENTUM, nesterov=True))
    seen = train_torch(network, batches, {})
    ours = interop.to_torch(train_ours(model, batches, tx), form.scheme())
    return start, arrays(network), ours, seen


def farthest(ours, theirs, *, leave=()):
    return max(np.abs(ours[key] - theirs[key]).max() for key in theirs if not key.endswith(leave))


@pytest.mark.parametrize("name", tiers.often(TRAINED, *TRAINED_OFTEN))
def test_twenty_steps_of_training(name, x64):
    """Nesterov momentum, decay, batch norm in training mode: every number, running means included."""
    form = FORMS[name]
    network = drawn(form, **TRAINED[name])
    start, theirs, ours, seen = trained(form, network)
    leave = ("running_var", "num_batches_tracked")
    assert farthest(ours, theirs, leave=leave) <= tolerances.TRAINED_AS_TORCH
    kernels = [key for key, p in network.named_parameters() if p.ndim > 1]
    moved = [*kernels, *(key for key in theirs if key.endswith(("running_mean", "weight")))]
    assert min(np.abs(theirs[key] - start[key]).max() for key in moved) > 1e-4
    # The one known difference: PyTorch keeps the variance over n - 1, we the one over n that normalises.
    for key in (key for key in theirs if key.endswith("running_var")):
        steps = seen[key.removesuffix(".running_var")]
        biased = isinstance(network.get_submodule(key.removesuffix(".running_var")), reference.BiasedNorm)
        for found, unbiased in ((theirs, not biased), (ours, False)):
            expected = running_variance(start[key], steps, unbiased=unbiased)
            assert np.abs(found[key] - expected).max() <= tolerances.TRAINED_AS_TORCH


def test_other_trainings_go_elsewhere(x64):
    """Negative controls: a decay of all parameters; DBB padded by PyTorch's own running variance; no decay of
    OREPA's scales."""
    leave = ("running_var", "num_batches_tracked")
    form = FORMS["acnet"]
    _, theirs, ours, _ = trained(form, drawn(form), decay=lambda params: True)
    assert farthest(ours, theirs, leave=leave) > tolerances.TRAINED_APART
    form = FORMS["dbb"]
    _, theirs, ours, _ = trained(form, drawn(form))
    assert farthest(ours, theirs, leave=leave) > tolerances.TRAINED_APART
    form = FORMS["orepa"]
    kernels = functools.partial(map_named, lambda _, leaf: leaf.ndim > 1)
    _, theirs, ours, _ = trained(form, drawn(form), decay=kernels)
    assert farthest(ours, theirs, leave=leave) > tolerances.TRAINED_APART


# -- names


def test_the_form_that_keeps_the_norm_after_the_sum(x64):
    """QARepVGG's for training with quantization."""
    form = FORMS["qarepvgg"]
    network = drawn(form)
    model = interop.from_torch(arrays(network), form.model(), form.scheme())
    model.eval()
    merged = fuse(model, only=(Branched,))
    found = {key for key in interop.to_torch(merged, form.scheme()) if key.startswith("layers.1.")}
    assert found == {f"layers.1.{key}" for key in keys("", "bn", "rbr_reparam")}
    assert relative(run_ours(merged, image()), run_torch(network, image())) <= tolerances.BLOCKS


def test_weights_without_counters(x64):
    """As ACNet's authors store them, in HDF5 files."""
    form = FORMS["acnet"]
    state = arrays(randomise(form.network()))
    some = {key: value for key, value in state.items() if not key.endswith("num_batches_tracked")}
    model = interop.from_torch(some, form.model(), form.scheme())
    assert set(interop.to_torch(model, form.scheme())) == set(state)


def test_several_kinds_of_blocks_in_one_network(x64):
    shapes = (Shape(3, 4, 3, 2), Shape(4, 4, 3))
    network = reference.Chain(
        [shapes[0].made(reference.ACBlock), shapes[1].made(reference.DiverseBranch)], 4, CLASSES
    )
    state = arrays(randomise(network.double()))
    structures = {r"layers/0": "acnet", r"layers/1": "dbb"}
    model = abstract(lambda rngs: to_structure(Layers(shapes, False, rngs=rngs), structures, rngs=rngs))
    rows = (
        *block_rows("acnet", "layers/0", "layers.0"),
        *block_rows("dbb", "layers/(1)", r"layers.\1"),
        ("fc", "fc", BIASED),
    )
    both = Scheme("both", "ACNet and DBB", (Layout(rows=rows),))
    loaded = interop.from_torch(state, model, both)
    assert relative(run_ours(loaded, image()), run_torch(network, image())) <= tolerances.LOGITS_FLOAT32


def test_everything_that_does_not_fit_is_told_at_once(x64):
    """Of arrays that are rows of one, and of constants, as of all others."""
    form = FORMS["orepa"]
    state = arrays(drawn(form))
    scales = state["layers.2.vector"]
    for key in ("layers.0.vector", "layers.1.id_tensor"):
        del state[key]
    state |= {"layers.2.vector": scales[:5], "layers.1.weight_orepa_1x1_kxk_conv1": np.zeros((4, 4, 1, 1))}
    with pytest.raises(ValueError, match="does not fit the Layers") as error:
        interop.from_torch(state, form.model(), form.scheme())
    for part in (
        "2 missing tensors: layers.0.vector (6, 4), layers.1.id_tensor (4, 4, 1, 1)",
        "1 extra tensors: layers.1.weight_orepa_1x1_kxk_conv1 (4, 4, 1, 1)",
        "1 misshapen tensors: layers.2.vector (expected (6, 6), found (5, 6))",
    ):
        assert part in str(error.value)


def test_constants_are_those_of_the_structure(x64):
    """To the rounding of float32, in which a code base computes them; others are refused, each named."""
    form = FORMS["orepa"]
    state = arrays(drawn(form))
    rounded = {key: value.astype(np.float32) if key in CONSTANTS else value for key, value in state.items()}
    assert any((rounded[key] != state[key]).any() for key in CONSTANTS & set(state))
    model = interop.from_torch(rounded, form.model(), form.scheme())
    written = interop.to_torch(model, form.scheme())
    assert all(
        np.abs(written[key] - state[key]).max() <= tolerances.COSINES for key in CONSTANTS & set(state)
    )

    wide, identity = "layers.2.weight_orepa_prior", "layers.0.id_tensor"
    table = state[wide].copy()  # of a window of five taps a side, of which the published code fills three
    table[:, 3:], table[:, :, 3:] = np.nan, np.nan
    with pytest.raises(ValueError, match="computes, and does not read, hold other values") as error:
        interop.from_torch(state | {wide: table, identity: 0 * state[identity]}, form.model(), form.scheme())
    assert f"{identity} (by up to 1)" in str(error.value)
    assert f"{wide} (by up to nan)" in str(error.value)


def test_rows_that_no_branch_uses_are_read_and_written_as_zeros(x64):
    """OREPA's RepVGG has one where there is an identity."""
    form = FORMS["orepa_repvgg"]
    network = randomise(form.network().double())
    state, key = arrays(network), "layers.1.rbr_dense.vector"
    assert state[key].shape == (6, 4)
    assert state[key][5].all()
    model = interop.from_torch(state, form.model(), form.scheme())
    assert relative(run_ours(model, image()), run_torch(network, image())) <= tolerances.BLOCKS
    written = interop.to_torch(model, form.scheme())[key]
    assert np.array_equal(written[:5], state[key][:5])
    assert not written[5].any()


def test_windows_without_a_centre_lack_one_of_the_rows():
    """They have no 1x1 branch, and the published block is not defined for them."""
    form = dataclasses.replace(FORMS["orepa"], shapes=(Shape(3, 4, 2),))
    with pytest.raises(ValueError, match=r"layers\.0\.vector: no branch of the layer here has row 4"):
        torch_names(form.model(), form.scheme())


def test_blocks_in_networks_of_ours():
    """Where the block's batch norm has given way."""
    model = nnx.eval_shape(lambda: forms.vgg(VGG, "acnet"))
    blocks = {r"stages/(\d+)/(\d+)/conv": r"stage\1.\2"}
    names = torch_names(model, block_scheme("acnet", blocks, (("head", "linear", BIASED),)))
    assert names["stages/1/1/conv/weights/1x3"].key == "stage1.1.hor_conv.weight"
    assert names["stages/1/1/conv/norms/3x1/mean"].key == "stage1.1.ver_bn.running_mean"


def test_what_has_no_names():
    model = FORMS["dbb"].model()
    blocks, rows = {r"layers/(\d+)": r"layers.\1"}, (("fc", "fc", BIASED),)
    with pytest.raises(ValueError, match=r"'acnet blocks' .*no place for the layers layers/0"):
        torch_names(model, block_scheme("acnet", blocks, rows))
    with pytest.raises(ValueError, match="no names of 'search' blocks: `structure` must be one of repvgg"):
        block_rows("search", "layers", "layers")
    with pytest.raises(ValueError, match="no structure 'dbbs'"):
        block_scheme("dbbs", blocks)
    with pytest.raises(ValueError, match=r"`blocks` holds '\(', which is no regular expression"):
        block_scheme("dbb", {"(": "x"})
    with pytest.raises(ValueError, match=r"`blocks` gives .* 'x.*3': invalid group reference 3"):
        block_scheme("dbb", {r"layers/(\d+)": r"x\3"})
    with pytest.raises(ValueError, match=r"`rows` holds '\)', which is no regular expression"):
        block_scheme("dbb", blocks, ((")", "x", BIASED),))
    # Every branch has a name, but the average, which the block has as well, is missing.

    def without_average(layer):
        return Structure(layer, {name: chain for name, chain in dbb(layer).chains if name != "average"})

    shapes = FORMS["dbb"].shapes
    model = abstract(lambda rngs: to_structure(Layers(shapes, False, rngs=rngs), without_average, rngs=rngs))
    with pytest.raises(
        ValueError, match="layers/0: it is made of 1x1, 1x1_3x3_0, 1x1_3x3_1, 3x3, there of 1x1, "
    ):
        torch_names(model, block_scheme("dbb", blocks, rows))
