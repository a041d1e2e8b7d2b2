"""The checker agrees where the equivalence holds, and says so where an optimizer breaks it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from repopt_jax import verify
from repopt_jax.models import RepOptVGG, VGGVariant

SMALL = VGGVariant("small", (2, 1, 1, 1), (4, 4, 6, 6, 8), (1, 1, 2, 1, 2))
EXACT = 1e-12  # relative, float64, 12 steps with batch norm in training mode; measured: 3e-15
WRONG = 1e-3  # measured: 0.09 for decay before the multiplier


@pytest.fixture(scope="module")
def setting():
    model = RepOptVGG(SMALL, num_classes=3, in_channels=2, rngs=nnx.Rngs(0))
    rng = np.random.default_rng(0)
    scales = jax.tree.map(
        lambda v: v * jnp.asarray(rng.normal(size=v.shape), jnp.float32), model.depth_scales()
    )
    batches = [
        {"image": rng.normal(size=(8, 8, 8, 2)).astype(np.float32), "label": rng.integers(0, 3, 8)}
        for _ in range(12)
    ]
    return model, scales, batches


def test_a_network_and_its_twin_stay_together(setting):
    model, scales, batches = setting
    before = jax.tree.map(jnp.copy, nnx.state(model))
    result = verify.verify_equivalence(model, scales, batches, tolerance=EXACT, rngs=nnx.Rngs(1))
    assert result.equivalent
    assert result.max_difference <= EXACT
    assert result.movement > 0.05
    assert result.steps == len(result.losses) == 12
    assert "stages/1/1/conv/kernel" in result.differences
    assert "stages/1/1/bn/mean" in result.differences  # statistics are compared too
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), before, nnx.state(model)))
    assert model.head.kernel.dtype == jnp.float32


def test_decay_before_the_multiplier_is_found_out(setting):
    model, scales, batches = setting

    def wrong(mask):
        return optax.chain(optax.add_decayed_weights(1e-2), mask, optax.sgd(0.05, 0.9, nesterov=True))

    result = verify.verify_equivalence(model, scales, batches, optimizer=wrong, rngs=nnx.Rngs(1))
    assert not result.equivalent
    assert result.max_difference > WRONG


def test_nan_is_not_equivalence():
    result = verify.Equivalence({"a": 1e-15, "b": float("nan")}, [1.0], 1e-15, 0.5, 1, EXACT)
    assert not result.equivalent
    assert np.isnan(result.max_difference)


def test_scales_that_do_not_fit_and_no_batches(setting):
    model, scales, batches = setting
    other = RepOptVGG(VGGVariant("o", (1, 1, 1, 1), (4, 4, 6, 6, 8)), num_classes=3, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="do not fit the model"):
        verify.verify_equivalence(other, scales, batches, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="`batches` is empty"):
        verify.verify_equivalence(model, scales, [], rngs=nnx.Rngs(0))
