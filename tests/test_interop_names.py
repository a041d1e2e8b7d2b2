"""PyTorch's names of our networks: the published keys, strict both ways, nothing lost and nothing changed."""

import functools
import importlib.util

import forms
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from repopt_jax import interop, models, prepare
from repopt_jax.core.paths import named_leaves
from repopt_jax.interop import Layout, Scheme, convert, networks
from repopt_jax.interop.names import SCHEMES, TorchName, arrays_of, authors_scheme, recognise, torch_names
from repopt_jax.interop.networks import Description, build, describe
from repopt_jax.models import GhostRow, GhostVariant, MobileOneVariant, RepMLPVariant, VGGVariant, registry
from repopt_jax.nn.block import block
from repopt_jax.surgery.modules import named_modules

pytestmark = pytest.mark.once

VGG = VGGVariant("tiny", (2, 1, 1, 1), (4, 4, 4, 6, 8))
VGG_SE = VGGVariant("tiny-se", (1, 1, 1, 1), (16, 16, 16, 16, 16), pre_se=16)
ONE = MobileOneVariant("tiny", (4, 4, 4, 4, 32), 2, (1, 1, 1, 2), (0, 0, 0, 1))
GHOST = GhostVariant("tiny", 0.5, ((GhostRow(3, 8, 16, False, 1),), (GhostRow(5, 16, 16, True, 2),)), 16, 20)

MLP = RepMLPVariant("tiny", (4, 8), (1, 2), (4, 2), (2, 4), patch=2)

TENSOR = ("weight",)
BIASED = ("weight", "bias")
NORM = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


def keys(**layers):
    """Keys from the layers' names, with `_` for `.` doubled: no name of a layer has two in a row."""
    return {f"{name.replace('__', '.')}.{part}" for name, parts in layers.items() for part in parts}


def vgg(mode="plain", variant=VGG, **options):
    return lambda: forms.vgg(variant, mode, **options)


def ghost(mode="plain", **options):
    return lambda: forms.ghostnet(GHOST, mode, **options)


def one(**options):
    return lambda: forms.mobileone(ONE, **options)


def mlp(mode="repmlp", **options):
    return lambda: forms.repmlpnet(MLP, mode, **options)


# What a unit of RepMLPNet has in every form.
UNIT = keys(
    prebn1=NORM,
    prebn2=NORM,
    repmlp_block__gp__fc1=BIASED,
    repmlp_block__gp__fc2=BIASED,
    ffn_block__ffn_fc1__conv=TENSOR,
    ffn_block__ffn_fc1__bn=NORM,
    ffn_block__ffn_fc2__conv=TENSOR,
    ffn_block__ffn_fc2__bn=NORM,
)

# scheme, our network, a prefix, the published keys under it
PUBLISHED = {
    "repopt target": (
        "repopt",
        vgg("plain", post_se=True),
        "stage1.1.",
        keys(conv=TENSOR, bn=NORM, post_se__down=BIASED, post_se__up=BIASED),
    ),
    "repopt target deployed": ("repopt", vgg("plain", form="deployed"), "stage0.", keys(conv=BIASED)),
    "repopt search": (
        "repopt",
        vgg("search"),
        "stage1.1.",
        keys(
            conv=TENSOR, scale_conv=TENSOR, conv_1x1=TENSOR, scale_1x1=TENSOR, scale_identity=TENSOR, bn=NORM
        ),
    ),
    "repopt csla": (
        "repopt",
        vgg(forms.CSLA),
        "stage2.0.",
        keys(conv=TENSOR, scale_conv=TENSOR, conv_1x1=TENSOR, scale_1x1=TENSOR, bn=NORM),
    ),
    "repopt repvgg": (
        "repopt",
        vgg("repvgg"),
        "stage1.1.",
        keys(conv_3x3=TENSOR, bn_3x3=NORM, conv_1x1=TENSOR, bn_1x1=NORM, bn_identity=NORM),
    ),
    "repvgg": (
        "repvgg",
        vgg("repvgg", VGG_SE),
        "stage0.",
        keys(
            rbr_dense__conv=TENSOR,
            rbr_dense__bn=NORM,
            rbr_1x1__conv=TENSOR,
            rbr_1x1__bn=NORM,
            se__down=BIASED,
            se__up=BIASED,
        ),
    ),
    "repvgg identity": (
        "repvgg",
        vgg("repvgg"),
        "stage1.1.",
        keys(
            rbr_dense__conv=TENSOR,
            rbr_dense__bn=NORM,
            rbr_1x1__conv=TENSOR,
            rbr_1x1__bn=NORM,
            rbr_identity=NORM,
        ),
    ),
    "repvgg deployed": ("repvgg", vgg("repvgg", form="deployed"), "stage4.0.", keys(rbr_reparam=BIASED)),
    "timm repvgg": (
        "timm",
        vgg("repvgg", VGG_SE),
        "stem.",
        keys(
            conv_kxk__conv=TENSOR,
            conv_kxk__bn=NORM,
            conv_1x1__conv=TENSOR,
            conv_1x1__bn=NORM,
            attn__fc1=BIASED,
            attn__fc2=BIASED,
        ),
    ),
    "timm repvgg identity": (
        "timm",
        vgg("repvgg"),
        "stages.0.1.",
        keys(
            conv_kxk__conv=TENSOR, conv_kxk__bn=NORM, conv_1x1__conv=TENSOR, conv_1x1__bn=NORM, identity=NORM
        ),
    ),
    "timm repvgg deployed": (
        "timm",
        vgg("repvgg", form="deployed"),
        "stages.3.0.",
        keys(reparam_conv=BIASED),
    ),
    "mobileone": (
        "mobileone",
        one(),
        "stage4.2.",
        keys(
            rbr_conv__0__conv=TENSOR,
            rbr_conv__0__bn=NORM,
            rbr_conv__1__conv=TENSOR,
            rbr_conv__1__bn=NORM,
            rbr_scale__conv=TENSOR,
            rbr_scale__bn=NORM,
            rbr_skip=NORM,
            se__reduce=BIASED,
            se__expand=BIASED,
        ),
    ),
    "mobileone deployed": (
        "mobileone",
        one(form="deployed"),
        "stage4.3.",
        keys(reparam_conv=BIASED, se__reduce=BIASED, se__expand=BIASED),
    ),
    "timm mobileone": (
        "timm",
        one(),
        "stages.3.3.",
        keys(
            conv_kxk__0__conv=TENSOR,
            conv_kxk__0__bn=NORM,
            conv_kxk__1__conv=TENSOR,
            conv_kxk__1__bn=NORM,
            identity=NORM,
            attn__fc1=BIASED,
            attn__fc2=BIASED,
        ),
    ),
    "timm mobileone deployed": ("timm", one(form="deployed"), "stem.", keys(reparam_conv=BIASED)),
    "repopt ghost target": (
        "repopt",
        ghost("plain"),
        "blocks.0.0.ghost1.",
        keys(primary_conv__0=TENSOR, primary_conv__1=NORM, cheap_operation__0=TENSOR, final_bn=NORM),
    ),
    "repopt ghost search": (
        "repopt",
        ghost("search"),
        "blocks.1.0.ghost2.",
        keys(
            primary_conv__0=TENSOR,
            primary_conv__1=NORM,
            cheap_operation__0=TENSOR,
            cheap_operation__1=TENSOR,
            fusion_scale=TENSOR,
            final_bn=NORM,
        ),
    ),
    "repopt ghost rep": (
        "repopt",
        ghost("repghost"),
        "blocks.0.0.ghost2.",
        keys(
            primary_conv__0=TENSOR,
            primary_conv__1=NORM,
            cheap_operation__0=TENSOR,
            cheap_operation__1=NORM,
            fusion_bn=NORM,
        ),
    ),
    "repghost": (
        "repghost",
        ghost("repghost"),
        "blocks.0.0.ghost2.",
        keys(
            primary_conv__0=TENSOR,
            primary_conv__1=NORM,
            cheap_operation__0=TENSOR,
            cheap_operation__1=NORM,
            fusion_bn__0=NORM,
        ),
    ),
    "repghost deployed": (
        "repghost",
        ghost("repghost", form="merged"),
        "blocks.1.0.",
        keys(
            ghost1__primary_conv__0=TENSOR,
            ghost1__primary_conv__1=NORM,
            ghost1__cheap_operation=BIASED,
            ghost2__primary_conv__0=TENSOR,
            ghost2__primary_conv__1=NORM,
            ghost2__cheap_operation=BIASED,
            conv_dw=TENSOR,
            bn_dw=NORM,
            se__conv_reduce=BIASED,
            se__conv_expand=BIASED,
            shortcut__0=TENSOR,
            shortcut__1=NORM,
            shortcut__2=TENSOR,
            shortcut__3=NORM,
        ),
    ),
    "repmlp": (
        "repmlp",
        mlp(),
        "stages.1.1.",
        UNIT
        | keys(
            repmlp_block__fc3=TENSOR,
            repmlp_block__fc3_bn=NORM,
            repmlp_block__repconv1__conv=TENSOR,
            repmlp_block__repconv1__bn=NORM,
            repmlp_block__repconv3__conv=TENSOR,
            repmlp_block__repconv3__bn=NORM,
        ),
    ),
    "repmlp plain": (
        "repmlp",
        mlp("plain"),
        "stages.0.0.",
        UNIT | keys(repmlp_block__fc3=TENSOR, repmlp_block__fc3_bn=NORM),
    ),
    "repmlp deployed": (
        "repmlp",
        mlp(form="merged"),
        "stages.1.0.",
        UNIT | keys(repmlp_block__fc3=BIASED),
    ),
    "timm repghost": ("timm", ghost("repghost"), "blocks.2.0.", keys(conv=TENSOR, bn1=NORM)),
}
# What is not in a block, by the classifier's name.
OUTSIDE = {
    "linear": keys(linear=BIASED),
    "head": {"head.fc.weight", "head.fc.bias"},
    "head_norm": keys(
        conv_embedding__conv=TENSOR,
        conv_embedding__bn=NORM,
        embeds__0__conv=TENSOR,
        embeds__0__bn=NORM,
        head_norm=NORM,
        head=BIASED,
    ),
    "classifier": keys(conv_stem=TENSOR, bn1=NORM, conv_head=BIASED, classifier=BIASED),
}


@functools.cache
def abstract(name):
    """One of ours, without values."""
    return nnx.eval_shape(PUBLISHED[name][1])


def random_state(model, scheme, dtype=np.float32, seed=0):
    """A PyTorch state dict of the model, of random numbers."""
    rng = np.random.default_rng(seed)
    arrays, _ = named_leaves(arrays_of(model))
    return {
        name.key: rng.normal(size=name.shape_in_torch(arrays[path].shape)).astype(dtype)
        for path, name in torch_names(model, scheme).items()
    }


def refused(call, *parts, error=ValueError):
    with pytest.raises(error) as caught:
        call()
    for part in parts:
        assert part in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_keys(name):
    scheme, _, prefix, expected = PUBLISHED[name]
    model = abstract(name)
    state = random_state(model, scheme)
    written = interop.to_torch(interop.from_torch(state, model, scheme), scheme)
    assert {key.removeprefix(prefix) for key in written if key.startswith(prefix)} == expected
    outside = {key for key in written if not key.startswith(("stage", "stem", "blocks"))}
    assert outside in OUTSIDE.values()
    # One key for each array and each counter, and none for two.
    arrays, _ = named_leaves(arrays_of(model))
    assert len(written) == len(arrays) + sum("num_batches" in key for key in written)


@pytest.mark.parametrize("name", PUBLISHED)
def test_there_and_back_to_the_bit(name):
    scheme, model = PUBLISHED[name][0], abstract(name)
    state = random_state(model, scheme)
    assert recognise(state).scheme.name in (scheme, "repghost")  # timm has RepGhost's own names
    written = interop.to_torch(interop.from_torch(state, model), scheme)
    counters = {key: value for key, value in written.items() if key.endswith("num_batches_tracked")}
    assert all(v.shape == () and v.dtype == np.int64 and v == 0 for v in counters.values())
    assert set(written) == set(state) | set(counters)
    for key, value in state.items():
        assert written[key].dtype == value.dtype
        assert np.array_equal(written[key], value), key


def test_a_model_owns_its_values():
    """PyTorch's memory is aligned as JAX likes it: without a copy, training there would change the model."""
    scheme, model = PUBLISHED["repvgg"][0], abstract("repvgg")
    state = {key: aligned(value) for key, value in random_state(model, scheme).items()}
    loaded = interop.from_torch(state, model, scheme)
    before = interop.to_torch(loaded, scheme)
    before = {key: np.array(value) for key, value in before.items()}
    for value in state.values():
        value[...] = 99
    after = interop.to_torch(loaded, scheme)
    assert all(np.array_equal(before[key], after[key]) for key in before)


def aligned(array):
    """A copy that starts at a multiple of 64 bytes."""
    memory = np.empty(array.nbytes + 64, np.uint8)
    start = -memory.ctypes.data % 64
    copy = memory[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy


def test_the_networks_own_names_are_the_default():
    own = {name: authors_scheme(abstract(name)) for name in PUBLISHED}
    assert own["repopt target"] == own["repopt search"] == own["repopt csla"] == "repopt"
    assert own["repvgg"] == own["repvgg deployed"] == own["timm repvgg"] == own["repopt repvgg"] == "repvgg"
    assert own["mobileone"] == own["mobileone deployed"] == "mobileone"
    assert own["repmlp"] == own["repmlp plain"] == own["repmlp deployed"] == "repmlp"
    assert own["repopt ghost target"] == own["repopt ghost search"] == "repopt"
    assert own["repghost"] == own["repghost deployed"] == own["repopt ghost rep"] == "repghost"


def test_a_deployed_vgg_has_the_names_of_the_mode_it_was_trained_in():
    """Which it does not tell."""
    deployed = abstract("repopt target deployed")
    assert authors_scheme(deployed) == authors_scheme(deployed, "repvgg") == "repvgg"
    assert authors_scheme(deployed, "plain") == authors_scheme(deployed, "repopt") == "repopt"
    # With squeeze-and-excitation after the ReLU, only one code base can express it.
    assert authors_scheme(nnx.eval_shape(vgg("repvgg", post_se=True, form="deployed"))) == "repopt"


@pytest.mark.parametrize(
    ("model", "mode", "count"),
    [
        ("repopt-vgg-b1", "plain", 51_841_832),
        pytest.param("repvgg-b2g4", "repvgg", 61_758_376, marks=pytest.mark.long),
        pytest.param("mobileone-s4", "mobileone", 14_951_248, marks=pytest.mark.long),
        ("repopt-ghostnet-0.5", "plain", 2_309_008),
        pytest.param("repghost-2.0", "repghost", 9_796_124, marks=pytest.mark.long),
        ("repmlpnet-t224", "repmlp", 38_293_608),
    ],
)
def test_published_numbers_of_parameters_by_name(model, mode, count):
    """With 1000 classes, counted on the published code; and no two arrays have one key."""
    abstract = build(Description(model, mode, 1000))
    for scheme in {authors_scheme(abstract), "repopt" if "repopt" in model else "timm"} - {
        "timm" if "repmlp" in model else ""
    }:
        names = torch_names(abstract, scheme)
        assert len({name.key for name in names.values()}) == len(names)
    assert networks.count_parameters(abstract) == count


# -- axes


@given(window=st.lists(st.integers(1, 3), max_size=3), inputs=st.integers(1, 4), outputs=st.integers(1, 5))
@settings(max_examples=40, deadline=None)
def test_kernels_move_their_axes(window, inputs, outputs):
    """Dense layers and convolutions of one, two and three dimensions, entry by entry."""
    shape = (outputs, inputs, *window)
    tensor = np.arange(np.prod(shape)).reshape(shape)
    name = TorchName("k", "kernel")
    ours = name.from_torch(tensor)
    assert ours.shape == (*window, inputs, outputs)
    for o, i, *taps in np.ndindex(shape):
        assert ours[(*taps, i, o)] == tensor[(o, i, *taps)]
    assert np.array_equal(name.to_torch(ours), tensor)
    assert name.shape_in_torch(ours.shape) == tensor.shape


@given(
    window=st.lists(st.integers(1, 3), min_size=1, max_size=3),
    inputs=st.integers(1, 2),
    outputs=st.integers(1, 5),
)
@settings(max_examples=20, deadline=None)
def test_kernels_over_flattened_maps_get_a_window(window, inputs, outputs):
    """Entry by entry: column i T + q there is input i at position q of the window here."""
    positions = list(np.ndindex(*window))
    tensor = np.random.default_rng(0).normal(size=(outputs, inputs * len(positions), *(1 for _ in window)))
    name = TorchName("k", "kernel", tuple(window))
    ours = name.from_torch(tensor)
    assert ours.shape == (*window, inputs, outputs)
    for o, i, q in np.ndindex(outputs, inputs, len(positions)):
        assert ours[(*positions[q], i, o)] == tensor[o, i * len(positions) + q].item()
    assert np.array_equal(name.to_torch(ours), tensor)
    assert name.shape_in_torch(ours.shape) == tensor.shape


# -- strictness


@pytest.fixture(scope="module")
def target():
    """A plain VGG with values, and its state dict."""
    abstract_model = nnx.eval_shape(vgg("plain"))
    model = interop.from_torch(random_state(abstract_model, "repopt", seed=1), abstract_model)
    for _, module in named_modules(model):
        if isinstance(module, nnx.BatchNorm):
            module.var[...] = jnp.abs(module.var[...]) + 0.5
    return model, interop.to_torch(model)


def test_every_missing_extra_and_misshapen_key_is_told_at_once(target):
    model, state = target
    state = dict(state)
    del state["stage0.conv.weight"], state["linear.bias"]
    state |= {"stage9.0.conv.weight": np.zeros((1, 1, 3, 3)), "note.num_batches_tracked": np.zeros((), int)}
    state["stage1.0.bn.bias"] = np.zeros(5, np.float32)
    # Height and width are the same in a square kernel, inputs and outputs are not always.
    state["stage4.0.conv.weight"] = np.zeros((6, 8, 3, 3), np.float32)
    refused(
        lambda: interop.from_torch(state, model),
        "2 missing tensors: linear.bias (3,), stage0.conv.weight (4, 3, 3, 3)",
        "2 extra tensors: stage9.0.conv.weight (1, 1, 3, 3), note.num_batches_tracked ()",
        "2 misshapen tensors: stage1.0.bn.bias (expected (4,), found (5,)), stage4.0.conv.weight (expected "
        "(8, 6, 3, 3), found (6, 8, 3, 3))",
    )


def test_batch_counters_may_be_absent_and_are_not_looked_at(target):
    model, state = target
    without = {key: value for key, value in state.items() if "num_batches" not in key}
    for given_state in (without, {**state, "stage0.bn.num_batches_tracked": np.array(7)}):
        loaded = interop.to_torch(interop.from_torch(given_state, model))
        assert all(np.array_equal(loaded[key], state[key]) for key in state)


def test_the_given_model_is_untouched_and_half_precision_is_widened(target):
    model, state = target
    before = {key: value.copy() for key, value in interop.to_torch(model).items()}
    half = {
        key: (value + 1).astype(np.float16) if value.dtype == np.float32 else value
        for key, value in state.items()
    }
    loaded = interop.to_torch(interop.from_torch(half, model))
    assert all(np.array_equal(interop.to_torch(model)[key], before[key]) for key in before)
    for key, value in half.items():
        assert loaded[key].dtype == state[key].dtype
        if "num_batches" not in key:
            assert np.array_equal(loaded[key], value.astype(np.float32))


def test_bfloat16_is_a_floating_point_number_and_an_integer_is_none(target):
    model, state = target
    key = "linear.bias"
    loaded = interop.from_torch({**state, key: state[key].astype(jnp.bfloat16)}, model)
    assert loaded.head.bias.dtype == jnp.float32
    refused(lambda: interop.from_torch({**state, key: np.zeros(3, int)}, model), "linear.bias (int64)")


def test_names_of_no_known_scheme(target):
    model, _ = target
    message = refused(
        lambda: interop.from_torch({"layer1.0.conv1.weight": np.zeros((1, 1, 1, 1))}, model),
        "layer1.0.conv1.weight",
        *SCHEMES,
    )
    assert "RepVGG as its authors name it" in message
    refused(lambda: recognise({}), "no tensors")
    refused(lambda: interop.to_torch(model, "caffe"), "`names` is 'caffe'", *SCHEMES)


def test_a_state_dict_of_another_form_says_what_it_fits(target):
    model, state = target
    deployed = random_state(nnx.eval_shape(vgg("repvgg", form="deployed")), "repvgg")
    refused(
        lambda: interop.from_torch(deployed, model),
        "does not fit the Classifier tiny",
        "stages/0/0/bn",
        "a network prepared in mode 'repvgg' and given to `fuse`",
    )
    refused(
        lambda: interop.from_torch(state, nnx.eval_shape(vgg("search"))),
        "missing",
        "a network prepared in mode 'plain'",
    )


def test_layers_that_a_code_base_has_no_name_for_are_listed():
    model = nnx.eval_shape(vgg())
    refused(lambda: interop.to_torch(model, "repvgg"), "stages/0/0/bn, ", "stages/4/0/bn. Others: repopt")
    refused(lambda: interop.to_torch(model, "mobileone"), "layers head, ", "stages/4/0/conv.")
    acnet = nnx.eval_shape(vgg("acnet"))
    refused(lambda: interop.to_torch(acnet), "stages/0/0/conv, ", "stages/4/0/conv;", "'repopt'", "'timm'")
    # Every branch has a name, but not every name has a branch.
    repghost = nnx.eval_shape(vgg("repghost"))
    refused(
        lambda: interop.to_torch(repghost, "repvgg"),
        "stages/1/1/conv: it is made of 3x3, identity, there of 1x1, 3x3, identity",
    )
    # The fully folded form of a GhostNet: biases where nobody has them.
    folded = nnx.eval_shape(ghost("repghost", form="deployed"))
    refused(lambda: interop.to_torch(folded), "stages/1/0/ghost1/primary/conv", "'repopt'", "'repghost'")


@pytest.mark.parametrize("form", ["training", "deployed"])
def test_the_place_of_squeeze_and_excitation_is_not_in_the_names(form):
    """So that what would compute something else is refused."""
    before = nnx.eval_shape(vgg("repvgg", VGG_SE, form=form))
    refused(
        lambda: interop.to_torch(before, "repopt"),
        "stages/0/0: its squeeze-and-excitation comes before the ReLU, there it comes after",
    )
    after = nnx.eval_shape(vgg("repvgg", post_se=True, form=form))
    for names in ("repvgg", "timm"):
        refused(
            lambda names=names: interop.to_torch(after, names),
            "stages/4/0: its squeeze-and-excitation comes after the ReLU, there it comes before",
        )


class OwnNetwork(nnx.Module):
    """A user's network, with names of its own in PyTorch."""

    def __init__(self, rngs):
        self.stem = block(3, 4, 3, rngs=rngs)
        self.table = nnx.Param(jnp.zeros((2, 3)))


def test_a_scheme_of_ones_own():
    model = OwnNetwork(nnx.Rngs(0))
    refused(lambda: interop.to_torch(model), "no scheme names a OwnNetwork", "`Scheme`")
    rows = (
        ("stem/conv", "features.conv", interop.names.TENSOR),
        ("stem/bn", "features.bn", interop.names.NORM),
    )
    scheme = Scheme("mine", "my own code", (Layout(rows=rows),))
    refused(lambda: interop.to_torch(model, scheme), "have no place for the layers table.")
    del model.table
    same = Scheme(
        "same", "", (Layout(rows=((".*", "x", interop.names.TENSOR), (".*", "x", interop.names.NORM))),)
    )
    refused(lambda: interop.to_torch(model, same), "'same' call several arrays x.weight")
    state = interop.to_torch(model, scheme)
    assert "features.conv.weight" in state
    assert "features.bn.num_batches_tracked" in state
    assert np.array_equal(
        interop.to_torch(interop.from_torch(state, model, scheme), scheme)["features.bn.weight"], np.ones(4)
    )


def test_layers_that_pytorch_has_in_another_form_are_named():
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.a = nnx.Einsum("ab,bc->ac", (4, 4), rngs=rngs)
            self.b = nnx.LinearGeneral(4, (2, 2), rngs=rngs)

    rows = (("(a|b)", r"\1", interop.names.BIASED),)
    scheme = Scheme("mine", "my own code", (Layout(rows=rows),))
    refused(lambda: interop.to_torch(Net(nnx.Rngs(0)), scheme), "a/kernel (Einsum), b/kernel (LinearGeneral)")


# -- files, and networks by name


@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".pt"])
def test_weights_through_a_file(target, tmp_path, suffix):
    model, state = target
    path = tmp_path / f"weights{suffix}"
    interop.save_torch(path, model)
    loaded = interop.to_torch(interop.load_torch(path, nnx.eval_shape(vgg("plain"))))
    assert all(np.array_equal(loaded[key], value) for key, value in state.items())
    refused(lambda: interop.save_torch(path, model), error=FileExistsError)
    refused(lambda: interop.save_torch(tmp_path / "weights.npz", model), ".safetensors, .pth, .pt")


@pytest.fixture
def tiny_networks(monkeypatch):
    for prefix, make, variant in (
        ("repopt-vgg", models.vgg, VGG),
        ("repvgg", models.vgg, VGG),
        ("mobileone", models.mobileone, ONE),
        ("repopt-ghostnet", models.ghostnet, GHOST),
        ("repghost", models.ghostnet, GHOST),
        ("repmlpnet", models.RepMLPNet, MLP),
    ):
        entry = models.Entry(f"{prefix}-tiny", make, variant, "plain")
        monkeypatch.setitem(registry.NETWORKS, entry.name, entry)


@pytest.mark.parametrize(
    ("name", "scheme", "make", "mode", "form"),
    [
        ("repopt-vgg-tiny", "repopt", vgg("plain", post_se=True), "plain", "training"),
        ("repopt-vgg-tiny", "repopt", vgg("plain", form="deployed"), "plain", "deployed"),
        ("repopt-vgg-tiny", "repopt", vgg("search"), "search", "training"),
        pytest.param(
            "repopt-vgg-tiny", "repopt", vgg(forms.CSLA), "search", "training", marks=pytest.mark.long
        ),
        ("repvgg-tiny", "timm", vgg("repvgg"), "repvgg", "training"),
        ("repvgg-tiny", "repvgg", vgg("repvgg", form="deployed"), "repvgg", "deployed"),
        pytest.param("mobileone-tiny", "mobileone", one(), "mobileone", "training", marks=pytest.mark.long),
        ("mobileone-tiny", "timm", one(form="deployed"), "mobileone", "deployed"),
        pytest.param(
            "repopt-ghostnet-tiny", "repopt", ghost("plain"), "plain", "training", marks=pytest.mark.long
        ),
        ("repghost-tiny", "repghost", ghost("repghost", form="merged"), "repghost", "merged"),
        pytest.param("repmlpnet-tiny", "repmlp", mlp(), "repmlp", "training", marks=pytest.mark.long),
        pytest.param("repmlpnet-tiny", "repmlp", mlp("plain"), "plain", "training", marks=pytest.mark.long),
        ("repmlpnet-tiny", "repmlp", mlp(form="merged"), "repmlp", "merged"),
    ],
)
def test_a_converted_folder_gives_the_network_back(name, scheme, make, mode, form, tiny_networks, tmp_path):
    state = random_state(nnx.eval_shape(make), scheme)
    description = describe(state, name.upper(), classes=3)
    post_se = "stage0.post_se.up.bias" in state
    assert description == Description(name, mode, 3, 3, post_se, form)
    model = interop.from_torch(state, build(description))
    networks.save_converted(tmp_path / "out", model, description)
    again = interop.load_converted(tmp_path / "out")
    written = interop.to_torch(again, scheme)
    assert all(np.array_equal(written[key], value) for key, value in state.items())
    assert not any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(nnx.state(again)))
    refused(lambda: networks.save_converted(tmp_path / "out", model, description), error=FileExistsError)
    for path in (tmp_path / "out" / "weights").rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[:50])
    refused(lambda: interop.load_converted(tmp_path / "out"), "weights is damaged", "convert the file again")


def test_what_is_built_is_what_surgery_makes(tiny_networks):
    """The same arrays, shapes and dtypes, and the same network for mode repopt as for plain."""
    made = prepare(models.create("repvgg-tiny", num_classes=3, rngs=nnx.Rngs(0)), "repvgg", rngs=nnx.Rngs(0))
    expected, _ = named_leaves(nnx.state(made.model))
    found, _ = named_leaves(nnx.state(build(Description("repvgg-tiny", "repvgg", 3))))
    assert {k: (v.shape, v.dtype) for k, v in found.items()} == {
        k: (v.shape, v.dtype) for k, v in expected.items()
    }
    plain, repopt = (build(Description("repopt-vgg-tiny", mode, 3)) for mode in ("plain", "repopt"))
    assert torch_names(plain, "repopt") == torch_names(repopt, "repopt")


def test_names_and_numbers_that_contradict_the_file():
    state = random_state(nnx.eval_shape(vgg()), "repopt")
    refused(lambda: describe(state, "vgg-16"), "no network 'vgg-16'", "repopt-vgg-b1, ", "mobileone-s0, ")
    refused(
        lambda: describe(state, "mobileone-s0"), "holds repopt (VGG, mode plain), which is no mobileone-s0"
    )
    refused(lambda: describe(state, "fcos-face"), "which is no fcos-face")
    refused(lambda: describe(state, "repopt-vgg-B1", classes=5), "`classes` is 5", "has 3")
    del state["linear.weight"]
    refused(lambda: describe(state, "repopt-vgg-B1"), "without its classifier")
    refused(lambda: interop.load_converted("nowhere"), "convert.json", error=FileNotFoundError)


def test_a_converted_folder_without_weights_or_of_another_version(tmp_path):
    (tmp_path / networks.RECORD).write_text('{"model": "repvgg-A0", "kind": "", "library_version": "0.0"}')
    refused(
        lambda: interop.load_converted(tmp_path), "has no weights", "interrupted", error=FileNotFoundError
    )
    (tmp_path / networks.WEIGHTS).mkdir()
    refused(lambda: interop.load_converted(tmp_path), "is of version 0.0", "convert the file again")


def test_the_check_without_pytorch_says_so(target, monkeypatch):
    model, state = target
    model.eval()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    checked = convert.check(model, state, "repopt")
    assert checked.lines[1] == "logits not compared: PyTorch is not installed"
    assert checked.parameters == checked.torch_parameters > 0
    wrong = {**state, "more.weight": np.zeros(2)}
    refused(lambda: convert.check(model, wrong, "repopt"), "the two sides differ, nothing was written")


def test_the_check_notices_another_network(target):
    pytest.importorskip("torch")
    model, state = target
    model.eval()
    checked = convert.check(model, state, "repopt")
    assert checked.difference is not None
    assert checked.largest is not None
    assert checked.difference <= 1e-4 * checked.largest
    key = "stage1.0.conv.weight"
    wrong = {**state, key: state[key].transpose(0, 1, 3, 2)}
    refused(lambda: convert.check(model, wrong, "repopt"), "the two sides differ", "largest logit difference")
