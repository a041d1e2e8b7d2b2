"""Reference networks in PyTorch, with the attribute names of the code bases that publish weights.

Written for the tests from the papers and from the published names, with nothing of the package in them: what
is compared is two implementations. Every class takes its widths and strides, so that the tests can use tiny
ones.
"""

import itertools

import torch
from torch import nn
from torch.nn import functional


def conv(inputs, outputs, size, stride=1, groups=1, bias=False):
    return nn.Conv2d(inputs, outputs, size, stride, size // 2, groups=groups, bias=bias)


def named(**modules):
    """A sequence whose layers have names: `named(conv=..., bn=...)`."""
    sequence = nn.Sequential()
    for name, module in modules.items():
        sequence.add_module(name, module)
    return sequence


def conv_bn(*args, **kwargs):
    layer = conv(*args, **kwargs)
    return named(conv=layer, bn=nn.BatchNorm2d(layer.out_channels))


class Scale(nn.Module):
    """One factor for each channel."""

    def __init__(self, channels):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))

    def forward(self, x):
        return x * self.weight.view(1, -1, 1, 1)


class Excite(nn.Module):
    """Squeeze-and-excitation; `names` are those of its two layers."""

    def __init__(self, channels, hidden, names, hard=False):
        super().__init__()
        self.names, self.hard = names, hard
        self.add_module(names[0], conv(channels, hidden, 1, bias=True))
        self.add_module(names[1], conv(hidden, channels, 1, bias=True))

    def forward(self, x):
        down, up = (getattr(self, name) for name in self.names)
        z = up(functional.relu(down(functional.adaptive_avg_pool2d(x, 1))))
        return x * (functional.relu6(z + 3) / 6 if self.hard else z.sigmoid())


# -- RepOpt-VGG, as its authors name it


class PlainBlock(nn.Module):
    """Mode "target"."""

    def __init__(self, inputs, outputs, stride, groups=1, se=False):
        super().__init__()
        self.conv = conv(inputs, outputs, 3, stride, groups)
        self.bn = nn.BatchNorm2d(outputs)
        self.post_se = Excite(outputs, outputs // 4, ("down", "up")) if se else nn.Identity()

    def forward(self, x):
        return self.post_se(functional.relu(self.bn(self.conv(x))))


class PlainDeployed(nn.Module):
    """The plain block with its batch norm folded."""

    def __init__(self, inputs, outputs, stride, groups=1, se=False):
        super().__init__()
        self.conv = conv(inputs, outputs, 3, stride, groups, bias=True)
        self.post_se = Excite(outputs, outputs // 4, ("down", "up")) if se else nn.Identity()

    def forward(self, x):
        return self.post_se(functional.relu(self.conv(x)))


class LinearAddition(nn.Module):
    """Modes "hs" and "csla": scaled branches, each run on its own."""

    def __init__(self, inputs, outputs, stride, groups=1, se=False):
        super().__init__()
        self.conv = conv(inputs, outputs, 3, stride, groups)
        self.scale_conv = Scale(outputs)
        self.conv_1x1 = conv(inputs, outputs, 1, stride, groups)
        self.scale_1x1 = Scale(outputs)
        self.scale_identity = Scale(outputs) if inputs == outputs and stride == 1 else None
        self.bn = nn.BatchNorm2d(outputs)
        self.post_se = Excite(outputs, outputs // 4, ("down", "up")) if se else nn.Identity()

    def forward(self, x):
        y = self.scale_conv(self.conv(x)) + self.scale_1x1(self.conv_1x1(x))
        if self.scale_identity is not None:
            y = y + self.scale_identity(x)
        return self.post_se(functional.relu(self.bn(y)))


class ThreeBranches(nn.Module):
    """Mode "repvgg", the authors' own baseline."""

    def __init__(self, inputs, outputs, stride, groups=1, se=False):
        super().__init__()
        self.conv_3x3 = conv(inputs, outputs, 3, stride, groups)
        self.bn_3x3 = nn.BatchNorm2d(outputs)
        self.conv_1x1 = conv(inputs, outputs, 1, stride, groups)
        self.bn_1x1 = nn.BatchNorm2d(outputs)
        if inputs == outputs and stride == 1:
            self.bn_identity = nn.BatchNorm2d(outputs)
        self.post_se = Excite(outputs, outputs // 4, ("down", "up")) if se else nn.Identity()

    def forward(self, x):
        y = self.bn_3x3(self.conv_3x3(x)) + self.bn_1x1(self.conv_1x1(x))
        if hasattr(self, "bn_identity"):
            y = y + self.bn_identity(x)
        return self.post_se(functional.relu(y))


# -- RepVGG, as its authors and as timm name it


class RepVGGTrained(nn.Module):
    def __init__(self, inputs, outputs, stride, groups=1, se=False):
        super().__init__()
        self.rbr_identity = nn.BatchNorm2d(inputs) if inputs == outputs and stride == 1 else None
        self.rbr_dense = conv_bn(inputs, outputs, 3, stride, groups)
        self.rbr_1x1 = conv_bn(inputs, outputs, 1, stride, groups)
        self.se = Excite(outputs, outputs // 16, ("down", "up")) if se else nn.Identity()

    def forward(self, x):
        y = self.rbr_dense(x) + self.rbr_1x1(x)
        if self.rbr_identity is not None:
            y = y + self.rbr_identity(x)
        return functional.relu(self.se(y))


class RepVGGDeployed(nn.Module):
    def __init__(self, inputs, outputs, stride, groups=1, se=False):
        super().__init__()
        self.rbr_reparam = conv(inputs, outputs, 3, stride, groups, bias=True)
        self.se = Excite(outputs, outputs // 16, ("down", "up")) if se else nn.Identity()

    def forward(self, x):
        return functional.relu(self.se(self.rbr_reparam(x)))


class TimmRepVGG(nn.Module):
    def __init__(self, inputs, outputs, stride, groups=1, se=False):
        super().__init__()
        self.identity = nn.BatchNorm2d(outputs) if inputs == outputs and stride == 1 else None
        self.conv_kxk = conv_bn(inputs, outputs, 3, stride, groups)
        self.conv_1x1 = conv_bn(inputs, outputs, 1, stride, groups)
        self.attn = Excite(outputs, outputs // 16, ("fc1", "fc2")) if se else nn.Identity()

    def forward(self, x):
        y = self.conv_1x1(x) + self.conv_kxk(x)
        if self.identity is not None:
            y = y + self.identity(x)
        return functional.relu(self.attn(y))


class TimmDeployed(nn.Module):
    """RepVGG's and MobileOne's block after `reparameterize`."""

    def __init__(self, inputs, outputs, stride, groups=1, se=False, size=3, copies=1):
        super().__init__()
        self.reparam_conv = conv(inputs, outputs, size, stride, groups, bias=True)
        self.attn = Excite(outputs, outputs // 16, ("fc1", "fc2")) if se else nn.Identity()

    def forward(self, x):
        return functional.relu(self.attn(self.reparam_conv(x)))


# -- MobileOne, as its authors and as timm name it


class MobileOneTrained(nn.Module):
    def __init__(self, inputs, outputs, stride, groups=1, se=False, size=3, copies=1):
        super().__init__()
        self.se = Excite(outputs, outputs // 16, ("reduce", "expand")) if se else nn.Identity()
        self.rbr_skip = nn.BatchNorm2d(inputs) if inputs == outputs and stride == 1 else None
        self.rbr_conv = nn.ModuleList([conv_bn(inputs, outputs, size, stride, groups) for _ in range(copies)])
        self.rbr_scale = conv_bn(inputs, outputs, 1, stride, groups) if size > 1 else None

    def forward(self, x):
        branches = [*self.rbr_conv, self.rbr_scale, self.rbr_skip]
        return functional.relu(self.se(sum(branch(x) for branch in branches if branch is not None)))


class MobileOneDeployed(nn.Module):
    def __init__(self, inputs, outputs, stride, groups=1, se=False, size=3, copies=1):
        super().__init__()
        self.reparam_conv = conv(inputs, outputs, size, stride, groups, bias=True)
        self.se = Excite(outputs, outputs // 16, ("reduce", "expand")) if se else nn.Identity()

    def forward(self, x):
        return functional.relu(self.se(self.reparam_conv(x)))


class TimmMobileOne(nn.Module):
    def __init__(self, inputs, outputs, stride, groups=1, se=False, size=3, copies=1):
        super().__init__()
        self.identity = nn.BatchNorm2d(outputs) if inputs == outputs and stride == 1 else None
        self.conv_kxk = nn.ModuleList([conv_bn(inputs, outputs, size, stride, groups) for _ in range(copies)])
        self.conv_scale = conv_bn(inputs, outputs, 1, stride, groups) if size > 1 else None
        self.attn = Excite(outputs, outputs // 16, ("fc1", "fc2")) if se else nn.Identity()

    def forward(self, x):
        branches = [*self.conv_kxk, self.conv_scale, self.identity]
        return functional.relu(self.attn(sum(branch(x) for branch in branches if branch is not None)))


class Staged(nn.Module):
    """Five stages of blocks, pooling, a classifier: `stage0`, `stage1.0` ... `linear`, or timm's names.

    `stages` is a list of lists of blocks.
    """

    def __init__(self, stages, classes, width, timm=False):
        super().__init__()
        self.timm = timm
        first, *rest = stages
        if timm:
            (self.stem,) = first
            self.stages = nn.Sequential(*(nn.Sequential(*blocks) for blocks in rest))
            self.head = named(fc=nn.Linear(width, classes))
        else:
            (self.stage0,) = first
            for number, blocks in enumerate(rest, start=1):
                self.add_module(f"stage{number}", nn.Sequential(*blocks))
            self.linear = nn.Linear(width, classes)

    def forward(self, x):
        parts = [self.stem, self.stages] if self.timm else [self.stage0]
        parts += [] if self.timm else [getattr(self, f"stage{n}") for n in range(1, 5)]
        for part in parts:
            x = part(x)
        x = x.mean((2, 3))
        return self.head(x) if self.timm else self.linear(x)


def vgg(block, blocks, widths, strides, classes, groups=1, timm=False, se=False):
    """Every second block, counted through the network from 0, has `groups` groups, block 0 excepted."""
    stages, inputs, count = [], 3, 0
    for number, width, stride in zip((1, *blocks), widths, strides):
        stages.append([])
        for i in range(number):
            g = groups if count and count % 2 == 0 else 1
            stages[-1].append(block(inputs, width, stride if i == 0 else 1, g, se))
            inputs, count = width, count + 1
    return Staged(stages, classes, inputs, timm)


def mobileone(block, pairs, widths, classes, copies=1, se_pairs=(0, 0, 0, 0), timm=False):
    inputs, *widths = widths
    stages = [[block(3, inputs, 2)]]
    for number, with_se, width in zip(pairs, se_pairs, widths):
        stages.append([])
        for i in range(number):
            se, stride = i >= number - with_se, 2 if i == 0 else 1
            stages[-1].append(block(inputs, inputs, stride, inputs, se, 3, copies))
            stages[-1].append(block(inputs, width, 1, 1, se, 1, copies))
            inputs = width
    return Staged(stages, classes, inputs, timm)


# -- GhostNets, as the authors of RepOptimizers (target, hs, rep) and of RepGhost (train, deploy) name them


class Ghost(nn.Module):
    def __init__(self, inputs, outputs, relu, mode):
        super().__init__()
        self.act = functional.relu if relu else lambda x: x
        self.primary_conv = nn.Sequential(conv(inputs, outputs, 1), nn.BatchNorm2d(outputs))
        cheap = conv(outputs, outputs, 3, groups=outputs, bias=mode == "deploy")
        if mode == "deploy":
            self.cheap_operation = cheap
        elif mode == "target":
            self.cheap_operation = nn.Sequential(cheap, nn.Identity())
            self.final_bn = nn.BatchNorm2d(outputs)
        elif mode == "hs":
            self.cheap_operation = nn.Sequential(cheap, Scale(outputs))
            self.fusion_scale = Scale(outputs)
            self.final_bn = nn.BatchNorm2d(outputs)
        else:
            self.cheap_operation = nn.Sequential(cheap, nn.BatchNorm2d(outputs))
            fusion = nn.BatchNorm2d(outputs)
            self.fusion_bn = nn.Sequential(fusion) if mode == "train" else fusion

    def forward(self, x):
        x = self.act(self.primary_conv(x))
        y = self.cheap_operation(x)
        for name in ("fusion_scale", "fusion_bn"):
            if hasattr(self, name):
                y = y + getattr(self, name)(x)
        return self.act(self.final_bn(y) if hasattr(self, "final_bn") else y)


class Bottleneck(nn.Module):
    def __init__(self, inputs, hidden, outputs, size, se, stride, mode):
        super().__init__()
        self.ghost1 = Ghost(inputs, hidden, True, mode)
        if stride > 1:
            self.conv_dw = conv(hidden, hidden, size, stride, hidden)
            self.bn_dw = nn.BatchNorm2d(hidden)
        self.se = Excite(hidden, se, ("conv_reduce", "conv_expand"), hard=True) if se else None
        self.ghost2 = Ghost(hidden, outputs, False, mode)
        self.shortcut = nn.Sequential()
        if stride > 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                conv(inputs, inputs, size, stride, inputs),
                nn.BatchNorm2d(inputs),
                conv(inputs, outputs, 1),
                nn.BatchNorm2d(outputs),
            )

    def forward(self, x):
        y = self.ghost1(x)
        if hasattr(self, "conv_dw"):
            y = self.bn_dw(self.conv_dw(y))
        if self.se is not None:
            y = self.se(y)
        return self.ghost2(y) + self.shortcut(x)


class Last(nn.Module):
    def __init__(self, inputs, outputs):
        super().__init__()
        self.conv = conv(inputs, outputs, 1)
        self.bn1 = nn.BatchNorm2d(outputs)

    def forward(self, x):
        return functional.relu(self.bn1(self.conv(x)))


class GhostNet(nn.Module):
    """`stages`: lists of rows (kernel, hidden, outputs, hidden channels of the excitation or 0, stride), with
    channels as they are; `last` and `features`: channels of the last block and before the classifier."""

    def __init__(self, stages, stem, last, features, classes, mode, dropout=0.0):
        super().__init__()
        self.conv_stem = conv(3, stem, 3, 2)
        self.bn1 = nn.BatchNorm2d(stem)
        blocks, inputs = [], stem
        for rows in stages:
            layers = []
            for size, hidden, outputs, se, stride in rows:
                layers.append(Bottleneck(inputs, hidden, outputs, size, se, stride, mode))
                inputs = outputs
            blocks.append(nn.Sequential(*layers))
        blocks.append(nn.Sequential(Last(inputs, last)))
        self.blocks = nn.Sequential(*blocks)
        self.conv_head = conv(last, features, 1, bias=True)
        self.classifier = nn.Linear(features, classes)
        self.dropout = dropout

    def forward(self, x):
        x = self.blocks(functional.relu(self.bn1(self.conv_stem(x))))
        x = functional.relu(self.conv_head(functional.adaptive_avg_pool2d(x, 1))).flatten(1)
        return self.classifier(functional.dropout(x, self.dropout, self.training))


# -- RepMLPNet, as its authors name it


class Perceptron(nn.Module):
    """The gate: a number for each image and channel, of the mean over the map."""

    def __init__(self, channels, hidden):
        super().__init__()
        self.fc1 = conv(channels, hidden, 1, bias=True)
        self.fc2 = conv(hidden, channels, 1, bias=True)

    def forward(self, x):
        return self.fc2(functional.relu(self.fc1(x.mean((2, 3), keepdim=True)))).sigmoid()


class Mixing(nn.Module):
    """A dense layer for each tile of a map, channel c with kernel c mod `sets`; convolutions in the tile.

    `form` is "train", "deploy" or "plain" (without the convolutions). With `published_order` the tiles are
    put together as if the rows were ordered by groups of channels first.
    """

    def __init__(self, channels, side, sets, form="train", published_order=False):
        super().__init__()
        self.side, self.sets, self.published_order = side, sets, published_order
        self.gp = Perceptron(channels, channels // 4)
        rows = sets * side * side
        self.fc3 = nn.Conv2d(rows, rows, 1, groups=sets, bias=form == "deploy")
        self.fc3_bn = nn.Identity() if form == "deploy" else nn.BatchNorm2d(sets)
        if form == "train":
            self.repconv1 = conv_bn(sets, sets, 1, groups=sets)
            self.repconv3 = conv_bn(sets, sets, 3, groups=sets)

    def forward(self, x):
        side, sets = self.side, self.sets
        batch, channels, height, width = x.shape
        down, across, repeats = height // side, width // side, channels // sets
        outputs = {}
        for i in range(down):
            for j in range(across):
                tile = x[:, :, i * side : (i + 1) * side, j * side : (j + 1) * side]
                for r in range(repeats):
                    outputs[i, j, r] = tile[:, r * sets : (r + 1) * sets]
        places = list(outputs)  # rows of one image, in the order of the published code
        rows = torch.stack([outputs[place] for place in places], 1).reshape(-1, sets, side, side)
        y = self.fc3_bn(self.fc3(rows.reshape(-1, sets * side * side, 1, 1)).reshape(rows.shape))
        for name in ("repconv1", "repconv3"):
            if hasattr(self, name):
                y = y + getattr(self, name)(rows)
        y = y.reshape(batch, len(places), sets, side, side)
        if self.published_order:
            places = [(i, j, r) for r in range(repeats) for i in range(down) for j in range(across)]
        result = torch.empty_like(x)
        for row, (i, j, r) in enumerate(places):
            spot = result[:, r * sets : (r + 1) * sets, i * side : (i + 1) * side]
            spot[:, :, :, j * side : (j + 1) * side] = y[:, row]
        return result * self.gp(x)


class FeedForward(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.ffn_fc1 = conv_bn(channels, 4 * channels, 1)
        self.ffn_fc2 = conv_bn(4 * channels, channels, 1)

    def forward(self, x):
        return self.ffn_fc2(functional.gelu(self.ffn_fc1(x)))


class MixingUnit(nn.Module):
    def __init__(self, channels, side, sets, form="train", published_order=False):
        super().__init__()
        self.prebn1, self.prebn2 = nn.BatchNorm2d(channels), nn.BatchNorm2d(channels)
        self.repmlp_block = Mixing(channels, side, sets, form, published_order)
        self.ffn_block = FeedForward(channels)

    def forward(self, x):
        x = x + self.repmlp_block(self.prebn1(x))
        return x + self.ffn_block(self.prebn2(x))


class RepMLPNet(nn.Module):
    """`stages`: tuples (channels, units, side of the tiles, sets)."""

    def __init__(self, stages, patch, classes, form="train", published_order=False):
        super().__init__()

        def smaller(inputs, outputs, factor):
            layer = nn.Conv2d(inputs, outputs, factor, factor, bias=False)
            return named(conv=layer, bn=nn.BatchNorm2d(outputs), relu=nn.ReLU())

        widths = [width for width, *_ in stages]
        self.conv_embedding = smaller(3, widths[0], patch)
        self.stages = nn.ModuleList(
            nn.ModuleList(MixingUnit(width, side, sets, form, published_order) for _ in range(units))
            for width, units, side, sets in stages
        )
        self.embeds = nn.ModuleList(smaller(a, b, 2) for a, b in itertools.pairwise(widths))
        self.head_norm = nn.BatchNorm2d(widths[-1])
        self.head = nn.Linear(widths[-1], classes)

    def forward(self, x):
        x = self.conv_embedding(x)
        for i, stage in enumerate(self.stages):
            x = self.embeds[i - 1](x) if i else x
            for unit in stage:
                x = unit(x)
        return self.head(self.head_norm(x).mean((2, 3)))


def randomise(network, seed=0):
    """Weights, scales (both signs) and statistics that are none of the initial ones. Returns the network, in
    evaluation mode."""
    generator = torch.Generator().manual_seed(seed)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight, module.running_var):
                tensor.data.copy_(0.5 + torch.rand(tensor.shape, generator=generator, dtype=tensor.dtype))
            for tensor in (module.bias, module.running_mean):
                tensor.data.copy_(0.3 * torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype))
        elif isinstance(module, Scale):
            shape, dtype = module.weight.shape, module.weight.dtype
            module.weight.data.copy_(1 + 0.7 * torch.randn(shape, generator=generator, dtype=dtype))
        elif isinstance(module, (nn.Conv2d, nn.Linear)):
            fan_in = module.weight[0].numel()
            for tensor in filter(lambda t: t is not None, (module.weight, module.bias)):
                draw = torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype)
                tensor.data.copy_(draw * (2 / fan_in) ** 0.5)
        else:  # a block with parameters of its own
            for tensor in module.parameters(recurse=False):
                draw = torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype)
                tensor.data.copy_(draw * (2 / tensor[0].numel()) ** 0.5)
    return network.eval()
