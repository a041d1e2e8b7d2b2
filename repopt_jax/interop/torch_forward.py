"""Runs a PyTorch state dict in PyTorch, without the class that it came from.

The keys determine the computation: which convolutions, normalisations and scales a block has, and hence which
are summed. Only strides are not in a state dict. `repopt convert` compares the result with our forward pass,
so this module shares nothing with it: no module, no convolution, no names. PyTorch is imported at first use.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from repopt_jax.core.paths import natural_order

# The branches that are summed in a block, each a sequence of layers of which those that the block has are
# applied; then the layer after the sum, the two layers of squeeze-and-excitation, and whether that comes
# before the ReLU.
_GRAMMARS: dict[str, tuple[tuple[tuple[str, ...], ...], str, tuple[str, str], bool]] = {
    "repvgg": (
        (
            ("rbr_dense.conv", "rbr_dense.bn"),
            ("rbr_1x1.conv", "rbr_1x1.bn"),
            ("rbr_identity",),
            ("rbr_reparam",),
        ),
        "",
        ("se.down", "se.up"),
        True,
    ),
    "repopt": (
        (
            ("conv", "scale_conv"),
            ("conv_3x3", "bn_3x3"),
            ("conv_1x1", "bn_1x1", "scale_1x1"),
            ("scale_identity",),
            ("bn_identity",),
        ),
        "bn",
        ("post_se.down", "post_se.up"),
        False,
    ),
    "mobileone": (
        (
            *((f"rbr_conv.{j}.conv", f"rbr_conv.{j}.bn") for j in range(16)),
            ("rbr_scale.conv", "rbr_scale.bn"),
            ("rbr_skip",),
            ("reparam_conv",),
        ),
        "",
        ("se.reduce", "se.expand"),
        True,
    ),
    "timm": (
        (
            ("conv_kxk.conv", "conv_kxk.bn"),
            *((f"conv_kxk.{j}.conv", f"conv_kxk.{j}.bn") for j in range(16)),
            ("conv_1x1.conv", "conv_1x1.bn"),
            ("conv_scale.conv", "conv_scale.bn"),
            ("identity",),
            ("reparam_conv",),
        ),
        "",
        ("attn.fc1", "attn.fc2"),
        True,
    ),
}


def torch_logits(
    tensors: Mapping[str, np.ndarray],
    images: np.ndarray,
    *,
    scheme: str,
    strides: Sequence[int] = (),
    eps: float = 1e-5,
) -> np.ndarray:
    """Computes the logits of a state dict's network in PyTorch, in evaluation mode.

    Args:
      tensors: the state dict; its dtype is that of the computation.
      images: (batch, height, width, channels).
      scheme: the scheme of the keys: "repvgg", "repopt", "mobileone", "repghost" or "timm".
      strides: strides of the blocks in order; not needed for a GhostNet, whose keys determine them.
      eps: epsilon of the batch norms.

    Returns:
      (batch, classes).

    Raises:
      ModuleNotFoundError: PyTorch is not installed.
      ValueError: the number of blocks is not that of `strides`, or an unknown scheme.
    """
    import torch

    run = _Run({key: torch.from_numpy(np.array(value)) for key, value in tensors.items()}, eps)
    x = torch.from_numpy(np.array(images.transpose(0, 3, 1, 2))).to(next(iter(run.tensors.values())).dtype)
    with torch.no_grad():
        if "conv_stem.weight" in tensors:
            return _ghost(run, x).numpy()
        if scheme not in _GRAMMARS:
            raise ValueError(f"`scheme` is {scheme!r}: it must be one of {', '.join(_GRAMMARS)}, repghost")
        places = r"(stem|stage0|stage\d+\.\d+|stages\.\d+\.\d+)\."
        blocks = sorted({m[1] for key in tensors if (m := re.match(places, key))}, key=_block_order)
        if len(blocks) != len(strides):
            raise ValueError(f"`strides` has {len(strides)} entries and the state dict {len(blocks)} blocks")
        for block, stride in zip(blocks, strides):
            x = _sum_block(run, f"{block}.", x, stride, scheme)
        return run.dense(("head.fc" if scheme == "timm" else "linear"), x.mean((2, 3))).numpy()


class _Run:
    """PyTorch's layers by the keys of a state dict."""

    def __init__(self, tensors: Mapping[str, Any], eps: float):
        self.tensors = tensors
        self.eps = eps

    def has(self, name: str) -> bool:
        return f"{name}.weight" in self.tensors

    def __call__(self, name: str, x: Any, *, stride: int = 1) -> Any:
        """Applies the layer of that name: a batch norm if it has statistics, else a convolution or a scale.

        A convolution has a weight of rank 4, is padded by half its size, and its weight's input channels
        determine the number of groups.
        """
        from torch.nn import functional

        weight, bias = self.tensors[f"{name}.weight"], self.tensors.get(f"{name}.bias")
        if f"{name}.running_mean" in self.tensors:
            mean, var = self.tensors[f"{name}.running_mean"], self.tensors[f"{name}.running_var"]
            return functional.batch_norm(x, mean, var, weight, bias, eps=self.eps)
        if weight.ndim == 1:
            return x * weight[:, None, None]
        padding = (weight.shape[2] // 2, weight.shape[3] // 2)
        groups = x.shape[1] // weight.shape[1]
        return functional.conv2d(x, weight, bias, stride, padding, groups=groups)

    def dense(self, name: str, x: Any) -> Any:
        return x @ self.tensors[f"{name}.weight"].T + self.tensors[f"{name}.bias"]

    def excite(self, down: str, up: str, x: Any, *, hard: bool = False) -> Any:
        """Applies squeeze-and-excitation if the state dict has it."""
        from torch.nn import functional

        if not self.has(down):
            return x
        z = self(up, self(down, x.mean((2, 3), keepdim=True)).relu())
        return x * (functional.relu6(z + 3) / 6 if hard else z.sigmoid())


def _sum_block(run: _Run, prefix: str, x: Any, stride: int, scheme: str) -> Any:
    chains, after, (down, up), se_first = _GRAMMARS[scheme]
    outputs = []
    for chain in chains:
        layers = [prefix + name for name in chain if run.has(prefix + name)]
        y = x
        for layer in layers:
            y = run(layer, y, stride=stride)
        if layers:
            outputs.append(y)
    y = sum(outputs[1:], start=outputs[0])
    if after and run.has(prefix + after):
        y = run(prefix + after, y)
    y = run.excite(prefix + down, prefix + up, y).relu() if se_first else y.relu()
    return y if se_first else run.excite(prefix + down, prefix + up, y)


def _ghost(run: _Run, x: Any) -> Any:
    x = run("bn1", run("conv_stem", x, stride=2)).relu()
    found = {m[1] for key in run.tensors if (m := re.match(r"(blocks\.\d+\.\d+)\.", key))}
    *blocks, last = sorted(found, key=natural_order)
    for block in blocks:
        stride = 2 if run.has(f"{block}.conv_dw") else 1
        y = _ghost_module(run, f"{block}.ghost1", x).relu()
        if stride == 2:
            y = run(f"{block}.bn_dw", run(f"{block}.conv_dw", y, stride=2))
        y = run.excite(f"{block}.se.conv_reduce", f"{block}.se.conv_expand", y, hard=True)
        y = _ghost_module(run, f"{block}.ghost2", y)
        if run.has(f"{block}.shortcut.0"):
            x = run(f"{block}.shortcut.0", x, stride=stride)
            for i in (1, 2, 3):
                x = run(f"{block}.shortcut.{i}", x)
        x = y + x
    x = run(f"{last}.bn1", run(f"{last}.conv", x)).relu()
    x = run("conv_head", x.mean((2, 3), keepdim=True)).relu()
    return run.dense("classifier", x[:, :, 0, 0])


def _ghost_module(run: _Run, name: str, x: Any) -> Any:
    x = run(f"{name}.primary_conv.1", run(f"{name}.primary_conv.0", x))
    x = x.relu() if name.endswith("ghost1") else x
    branches = (
        ("cheap_operation",),
        ("cheap_operation.0", "cheap_operation.1"),
        ("fusion_bn",),
        ("fusion_bn.0",),
        ("fusion_scale",),
    )
    total = None
    for chain in branches:
        layers = [f"{name}.{layer}" for layer in chain if run.has(f"{name}.{layer}")]
        y = x
        for layer in layers:
            y = run(layer, y)
        if layers:
            total = y if total is None else total + y
    return run(f"{name}.final_bn", total) if run.has(f"{name}.final_bn") else total


def _block_order(prefix: str) -> tuple[bool, list]:
    """Blocks in the network's order: the stem first, then by their numbers."""
    return prefix != "stem", natural_order(prefix)
