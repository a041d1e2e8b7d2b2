"""Which layers of any network become which structure, with which options; and that all merge exactly."""

import functools
import inspect
import math
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiers
import tolerances
from any_networks import DEPTHWISE, NETWORKS, squared_error
from flax import nnx
from forms import UNIREPLKNET, is_of_small_windows
from networks import abstract, count, parameter_shapes, relative, settled_statistics

from repopt_jax import Geometry, find_parametrizations, fuse, models, prepare, to_structure
from repopt_jax.core import published
from repopt_jax.core.branches import Kernel
from repopt_jax.core.published import STRUCTURES, acnet, dbb, repghost
from repopt_jax.nn import Branched, Merged
from repopt_jax.surgery.choose import find_classifier, find_structure, find_structures, parse_options
from repopt_jax.surgery.fuse import FoldedNorm
from repopt_jax.surgery.modules import named_modules

pytestmark = pytest.mark.once

PLAIN = Geometry((3, 3), 4, 4)
CASES = {name: NETWORKS[name] for name in ("ResNet-18", "U-Net", "1-D")} | {"depthwise": DEPTHWISE}
# Options under which structures have more kinds of branches; `test_structure` runs them without.
OPTIONS = {"mobileone": {"copies": 2}, "repghost": {"raw_identity": True}, "replknet": {"small": 3}}


def taken(choices):
    return {path.rpartition("/")[0] for path, choice in choices.items() if choice.structure is not None}


def reasons(choices):
    return {path.rpartition("/")[0]: c.reason for path, c in choices.items() if c.structure is None}


# -- exactness


# The others are `long`: this one has windows for every structure, and layers of every other kind are in
# test_structure.py, one by one.
@pytest.mark.parametrize("name", tiers.often(CASES, "depthwise"))
def test_every_structure_of_a_network_merges_exactly(name, x64):
    """Branch by branch and merged."""
    case = CASES[name]
    plain, made = case.abstract(), {}
    for structure in STRUCTURES:
        options = OPTIONS.get(structure)
        if taken(find_structures(plain, structure, options=options)):
            convert = functools.partial(to_structure, structure=structure, options=options)
            made[structure] = settled_statistics(
                nnx.eval_shape(lambda m, c=convert: c(m, rngs=nnx.Rngs(0)), plain)
            )

    x = case.batches(1, dtype=np.float64)[0]["x"]
    assert {s for s in STRUCTURES if is_of_small_windows(s, OPTIONS.get(s))} <= set(made)
    outputs = {}
    for key, model in made.items():
        branched = outputs[key] = model(x)
        difference = apart(fuse(model, only=(Branched, Merged))(x), branched)
        assert difference <= tolerances.STRUCTURES, key
    # Negative control: a fresh batch norm would hide what is forgotten.
    model = made["acnet"]
    for norm in next(m for _, m in named_modules(model) if isinstance(m, Branched)).norms.values():
        norm.mean[...] += 0.5
    assert apart(model(x), outputs["acnet"]) > tolerances.STRUCTURES_APART


def apart(found, expected):
    """The largest difference, in the largest deviation of an output between the inputs of a batch: of what an
    input brings about, not of the biases."""
    deviation = np.asarray(expected).std(axis=0).max()
    return float(np.abs(np.asarray(found) - np.asarray(expected)).max() / deviation)


# -- which layers


def test_what_is_left_as_it_is():
    plain = NETWORKS["ResNet-18"].abstract()
    found = find_structures(plain, "acnet")
    assert len(found) == NETWORKS["ResNet-18"].layers
    downsample = [f"stages/{i}/0/downsample/layers/0" for i in (1, 2)]
    assert set(reasons(found)) == {"fc", *downsample}
    assert str(found["fc/kernel"]).startswith("left as it is: it is the dense layer that makes the logits")
    assert str(found["conv1/kernel"]) == "3x3 + 3x1 + 1x3"
    assert reasons(found)[downsample[0]] == "the structure would have its own kernel only"
    # In DBB a 1x1 layer has branches to gain, but not in the published networks.
    assert (
        "the published networks keep 1x1 layers plain"
        in reasons(find_structures(plain, "dbb"))[downsample[0]]
    )
    assert taken(find_structures(plain, functools.partial(dbb, middle=8))) == taken(found)
    # A 1x1 layer of as many outputs as inputs gains the identity unless it is strided.
    assert set(reasons(find_structures(plain, "repvgg"))) == {"fc", *downsample}


def test_selected_layers_are_taken_or_refused():
    plain = NETWORKS["ResNet-18"].abstract()
    assert taken(find_structures(plain, "acnet", r"fc|stages/1/0/downsample/layers/0")) == {
        "fc",
        "stages/1/0/downsample/layers/0",
    }
    chosen = nnx.eval_shape(lambda m: to_structure(m, "dbb", r"fc|conv1", rngs=nnx.Rngs(0)), plain)
    assert isinstance(chosen.fc, Branched)
    assert isinstance(chosen.conv1, Branched)
    with pytest.raises(
        ValueError, match=r"not defined for all selected layers: conv1: the window is \(3, 3\)"
    ):
        to_structure(plain, "unireplknet", "conv1", rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"^no layer of `model` becomes `structure`: conv1: the window is"):
        to_structure(plain, "unireplknet", rngs=nnx.Rngs(0))


UP = (
    "a transposed convolution with strides 2: each of its outputs is reached by some taps of the kernel "
    "only, so that a 1x1 branch in the centre would reach some outputs alone"
)


def test_by_default_a_structure_goes_where_it_is_defined():
    found = find_structures(DEPTHWISE.abstract(), "unireplknet")
    assert taken(found) == {"large", "strided"}
    assert all(found[f"{name}/kernel"].undefined for name in ("stem", "mix", "wide"))
    assert taken(find_structures(DEPTHWISE.abstract(), "replknet")) == {"large"}
    assert taken(find_structures(DEPTHWISE.abstract(), "dbb")) == {"strided", "wide"}
    unet = find_structures(NETWORKS["U-Net"].abstract(), "repvgg")
    own_only = dict.fromkeys(("out", "deeper"), "the structure would have its own kernel only")
    assert reasons(unet) == own_only | {"up": UP}
    # Two taps have no centre.
    deeper = reasons(find_structures(NETWORKS["U-Net"].abstract(), "acnet"))["deeper"]
    assert "not defined for a 2x2 layer of" in deeper
    assert "cannot be centred in a window of 2 taps (spatial axis 0): the window has 1 more" in deeper
    assert "Geometry" not in deeper
    dense = reasons(find_structures(NETWORKS["MLP"].abstract(), "unireplknet"))["layers/0"]
    assert dense == "it is a dense layer, which has no window for large kernels"


class Unreadable(nnx.Module):
    def __init__(self, rngs):
        self.conv = nnx.Conv(2, 2, (3, 3), rngs=rngs)
        self.causal = nnx.Conv(2, 2, (3,), padding="CAUSAL", rngs=rngs)
        self.up = nnx.ConvTranspose(2, 2, (2, 2), strides=2, rngs=rngs)


def test_a_layer_that_no_branches_can_replace(caplog):
    model = Unreadable(nnx.Rngs(0))
    found = find_structures(model, "repvgg")
    assert taken(found) == {"conv"}
    assert "padding 'CAUSAL' shifts the window" in reasons(found)["causal"]
    assert reasons(found)["up"] == UP
    lines = str(found).splitlines()
    assert lines[:2] == ["1 layers taken:", "  conv/kernel: 3x3 + 1x1 + identity"]
    assert lines[2] == "2 left as they are:"
    assert [line.split(":")[0] for line in lines[3:]] == ["  causal/kernel", "  up/kernel"]
    assert taken(find_structures(model)) == {"conv"}
    assert isinstance(to_structure(model, "repvgg", rngs=nnx.Rngs(0)).causal, nnx.Conv)
    assert "layers that no branches can replace are left as they are: causal: padding" in caplog.text
    with pytest.raises(ValueError, match=r"not defined for all selected layers: causal: .*padding 'CAUSAL'"):
        to_structure(model, "repvgg", "causal|conv", rngs=nnx.Rngs(0))


class Normed(nnx.Module):
    """A layer and its batch norm."""

    def __init__(self, rngs):
        self.conv = nnx.Conv(2, 2, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(2, rngs=rngs)

    def __call__(self, x):
        return self.norm(self.conv(x))


@pytest.mark.parametrize(
    ("structure", "given", "said"),
    [
        ("repvgg", {}, True),
        ("repvgg", {"example": (jnp.ones((1, 4, 4, 2)),)}, False),
        ("repvgg", {"pairs": {"conv": "norm"}}, False),
        ("qarepvgg", {}, False),
    ],
    ids=["nothing", "example", "pairs", "a norm after the sum"],
)
def test_norms_that_stay_are_named_where_nothing_says_what_they_follow(structure, given, said, caplog):
    model = to_structure(Normed(nnx.Rngs(0)), structure, rngs=nnx.Rngs(0), **given)
    assert ("the batch norms norm stay" in caplog.text) == said
    assert isinstance(model.norm, nnx.BatchNorm) == (said or structure == "qarepvgg")


class Dense(nnx.Module):
    """Dense layers with these (inputs, outputs), by name."""

    def __init__(self, *, rngs, **sizes):
        for name, (inputs, outputs) in sizes.items():
            setattr(self, name, nnx.Linear(inputs, outputs, rngs=rngs))


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ({"fc1": (4, 6), "fc2": (6, 3)}, "fc2"),
        ({"fc9": (4, 4), "fc10": (4, 4)}, "fc10"),
        # By name the last, but it feeds the others.
        ({"head": (6, 3), "patch": (4, 6)}, "head"),
        ({"logits": (8, 10), "proj": (8, 8)}, "logits"),
        ({}, None),
    ],
)
def test_the_classifier(sizes, expected):
    assert find_classifier(nnx.eval_shape(lambda: Dense(rngs=nnx.Rngs(0), **sizes))) == expected


def test_classifiers_of_the_other_networks():
    found = {name: find_classifier(case.abstract()) for name, case in NETWORKS.items()}
    assert found == {
        "ResNet-18": "fc",
        "U-Net": None,
        "shared head": None,
        "scanned stack": "head",
        "1-D": "head",
        "3-D": "head",
        "MLP": "layers/3",
    }


@pytest.mark.parametrize(
    ("name", "mode"),
    [("vgg-digits", "repvgg"), ("mobileone-digits", "mobileone"), ("repghost-digits", "repghost")],
)
def test_a_network_that_declares_its_layers_decides_by_itself(name, mode, caplog):
    """Among them 1x1 layers of one copy, which elsewhere would have nothing to gain."""
    model = abstract(models.create, name, num_classes=10)
    found = find_structures(model, mode)
    assert taken(found) == {path.rpartition("/")[0] for path in model.layers()}
    assert reasons(found)["head"] == "the model does not declare it: choose it with `select`"
    nnx.eval_shape(lambda m: to_structure(m, mode, rngs=nnx.Rngs(0)), model)
    assert not caplog.records


PARAMETERS = {
    ("vgg-digits", "repvgg"): 125610,
    ("vgg-digits", "dbb"): 261913,
    ("mobileone-digits", "mobileone"): 2722,
    ("mobileone-digits", "acnet"): 2026,
    ("mobileone-digits", "dbb"): 4753,
    ("repghost-digits", "repghost"): 4114,
    ("fcos-scenes", "qarepvgg"): 217746,
}


@pytest.mark.parametrize(("name", "mode"), PARAMETERS)
def test_networks_of_ours_keep_their_numbers_of_parameters(name, mode):
    """1x1 layers of DBB among them, which other networks keep plain."""

    def build(rngs):
        return prepare(models.create(name, num_classes=10, rngs=rngs), mode, rngs=rngs).model

    assert count(abstract(build)) == PARAMETERS[name, mode]


# -- options


def starts(structure):
    return {part.key: part.stage.start for part in structure.followers("norm").values()}


def test_options_of_acnet_and_dbb():
    assert starts(acnet(PLAIN)) == {"3x3": 1, "3x1": 1, "1x3": 1}
    assert starts(acnet(PLAIN, gamma=1 / 3)) == dict.fromkeys(("3x3", "3x1", "1x3"), 1 / 3)
    assert starts(acnet(PLAIN, single_init=True)) == {"3x3": 1, "3x1": 0, "1x3": 0}
    inner = {"average_0": 1, "1x1_3x3_0": 1}
    assert (
        starts(dbb(PLAIN, single_init=True)) == {"3x3": 1, "1x1": 0, "average_1": 0, "1x1_3x3_1": 0} | inner
    )
    assert set(starts(dbb(PLAIN)).values()) == {1}
    depthwise = dbb(Geometry((3, 3), 4, 4, 4), single_init=True)
    assert starts(depthwise) == {"3x3": 1, "average": 0, "1x1_3x3_0": 1, "1x1_3x3_1": 0}
    assert depthwise.placed["1x1_3x3"][0].layer.outputs == 8
    assert dbb(PLAIN, middle=6).placed["1x1_3x3"][0].layer.outputs == 6
    several = dbb(Geometry((3, 3), 4, 8, 4))
    assert [name for name, _ in several.chains] == ["3x3", "1x1", "average", "1x1_3x3"]
    raw = dict(repghost(PLAIN, raw_identity=True).chains)["identity"]
    assert [stage.then for stage in raw] == [""]


def test_the_square_kernel_alone_starts_as_the_plain_layer():
    """What `single_init` is for."""
    model = nnx.Sequential(nnx.Conv(4, 4, (3, 3), use_bias=False, rngs=nnx.Rngs(0)))
    for name in ("acnet", "dbb"):
        layer = to_structure(
            model, name, options={"single_init": True}, trained=False, rngs=nnx.Rngs(0)
        ).layers[0]
        kernel, bias = layer.kernel_and_bias()
        assert relative(kernel, layer.weights["3x3"][...] / math.sqrt(1 + 1e-5)) <= 1e-6
        assert not np.asarray(bias).any()


def test_options_by_name_and_by_description():
    model = NETWORKS["1-D"].abstract()

    def made(structure, **arguments):
        return find_structures(model, structure, **arguments)["wide/kernel"].structure

    by_name = made("acnet", options={"gamma": 1 / 3})
    assert by_name == made(functools.partial(acnet, gamma=1 / 3)) == made(acnet, options={"gamma": 1 / 3})
    assert by_name == made({".*": "acnet"}, options={"gamma": 1 / 3}) != made("acnet")
    # Of a network's own description too: MobileOne's has two copies here.
    one = abstract(models.create, "mobileone-digits", num_classes=2)
    for options, copies in ((None, 2), ({"copies": 3}, 3)):
        layer = find_structures(one, "mobileone", options=options)["stages/1/0/conv/kernel"].structure
        assert [name for name, _ in layer.chains][:copies] == [f"3x3_{j}" for j in range(copies)]
    ready = nnx.eval_shape(
        lambda m: prepare(m, "mobileone", options={"copies": 1}, rngs=nnx.Rngs(0)).model, one
    )
    assert "3x3_1" not in ready.stages[1][1].conv.norms
    assert set(ready.stages[0][0].conv.norms) == {"3x3_0", "1x1"}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: find_structure("replk"), r"no structure 'replk' \(did you mean 'replknet'\?\)"),
        (lambda: find_structure("unireplk"), r"\(did you mean 'unireplknet'\?\)"),
        (
            lambda: find_structure("acnet", {"gama": 1}),
            r"acnet has no option 'gama' \(did you mean 'gamma'\?\): it",
        ),
        (lambda: find_structure("repvgg", {"copies": 1}), "repvgg has no option 'copies': it takes none"),
        (lambda: acnet(PLAIN, gamma=0.5, single_init=True), "`gamma` is 0.5 with `single_init`"),
        (lambda: acnet(PLAIN, gamma=math.nan), "`gamma` is nan: it must be a finite number"),
        (lambda: dbb(PLAIN, middle=0), "`middle` is 0: a chain of two stages needs"),
        (lambda: dbb(Geometry((3, 3), 4, 4, 2), middle=3), "`groups` is 2: it must divide"),
        (
            lambda: published.replknet(Geometry((9, 9), 4, 4), small=4),
            "a 9x9 layer of 4 inputs and 4 outputs: 4x4: a kernel of 4 taps cannot be centred",
        ),
        (
            lambda: find_structure("mobileone", {"copies": 2.5}),
            "`copies` of mobileone is 2.5: it must be of type int",
        ),
        (lambda: find_structure("dbb", {"middle": True}), "`middle` of dbb is True: it must be of type"),
        (lambda: find_structure("acnet", {"gamma": "1/3"}), "is '1/3': it must be of type float"),
        (lambda: find_structure("dbb", {"single_init": 1}), "is 1: it must be of type bool"),
        (lambda: parse_options("copies"), "'copies' of 'copies' is not `name=value`"),
        (lambda: parse_options("a=1, a=2"), "each name once"),
        (lambda: parse_options("gamma=1/0"), "'gamma=1/0': its value must be a finite number"),
        (lambda: parse_options("gamma=x"), "must be a finite number, a fraction, true, false or none"),
        (
            lambda: prepare(nnx.Sequential(), "plain", options={"gamma": 1}, rngs=nnx.Rngs(0)),
            r"mode plain has no structure that takes `options` \{'gamma': 1\}",
        ),
        (
            lambda: prepare(nnx.Sequential(), "plain", select=".*", branches=[], rngs=nnx.Rngs(0)),
            "mode plain leaves every layer as it is, without a use for `select` and `branches`",
        ),
        (
            lambda: prepare(nnx.Sequential(), "plain", keep="all", rngs=nnx.Rngs(0)),
            "`keep` is 'all': it must be 'split' or None",
        ),
    ],
)
def test_wrong_names_and_options(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("take", [find_structures, find_parametrizations, to_structure])
@pytest.mark.parametrize(
    ("structure", "match"),
    [
        (None, "`structure` is of type NoneType: it must be a name in `STRUCTURES`, or a description"),
        (3, "`structure` is of type int"),
        (
            published.repvgg(PLAIN),
            "`structure` is of type Structure: .* a function from a layer's `Geometry`",
        ),
        (
            {"a": 1, "b": "repvgg", "c": published.repvgg(PLAIN)},
            "of the rule 'a' is of type int; `structure` of the rule 'c' is of type Structure: it must",
        ),
    ],
)
def test_what_is_no_structure(take, structure, match):
    model = nnx.Sequential(nnx.Conv(4, 4, (3, 3), rngs=nnx.Rngs(0)))
    options = {"rngs": nnx.Rngs(0), "trained": False} if take is to_structure else {}
    with pytest.raises(TypeError, match=match):
        take(model, structure=structure, **options)


def test_options_as_text():
    assert parse_options("") == {}
    assert parse_options("gamma=1/3, single_init=False,middle=none") == {
        "gamma": 1 / 3,
        "single_init": False,
        "middle": None,
    }
    assert parse_options("small = 7,gamma=0.5") == {"small": 7, "gamma": 0.5}


@pytest.mark.parametrize("size", UNIREPLKNET)
def test_unireplknet_has_a_set_for_every_published_size(size):
    structure = published.unireplknet(Geometry((size, size), 2, 2, 2))
    own, *small = [chain[0].map for _, chain in structure.chains]
    assert own == Kernel((size, size))
    assert small == [Kernel((k, k), (d, d)) for k, d in zip(*UNIREPLKNET[size], strict=True)]


def test_unireplknet_has_no_other_sets():
    assert set(published.DILATED_KERNELS) == set(UNIREPLKNET)
    for size in (3, 6, 19):
        with pytest.raises(ValueError, match=r"the same, one of 5, 7, 9, 11, 13, 15, 17$"):
            published.unireplknet(Geometry((size, size), 2, 2, 2))


def test_the_documentation_has_every_structure_with_its_options():
    text = (Path(__file__).parents[1] / "docs" / "structures.md").read_text(encoding="utf-8")
    rows = {line.split("`")[1]: line for line in text.splitlines() if line.startswith("| `")}
    assert set(STRUCTURES) <= set(rows)
    table = text[: text.index("## Which layers")]
    for name, description in STRUCTURES.items():
        (row,) = (line for line in table.splitlines() if line.startswith(f"| `{name}`"))
        parameters = inspect.signature(description).parameters.values()
        assert all(f"`{p.name}`" in row for p in parameters if p.kind is p.KEYWORD_ONLY), name


# -- insert, train, convert


PAIRS = {r"(.*/)?conv(\d)": r"\1bn\2", r"(.*/)downsample/layers/0": r"\1downsample/layers/1"}


def test_an_existing_network_gets_blocks_is_trained_and_converted():
    """A structure by place, for a layer and its batch norm: DBB on the way up, ACNet on the way down."""
    pairs = {r"(.*/)conv(\d)": r"\1bn\2"}
    case = NETWORKS["U-Net"]
    original = case.fresh()
    rules = {r"leave/.*": "dbb", r"enter/.*": "acnet"}
    model = to_structure(original, rules, pairs=pairs, rngs=nnx.Rngs(0))  # insert

    assert set(model.leave.conv1.norms) == {"3x3", "1x1", "average_0", "average_1", "1x1_3x3_0", "1x1_3x3_1"}
    assert set(model.enter.conv2.norms) == {"3x3", "3x1", "1x3"}
    assert isinstance(model.enter.bn2, FoldedNorm)
    assert isinstance(model.middle.bn2, nnx.BatchNorm)

    (batch,) = case.batches(1)  # train
    optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer, batch):
        loss, gradients = nnx.value_and_grad(squared_error)(model, batch)
        optimizer.update(model, gradients)
        return loss

    losses = [float(step(model, optimizer, batch)) for _ in range(6)]
    assert losses[-1] < 0.9 * losses[0]

    model.eval()
    converted = fuse(model, pairs=pairs)  # convert

    original.eval()
    plain = fuse(original, pairs=pairs)
    assert parameter_shapes(converted) == parameter_shapes(plain)
    assert {type(m) for _, m in named_modules(converted)} == {type(m) for _, m in named_modules(plain)}
    assert relative(converted(batch["x"]), model(batch["x"])) <= tolerances.FUSED_FLOAT32


def test_which_batch_norms_are_removed():
    """Those of layers that become a structure without a norm after its sum."""
    model = abstract(lambda rngs: NETWORKS["ResNet-18"].build(rngs=rngs))
    for structure, kept in (
        ("repvgg", {"downsample/layers/1"}),
        ("qarepvgg", {"bn1", "bn2", "downsample/layers/1"}),
    ):
        new = nnx.eval_shape(lambda m, s=structure: to_structure(m, s, pairs=PAIRS, rngs=nnx.Rngs(0)), model)
        norms = {p for p, m in named_modules(new) if isinstance(m, nnx.BatchNorm) and "/norms/" not in p}
        assert {p for p in norms if p.startswith("stages/1/0/")} == {f"stages/1/0/{name}" for name in kept}
    with pytest.raises(ValueError, match="the rules 'conv9' match none of the layers"):
        to_structure(model, "repvgg", pairs={"conv9": "bn9"}, rngs=nnx.Rngs(0))
