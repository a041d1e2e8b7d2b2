"""Nine architectures as public NNX collections write them, small: their paddings, names and idioms.

None of them knows this package. Strided convolutions are padded by name, blocks are `nnx.Sequential`s or
classes of their own, attention is Flax's, layers hide in recurrent cells, and the VAE is called with `rngs`.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from repopt_jax.core import paths

norm_of = functools.partial(nnx.BatchNorm, use_fast_variance=False)


# -- ResNet-50: bottlenecks, torchvision's names and paddings


class Bottleneck(nnx.Module):
    def __init__(self, inplanes, planes, stride=1, downsample=None, *, rngs):
        conv = functools.partial(nnx.Conv, use_bias=False, rngs=rngs)
        self.conv1, self.bn1 = conv(inplanes, planes, (1, 1)), norm_of(planes, rngs=rngs)
        self.conv2 = conv(planes, planes, (3, 3), strides=stride, padding=1)
        self.bn2 = norm_of(planes, rngs=rngs)
        self.conv3, self.bn3 = conv(planes, planes * 2, (1, 1)), norm_of(planes * 2, rngs=rngs)
        self.downsample = nnx.data(downsample)

    def __call__(self, x):
        out = nnx.relu(self.bn1(self.conv1(x)))
        out = nnx.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        return nnx.relu(out + (x if self.downsample is None else self.downsample(x)))


class ResNet50(nnx.Module):
    def __init__(self, *, rngs):
        self.conv1 = nnx.Conv(3, 4, (7, 7), strides=2, padding=3, use_bias=False, rngs=rngs)
        self.bn1 = norm_of(4, rngs=rngs)
        stages, inplanes = [], 4
        for planes, stride in ((4, 1), (6, 2)):
            down = nnx.Sequential(
                nnx.Conv(inplanes, planes * 2, (1, 1), strides=stride, use_bias=False, rngs=rngs),
                norm_of(planes * 2, rngs=rngs),
            )
            first = Bottleneck(inplanes, planes, stride, down, rngs=rngs)
            stages.append(nnx.Sequential(first, Bottleneck(planes * 2, planes, rngs=rngs)))
            inplanes = planes * 2
        self.layer1, self.layer2 = stages
        self.fc = nnx.Linear(inplanes, 5, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.bn1(self.conv1(x)))
        x = nnx.max_pool(x, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))
        return self.fc(self.layer2(self.layer1(x)).mean((1, 2)))


# -- ConvNeXt: a patchify stem and downsampling of 2x2, layer norms, layer scale


class ConvNeXtBlock(nnx.Module):
    def __init__(self, dim, *, rngs):
        self.dwconv = nnx.Conv(dim, dim, (7, 7), feature_group_count=dim, rngs=rngs)
        self.norm = nnx.LayerNorm(dim, epsilon=1e-6, rngs=rngs)
        self.pwconv1 = nnx.Linear(dim, 4 * dim, rngs=rngs)
        self.pwconv2 = nnx.Linear(4 * dim, dim, rngs=rngs)
        self.gamma = nnx.Param(jnp.full((1, 1, 1, dim), 0.1))

    def __call__(self, x):
        return x + self.gamma * self.pwconv2(nnx.gelu(self.pwconv1(self.norm(self.dwconv(x)))))


class ConvNeXt(nnx.Module):
    def __init__(self, *, rngs):
        self.stem = nnx.Sequential(
            nnx.Conv(3, 4, (4, 4), strides=(4, 4), rngs=rngs), nnx.LayerNorm(4, rngs=rngs)
        )
        self.block1 = ConvNeXtBlock(4, rngs=rngs)
        self.downsample = nnx.Sequential(
            nnx.LayerNorm(4, rngs=rngs), nnx.Conv(4, 6, (2, 2), strides=(2, 2), rngs=rngs)
        )
        self.block2 = ConvNeXtBlock(6, rngs=rngs)
        self.norm = nnx.LayerNorm(6, rngs=rngs)
        self.head = nnx.Linear(6, 5, rngs=rngs)

    def __call__(self, x):
        x = self.block2(self.downsample(self.block1(self.stem(x))))
        return self.head(self.norm(x.mean((1, 2))))


# -- EfficientNet: strided depthwise layers padded by name, squeeze and excitation


class SqueezeExcite(nnx.Module):
    def __init__(self, channels, squeezed, *, rngs):
        self.reduce = nnx.Conv(channels, squeezed, (1, 1), rngs=rngs)
        self.expand = nnx.Conv(squeezed, channels, (1, 1), rngs=rngs)

    def __call__(self, x):
        s = x.mean((1, 2), keepdims=True)
        return x * nnx.sigmoid(self.expand(nnx.silu(self.reduce(s))))


class MBConv(nnx.Module):
    def __init__(self, inputs, outputs, kernel, stride, expand, *, rngs):
        wide = inputs * expand
        conv = functools.partial(nnx.Conv, use_bias=False, padding="SAME", rngs=rngs)
        self.expand_conv, self.bn0 = conv(inputs, wide, (1, 1)), norm_of(wide, epsilon=1e-3, rngs=rngs)
        self.depthwise_conv = conv(
            wide, wide, (kernel, kernel), strides=(stride, stride), feature_group_count=wide
        )
        self.bn1 = norm_of(wide, epsilon=1e-3, rngs=rngs)
        self.se = SqueezeExcite(wide, 2, rngs=rngs)
        self.project_conv, self.bn2 = conv(wide, outputs, (1, 1)), norm_of(outputs, epsilon=1e-3, rngs=rngs)
        self.skip = stride == 1 and inputs == outputs

    def __call__(self, x):
        y = nnx.silu(self.bn0(self.expand_conv(x)))
        y = self.bn2(self.project_conv(self.se(nnx.silu(self.bn1(self.depthwise_conv(y))))))
        return x + y if self.skip else y


class EfficientNet(nnx.Module):
    def __init__(self, *, rngs):
        self.stem_conv = nnx.Conv(3, 4, (3, 3), strides=(2, 2), padding="SAME", use_bias=False, rngs=rngs)
        self.stem_bn = norm_of(4, epsilon=1e-3, rngs=rngs)
        blocks = ((4, 4, 3, 1, 2), (4, 6, 5, 2, 2), (6, 6, 5, 1, 2))
        self.blocks = nnx.List([MBConv(*block, rngs=rngs) for block in blocks])
        self.head_conv, self.head_bn = (
            nnx.Conv(6, 8, (1, 1), use_bias=False, rngs=rngs),
            norm_of(8, rngs=rngs),
        )
        self.dropout = nnx.Dropout(0.2, rngs=rngs)
        self.classifier = nnx.Linear(8, 5, rngs=rngs)

    def __call__(self, x):
        x = nnx.silu(self.stem_bn(self.stem_conv(x)))
        for block in self.blocks:
            x = block(x)
        x = nnx.silu(self.head_bn(self.head_conv(x)))
        return self.classifier(self.dropout(x.mean((1, 2))))


# -- DenseNet-121: pre-activation, concatenations


class DenseLayer(nnx.Module):
    def __init__(self, inputs, growth, *, rngs):
        self.norm1, self.norm2 = norm_of(inputs, rngs=rngs), norm_of(2 * growth, rngs=rngs)
        self.conv1 = nnx.Conv(inputs, 2 * growth, (1, 1), use_bias=False, rngs=rngs)
        self.conv2 = nnx.Conv(2 * growth, growth, (3, 3), padding="SAME", use_bias=False, rngs=rngs)

    def __call__(self, x):
        y = self.conv1(nnx.relu(self.norm1(x)))
        return jnp.concatenate([x, self.conv2(nnx.relu(self.norm2(y)))], axis=-1)


class Transition(nnx.Module):
    def __init__(self, inputs, outputs, *, rngs):
        self.norm = norm_of(inputs, rngs=rngs)
        self.conv = nnx.Conv(inputs, outputs, (1, 1), use_bias=False, rngs=rngs)

    def __call__(self, x):
        return nnx.avg_pool(self.conv(nnx.relu(self.norm(x))), (2, 2), strides=(2, 2))


class DenseNet(nnx.Module):
    def __init__(self, *, rngs):
        self.conv0, self.norm0 = nnx.Conv(3, 4, (3, 3), strides=2, rngs=rngs), norm_of(4, rngs=rngs)
        self.denseblock1 = nnx.Sequential(*[DenseLayer(n, 2, rngs=rngs) for n in (4, 6)])
        self.transition1 = Transition(8, 4, rngs=rngs)
        self.denseblock2 = nnx.Sequential(*[DenseLayer(n, 2, rngs=rngs) for n in (4, 6)])
        self.norm5 = norm_of(8, rngs=rngs)
        self.classifier = nnx.Linear(8, 5, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.norm0(self.conv0(x)))
        x = self.denseblock2(self.transition1(self.denseblock1(x)))
        return self.classifier(nnx.relu(self.norm5(x)).mean((1, 2)))


# -- VGG-19 with batch norms: one long nnx.Sequential


class VGG19(nnx.Module):
    def __init__(self, *, rngs):
        layers, inputs = [], 3
        for width in (4, 4, "M", 6, 6, "M"):
            if width == "M":
                layers.append(functools.partial(nnx.max_pool, window_shape=(2, 2), strides=(2, 2)))
                continue
            layers += [nnx.Conv(inputs, width, (3, 3), rngs=rngs), norm_of(width, rngs=rngs), nnx.relu]
            inputs = width
        self.features = nnx.Sequential(*layers)
        self.classifier = nnx.Sequential(
            nnx.Linear(6 * 16, 8, rngs=rngs),
            nnx.relu,
            nnx.Dropout(0.5, rngs=rngs),
            nnx.Linear(8, 8, rngs=rngs),
            nnx.relu,
            nnx.Linear(8, 5, rngs=rngs),
        )

    def __call__(self, x):
        x = self.features(x)
        return self.classifier(x.reshape(x.shape[0], -1))


# -- U-Net: double convolutions, transposed ones on the way up


class DoubleConv(nnx.Module):
    def __init__(self, inputs, outputs, *, rngs):
        conv = functools.partial(nnx.Conv, kernel_size=(3, 3), padding="SAME", rngs=rngs)
        self.double_conv = nnx.Sequential(
            *(conv(inputs, outputs), norm_of(outputs, rngs=rngs), nnx.relu),
            *(conv(outputs, outputs), norm_of(outputs, rngs=rngs), nnx.relu),
        )

    def __call__(self, x):
        return self.double_conv(x)


class UNet(nnx.Module):
    def __init__(self, *, rngs):
        self.inc, self.down = DoubleConv(3, 4, rngs=rngs), DoubleConv(4, 6, rngs=rngs)
        self.up = nnx.ConvTranspose(6, 4, (2, 2), strides=(2, 2), rngs=rngs)
        self.up_bn = norm_of(4, rngs=rngs)
        self.conv = DoubleConv(8, 4, rngs=rngs)
        self.outc = nnx.Conv(4, 2, (1, 1), rngs=rngs)

    def __call__(self, x):
        skip = self.inc(x)
        deep = self.down(nnx.max_pool(skip, (2, 2), strides=(2, 2)))
        up = nnx.relu(self.up_bn(self.up(deep)))
        return self.outc(self.conv(jnp.concatenate([skip, up], axis=-1)))


# -- ViT: a patch embedding, Flax's attention


class Encoder(nnx.Module):
    def __init__(self, dim, heads, *, rngs):
        self.norm1, self.norm2 = nnx.LayerNorm(dim, rngs=rngs), nnx.LayerNorm(dim, rngs=rngs)
        self.attn = nnx.MultiHeadAttention(heads, dim, decode=False, rngs=rngs)
        self.mlp = nnx.Sequential(
            nnx.Linear(dim, 2 * dim, rngs=rngs), nnx.gelu, nnx.Linear(2 * dim, dim, rngs=rngs)
        )

    def __call__(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class ViT(nnx.Module):
    def __init__(self, *, rngs):
        self.patch = nnx.Conv(3, 8, (4, 4), strides=(4, 4), padding="SAME", rngs=rngs)
        self.cls_token = nnx.Param(jnp.zeros((1, 1, 8)))
        self.pos_embed = nnx.Param(jnp.zeros((1, 17, 8)))
        self.encoder = nnx.Sequential(*[Encoder(8, 2, rngs=rngs) for _ in range(2)])
        self.norm = nnx.LayerNorm(8, rngs=rngs)
        self.head = nnx.Linear(8, 5, rngs=rngs)

    def __call__(self, x):
        x = self.patch(x)
        x = x.reshape(x.shape[0], -1, x.shape[-1])
        cls = jnp.broadcast_to(self.cls_token[...], (x.shape[0], 1, 8)).astype(x.dtype)
        x = jnp.concatenate([cls, x], axis=1) + self.pos_embed[...]
        return self.head(self.norm(self.encoder(x))[:, 0])


# -- VAE: strided down and transposed up, noise from `rngs`


class VAE(nnx.Module):
    def __init__(self, *, rngs):
        self.enc1, self.enc_bn = nnx.Conv(3, 4, (3, 3), strides=2, rngs=rngs), norm_of(4, rngs=rngs)
        self.enc2 = nnx.Conv(4, 4, (3, 3), strides=2, rngs=rngs)
        self.mean, self.logvar = nnx.Linear(64, 4, rngs=rngs), nnx.Linear(64, 4, rngs=rngs)
        self.dense = nnx.Linear(4, 64, rngs=rngs)
        self.dec1 = nnx.ConvTranspose(4, 4, (3, 3), strides=(2, 2), rngs=rngs)
        self.dec_bn = norm_of(4, rngs=rngs)
        self.dec2 = nnx.ConvTranspose(4, 3, (3, 3), strides=(2, 2), rngs=rngs)

    def __call__(self, x, *, rngs):
        x = nnx.relu(self.enc_bn(self.enc1(x)))
        x = nnx.relu(self.enc2(x)).reshape(x.shape[0], -1)
        mean, logvar = self.mean(x), jnp.clip(self.logvar(x), -4, 4)
        z = mean + jnp.exp(logvar / 2) * jax.random.normal(rngs.noise(), mean.shape, mean.dtype)
        y = nnx.relu(self.dense(z)).reshape(-1, 4, 4, 4)
        return self.dec2(nnx.relu(self.dec_bn(self.dec1(y))))


# -- GRU: an embedding, a recurrent cell, a dense layer


class GRU(nnx.Module):
    def __init__(self, *, rngs):
        self.embed = nnx.Embed(11, 6, rngs=rngs)
        self.rnn = nnx.RNN(nnx.GRUCell(6, 8, rngs=rngs), rngs=rngs)
        self.hidden = nnx.Linear(8, 8, rngs=rngs)
        self.head = nnx.Linear(8, 5, rngs=rngs)

    def __call__(self, x):
        return self.head(nnx.tanh(self.hidden(self.rnn(self.embed(x))[:, -1])))


class Stranger(NamedTuple):
    """A network.

    Attributes:
      build: its class.
      inputs: shape of one input; tokens if it has one axis.
      taken: its layers of several branches.
      structure: what `to_structure` makes of it; attention and cells have layers for merged branches only.
      kept: batch norms that no layer takes in.
    """

    build: Callable[..., nnx.Module]
    inputs: tuple[int, ...]
    taken: tuple[str, ...]
    structure: str = "repvgg"
    kept: tuple[str, ...] = ()

    def fresh(self, dtype: Any = jnp.float32, seed: int = 0) -> Any:
        """A network whose kernels are drawn by NumPy, with biases and norms as Flax starts them."""
        model = nnx.eval_shape(lambda: self.build(rngs=nnx.Rngs(0)))
        rng = np.random.default_rng(seed)

        def draw(path, v):
            name = path.rpartition("/")[2]
            if name in ("scale", "var", "gamma"):
                return jnp.ones(v.shape, dtype)
            if name in ("bias", "mean"):
                return jnp.zeros(v.shape, dtype)
            fan_in = max(1, int(np.prod(v.shape[:-1])))
            return jnp.asarray(rng.normal(size=v.shape) / np.sqrt(fan_in), dtype)

        nnx.update(model, paths.map_named(draw, nnx.state(model, (nnx.Param, nnx.BatchStat))))
        for _, module in nnx.iter_modules(model):
            if hasattr(module, "param_dtype"):  # a recurrent cell starts in it
                setattr(module, "param_dtype", dtype)  # noqa: B010
        keys = nnx.state(model, nnx.RngKey)
        nnx.update(model, jax.tree.map(lambda _: jax.random.key(7), keys))
        nnx.update(model, jax.tree.map(lambda v: jnp.zeros(v.shape, v.dtype), nnx.state(model, nnx.RngCount)))
        return model

    def batches(self, count: int = 3, size: int = 4) -> list[dict[str, np.ndarray]]:
        rng = np.random.default_rng(1)
        if len(self.inputs) == 1:
            xs = rng.integers(0, 11, size=(count, size, *self.inputs))
        else:
            xs = rng.normal(size=(count, size, *self.inputs))
        return [{"x": x, "y": rng.normal(size=5)} for x in xs]


def call(model: Any, x: Any) -> Any:
    """Calls any of them."""
    return model(x, rngs=nnx.Rngs(noise=3)) if isinstance(model, VAE) else model(x)


STRANGERS = {
    "ResNet-50": Stranger(
        ResNet50,
        (16, 16, 3),
        (
            *("conv1", "layer1/layers/0/conv1", "layer1/layers/0/conv2", "layer1/layers/1/conv2"),
            *("layer2/layers/0/conv2", "layer2/layers/1/conv2"),
        ),
    ),
    "ConvNeXt": Stranger(ConvNeXt, (16, 16, 3), ("block1/dwconv", "block2/dwconv")),
    "EfficientNet": Stranger(
        EfficientNet, (16, 16, 3), ("stem_conv", *(f"blocks/{i}/depthwise_conv" for i in range(3)))
    ),
    "DenseNet": Stranger(
        DenseNet,
        (16, 16, 3),
        (
            *("conv0", "denseblock1/layers/0/conv1", "denseblock1/layers/0/conv2"),
            *("denseblock1/layers/1/conv2", "denseblock2/layers/0/conv1", "denseblock2/layers/0/conv2"),
            "denseblock2/layers/1/conv2",
        ),
        kept=(
            *(f"denseblock{b}/layers/{i}/norm1" for b in (1, 2) for i in (0, 1)),
            *("norm5", "transition1/norm"),
        ),
    ),
    "VGG-19": Stranger(
        VGG19, (16, 16, 3), (*(f"features/layers/{i}" for i in (0, 3, 7, 10)), "classifier/layers/3")
    ),
    "U-Net": Stranger(
        UNet,
        (8, 8, 3),
        tuple(f"{block}/double_conv/layers/{i}" for block in ("conv", "down", "inc") for i in (0, 3)),
    ),
    "ViT": Stranger(
        ViT,
        (16, 16, 3),
        tuple(f"encoder/layers/{i}/attn/{n}" for i in (0, 1) for n in ("key", "out", "query", "value")),
        structure="repopt",
    ),
    "VAE": Stranger(VAE, (16, 16, 3), ("enc1", "enc2")),
    "GRU": Stranger(GRU, (5,), ("hidden",), structure="repopt"),
}
