"""The checker agrees where the equivalence holds; where an optimizer, a model or a loss breaks it, it says
why."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiers
from flax import nnx

from repopt_jax import depth_scales, reinitialize
from repopt_jax.core.published import default_branches
from repopt_jax.core.scales import LayerScales, Scales
from repopt_jax.models import VGGVariant, vgg
from repopt_jax.optim.adaptive import repopt_adamw, repopt_lion
from repopt_jax.optim.reparameterize import reparameterize
from repopt_jax.optim.sgd import clip_by_repopt_global_norm, repopt_mask, repopt_sgd
from repopt_jax.verify import equivalence as verify

SMALL = VGGVariant("small", (2, 1, 1, 1), (4, 4, 4, 4, 4), (1, 1, 2, 1, 2))
EXACT = 1e-12  # relative, float64, 4 to 12 steps of any optimizer; measured: 2e-16 to 3e-15
WRONG = 1e-3  # relative; measured: 4e-3 for decay before the multiplier, 1.3 for steps made of rounding


@pytest.fixture(scope="module")
def setting():
    model = vgg(SMALL, num_classes=3, in_channels=2, rngs=nnx.Rngs(0))
    rng = np.random.default_rng(0)
    scales = jax.tree.map(
        lambda v: v * jnp.asarray(rng.normal(size=v.shape), jnp.float32), depth_scales(model)
    )
    batches = [
        {"image": rng.normal(size=(8, 8, 8, 2)).astype(np.float32), "label": rng.integers(0, 3, 8)}
        for _ in range(12)
    ]
    return model, scales, batches


class Dense(nnx.Module):
    """Dense layers with the identity beside them, the second used twice; a head. Batch norm and dropout only
    where they are asked for: most of a check is compilation."""

    def __init__(self, *, norm=False, bias=False, dropout=0.0, layer=nnx.Linear, rngs):
        self.first = layer(4, 4, use_bias=bias, rngs=rngs)
        self.bn = nnx.BatchNorm(4, use_fast_variance=False, rngs=rngs) if norm else None
        self.second = nnx.Linear(4, 4, rngs=rngs)
        self.dropout = nnx.Dropout(dropout, rngs=rngs)
        self.head = nnx.Linear(4, 3, rngs=rngs)

    def __call__(self, x):
        x = self.first(x)
        x = jnp.tanh(x if self.bn is None else self.bn(x))
        x = self.dropout(jnp.tanh(self.second(jnp.tanh(self.second(x)))))
        return self.head(x)


def dense(**options):
    return Dense(rngs=nnx.Rngs(params=1, dropout=2), **options)


def scales_of(model, *names, seed=0):
    """Random scales of both signs."""
    rng = np.random.default_rng(seed)
    entries = {}
    for name in names:
        branches = default_branches(getattr(model, name).kernel.shape)
        vectors = {b: jnp.asarray(rng.normal(size=4) + 0.2, jnp.float32) for b in branches.names}
        entries[f"{name}/kernel"] = LayerScales(branches, vectors)
    return Scales(entries)


def batches_of(*shape, count=4, size=6):
    rng = np.random.default_rng(3)
    return [
        {"image": rng.normal(size=(size, *shape)).astype(np.float32), "label": rng.integers(0, 3, size)}
        for _ in range(count)
    ]


DENSE = scales_of(dense(), "first", "second")


def check(optimizer=None, twin=None, *, model=None, batches=None, **options):
    """A check of the dense network."""
    return verify.verify_equivalence(
        dense() if model is None else model,
        DENSE,
        batches_of(4) if batches is None else batches,
        optimizer=optimizer,
        twin_optimizer=twin,
        rngs=nnx.Rngs(1),
        **options,
    )


def only_reason(result, *parts):
    """The one reason that is given, which has all of `parts`."""
    assert not result.equivalent
    (reason,) = result.reasons
    for part in parts:
        assert part in reason
    return reason


# -- what is equivalent


def test_a_network_and_its_twin_stay_together(setting):
    model, scales, batches = setting
    before = jax.tree.map(jnp.copy, nnx.state(model))
    result = verify.verify_equivalence(model, scales, batches, tolerance=EXACT, rngs=nnx.Rngs(1))
    assert result.equivalent
    assert result.reasons == ()
    assert result.max_difference <= EXACT
    assert result.movement > 0.05
    assert result.steps == len(result.losses) == 12
    assert "stages/1/1/conv/kernel" in result.differences
    assert "stages/1/1/bn/mean" in result.differences  # statistics are compared too
    chex.assert_trees_all_equal(before, nnx.state(model))
    assert model.head.kernel.dtype == jnp.float32
    assert result.compared.startswith("12 steps in float64, batch norm in training mode (6 layers)")


class Sowing(Dense):
    def __call__(self, x):
        logits = super().__call__(x)
        self.sow(nnx.Intermediate, "logits", logits)
        return logits


@pytest.mark.filterwarnings("ignore:Using 'Module.sow:DeprecationWarning")  # outside of `nnx.capture`
@pytest.mark.parametrize("called", [False, True])
def test_a_model_that_sows(called):
    """A loss may read what is sown in its step; the given model keeps what it has."""
    model = Sowing(rngs=nnx.Rngs(params=1, dropout=2))
    if called:
        model(jnp.ones((2, 4)))

    def loss(model, batch):
        value = verify.cross_entropy(model, batch)
        if isinstance(model, Sowing):  # not a probe of the loss
            (logits,) = model.logits.get_value()
            value += 1e-3 * jnp.square(logits).mean()
        return value

    before = nnx.state(model)
    assert check(model=model, loss=loss).equivalent
    chex.assert_trees_all_equal(before, nnx.state(model))


def sgd(first):
    return optax.chain(
        first,
        optax.add_decayed_weights(1e-2),
        optax.sgd(optax.linear_schedule(0.0, 0.1, 3), 0.9, nesterov=True),
    )


def multi_steps(inner):
    with jax.enable_x64(True):  # otherwise it would add up in float32
        return optax.MultiSteps(inner, 2, accumulator_dtype=jnp.float64).gradient_transformation()


RIGHT = {
    "repopt_sgd": (
        repopt_sgd(0.05, DENSE, weight_decay=1e-2),
        optax.chain(optax.add_decayed_weights(1e-2), optax.sgd(0.05, 0.9, nesterov=True)),
    ),
    "warm-up": (sgd(repopt_mask(DENSE)), sgd(optax.identity())),
    "adamw": (
        repopt_adamw(3e-3, DENSE, eps=1e-3, weight_decay=0.1),
        optax.adamw(3e-3, eps=1e-3, weight_decay=0.1),
    ),
    "lion": (repopt_lion(1e-3, DENSE, weight_decay=0.1), optax.lion(1e-3, weight_decay=0.1)),
    "reparameterize(adam)": (reparameterize(optax.adam(1e-2, eps=1e-3), DENSE), optax.adam(1e-2, eps=1e-3)),
    "reparameterize(lamb)": (
        lambda weights: reparameterize(optax.lamb(1e-2), DENSE, weights=weights),
        optax.lamb(1e-2),
    ),
    "reparameterize(muon)": (
        lambda weights: reparameterize(optax.contrib.muon(1e-2), DENSE, weights=weights),
        optax.contrib.muon(1e-2),
    ),
    "clipping": (
        optax.chain(clip_by_repopt_global_norm(0.05, DENSE), repopt_mask(DENSE), optax.sgd(0.5, 0.9)),
        optax.chain(optax.clip_by_global_norm(0.05), optax.sgd(0.5, 0.9)),
    ),
    "MultiSteps": (
        multi_steps(repopt_sgd(0.05, DENSE)),
        multi_steps(optax.sgd(0.05, 0.9, nesterov=True)),
    ),
}


# Each way of giving an optimizer; the others are given as one of these.
OFTEN = ("repopt_sgd", "adamw", "reparameterize(muon)", "clipping", "MultiSteps")


@pytest.mark.parametrize("name", tiers.often(RIGHT, *OFTEN))
def test_right_pairs_of_optimizers(name):
    # A shared layer and batch norm in training mode are in all of them.
    dropout = 0.2 if name in ("repopt_sgd", "reparameterize(lamb)") else 0.0
    result = check(*RIGHT[name], model=dense(norm=True, dropout=dropout), tolerance=0.0)
    assert result.max_difference <= EXACT
    assert result.movement > 1e-3
    # With a tolerance that rounding exceeds, all probes are made, and accuse nobody.
    assert result.equivalent or len(result.reasons) == 1
    assert all(reason.startswith("no known reason") for reason in result.reasons)
    assert set(result.differences) >= {"first/kernel", "second/kernel", "second/bias", "bn/var"}


# -- optimizers that break it, and what is said of them


def decayed_first(rule):
    return optax.chain(optax.add_decayed_weights(1e-2), rule, optax.sgd(0.05, 0.9, nesterov=True))


def test_decay_before_the_multiplier():
    result = check(decayed_first(repopt_mask(DENSE)), decayed_first(optax.identity()))
    only_reason(result, "weight decay comes before the multiplier", "add_decayed_weights after repopt_mask")
    assert result.max_difference > WRONG
    assert result.worst(1)[0][1] <= result.max_difference
    assert len(result.worst()) == len(result.differences)


def matrices(params):
    return jax.tree.map(lambda p: p.ndim > 1, params)


@pytest.mark.once
def test_identity_that_is_not_decayed():
    twin = optax.chain(optax.add_decayed_weights(1e-2, matrices), optax.sgd(0.05))
    result = check(repopt_sgd(0.05, DENSE, momentum=None, weight_decay=1e-2, mask=matrices), twin)
    only_reason(result, "the identity's weight is not decayed in the twin", "first/kernel, second/kernel")


@pytest.mark.once
def test_decay_of_the_kernels_alone():
    def kernels(params):
        return jax.tree_util.tree_map_with_path(
            lambda path, _: "kernel" in jax.tree_util.keystr(path), params
        )

    twin = optax.chain(optax.add_decayed_weights(1e-2, kernels), optax.sgd(0.05))
    result = check(repopt_sgd(0.05, DENSE, momentum=None, weight_decay=1e-2, mask=kernels), twin)
    only_reason(result, "weight decay", "differs at first/kernel, second/kernel:")


def test_ordinary_clipping():
    clip = optax.clip_by_global_norm(0.05)
    result = check(
        optax.chain(clip, repopt_sgd(0.5, DENSE)), optax.chain(clip, optax.sgd(0.5, 0.9, nesterov=True))
    )
    only_reason(result, "ordinary clipping", "first/kernel, second/kernel", "clip_by_repopt_global_norm")
    # Adam hides the size of its gradients, but not how it changes.
    result = check(optax.chain(clip, repopt_adamw(1e-2, DENSE)), optax.chain(clip, optax.adamw(1e-2)))
    only_reason(result, "ordinary clipping")


@pytest.mark.once
def test_clipping_on_one_side():
    clip, right = optax.clip_by_global_norm(0.05), clip_by_repopt_global_norm(0.05, DENSE)
    plain, ordinary = repopt_sgd(0.5, DENSE, momentum=None), optax.sgd(0.5)
    for result in (check(plain, optax.chain(clip, ordinary)), check(optax.chain(right, plain), ordinary)):
        only_reason(result, "agree on small gradients and differ on large ones: one of them clips")


@pytest.mark.once
def test_adam_after_the_multiplier():
    result = check(optax.chain(repopt_mask(DENSE), optax.adam(1e-2)), optax.adam(1e-2))
    only_reason(result, "first/kernel, second/kernel", "not linear in the gradient", "repopt_adamw")


@pytest.mark.once
def test_other_settings_of_reparameterize():
    """Where every parameter is a re-parameterized kernel, no other can tell that the settings differ."""
    model = nnx.Sequential(nnx.Linear(4, 4, use_bias=False, rngs=nnx.Rngs(0)))
    path = "layers/0/kernel"
    scales = Scales.depth_rule({path: default_branches((4, 4))}, {path: 8})
    result = verify.verify_equivalence(
        model,
        scales,
        batches_of(4, count=2),
        optimizer=lambda weights: reparameterize(optax.adam(1e-2), scales, weights=weights),
        twin_optimizer=optax.adam(2e-2),
        rngs=nnx.Rngs(0),
    )
    only_reason(result, "moves the kernels at layers/0/kernel otherwise than `twin_optimizer`")


@pytest.mark.parametrize(
    "inner",
    [optax.lamb(1e-2), pytest.param(optax.contrib.muon(1e-2), marks=pytest.mark.long)],
    ids=["lamb", "muon"],
)
def test_optimizers_that_are_not_elementwise(inner):
    result = check(optax.chain(repopt_mask(DENSE), inner), inner)
    only_reason(result, "not linear in the gradient", "reparameterize(inner, scales)")


@pytest.mark.once
def test_reparameterize_without_the_branches():
    result = check(reparameterize(optax.lamb(1e-2), DENSE), optax.lamb(1e-2))
    only_reason(result, "without the branch tensors", "lambda weights:")


@pytest.mark.once
def test_the_published_rule():
    result = check(repopt_adamw(1e-2, DENSE, rule="published"), optax.adamw(1e-2))
    only_reason(result, "`optimizer` moves the kernels at first/kernel, second/kernel otherwise", "'exact'")


@pytest.mark.once
def test_a_multiplier_that_is_missing_or_another():
    ordinary = optax.sgd(0.05, 0.9)
    only_reason(check(ordinary, ordinary), "repopt_mask(scales) is missing")
    other = repopt_mask(scales_of(dense(), "first", "second", seed=7))
    only_reason(check(optax.chain(other, ordinary), ordinary), "was made with other scales")


@pytest.mark.once
def test_other_settings():
    result = check(repopt_sgd(0.06, DENSE, weight_decay=1e-2), decayed_first(optax.identity()))
    assert "give `optimizer` and `twin_optimizer` the same learning rate" in result.reasons[0]
    result = check(repopt_sgd(0.05, DENSE), optax.adam(0.05))
    only_reason(result, "give `optimizer` and `twin_optimizer` the same", "let them be counterparts")


@pytest.mark.once
def test_every_mistake_is_named():
    """Decay before the multiplier and clipping, both at once."""
    clip = optax.clip_by_global_norm(0.05)
    result = check(
        optax.chain(clip, decayed_first(repopt_mask(DENSE))),
        optax.chain(clip, decayed_first(optax.identity())),
    )
    assert len(result.reasons) == 2
    assert "decay comes before" in result.reasons[0]
    assert "ordinary clipping" in result.reasons[1]


# -- models, losses, numbers


class Strided(nnx.Module):
    def __init__(self, *, rngs):
        self.down = nnx.Conv(4, 4, (3, 3), strides=2, padding="SAME", rngs=rngs)
        self.same = nnx.Conv(4, 4, (3, 3), padding="SAME", rngs=rngs)

    def __call__(self, x):
        return self.same(nnx.tanh(self.down(x))).mean((1, 2))


# Padded by (0, 1) and by (1, 1).
@pytest.mark.parametrize("size", [6, pytest.param(7, marks=pytest.mark.long)])
def test_same_padding_at_stride_2(size):
    model = Strided(rngs=nnx.Rngs(0))
    rng = np.random.default_rng(0)
    batches = [{"image": rng.normal(size=(2, size, size, 4)), "label": np.arange(2)} for _ in range(3)]
    scales = scales_of(model, "down", "same")
    assert verify.verify_equivalence(model, scales, batches, rngs=nnx.Rngs(0)).equivalent


def test_batch_norm_in_evaluation_mode_that_diverges():
    model = dense(norm=True)
    model.eval()
    fine = check(model=model)
    assert fine.equivalent
    assert "batch norm in evaluation mode (1 layers)" in fine.compared

    big = [{**batch, "image": 1e160 * batch["image"].astype(np.float64)} for batch in batches_of(4)]

    def square(model, batch):
        return jnp.square(model.bn(model.second(model.first(batch["image"])))).mean()

    result = check(model=model, batches=big, loss=square)
    assert np.isnan(result.max_difference)
    assert "batch norm is in evaluation mode in 1 layers" in result.reasons[0]
    assert "is not finite from step 0 on" in result.reasons[-1]


def test_batches_that_are_not_finite():
    batches = batches_of(4)
    batches[2]["image"][0, 0] = np.nan
    result = check(batches=batches)
    assert np.isnan(result.max_difference)
    assert result.worst(1)[0][1] != result.worst(1)[0][1]
    only_reason(result, "batch 2 holds NaN or infinite numbers (image)")


def test_networks_that_do_not_move():
    result = check(repopt_sgd(0.0, DENSE), optax.sgd(0.0))
    assert result.max_difference == 0
    only_reason(result, "the networks did not move")


def test_a_loss_that_reads_the_kernels():
    def decayed(model, batch):
        norms = [jnp.sum(p**2) for p in jax.tree.leaves(nnx.state(model, nnx.Param))]
        return verify.cross_entropy(model, batch) + 1e-2 * sum(norms[1:], start=norms[0])

    only_reason(check(loss=decayed), "differ before the first step (loss", "an L2 term")


class Standardized(nnx.Linear):
    def __call__(self, inputs, out_sharding=None):
        return inputs @ (self.kernel[...] - self.kernel[...].mean())


class Scaled(nnx.Linear):
    """Another function with everything that `nnx.Linear` has: its kernel is read twice as large."""

    class Kernel(nnx.Param):
        def __getitem__(self, index):
            return 2 * super().__getitem__(index)

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.kernel = self.Kernel(self.kernel[...])


class Halved(nnx.Linear):
    """Another function with the `__call__` of `nnx.Linear`."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.promote_dtype = lambda arrays, *, dtype: (arrays[0] / 2, *arrays[1:])


def test_a_layer_of_a_class_of_its_own():
    with pytest.raises(ValueError, match=r"first \(Standardized\): its class has a __call__ of its own"):
        check(model=dense(layer=Standardized))
    with pytest.raises(ValueError, match=r"first \(Halved\): it changes .* by a `promote_dtype` of its own"):
        check(model=dense(layer=Halved))
    # What no attribute shows is found by the first output.
    result = check(model=dense(layer=Scaled))
    only_reason(result, "differ before the first step", "first (Scaled)")


def test_casts_to_narrower_types():
    def rounded(model, batch):
        logits = model(batch["image"]).astype(jnp.bfloat16).astype(jnp.float64)
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]).mean()

    only_reason(check(loss=rounded, tolerance=0.0), "model or loss cast to bfloat16")
    narrow = jnp.bfloat16
    result = check(repopt_adamw(1e-2, DENSE, mu_dtype=narrow), optax.adamw(1e-2, mu_dtype=narrow))
    assert [reason.partition(" (")[0] for reason in result.reasons] == [
        "`optimizer` casts to bfloat16",
        "`twin_optimizer` casts to bfloat16",
    ]


def test_a_model_in_half_precision_is_computed_in_float64():
    model = dense(norm=True)
    for layer in (model.first, model.bn, model.second, model.head):
        layer.dtype = jnp.bfloat16
    assert check(model=model, tolerance=EXACT).equivalent
    assert model.first.dtype == jnp.bfloat16


def test_a_bias_in_front_of_batch_norm():
    """Its gradient is rounding, of which a sign rule makes whole steps."""
    batches = batches_of(4, count=12, size=64)
    result = check(
        repopt_lion(1e-3, DENSE), optax.lion(1e-3), model=dense(norm=True, bias=True), batches=batches
    )
    assert result.differences["first/bias"] > WRONG
    only_reason(result, "the gradient of first/bias is zero but for rounding")


def test_when_nothing_is_recognised():
    only_reason(check(tolerance=0.0), "no known reason was recognised")


def test_a_parameter_without_entries():
    """Nothing of it differs, also where reasons for a difference are looked for."""
    model = dense()
    model.none = nnx.Param(jnp.zeros((0,)))
    result = check(model=model, tolerance=0.0)
    assert result.differences["none"] == 0 < result.max_difference < EXACT
    only_reason(result, "no known reason was recognised")


def test_nan_is_not_equivalence():
    result = verify.Equivalence({"a": 1e-15, "b": float("nan")}, [1.0], 1e-15, 0.5, 1, EXACT)
    assert not result.equivalent
    assert np.isnan(result.max_difference)
    assert result.worst(1)[0][0] == "b"


class Attentive(nnx.Module):
    """An attention, whose keys have a bias, between dense layers."""

    def __init__(self, *, rngs):
        self.first = nnx.Linear(4, 4, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(2, 4, decode=False, rngs=rngs)
        self.head = nnx.Linear(4, 3, rngs=rngs)

    def __call__(self, x):
        return self.head(self.attention(jnp.tanh(self.first(x))).mean(1))


def test_a_bias_of_the_keys_of_an_attention():
    """It adds the same to all logits of a row, so that its gradient is rounding too."""
    model = Attentive(rngs=nnx.Rngs(0))
    scales = scales_of(model, "first")
    result = verify.verify_equivalence(
        model,
        scales,
        batches_of(5, 4, count=2),
        optimizer=repopt_adamw(1e-2, scales),
        twin_optimizer=optax.adamw(1e-2),
        tolerance=1e-11,
        rngs=nnx.Rngs(1),
    )
    assert [path for path, d in result.worst() if d > result.tolerance] == ["attention/key/bias"]
    only_reason(result, "gradient of attention/key/bias is zero but for rounding", "an attention's keys")


def test_a_cast_of_constants_is_none():
    def shifted(model, batch):
        return verify.cross_entropy(model, batch) + jnp.sqrt(jnp.float64(2)).astype(jnp.float32)

    only_reason(check(loss=shifted, tolerance=0.0), "no known reason was recognised")


def test_branch_tensors_of_another_draw():
    model, weights = reinitialize(dense(), DENSE, rngs=nnx.Rngs(1), return_weights=True)
    inner = optax.lamb(1e-2)
    with pytest.raises(ValueError, match=r"the check, which draws its own: .* optimizer=lambda weights: "):
        check(reparameterize(inner, DENSE, weights=weights), inner, model=model)


@pytest.mark.parametrize("wrong", [lambda b: (b["image"], b["label"]), lambda b: {"x": b["image"]}])
def test_batches_of_another_loss(wrong):
    batches = [wrong(batch) for batch in batches_of(4)]
    with pytest.raises(
        TypeError, match=r"`loss` is not given, .* entries 'image' and 'label', .* loss=loss_of"
    ):
        check(batches=batches)


def test_the_result_is_printed_in_a_few_lines():
    good = verify.Equivalence({"a": 1e-15, "b": 0.0}, [1.0], 1e-16, 0.5, 1, EXACT, compared="1 step")
    assert str(good).splitlines() == [
        "equivalent: no difference above 1e-12",
        "compared: 1 step; kernels moved by 50.00%",
        "largest relative differences, of 2 parameters and statistics:",
        "  loss  1.0e-16",
        "  a     1.0e-15",
        "  b     0.0e+00",
    ]
    many = {f"p{i}": 0.1 for i in range(50)}
    bad = verify.Equivalence(many, [1.0], 0.2, 0.5, 1, EXACT, ("first", "second"), "1 step")
    lines = str(bad).splitlines()
    assert lines[:3] == [
        "NOT equivalent: the largest difference is 2.0e-01, the tolerance 1e-12",
        "likely reason: first",
        "likely reason: second",
    ]
    assert len(lines) < 12


def test_arguments_that_are_wrong(setting):
    model, scales, batches = setting
    other = vgg(VGGVariant("o", (1, 1, 1, 1), (4, 4, 6, 6, 8)), num_classes=3, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="do not fit the model"):
        verify.verify_equivalence(other, scales, batches, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="`scales` name no layer, so there is nothing to compare"):
        verify.verify_equivalence(dense(), Scales({}), batches_of(4), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="`batches` is empty"):
        verify.verify_equivalence(model, scales, [], rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="`optimizer` is given without `twin_optimizer`"):
        check(repopt_sgd(0.1, DENSE))
