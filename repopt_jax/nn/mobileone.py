"""MobileOne's block: several normalised copies of one convolution, a 1x1 branch and an identity branch.

Source: MobileOne (arXiv 2206.04040), section 3.3; published code read for facts.
"""

from typing import Any

import jax
from flax import nnx

from repopt_jax.nn.blocks import ConvNorm, SqueezeExcite, activate, batch_norm, conv, normed_branches


class MobileOneBlock(nnx.Module):
    """relu(se(sum_j bn(conv_kxk_j(x)) + bn(conv1x1(x)) + bn(x))): (batch, h, w, in) -> (batch, h', w', out).

    The 1x1 branch is there for kernels larger than 1x1, the identity where width and resolution stay. All
    branches deploy to one convolution.

    Args:
      inputs: channels of x.
      outputs: channels of the result.
      size: side of the kernel, odd; padding is size // 2.
      stride: of every branch.
      groups: of every convolution; `inputs` for a depthwise block.
      copies: how many normalised kxk convolutions are summed.
      se: squeeze-and-excitation before the ReLU, or None.
      dtype: computation dtype; parameters are float32.
      rngs: `nnx.Rngs`.

    Raises:
      ValueError: fewer than one copy.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        size: int,
        *,
        stride: int = 1,
        groups: int = 1,
        copies: int = 1,
        se: SqueezeExcite | None = None,
        dtype: Any = None,
        rngs: nnx.Rngs,
    ):
        if copies < 1:
            raise ValueError(f"`copies` is {copies}: a block has at least one convolution")

        def conv_norm(size: int) -> ConvNorm:
            layer = conv(inputs, outputs, size, stride=stride, groups=groups, dtype=dtype, rngs=rngs)
            return ConvNorm(layer, batch_norm(outputs, dtype=dtype, rngs=rngs))

        # What the deployed kernel is merged from; it also says which branches there are.
        has_identity = stride == 1 and inputs == outputs
        self.branches = normed_branches(inputs, outputs, size, groups, has_identity)
        self.conv_kxk = nnx.List([conv_norm(size) for _ in range(copies)])
        self.conv_1x1 = nnx.data(conv_norm(1) if size > 1 else None)
        self.bn_identity = nnx.data(batch_norm(outputs, dtype=dtype, rngs=rngs) if has_identity else None)
        self.se = nnx.data(se)

    def __call__(self, x: jax.Array) -> jax.Array:
        parts = [layer(x) for layer in self.conv_kxk]
        if self.conv_1x1 is not None:
            parts.append(self.conv_1x1(x))
        if self.bn_identity is not None:
            parts.append(self.bn_identity(x))
        return activate(sum(parts[1:], start=parts[0]), self.se, se_first=True)
