"""`repopt_mask` and the training that it stands for are the same under jit, without it and under pmap."""

import functools

import chex
import jax
import numpy as np
import optax
import pytest
from twins import assert_close, jacobian, problem, relative, train

from repopt_jax.optim.sgd import repopt_mask, repopt_sgd

EXACT = 1e-12  # relative, float64
WRONG = 1e-2
LAYERS = ("3x3+1x1+identity", "stacked", "average pooling")
STEPS = 3


@functools.cache
def training():
    """A problem, its start and batches, the kernels where the branches end, and those without the mask."""
    p = problem(LAYERS)
    batches = jax.tree.map(lambda b: b[:STEPS], p.batches)
    start = p.start()

    def branches_loss(params, batch):
        return p.loss(p.merged(params), params["other"], batch)

    ordinary = optax.chain(optax.add_decayed_weights(1e-2), optax.sgd(0.2, 0.9, nesterov=True))
    twin = train(ordinary, p.weights | {"other": p.bias}, branches_loss, batches)
    return p, start, batches, jax.jit(p.merged)(twin), train(ordinary, start, p.plain_loss, batches)


def kernels(params):
    return {name: params[name]["kernel"] for name in LAYERS}


@pytest.mark.usefixtures("x64")
class EveryWayToRunIt(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True, with_pmap=True)
    def test_the_mask_is_the_product_with_the_jacobians(self):
        """P(g) = J J^T g, with J made entry by entry."""
        p = problem(LAYERS)
        rng = np.random.default_rng(0)
        gradients = {n: {"kernel": rng.normal(size=p.entry(n).branches.kernel)} for n in LAYERS}
        gradients |= {"other": rng.normal(size=3)}
        tx = repopt_mask(p.scales)
        found, state = self.variant(tx.update)(gradients, tx.init(gradients))
        for name in LAYERS:
            matrix = jacobian(p.entry(name).branches, p.entry(name).vectors)
            g = gradients[name]["kernel"]
            expected = (matrix @ (matrix.T @ g.ravel())).reshape(g.shape)
            assert_close(found[name]["kernel"], expected, EXACT)
        chex.assert_trees_all_equal(found["other"], gradients["other"])
        chex.assert_trees_all_equal(state.scales, p.scales.vectors)

    @chex.variants(with_jit=True, without_jit=True, with_pmap=True)
    def test_sgd_ends_where_the_branches_end(self):
        p, start, batches, expected, without = training()
        tx = repopt_sgd(0.2, p.scales, weight_decay=1e-2)

        def run(params, batches):
            state = tx.init(params)
            for step in range(STEPS):
                gradients = jax.grad(p.plain_loss)(
                    params, jax.tree.map(lambda b, step=step: b[step], batches)
                )
                updates, state = tx.update(gradients, state, params)
                params = optax.apply_updates(params, updates)
            return params

        assert_close(kernels(self.variant(run)(start, batches)), expected, EXACT)
        assert relative(kernels(without), expected) > WRONG
