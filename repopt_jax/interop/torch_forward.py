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
      scheme: the scheme of the keys: "repvgg", "repopt", "mobileone", "repghost", "repmlp" or "timm".
      strides: strides of the blocks in order; not needed for a GhostNet or a RepMLPNet, whose keys and shapes
        determine them.
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
        if "conv_embedding.conv.weight" in tensors:
            return _repmlp(run, x).numpy()
        if scheme not in _GRAMMARS:
            raise ValueError(
                f"`scheme` is {scheme!r}: it must be one of {', '.join(_GRAMMARS)}, repghost, repmlp"
            )
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


def _repmlp(run: _Run, x: Any) -> Any:
    from torch.nn import functional

    places = r"(conv_embedding|stages\.\d+\.\d+|embeds\.\d+)\."
    blocks = {m[1] for key in run.tensors if (m := re.match(places, key))}
    for block in sorted(blocks, key=_stage_order):
        if not block.startswith("stages"):
            weight = run.tensors[f"{block}.conv.weight"]
            x = run(f"{block}.bn", functional.conv2d(x, weight, stride=tuple(weight.shape[2:]))).relu()
            continue
        x = x + _mixer(run, f"{block}.repmlp_block", run(f"{block}.prebn1", x))
        ffn, y = f"{block}.ffn_block", run(f"{block}.prebn2", x)
        y = functional.gelu(run(f"{ffn}.ffn_fc1.bn", run(f"{ffn}.ffn_fc1.conv", y)))
        x = x + run(f"{ffn}.ffn_fc2.bn", run(f"{ffn}.ffn_fc2.conv", y))
    return run.dense("head", run("head_norm", x).mean((2, 3)))


def _mixer(run: _Run, name: str, x: Any) -> Any:
    """A RepMLP block: every tile of the map goes through `fc3`, whose groups are for channels in turn."""
    gate = run(f"{name}.gp.fc2", run(f"{name}.gp.fc1", x.mean((2, 3), keepdim=True)).relu()).sigmoid()
    outputs, positions = run.tensors[f"{name}.fc3.weight"].shape[:2]
    side, sets = round(positions**0.5), outputs // positions
    batch, channels, height, width = x.shape
    shape = (batch, channels // sets, sets, height // side, side, width // side, side)
    rows = x.reshape(shape).permute(0, 1, 3, 5, 2, 4, 6)
    y = run(f"{name}.fc3", rows.reshape(-1, outputs, 1, 1)).reshape(-1, sets, side, side)
    y = run(f"{name}.fc3_bn", y) if run.has(f"{name}.fc3_bn") else y
    for size in (1, 3):
        if run.has(f"{name}.repconv{size}.conv"):
            inside = run(f"{name}.repconv{size}.conv", rows.reshape(-1, sets, side, side))
            y = y + run(f"{name}.repconv{size}.bn", inside)
    return y.reshape(rows.shape).permute(0, 1, 4, 2, 5, 3, 6).reshape(x.shape) * gate


def _stage_order(block: str) -> tuple[int, int]:
    """A RepMLPNet's blocks in order: the embedding, then each stage and what follows it."""
    if block.startswith("stages"):
        stage, unit = map(int, block.split(".")[1:])
        return stage, unit
    return (-1, 0) if block == "conv_embedding" else (int(block.split(".")[1]), 10**6)


def _block_order(prefix: str) -> tuple[bool, list]:
    """Blocks in the network's order: the stem first, then by their numbers."""
    return prefix != "stem", natural_order(prefix)
