"""A check of your own: does your model, with your loss and your optimizer, train as its multi-branch
counterpart?

    repopt verify --check=examples/verify_own_model.py

Copy this file and put your own in place of the model, the loss, the optimizers and the batches. A few steps
on a few images will do: where the two trainings part, they part at once.
"""

import jax
import numpy as np
import optax
from flax import nnx

from repopt_jax import Scales, default_branches
from repopt_jax.optim.adaptive import repopt_adamw
from repopt_jax.optim.sgd import clip_by_repopt_global_norm
from repopt_jax.verify.equivalence import Check


class Model(nnx.Module):
    """Two 3x3 convolutions with batch norm, dropout, a classifier."""

    def __init__(self, *, rngs: nnx.Rngs):
        self.stem = nnx.Conv(3, 8, (3, 3), strides=2, padding=((1, 1), (1, 1)), use_bias=False, rngs=rngs)
        self.stem_bn = nnx.BatchNorm(8, rngs=rngs)
        self.body = nnx.Conv(8, 8, (3, 3), padding=1, use_bias=False, rngs=rngs)
        self.body_bn = nnx.BatchNorm(8, rngs=rngs)
        self.dropout = nnx.Dropout(0.1, rngs=rngs)
        self.head = nnx.Linear(8, 5, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = nnx.relu(self.stem_bn(self.stem(x)))
        x = nnx.relu(self.body_bn(self.body(x)))
        return self.head(self.dropout(x.mean(axis=(1, 2))))


def loss(model: Model, batch: dict[str, jax.Array]) -> jax.Array:
    logits = model(batch["image"])
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]).mean()


def get_check() -> Check:
    model = Model(rngs=nnx.Rngs(params=0, dropout=1))
    model.train()

    # Which kernels are re-parameterized, and by which branches: 3x3 + 1x1, with the identity where it is
    # defined. Scales of a search (`load_scales`) would do as well.
    branch_sets = {
        "stem/kernel": default_branches(model.stem.kernel.shape, stride=2),
        "body/kernel": default_branches(model.body.kernel.shape),
    }
    scales = Scales.depth_rule(branch_sets, {"stem/kernel": 0, "body/kernel": 1})

    # `optimizer` trains the plain model, `twin_optimizer` the one with branches: the same in everything else.
    schedule = optax.warmup_cosine_decay_schedule(0.0, 3e-3, warmup_steps=2, decay_steps=20)
    optimizer = optax.chain(
        clip_by_repopt_global_norm(1.0, scales),
        repopt_adamw(schedule, scales, weight_decay=0.05),
    )
    twin_optimizer = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(schedule, weight_decay=0.05),
    )

    rng = np.random.default_rng(0)
    batches = [
        {"image": rng.normal(size=(8, 16, 16, 3)).astype(np.float32), "label": rng.integers(0, 5, 8)}
        for _ in range(6)
    ]
    return Check(model, scales, batches, optimizer, twin_optimizer, loss, tolerance=1e-10)
