"""Blocks of the literature in PyTorch, with the attribute names of their code bases, and networks of them.

Written for the tests from the papers and from the published names, with nothing of the package in them. A
block is `Block(inputs, outputs, size, stride=1, groups=1, ...)` and pads by half of its size unless it says
otherwise; `Deployed` is the one convolution that a code base makes of it.
"""

import math

import torch
from torch import nn
from torch.nn import functional
from torch_networks import conv_bn


class BiasedNorm(nn.BatchNorm2d):
    """A batch norm whose running variance is over n, as the one that normalises, and not over n - 1."""

    def forward(self, x):
        if not self.training:
            return super().forward(x)
        with torch.no_grad():
            variance, mean = torch.var_mean(x, (0, 2, 3), unbiased=False)
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance, self.momentum)
        return functional.batch_norm(x, None, None, self.weight, self.bias, True, eps=self.eps)


def convolution(inputs, outputs, size, stride, groups, padding, bias=False):
    return nn.Conv2d(inputs, outputs, size, stride, padding, groups=groups, bias=bias)


class ACBlock(nn.Module):
    def __init__(self, inputs, outputs, size, stride=1, groups=1, padding=None):
        super().__init__()
        half = size // 2
        padding = half if padding is None else padding
        # A thin kernel pads less than the square one, and cuts off where that would be less than nothing.
        self.cut, thin = max(half - padding, 0), max(padding - half, 0)
        self.square_conv = convolution(inputs, outputs, size, stride, groups, padding)
        self.square_bn = nn.BatchNorm2d(outputs)
        self.ver_conv = convolution(inputs, outputs, (size, 1), stride, groups, (padding, thin))
        self.ver_bn = nn.BatchNorm2d(outputs)
        self.hor_conv = convolution(inputs, outputs, (1, size), stride, groups, (thin, padding))
        self.hor_bn = nn.BatchNorm2d(outputs)

    def forward(self, x):
        height, width, cut = x.shape[2], x.shape[3], self.cut
        tall, broad = x[..., cut : width - cut], x[..., cut : height - cut, :]
        return (
            self.square_bn(self.square_conv(x))
            + self.ver_bn(self.ver_conv(tall))
            + self.hor_bn(self.hor_conv(broad))
        )


class NormAndPad(nn.Module):
    """A batch norm and then a border of what it makes of zeros, by its running statistics."""

    def __init__(self, channels, width, norm):
        super().__init__()
        self.bn, self.width, self.border = norm(channels), width, 1

    def forward(self, x):
        y = self.bn(x)
        with torch.no_grad():
            scale = self.bn.weight / (self.bn.running_var + self.bn.eps).sqrt()
            border = (self.bn.bias - self.bn.running_mean * scale).view(1, -1, 1, 1)
        w = self.width
        inside = functional.pad(torch.ones_like(y[:1, :1]), (w, w, w, w))
        return functional.pad(y, (w, w, w, w)) + self.border * (1 - inside) * border


class PlusIdentity(nn.Conv2d):
    """A 1x1 convolution whose weight is what is added to the identity."""

    def __init__(self, channels, groups):
        super().__init__(channels, channels, 1, groups=groups, bias=False)
        each = channels // groups
        own = torch.zeros(channels, each, 1, 1)
        own[torch.arange(channels), torch.arange(channels) % each] = 1
        self.own = own

    def forward(self, x):
        weight = self.weight + self.own.to(self.weight)
        return functional.conv2d(x, weight, groups=self.groups)


class DiverseBranch(nn.Module):
    def __init__(self, inputs, outputs, size, stride=1, groups=1, middle=None, norm=nn.BatchNorm2d):
        super().__init__()
        padding, depthwise = size // 2, groups == outputs
        self.dbb_origin = conv_bn(inputs, outputs, size, stride, groups)
        self.dbb_avg = nn.Sequential()
        if depthwise:
            self.dbb_avg.add_module("avg", nn.AvgPool2d(size, stride, padding))
        else:
            self.dbb_1x1 = conv_bn(inputs, outputs, 1, stride, groups)
            self.dbb_avg.add_module("conv", convolution(inputs, outputs, 1, 1, groups, 0))
            self.dbb_avg.add_module("bn", NormAndPad(outputs, padding, norm))
            self.dbb_avg.add_module("avg", nn.AvgPool2d(size, stride))
        self.dbb_avg.add_module("avgbn", nn.BatchNorm2d(outputs))
        middle = middle or (2 * inputs if depthwise else inputs)
        self.dbb_1x1_kxk = nn.Sequential()
        if middle == inputs:
            self.dbb_1x1_kxk.add_module("idconv1", PlusIdentity(inputs, groups))
        else:
            self.dbb_1x1_kxk.add_module("conv1", convolution(inputs, middle, 1, 1, groups, 0))
        self.dbb_1x1_kxk.add_module("bn1", NormAndPad(middle, padding, norm))
        self.dbb_1x1_kxk.add_module("conv2", convolution(middle, outputs, size, stride, groups, 0))
        self.dbb_1x1_kxk.add_module("bn2", nn.BatchNorm2d(outputs))

    def forward(self, x):
        y = self.dbb_origin(x) + self.dbb_avg(x) + self.dbb_1x1_kxk(x)
        return y + self.dbb_1x1(x) if hasattr(self, "dbb_1x1") else y


class LargeKernel(nn.Module):
    """RepLKNet's pair of depthwise kernels."""

    def __init__(self, inputs, outputs, size, stride=1, groups=1, small=5):
        super().__init__()
        self.lkb_origin = conv_bn(inputs, outputs, size, stride, groups)
        self.small_conv = conv_bn(inputs, outputs, small, stride, groups)

    def forward(self, x):
        return self.lkb_origin(x) + self.small_conv(x)


class LongKernels(nn.Module):
    """SLaK's two kernels that are long along one axis each, and the small one."""

    def __init__(self, inputs, outputs, size, stride=1, groups=1, small=5):
        super().__init__()
        for name, window in (
            ("Decom1", (size, small)),
            ("Decom2", (small, size)),
            ("small_conv", (small, small)),
        ):
            part = nn.Sequential()
            pads = tuple(n // 2 for n in window)
            part.add_module("conv", convolution(inputs, outputs, window, stride, groups, pads))
            part.add_module("bn", nn.BatchNorm2d(outputs))
            self.add_module(name, part)

    def forward(self, x):
        return self.Decom1(x) + self.Decom2(x) + self.small_conv(x)


class DilatedReparam(nn.Module):
    """UniRepLKNet's: `sets` are (size, dilation) of the small kernels."""

    def __init__(self, inputs, outputs, size, stride=1, groups=1, sets=()):
        super().__init__()
        self.lk_origin = convolution(inputs, outputs, size, stride, groups, size // 2)
        self.origin_bn = nn.BatchNorm2d(outputs)
        self.names = [f"k{k}_{r}" for k, r in sets]
        for (k, r), name in zip(sets, self.names):
            small = nn.Conv2d(
                inputs, outputs, k, stride, r * (k - 1) // 2, dilation=r, groups=groups, bias=False
            )
            self.add_module(f"dil_conv_{name}", small)
            self.add_module(f"dil_bn_{name}", nn.BatchNorm2d(outputs))

    def forward(self, x):
        y = self.origin_bn(self.lk_origin(x))
        for name in self.names:
            y = y + getattr(self, f"dil_bn_{name}")(getattr(self, f"dil_conv_{name}")(x))
        return y


class QuantizationAware(nn.Module):
    """QARepVGG's: no norm on the 1x1 kernel and the identity, one after the sum; with `pool` the second
    version."""

    def __init__(self, inputs, outputs, size, stride=1, groups=1, pool=False):
        super().__init__()
        self.rbr_dense = conv_bn(inputs, outputs, size, stride, groups)
        self.rbr_1x1 = convolution(inputs, outputs, 1, stride, groups, 0)
        self.same, self.pool, self.size = inputs == outputs and stride == 1, pool, size
        self.bn = nn.BatchNorm2d(outputs)

    def forward(self, x):
        y = self.rbr_dense(x) + self.rbr_1x1(x)
        if self.same:
            y = y + x
            if self.pool:
                y = y + functional.avg_pool2d(x, self.size, 1, self.size // 2)
        return self.bn(y)


class ThreeNorms(nn.Module):
    """RepVGG's."""

    def __init__(self, inputs, outputs, size, stride=1, groups=1):
        super().__init__()
        self.rbr_dense = conv_bn(inputs, outputs, size, stride, groups)
        self.rbr_1x1 = conv_bn(inputs, outputs, 1, stride, groups)
        self.rbr_identity = nn.BatchNorm2d(inputs) if inputs == outputs and stride == 1 else None

    def forward(self, x):
        y = self.rbr_dense(x) + self.rbr_1x1(x)
        return y if self.rbr_identity is None else y + self.rbr_identity(x)


class SeveralCopies(nn.Module):
    """MobileOne's: the kernel several times, a 1x1 beside a larger one, the identity; a norm each."""

    def __init__(self, inputs, outputs, size, stride=1, groups=1, copies=2):
        super().__init__()
        self.rbr_conv = nn.ModuleList(conv_bn(inputs, outputs, size, stride, groups) for _ in range(copies))
        self.rbr_scale = conv_bn(inputs, outputs, 1, stride, groups) if size > 1 else None
        self.rbr_skip = nn.BatchNorm2d(inputs) if inputs == outputs and stride == 1 else None

    def forward(self, x):
        branches = [*self.rbr_conv, self.rbr_scale, self.rbr_skip]
        return sum(branch(x) for branch in branches if branch is not None)


class CheapOperation(nn.Module):
    """RepGhost's: the kernel and, where there is one, the identity; a norm each."""

    def __init__(self, inputs, outputs, size, stride=1, groups=1):
        super().__init__()
        kernel = convolution(inputs, outputs, size, stride, groups, size // 2)
        self.cheap_operation = nn.Sequential(kernel, nn.BatchNorm2d(outputs))
        same = inputs == outputs and stride == 1
        self.fusion_bn = nn.Sequential(*([nn.BatchNorm2d(inputs)] if same else []))

    def forward(self, x):
        y = self.cheap_operation(x)
        return y + self.fusion_bn(x) if len(self.fusion_bn) else y


class SixScales(nn.Module):
    """OREPA's: linear branches, each with a scale, and a norm after their sum. Run branch by branch.

    As the kernel of its RepVGG, `prefix` is another; five branches are left, without the 1x1; and the scales
    have a row more, of no branch, where there is an identity beside them.
    """

    def __init__(self, inputs, outputs, size, stride=1, groups=1, prefix="weight_orepa"):
        super().__init__()
        self.stride, self.groups, self.inputs, self.padding = stride, groups, inputs, size // 2
        self.prefix, whole = prefix, prefix == "weight_orepa"
        each, middle = inputs // groups, inputs if groups <= 4 else 2 * inputs
        shapes = {
            "origin": (outputs, each, size, size),
            "avg_conv": (outputs, each, 1, 1),
            "pfir_conv": (outputs, each, 1, 1),
            "1x1": (outputs, each, 1, 1),
            "1x1_kxk_idconv1": (middle, each, 1, 1),
            "1x1_kxk_conv2": (outputs, middle // groups, size, size),
            "gconv_dw": (8 * inputs, 1, size, size),
            "gconv_pw": (outputs, 8 * each, 1, 1),
        }
        self.branches = [0, 1, 2, 3, 4, 5] if whole else [0, 1, 2, 3, 5]
        if not whole:
            del shapes["1x1"]
        for name, shape in shapes.items():
            self.register_parameter(f"{prefix}_{name}", nn.Parameter(torch.zeros(shape)))
        unused = int(not whole and inputs == outputs and stride == 1)
        self.vector = nn.Parameter(torch.zeros(len(self.branches) + unused, outputs))
        self.bn = nn.BatchNorm2d(outputs)
        average = torch.full((size, size), 1 / size**2, dtype=torch.float64)
        self.register_buffer(f"{prefix}_avg_avg", average)
        self.register_buffer(f"{prefix}_prior", cosines(outputs, size))
        own = torch.zeros(middle, each, 1, 1)
        own[torch.arange(middle), torch.arange(middle) % each] = 1
        self.register_buffer("id_tensor", own)

    def weight(self, name):
        return getattr(self, f"{self.prefix}_{name}")

    def over_the_window(self, x, weight, groups=None):
        return functional.conv2d(x, weight, None, self.stride, self.padding, groups=groups or self.groups)

    def branch(self, index, x):
        match index:
            case 0:
                return self.over_the_window(x, self.weight("origin"))
            case 1:
                return self.over_the_window(x, self.weight("avg_conv") * self.weight("avg_avg"))
            case 2:
                return self.over_the_window(x, self.weight("pfir_conv") * self.weight("prior")[:, None])
            case 3:
                first = self.weight("1x1_kxk_idconv1") + self.id_tensor
                y = functional.conv2d(x, first, groups=self.groups)
                return self.over_the_window(y, self.weight("1x1_kxk_conv2"))
            case 4:
                return functional.conv2d(x, self.weight("1x1"), None, self.stride, groups=self.groups)
        # Row j * groups + g of the last 1x1 kernel gives output j of group g.
        last = self.weight("gconv_pw").unflatten(0, (-1, self.groups)).transpose(0, 1).flatten(0, 1)
        y = self.over_the_window(x, self.weight("gconv_dw"), self.inputs)
        return functional.conv2d(y, last, groups=self.groups)

    def forward(self, x):
        scaled = zip(self.vector, self.branches)
        return self.bn(sum(s.view(-1, 1, 1) * self.branch(index, x) for s, index in scaled))


class ThreeNormsOfSixScales(ThreeNorms):
    """OREPA's RepVGG."""

    def __init__(self, inputs, outputs, size, stride=1, groups=1):
        super().__init__(inputs, outputs, size, stride, groups)
        self.rbr_dense = SixScales(inputs, outputs, size, stride, groups, "weight_rbr")


def cosines(outputs, size):
    """The first half of the channels varies from row to row, the second from column to column."""
    table = torch.zeros(outputs, size, size, dtype=torch.float64)
    for channel in range(outputs):
        across, j = divmod(channel, outputs // 2)
        for tap in range(size):
            along = table[channel].T if across else table[channel]
            along[tap] = math.cos(math.pi * (tap + 0.5) * (j + 1) / size)
    return table


class Deployed(nn.Module):
    """One convolution with a bias, by the name that a code base gives it."""

    def __init__(self, name, inputs, outputs, size, stride=1, groups=1, padding=None, **_):
        super().__init__()
        padding = size // 2 if padding is None else padding
        self.name = name
        self.add_module(name, convolution(inputs, outputs, size, stride, groups, padding, bias=True))

    def forward(self, x):
        return getattr(self, self.name)(x)


class Chain(nn.Module):
    """Blocks with a ReLU after each, pooling and a classifier: `layers.0` ... `fc`."""

    def __init__(self, blocks, width, classes):
        super().__init__()
        self.layers = nn.Sequential(*blocks)
        self.fc = nn.Linear(width, classes)

    def forward(self, x):
        for block in self.layers:
            x = functional.relu(block(x))
        return self.fc(x.mean((2, 3)))
