"""A network of your own in the trainer: a config file that registers it by a name.

    repopt search --config=examples/own_network_in_trainer.py:search --out=runs/own/search
    repopt train --config=examples/own_network_in_trainer.py --out=runs/own/repopt
    repopt train --config=examples/own_network_in_trainer.py:repvgg --out=runs/own/repvgg
    repopt eval --run=runs/own/repopt
    repopt deploy --run=runs/own/repopt --out=runs/own/deployed

Copy this file and put your own in place of the network and the data. The network is any NNX model that is
called with images alone, (batch, height, width, channels), and returns logits; batch norm and dropout follow
`model.train()` and `model.eval()`. Its layers are found by themselves, as by `find_branches`.
"""

import jax
from flax import nnx

from repopt_jax import models
from repopt_jax.train import Config, DataConfig, ModelConfig, OptimConfig

# Argument -> mode, scales.
RUNS = {
    "repopt": ("repopt", "runs/own/search/scales"),
    "depth": ("repopt", "depth"),
    "search": ("search", ""),
    "repvgg": ("repvgg", ""),
    "plain": ("plain", ""),
}


class Block(nnx.Module):
    """Two convolutions with batch norms, their input added, ReLU."""

    def __init__(self, width: int, *, rngs: nnx.Rngs):
        self.conv1 = nnx.Conv(width, width, (3, 3), use_bias=False, rngs=rngs)
        self.norm1 = nnx.BatchNorm(width, momentum=0.9, rngs=rngs)
        self.conv2 = nnx.Conv(width, width, (3, 3), use_bias=False, rngs=rngs)
        self.norm2 = nnx.BatchNorm(width, momentum=0.9, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        inner = nnx.relu(self.norm1(self.conv1(x)))
        return nnx.relu(x + self.norm2(self.conv2(inner)))


class Net(nnx.Module):
    """A convolution, blocks, the mean over all places, a classifier."""

    def __init__(self, width: int, blocks: int, *, num_classes: int, in_channels: int, rngs: nnx.Rngs):
        self.stem = nnx.Conv(in_channels, width, (3, 3), 2, padding=1, use_bias=False, rngs=rngs)
        self.stem_norm = nnx.BatchNorm(width, momentum=0.9, rngs=rngs)
        self.blocks = nnx.List([Block(width, rngs=rngs) for _ in range(blocks)])
        self.head = nnx.Linear(width, num_classes, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = nnx.relu(self.stem_norm(self.stem(x)))
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean((1, 2)))


def make(*, num_classes: int, in_channels: int, dtype, rngs: nnx.Rngs) -> Net:
    """What the trainer calls; `dtype` is None unless the config asks for bfloat16."""
    return Net(16, 2, num_classes=num_classes, in_channels=in_channels, rngs=rngs)


models.register(models.Entry("own-net", make))


def get_config(arg: str = "") -> Config:
    mode, scales = RUNS[arg or "repopt"]
    return Config(
        name=f"own-{arg or 'repopt'}",
        epochs=10,
        scales=scales,
        model=ModelConfig(name="own-net", mode=mode),
        data=DataConfig(source="digits", image_size=8, crop_padding=1, mean=(0.3,), std=(0.37,)),
        optim=OptimConfig(learning_rate=0.05, weight_decay=4e-5, warmup_epochs=1),
    )
