"""Your own NNX network: search, check, train, deploy. The guide of docs/own_network.md, as a program.

    python examples/your_model.py

`Net`, below, stands for any network of `nnx.Conv`, `nnx.Linear` and whatever else: nothing in it knows of
branches. The data are the handwritten digits that scikit-learn carries.
"""

# guide: begin
import optax
from flax import nnx

import repopt_jax as rj
from repopt_jax import paths


def loss_of(model, batch):
    logits = model(batch["image"])
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]).mean()


@nnx.jit
def step(model, optimizer, batch):
    loss, grads = nnx.value_and_grad(loss_of)(model, batch)
    optimizer.update(model, grads)
    return loss


def train(model, tx, batches):
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    losses = [float(step(model, optimizer, batch)) for batch in batches]
    print(f"loss {losses[0]:.3f} to {losses[-1]:.3f}")


def decayed(params):  # kernels; of a search, the branch tensors that stand for them, and no scales
    return paths.map_named(lambda path, _: path.endswith("kernel") or "/weights/" in path, params)


def main(make_model, batches, folder):
    sgd = optax.chain(optax.add_decayed_weights(4e-5, decayed), optax.sgd(0.05, 0.9, nesterov=True))

    search_model = rj.to_search(make_model(), r".*conv", rngs=nnx.Rngs(0))  # the layers with these paths
    train(search_model, sgd, batches)
    rj.save_scales(folder / "scales", rj.extract_scales(search_model))

    model = make_model()
    scales = rj.load_scales(folder / "scales", rj.find_branches(model, r".*conv"))  # no layer may lack
    model = rj.reinitialize(model, scales, rngs=nnx.Rngs(1))
    tx = optax.chain(rj.repopt_mask(scales), sgd)  # the one line changed: it was `tx = sgd`

    check = rj.verify_equivalence(
        model, scales, batches[:3], loss=loss_of, optimizer=tx, twin_optimizer=sgd, rngs=nnx.Rngs(2)
    )
    if not check.equivalent:
        raise RuntimeError(str(check))  # the differences and the likely reason
    train(model, tx, batches)
    model.eval()
    return rj.fuse(model, example=(batches[0]["image"],))  # folds the batch norms into what they follow


# guide: end


class Block(nnx.Module):
    """A convolution, batch norm, ReLU."""

    def __init__(self, inputs, outputs, *, stride=1, rngs):
        self.conv = nnx.Conv(inputs, outputs, (3, 3), stride, padding=1, use_bias=False, rngs=rngs)
        self.norm = nnx.BatchNorm(outputs, momentum=0.9, rngs=rngs)

    def __call__(self, x):
        return nnx.relu(self.norm(self.conv(x)))


class Net(nnx.Module):
    """Three blocks and a classifier, for images (batch, 8, 8, 1)."""

    def __init__(self, *, rngs):
        self.stem = Block(1, 16, stride=2, rngs=rngs)
        self.blocks = nnx.List([Block(16, 16, rngs=rngs) for _ in range(2)])
        self.head = nnx.Linear(256, 10, rngs=rngs)

    def __call__(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x.reshape(x.shape[0], -1))


def digit_batches(count):
    """Batches of random training digits, as a list, and one of all test digits."""
    import numpy as np

    from repopt_jax.data import digits

    images, labels, is_test = digits.load()
    images = images[..., None].astype(np.float32) / 255
    rng = np.random.default_rng(0)
    rows = [rng.choice(np.flatnonzero(~is_test), 64) for _ in range(count)]
    *train, test = ({"image": images[r], "label": labels[r]} for r in (*rows, is_test))
    return train, test


def run(steps=200, folder=None):
    """The guide on the digits: a deployed model and its test accuracy."""
    import tempfile
    from pathlib import Path

    batches, test = digit_batches(steps)
    deployed = main(lambda: Net(rngs=nnx.Rngs(0)), batches, Path(folder or tempfile.mkdtemp()))
    accuracy = float((deployed(test["image"]).argmax(-1) == test["label"]).mean())
    print(f"deployed: test accuracy {100 * accuracy:.1f} %")
    return deployed, accuracy


if __name__ == "__main__":
    run()
