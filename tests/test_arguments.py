"""What public functions are given by mistake: an error at once, with the name of the argument."""

import functools

import jax.numpy as jnp
import optax
import pytest
from flax import nnx
from networks import TINY_DETECTOR, abstract

import repopt_jax
from repopt_jax import Scales, models
from repopt_jax.arguments import check_number
from repopt_jax.quantize import quantize


def network():
    return models.create("vgg-digits", num_classes=10, in_channels=1, rngs=nnx.Rngs(0))


@pytest.fixture(scope="module")
def model():
    return network()


@pytest.fixture(scope="module")
def scales(model):
    return repopt_jax.depth_scales(model)


BACKBONE = TINY_DETECTOR.backbone
NARROW = models.VGGVariant("narrow", (1, 1, 1, 1), (2, 2, 2, 2, 2))
PARAMS = {"w": jnp.ones((3, 3, 4, 4))}
# What scales are given to: name -> call(scales, model).
TAKE_SCALES = {
    "repopt_mask": lambda s, m: repopt_jax.repopt_mask(s),
    "repopt_sign_mask": lambda s, m: repopt_jax.repopt_sign_mask(s),
    "repopt_sgd": lambda s, m: repopt_jax.repopt_sgd(0.1, s),
    "repopt_adamw": lambda s, m: repopt_jax.repopt_adamw(0.1, s),
    "repopt_lion": lambda s, m: repopt_jax.repopt_lion(0.1, s),
    "scale_by_repopt_adam": lambda s, m: repopt_jax.scale_by_repopt_adam(s),
    "reparameterize": lambda s, m: repopt_jax.reparameterize(optax.sgd(0.1), s),
    "gradient_multipliers": lambda s, m: repopt_jax.gradient_multipliers(PARAMS, s),
    "clip_by_repopt_global_norm": lambda s, m: repopt_jax.clip_by_repopt_global_norm(1.0, s),
    "check_optimizer": lambda s, m: repopt_jax.check_optimizer(optax.sgd(0.1), s, PARAMS),
    "save_scales": lambda s, m: repopt_jax.save_scales("/nowhere/scales", s),
    "reinitialize": lambda s, m: repopt_jax.reinitialize(m, s, rngs=nnx.Rngs(0)),
    "prepare": lambda s, m: repopt_jax.prepare(m, "repopt", scales=s, rngs=nnx.Rngs(0)),
    "verify_equivalence": lambda s, m: repopt_jax.verify_equivalence(m, s, [], rngs=nnx.Rngs(0)),
    "transfer_scales": lambda s, m: repopt_jax.transfer_scales(m, s),
}
GIVEN = {"path": "runs/scales", "none": None, "dict": {"w": 1}, "model": network}


@pytest.mark.parametrize("kind", list(GIVEN))
@pytest.mark.parametrize("name", list(TAKE_SCALES))
def test_something_else_where_scales_are_due(name, kind, model):
    given = model if kind == "model" else GIVEN[kind]
    with pytest.raises((TypeError, ValueError), match=r"`(scales|source)`") as error:
        TAKE_SCALES[name](given, model)
    assert "\n" not in str(error.value)
    if kind == "path" and name != "reparameterize":
        assert "`load_scales` reads a file" in str(error.value)


@pytest.mark.parametrize("given", [None, {"w": 1}, network], ids=["none", "dict", "function"])
def test_something_else_where_branch_sets_or_a_path_are_due(given):
    with pytest.raises(TypeError, match="`branch_sets` is of type"):
        Scales.ones(given)
    with pytest.raises(TypeError, match="`path` is of type"):
        repopt_jax.load_scales(given)


TAKE_RNGS = {
    "create": lambda m, s, rngs: models.create("vgg-digits", num_classes=10, rngs=rngs),
    "to_search": lambda m, s, rngs: repopt_jax.to_search(m, rngs=rngs),
    "to_structure": lambda m, s, rngs: repopt_jax.to_structure(m, "repvgg", rngs=rngs),
    "to_repvgg": lambda m, s, rngs: repopt_jax.to_repvgg(m, rngs=rngs),
    "prepare": lambda m, s, rngs: repopt_jax.prepare(m, "search", rngs=rngs),
    "reinitialize": lambda m, s, rngs: repopt_jax.reinitialize(m, s, rngs=rngs),
    "verify_equivalence": lambda m, s, rngs: repopt_jax.verify_equivalence(m, s, [], rngs=rngs),
}


@pytest.mark.parametrize("name", list(TAKE_RNGS))
def test_a_seed_where_rngs_are_due(name, model, scales):
    with pytest.raises(TypeError, match=r"`rngs` is of type int: .* `nnx.Rngs`, such as nnx.Rngs\(0\)"):
        TAKE_RNGS[name](model, scales, 0)


@pytest.mark.parametrize("name", ["to_search", "to_structure", "reinitialize"])
def test_an_abstract_network_is_given_what_a_real_one_is(name, model, scales):
    shapes = nnx.eval_shape(lambda: nnx.clone(model))
    with pytest.raises(TypeError, match="`rngs` is of type int"):
        TAKE_RNGS[name](shapes, scales, 0)
    second = {"to_search": None, "to_structure": "repvgg", "reinitialize": scales}[name]
    for options, match in [({"keep": "all"}, "`keep` is 'all'"), ({"keep": "split"}, "kept or discarded")]:
        with pytest.raises(ValueError, match=match):
            getattr(repopt_jax, name)(shapes, second, allow_trained=True, **options, rngs=nnx.Rngs(0))


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"name": "vgg-digitz"}, ValueError, r"'vgg-digitz' \(did you mean 'vgg-digits'\?\)"),
        ({"name": None}, TypeError, "`name` is of type NoneType"),
        ({"num_classes": -1}, ValueError, "`num_classes` is -1: it must be at least 1"),
        ({"num_classes": 0}, ValueError, "`num_classes` is 0"),
        ({"num_classes": "10"}, TypeError, "`num_classes` is '10': it must be a whole number"),
        ({"num_classes": 1.5}, TypeError, "`num_classes` is 1.5"),
        ({"num_classes": True}, TypeError, "`num_classes` is True"),
        ({"in_channels": 0}, ValueError, "`in_channels` is 0"),
    ],
)
def test_networks_that_cannot_be(options, error, match):
    with pytest.raises(error, match=match):
        models.create(**{"name": "vgg-digits", "num_classes": 10, "rngs": nnx.Rngs(0), **options})


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda rngs: models.EfficientRep(BACKBONE, rngs=0), TypeError, r"`rngs` is .* nnx\.Rngs\(0\)"),
        (
            lambda rngs: models.EfficientRep(BACKBONE, in_channels=0, rngs=rngs),
            ValueError,
            "`in_channels` is 0",
        ),
        (lambda rngs: models.EfficientRep("tiny", rngs=rngs), TypeError, "`variant` is 'tiny'"),
        (lambda rngs: models.FCOS(TINY_DETECTOR, num_classes=1, rngs=0), TypeError, "`rngs` is of type int"),
        (
            lambda rngs: models.FCOS(TINY_DETECTOR, num_classes="3", rngs=rngs),
            TypeError,
            "`num_classes` is '3': it must be a whole number",
        ),
        (
            lambda rngs: models.FCOS(TINY_DETECTOR, num_classes=1, num_keypoints=2.5, rngs=rngs),
            TypeError,
            "`num_keypoints` is 2.5",
        ),
        (
            lambda rngs: models.vgg(NARROW, num_classes=2, post_se=True, rngs=rngs),
            ValueError,
            "squeeze-and-excitation of 2 channels has 0 hidden ones",
        ),
    ],
)
def test_other_networks_that_cannot_be(make, error, match):
    with pytest.raises(error, match=match):
        abstract(make)


@pytest.mark.parametrize("family", [models.vgg, models.ghostnet, models.mobileone, models.RepMLPNet])
def test_a_name_where_a_variant_is_due(family):
    with pytest.raises(TypeError, match=r"`variant` is 'A0': it must be a \w+Variant; `models.create` takes"):
        family("A0", num_classes=10, rngs=nnx.Rngs(0))


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda s: repopt_jax.clip_by_repopt_global_norm(-1.0, s), ValueError, "`max_norm` is -1.0"),
        (lambda s: repopt_jax.clip_by_repopt_global_norm(0, s), ValueError, "`max_norm` is 0"),
        (lambda s: repopt_jax.clip_by_repopt_global_norm("1", s), TypeError, "`max_norm` is '1'"),
        (lambda s: repopt_jax.repopt_sgd(0.1, s, momentum=2), ValueError, "`momentum` is 2: .* at most 1"),
        (lambda s: repopt_jax.repopt_sgd(0.1, s, weight_decay=-1), ValueError, "`weight_decay` is -1"),
        (lambda s: repopt_jax.repopt_sgd(float("nan"), s), ValueError, "`learning_rate` is nan"),
        (lambda s: repopt_jax.repopt_sgd("0.1", s), TypeError, "`learning_rate` is '0.1'"),
        *(
            (
                functools.partial(make, 0.1, **{name: None}),
                TypeError,
                f"`{name}` is None: it must be a number",
            )
            for make, names in {
                repopt_jax.repopt_sgd: ["weight_decay"],
                repopt_jax.repopt_adamw: ["b1", "b2", "eps", "eps_root", "weight_decay"],
                repopt_jax.repopt_lion: ["b1", "b2", "weight_decay"],
            }.items()
            for name in names
        ),
        (lambda s: repopt_jax.repopt_adamw(0.1, s, b1=1), ValueError, "`b1` is 1: .* less than 1"),
        (lambda s: repopt_jax.repopt_adamw(0.1, s, b2=-0.1), ValueError, "`b2` is -0.1"),
        (lambda s: repopt_jax.repopt_adamw(0.1, s, eps=-1), ValueError, "`eps` is -1"),
        (lambda s: repopt_jax.repopt_adamw(0.1, s, weight_decay=-1), ValueError, "`weight_decay` is -1"),
        (lambda s: repopt_jax.repopt_lion(0.1, s, b2=2), ValueError, "`b2` is 2"),
    ],
)
def test_numbers_out_of_their_range(make, error, match, scales):
    with pytest.raises(error, match=match):
        make(scales)


@pytest.mark.parametrize("tolerance", [-1.0, float("nan"), float("inf")])
def test_a_tolerance_that_is_none(tolerance, model, scales):
    with pytest.raises(ValueError, match=r"`tolerance` is .*: it must be a finite number, at least 0"):
        repopt_jax.verify_equivalence(model, scales, [], tolerance=tolerance, rngs=nnx.Rngs(0))


def test_what_is_known_only_later_is_taken(scales):
    """Schedules, arrays and what `optax.inject_hyperparams` traces; None for no momentum."""
    check_number("x", None, at_least=0, optional=True)
    for value in (optax.constant_schedule(0.1), jnp.float32(-1.0)):
        check_number("x", value, at_least=0)
    repopt_jax.repopt_sgd(optax.constant_schedule(0.1), scales, momentum=None)
    optax.inject_hyperparams(lambda rate: repopt_jax.repopt_sgd(rate, scales))(rate=0.1)


@pytest.mark.parametrize("given", [None, {"w": 1}, "runs/deployed"], ids=["none", "dict", "path"])
@pytest.mark.parametrize("name", ["fuse", "quantize"])
def test_something_else_where_a_model_is_due(name, given):
    calls = {"fuse": repopt_jax.fuse, "quantize": lambda m: quantize(m, jnp.ones((2, 8, 8, 1)))}
    with pytest.raises(TypeError, match=r"`model` is of type .*: it must be an NNX model"):
        calls[name](given)
