"""Reads the scales of PyTorch searches as `Scales`: `load_torch_scales`.

The published code keeps them under these names; here they belong to the re-parameterized kernel's path.

    RepOpt-VGG       stage0, stageN.i       .scale_conv, .scale_1x1, .scale_identity
                     stages/N/i/conv/kernel
    RepOpt-GhostNet  blocks.A.b.ghost1      .cheap_operation.1, .fusion_scale
                     stages/a/b/ghost1/cheap/conv/kernel, a = A + 1
    YOLOv6, others   any.module             .scale_conv, .scale_1x1, .scale_identity
                     any/module/conv/kernel

With `models.EfficientRep` as the model, the blocks of YOLOv6's backbone are those of its stages, N = s + 1:

    backbone.stem                   stages/0/0/conv/kernel
    backbone.ERBlock_N.0            stages/s/0/conv/kernel
    backbone.ERBlock_N.1.conv1      stages/s/1/conv/kernel
    backbone.ERBlock_N.1.block.j    stages/s/(2 + j)/conv/kernel

The blocks of its neck, RepPAN, are left out then, because no network here has such a neck; a log entry names
them. For a network of your own that has one, give that as the model: its paths are those of the file.

Each name is followed by `.weight`, a vector with one entry for each output channel. That of the identity is
the searched u, the initial value of its trainable weight.
"""

import dataclasses
import logging
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from repopt_jax.arguments import check_path
from repopt_jax.core import paths
from repopt_jax.core.branches import Branch, BranchSet, Identity, Kernel, Shape
from repopt_jax.core.published import repopt
from repopt_jax.core.scales import (
    DeclaresBranches,
    LayerScales,
    Scales,
    ScalesMetadata,
    check_finite,
    check_fit,
)
from repopt_jax.core.structure import Geometry
from repopt_jax.interop.files import read_tensors
from repopt_jax.models import GHOST_VARIANTS, VGG_VARIANTS
from repopt_jax.models.efficientrep import EfficientRep

_log = logging.getLogger(__name__)


def load_torch_scales(path: str | os.PathLike[str], model: Any = None, *, key: str | None = None) -> Scales:
    """Reads the scales of a hyper-search that was run in PyTorch, as float32.

    The file is one of the authors' scale files; or a checkpoint of the whole search network of RepOpt-VGG,
    RepOpt-GhostNet or a YOLOv6 detector (also as a pickled module), of which only the scales are taken. A
    scale file holds vectors but no shapes of kernels. These are taken from `model`, or else from the
    architecture: RepOpt-VGG's kernels are 3x3 and map the previous block's channels, or 3 in the first block,
    to the block's own; RepOpt-GhostNet's are 3x3 and depthwise.

    Args:
      path: a file that `read_tensors` reads.
      model: what the scales must fit, as in `check_fit`: a model that declares its `branch_sets()`,
        {path: BranchSet}, or any pytree of parameters. With an `EfficientRep`, those of YOLOv6's backbone.
      key: the entry of a checkpoint that holds the network, as in `read_tensors`.

    Returns:
      Scales whose metadata name the file, and the architecture if the blocks are those of a known variant.

    Raises:
      FileNotFoundError: no such file.
      ValueError: the file holds no scales; blocks with missing or misshapen vectors, all listed; NaN or
        infinite values; blocks of unknown kernels that `model` does not have; or scales that do not fit
        `model`, with every missing, extra and misshapen layer.
    """
    check_path("path", path)
    file = Path(path)
    tensors = read_tensors(file, key=key)
    blocks = _blocks(tensors)
    if not blocks:
        shown = ", ".join(list(tensors)[:3])
        raise ValueError(
            f"{file} holds no scales: no tensor in it is named *.scale_conv.weight or *.fusion_scale.weight "
            f"(it holds {shown}{' ...' if len(tensors) > 3 else ''}); give the checkpoint of a hyper-search"
        )
    _check_vectors(blocks, file)
    if isinstance(model, EfficientRep):
        blocks = _of_backbone(blocks, file)
    declared, kernels = _known(model, [block.path for block in blocks])
    if not declared:
        _check_no_gaps(blocks, file)
    branch_sets = _branch_sets(blocks, declared, kernels, file)
    metadata = ScalesMetadata(_architecture(branch_sets), config=file.name)
    scales = Scales({block.path: _layer(block, branch_sets[block.path]) for block in blocks}, metadata)
    check_finite(scales, where=f" in {file}")
    if model is not None:
        check_fit(scales, model, where=f" in {file}")
    return scales


@dataclasses.dataclass
class _Block:
    """A block of the file. `vectors` and `keys` are by role, in the order conv, 1x1, identity."""

    name: str
    ghost: bool
    keys: dict[str, str]
    vectors: dict[str, np.ndarray]
    weight: np.ndarray | None  # the kernel of the block's convolution, (out, in/groups, *spatial)
    backbone: bool = False  # whether it is one of YOLOv6's backbone and takes its place in `EfficientRep`

    @property
    def place(self) -> tuple[int, int] | None:
        """Stage and index of a block of RepOpt-VGG or, in its place, of YOLOv6's backbone."""
        if self.backbone and (found := _ER_BLOCK.fullmatch(self.name)):
            index = 0 if found[2] is None else 1 if found[3] is None else 2 + int(found[3])
            return (int(found[1]) - 1 if found[1] else 0), index
        if found := re.fullmatch(r"stage(?:(0)|(\d+)\.(\d+))", self.name):
            return int(found[1] or found[2]), int(found[3] or 0)
        return None

    @property
    def path(self) -> str:
        if self.place:
            return "stages/{}/{}/conv/kernel".format(*self.place)
        if found := re.fullmatch(r"blocks\.(\d+)\.(\d+)\.(ghost\d)", self.name):
            return f"stages/{int(found[1]) + 1}/{found[2]}/{found[3]}/cheap/conv/kernel"
        return f"{self.name.replace('.', '/')}/{'cheap/conv' if self.ghost else 'conv'}/kernel".lstrip("/")

    @property
    def out(self) -> int:
        """Output channels."""
        return next(iter(self.vectors.values())).size if self.weight is None else self.weight.shape[0]


# The role of each tensor of a block. `cheap_operation.1` is a scale in ghost modules of the search, but a
# batch norm, with a running mean, in those of the RepGhost baseline.
_VGG_ROLES = {"scale_conv": "conv", "scale_1x1": "1x1", "scale_identity": "identity"}
_GHOST_ROLES = {"cheap_operation.1": "conv", "fusion_scale": "identity"}
_REQUIRED = {False: ("conv", "1x1"), True: ("conv", "identity")}


def _blocks(tensors: Mapping[str, np.ndarray]) -> list[_Block]:
    """Returns the blocks that have scales, in the order of the network."""
    names = dict.fromkeys(
        (found[1] or "", bool(found[3]))
        for tensor in tensors
        if (found := _SCALE.fullmatch(tensor)) and f"{found[1]}.cheap_operation.1.running_mean" not in tensors
    )
    blocks = []
    for name, ghost in sorted(names, key=lambda entry: paths.natural_order(entry[0])):
        prefix = f"{name}." if name else ""
        keys = {
            role: f"{prefix}{layer}.weight" for layer, role in (_GHOST_ROLES if ghost else _VGG_ROLES).items()
        }
        vectors = {role: tensors[k] for role, k in keys.items() if k in tensors}
        weight = tensors.get(f"{prefix}cheap_operation.0.weight" if ghost else f"{prefix}conv.weight")
        is_kernel = weight is not None and weight.ndim > 2
        blocks.append(_Block(name, ghost, keys, vectors, weight if is_kernel else None))
    return blocks


_SCALE = re.compile(
    r"(?:(.+)\.)?(?:(scale_conv|scale_1x1|scale_identity)|(cheap_operation\.1|fusion_scale))\.weight"
)


_ER_BLOCK = re.compile(r"backbone\.(?:stem|ERBlock_(\d+)\.(?:0|(1)\.(?:conv1|block\.(\d+))))")


def _of_backbone(blocks: list[_Block], file: Path) -> list[_Block]:
    """Returns the blocks of YOLOv6's backbone at their places; all blocks of a file that has none."""
    own = [block for block in blocks if _ER_BLOCK.fullmatch(block.name)]
    if not own:
        return blocks
    if left := [block.name for block in blocks if block not in own]:
        _log.info("%s: the scales of %s are left out, which are not the backbone's", file, ", ".join(left))
    placed = [dataclasses.replace(block, backbone=True) for block in own]
    return sorted(placed, key=lambda block: block.place or (0, 0))


def _check_vectors(blocks: list[_Block], file: Path) -> None:
    expected, found = {}, {}
    for block in blocks:
        shapes = {block.keys[role]: vector.shape for role, vector in block.vectors.items()}
        needed = dict.fromkeys(block.keys[role] for role in _REQUIRED[block.ghost])
        expected |= dict.fromkeys({**needed, **shapes}, (block.out,))
        found |= shapes
    if difference := paths.describe_difference(expected, found, noun="scales"):
        raise ValueError(f"{file} is no complete file of scales: {difference}")


def _check_no_gaps(blocks: list[_Block], file: Path) -> None:
    """Raises ValueError if the numbering shows that a RepOpt-VGG file lacks a block."""
    found = [block.place for block in blocks if block.place]
    if len(found) < len(blocks):
        return
    stages = range(max(stage for stage, _ in found) + 1)
    blocks_of = {stage: 1 + max((i for s, i in found if s == stage), default=0) for stage in stages}
    missing = [(s, i) for s, count in blocks_of.items() for i in range(count) if (s, i) not in found]
    if missing:
        listed = ", ".join(f"stage{s}.{i}" if s else "stage0" for s, i in missing)
        raise ValueError(f"{file} is no complete file of scales: {len(missing)} missing blocks: {listed}")


def _known(model: Any, names: list[str]) -> tuple[dict[str, BranchSet], dict[str, Shape]]:
    """Returns the branch sets that the model declares, and its kernels' shapes (*spatial, in/groups, out)."""
    if isinstance(model, DeclaresBranches):
        model = model.branch_sets()
    if isinstance(model, Mapping) and model and all(isinstance(bs, BranchSet) for bs in model.values()):
        return dict(model), {path: bs.canonical for path, bs in model.items()}
    leaves, _ = paths.named_leaves(model)
    return {}, {path: tuple(leaves[path].shape) for path in names if path in leaves}


def _branch_sets(
    blocks: list[_Block], declared: Mapping[str, BranchSet], kernels: Mapping[str, Shape], file: Path
) -> dict[str, BranchSet]:
    """Returns the branches of every block: of the file's kernel, the model's, or the architecture's rule."""
    sets: dict[str, BranchSet] = {}
    unknown, wrong = [], []
    inputs = 3  # channels of the images
    for block in blocks:
        kernel = _kernel(block, kernels.get(block.path), inputs)
        inputs = block.out
        if kernel is None:
            unknown.append(block)
            continue
        like = declared.get(block.path)
        groups, layout = 1, "...io" if like is None else like.layout
        if like is not None and kernels[block.path] == kernel:
            groups = like.groups
        elif "identity" in block.vectors and (block.weight is not None or block.ghost):
            groups = max(block.out // kernel[-2], 1)
        branches: list[Branch] = [Kernel(kernel[:-2])]
        branches += [Kernel((1,) * (len(kernel) - 2))] if "1x1" in block.vectors else []
        branches += [Identity()] if "identity" in block.vectors else []
        try:
            ordered = kernel if layout == "...io" else (kernel[-1], kernel[-2], *kernel[:-2])
            sets[block.path] = BranchSet(ordered, tuple(branches), groups, layout)
        except ValueError as error:
            wrong.append(f"{block.name}: {error}")
    if wrong:
        raise ValueError(f"{file} holds scales that fit no network: {'; '.join(wrong)}")
    if unknown:
        expected = {path: f"({kernel[-1]},)" for path, kernel in kernels.items()}
        found = {block.path: f"({block.out},)" for block in blocks}
        difference = paths.describe_difference(expected, found, noun="layers") if kernels else ""
        raise ValueError(
            f"{file} holds scales but no kernels of {', '.join(block.path for block in unknown)}: give a "
            f"`model` whose kernels have these paths{f' ({difference})' if difference else ''}"
        )
    return sets


def _kernel(block: _Block, known: Shape | None, inputs: int) -> Shape | None:
    if block.weight is not None:
        out, per_group, *spatial = block.weight.shape
        return (*spatial, per_group, out)
    if known is not None and known[-1] == block.out:
        return known
    if block.ghost:
        return Geometry((3, 3), block.out, block.out, block.out).kernel
    return (3, 3, inputs, block.out) if block.place else None


def _layer(block: _Block, branches: BranchSet) -> LayerScales:
    # Squares of small scales underflow in half precision, so the vectors are widened first.
    vectors = [jnp.asarray(vector.astype(np.float32)) for vector in block.vectors.values()]
    return LayerScales(branches, dict(zip(branches.names, vectors)))


def _architecture(branch_sets: Mapping[str, BranchSet]) -> str:
    """Returns the name of the variant whose search has these branches, or ""."""
    first = branch_sets.get("stages/0/0/conv/kernel")
    in_channels = 3 if first is None else first.canonical[-2] * first.groups
    for variant in (*VGG_VARIANTS.values(), *GHOST_VARIANTS.values()):
        layers = variant.layers(in_channels)
        if set(layers) == set(branch_sets) and all(
            spec.structures.get("search", repopt)(spec.geometry).branch_set() == branch_sets[path]
            for path, spec in layers.items()
        ):
            return variant.architecture
    return ""
