"""Scales, the result of a search that training uses: for every layer its branches and a vector for each."""

import dataclasses
import json
import logging
import math
import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol, TypeVar, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from repopt_jax import extras, jsontext
from repopt_jax._version import __version__
from repopt_jax.arguments import check_kind, check_path
from repopt_jax.core import law, paths, transfer
from repopt_jax.core.branches import BranchSet
from repopt_jax.core.transfer import Depths

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class ScalesMetadata:
    """Where scales come from. All fields are text or numbers, hence hashable, and are kept in the file."""

    architecture: str = ""
    dataset: str = ""
    config: str = ""
    step: int = 0
    library_version: str = __version__


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerScales:
    """The branches of one layer and a vector (out,) for each; for stacked layers (*stack, out).

    Vectors are float32, or wider: in half precision a scale of 1e-4 has no square.

    The vector of a scaled branch is its constant scale s_b. The vector of the identity is u, the initial
    value of its trainable weight; the identity's scale is 1.
    """

    branches: BranchSet = dataclasses.field(metadata={"static": True})
    vectors: dict[str, jax.Array]


@runtime_checkable
class DeclaresBranches(Protocol):
    """A model that declares which of its kernels are re-parameterized, so that missing layers are found."""

    def branch_sets(self) -> dict[str, BranchSet]:
        """Returns the branches of each re-parameterized kernel by its path."""
        ...


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Scales:
    """Scales of a network by the path of each merged kernel (`stages/1/0/conv/kernel`): a pytree of vectors.

    Attributes:
      entries: by the kernel's path in the network that is trained with them.
      metadata: where they come from.
    """

    entries: dict[str, LayerScales]
    metadata: ScalesMetadata = dataclasses.field(default=ScalesMetadata(), metadata={"static": True})

    @classmethod
    def ones(cls, branch_sets: Mapping[str, BranchSet]) -> "Scales":
        """Returns scales that are all 1, without a search (part of the gain: RepOptimizer paper, table 4)."""
        _check_branch_sets(branch_sets)
        return cls.depth_rule(branch_sets, dict.fromkeys(branch_sets, 0))

    @classmethod
    def depth_rule(cls, branch_sets: Mapping[str, BranchSet], depths: Depths) -> "Scales":
        """Returns the scales of the depth rule, without a search: sqrt(2 / l), or 1 at l = 0, and u = 1.

        l counts the blocks of a stage; the first has l = 0. As in the published code, a hyper-search starts
        from these values. Source: RepOptimizer paper, appendix B.

        Args:
          branch_sets: path of each kernel -> its branches.
          depths: the same paths -> l, an integer; for stacked layers either one l for all of them, or an
            array or nested sequence of the stack's shape with an l for each.

        Raises:
          ValueError: the two mappings have different paths; or an l is negative, not an integer, or of
            another shape than the stack (all are listed).
        """
        counts = _counts(branch_sets, depths)
        return cls({path: _constant(bs, _depth_scale(counts[path])) for path, bs in branch_sets.items()})

    @classmethod
    def from_law(cls, branch_sets: Mapping[str, BranchSet], depths: Depths, Lambda: float) -> "Scales":
        """Returns the depth rule's scales after a search of decay Lambda in which only decay acts.

        The scales are sqrt(2 / l), or 1 at l = 0, as they were, since they are not decayed; u, which is, has
        become exp(-Lambda). It obeys the law of a search (`core.law`), and is the one point on it that needs
        no data: how the gradients share the rest out among the branches only a search tells. In the published
        files, of Lambda = 0.94, late layers of a stage have a u of .42 to .50, where this has .39.

        Args:
          branch_sets, depths: as in `depth_rule`.
          Lambda: weight decay * sum of the learning rates / (1 - momentum) of the search
            (`law.search_lambda`); 0 gives the depth rule.

        Raises:
          ValueError: as `depth_rule`; or a Lambda that is negative or not finite.
        """
        if not 0 <= Lambda < math.inf:
            raise ValueError(f"`Lambda` is {Lambda}: it must be a finite number, at least 0")
        counts, u = _counts(branch_sets, depths), law.identity_by_decay(Lambda)
        metadata = ScalesMetadata(config=f"the depth rule at Lambda {Lambda:g}")
        entries = {path: _constant(bs, _depth_scale(counts[path]), u) for path, bs in branch_sets.items()}
        return cls(entries, metadata)

    @classmethod
    def transfer(
        cls,
        source: "Scales",
        branch_sets: Mapping[str, BranchSet],
        depths: Depths,
        *,
        source_depths: Depths | None = None,
    ) -> "Scales":
        """Returns scales for another network from those of a search: wider, narrower, deeper or shallower.

        Layer i of stage j takes the scales of the source's layer i of stage j; where the source has no such
        layer, layer i of its longest stage, or the last one there. A branch that this layer lacks (an opener
        has no identity) comes from the layer nearest to it in the same stage that has it.

        Channels are resampled with all their vectors along a stage: they are ranked by the first principal
        component of the stage's trajectories, and the target takes evenly spaced ranks, in the order that the
        channels have in the source. So nothing is drawn, equal widths keep every channel, and channels of the
        source that are permuted, in all layers of a stage alike, give the target's scales in another order,
        which is the same network.

        Args:
          source: searched scales.
          branch_sets: the target's branches, by path.
          depths: l of the target's layers, as in `depth_rule`; a stage begins at l = 0 and where l falls.
          source_depths: l of the source's. By default the target's if both have the same paths, else as far
            as branches tell it (`core.transfer.counted_depths`).

        Raises:
          ValueError: as `depth_rule`; scales that do not fit their own branches or are not finite; a source
            without layers; or branches that no layer of the source has, all of them.
        """
        check_scales(source, "source")
        counts = _counts(branch_sets, depths)
        _check_vectors(source, "")
        check_finite(source)
        if not source.entries:
            raise ValueError("`source` has no layers: give the scales of a search")
        own = source.branch_sets
        if source_depths is not None:
            source_counts = _counts(own, source_depths, noun="source_depths")
        elif {p: bs.stack for p, bs in own.items()} == {p: bs.stack for p, bs in branch_sets.items()}:
            source_counts = counts
        else:
            source_counts = transfer.counted_depths(own)
        made = transfer.transferred(own, source.vectors, source_counts, branch_sets, counts)
        entries = {
            path: LayerScales(bs, {name: jnp.asarray(v) for name, v in made[path].items()})
            for path, bs in branch_sets.items()
        }
        name = source.metadata.architecture or "a network without a name"
        metadata = ScalesMetadata(
            dataset=source.metadata.dataset, config=f"transferred from {name}", step=source.metadata.step
        )
        return cls(entries, metadata)

    @property
    def branch_sets(self) -> dict[str, BranchSet]:
        """The branch set of each layer, by path."""
        return {path: entry.branches for path, entry in self.entries.items()}

    @property
    def vectors(self) -> dict[str, dict[str, jax.Array]]:
        """The arrays as plain dicts, as an optimizer's state holds them."""
        return {path: dict(entry.vectors) for path, entry in self.entries.items()}

    def __str__(self) -> str:
        """A line for each layer, with the mean of each branch's vector over its channels (and its stack)."""
        of = f" of {self.metadata.architecture}" if self.metadata.architecture else ""
        lines = [f"scales of {len(self.entries)} layers{of}, means over the channels:"]
        for path, entry in self.entries.items():
            means = (
                f"{name} {float(np.mean(v)):.3g}" if is_concrete(v) else name
                for name, v in entry.vectors.items()
            )
            lines.append(f"  {path}: {', '.join(means)}")
        return "\n".join(lines)

    def channel_means(self) -> "Scales":
        """Replaces every vector by its (signed) mean over the channels, in each layer of a stack.

        This is an ablation: what the search finds beyond one number for each branch is lost (RepOptimizer
        paper, table 4).
        """
        return jax.tree.map(lambda v: jnp.broadcast_to(v.mean(-1, keepdims=True), v.shape), self)

    def rename(self, rules: Mapping[str, str | None]) -> "Scales":
        r"""Returns the scales under other paths, or without some layers, for a network with other paths.

        Example::

            scales.rename({r"head/(.*)": r"heads/0/\1", r"stem/.*": None})

        Args:
          rules: regular expression, matched against whole paths -> the new path, in which \1, \2, ... or
            \g<name> stand for groups, or None to drop the layer. The first rule that matches applies; paths
            that no rule matches are kept, as are order and metadata.

        Raises:
          ValueError: a rule that is not a regular expression or refers to a group that it lacks; a rule that
            applies to no path, because of a typo or because earlier rules take all that it matches; a new
            path with an empty part; several paths that would become one, or of which one would be inside
            another. All are listed.
        """
        renamed = _renamed(self.entries, rules)
        sources: dict[str, list[str]] = {}
        for old, new in renamed.items():
            if new is not None:
                sources.setdefault(new, []).append(old)
        if twice := [f"{new!r} of {', '.join(old)}" for new, old in sources.items() if len(old) > 1]:
            raise ValueError(f"`rules` make one path of several: {'; '.join(twice)}")
        if broken := [f"{new!r} of {old[0]}" for new, old in sources.items() if "" in new.split("/")]:
            raise ValueError(f"`rules` make paths with an empty part: {', '.join(broken)}")
        if covered := paths.below(sources):
            pairs = [f"{p!r} of {sources[p][0]} below {q!r} of {sources[q][0]}" for p, q in covered.items()]
            raise ValueError(f"`rules` make paths of which one is inside another: {'; '.join(pairs)}")
        return Scales({new: self.entries[old] for new, (old,) in sources.items()}, self.metadata)

    def with_metadata(self, **fields: Any) -> "Scales":
        """Returns the same scales with these fields of `metadata` replaced."""
        return Scales(self.entries, dataclasses.replace(self.metadata, **fields))


def save_scales(path: str | os.PathLike[str], scales: Scales) -> None:
    """Writes `scales`, with branch sets and metadata, as an Orbax checkpoint to the directory `path`.

    Raises:
      ValueError: a scale is NaN or infinite.
      FileExistsError: `path` exists.
    """
    check_path("path", path)
    extras.require("orbax", "etils", by="a file of scales")
    from etils import epath
    from orbax.checkpoint import v1 as ocp

    check_finite(scales)
    location = epath.Path(path).absolute()
    if location.exists():
        raise FileExistsError(
            f"{location} exists: scales are not overwritten, give another path or remove it"
        )
    description = {
        "kind": _FILE_KIND,
        "metadata": dataclasses.asdict(scales.metadata),
        "branch_sets": {name: bs.to_json() for name, bs in scales.branch_sets.items()},
    }
    ocp.save(location, _nested(scales), custom_metadata={"repopt_scales": json.dumps(description)})


def load_scales(path: str | os.PathLike[str], model: Any = None) -> Scales:
    """Reads what `save_scales` wrote.

    Args:
      path: the directory.
      model: if given, what the scales must fit, as in `check_fit`.

    Raises:
      FileNotFoundError: `path` does not exist.
      ValueError: `path` holds no scales, or a damaged file; the scales are NaN or infinite; or they do not
        fit `model`, with every missing, extra and misshapen path.
    """
    extras.require("orbax", "etils", by="a file of scales")
    from etils import epath
    from orbax.checkpoint import v1 as ocp

    check_path("path", path)
    location = epath.Path(path).absolute()
    if not location.exists():
        raise FileNotFoundError(f"no scales at {location}")
    foreign = f"{location} is not a scales directory as `save_scales` writes it"
    if not location.is_dir():
        raise ValueError(foreign)
    stored = readable(lambda: ocp.metadata(location), foreign)
    branch_sets, metadata = _described_scales(stored.custom_metadata, location)
    # Before memory is taken: the arrays must be there, and as large as the description says.
    expected = {f"{p}/{name}": bs.vector_shape for p, bs in branch_sets.items() for name in bs.names}
    arrays, _ = paths.named_leaves(stored.metadata)
    found = {path: tuple(getattr(array, "shape", ())) for path, array in arrays.items()}
    if difference := paths.describe_difference(expected, found, noun="vectors"):
        raise ValueError(
            f"{location} is damaged or incomplete: it describes other vectors than it has: {difference}"
        )
    if sum(map(math.prod, expected.values())) > _MOST_SCALES:
        raise ValueError(
            f"{location} is damaged or incomplete: no network has more than {_MOST_SCALES:,} scales"
        )
    # Arrays of NumPy, which become arrays that no device is bound to, as fresh scales are: Orbax's own would
    # not go together with a network that lies on several devices.
    target = paths.nested(
        {
            path: {name: np.zeros(bs.vector_shape, np.float32) for name in bs.names}
            for path, bs in branch_sets.items()
        }
    )
    loaded = readable(lambda: ocp.load(location, target), f"{location} is damaged or incomplete")
    entries = {}
    for name, branches in branch_sets.items():
        entries[name] = LayerScales(branches, {b: jnp.asarray(v) for b, v in paths.at(loaded, name).items()})
    scales = Scales(entries, metadata)
    check_finite(scales, where=f" in {location}")
    if model is not None:
        check_fit(scales, model, where=f" in {location}")
    return scales


def check_scales(scales: Any, name: str = "scales") -> None:
    """Raises TypeError if an argument that must be `Scales` is something else."""
    check_kind(name, scales, Scales, "`Scales`", remedy="`load_scales` reads a file")


def check_fit(scales: Scales, model: Any, *, where: str = "") -> None:
    """Raises ValueError, with every missing, extra and misshapen path, if `scales` do not fit `model`.

    Args:
      scales: the scales.
      model: {path: BranchSet}; or a model that declares its `branch_sets()`; or any pytree of parameters, of
        which the scales may cover a part, so that nothing counts as missing.
      where: text that the message adds after "the scales".
    """
    _check_vectors(scales, where)
    found = {path: entry.branches.kernel for path, entry in scales.entries.items()}
    if isinstance(model, DeclaresBranches):
        model = model.branch_sets()
    if isinstance(model, Mapping) and all(isinstance(v, BranchSet) for v in model.values()):
        expected = {path: bs.kernel for path, bs in model.items()}
        found_names = {
            path: _described(entry.branches)
            for path, entry in scales.entries.items()
            if found[path] == expected.get(path)
        }
        names = {path: _described(model[path]) for path in found_names}
    else:
        leaves, _ = paths.named_leaves(model)
        expected = {path: tuple(leaves[path].shape) for path in found if path in leaves}
        names = found_names = {}
    difference = "; ".join(
        part
        for part in (
            paths.describe_difference(expected, found, noun="layers"),
            paths.describe_difference(names, found_names, noun="branch sets"),
        )
        if part
    )
    if difference:
        of = f" (searched on {scales.metadata.architecture})" if scales.metadata.architecture else ""
        raise ValueError(f"the scales{where}{of} do not fit the model: {difference}")


def check_weights(scales: Scales, weights: Mapping[str, Mapping[str, Any]]) -> None:
    """Raises ValueError, with every path, if `weights` (path -> branch -> w_b) are not the branch tensors of
    `scales`: missing, extra or misshapen ones, which would otherwise fail without a path or be broadcast."""
    expected, found = {}, {}
    for path, branches in scales.branch_sets.items():
        expected |= {f"{path}/{name}": shape for name, shape in branches.shapes().items()}
    for path, tensors in weights.items():
        found |= {f"{path}/{name}": getattr(w, "shape", type(w).__name__) for name, w in tensors.items()}
    if difference := paths.describe_difference(expected, found, noun="branch tensors"):
        raise ValueError(f"`weights` do not fit the scales: {difference}")


def check_finite(scales: Scales, *, where: str = "") -> None:
    """Raises ValueError, with every path, if a scale is NaN or infinite. Traced values are not checked."""
    check_scales(scales)
    bad = [
        f"{path}/{name}"
        for path, entry in scales.entries.items()
        for name, v in entry.vectors.items()
        if is_concrete(v) and not np.isfinite(v).all()
    ]
    if bad:
        raise ValueError(f"the scales{where} hold NaN or infinite values: {', '.join(bad)}")


def check_values(scales: Scales) -> None:
    """Raises ValueError, with every path, if scales are NaN or infinite, or if all scales of a layer are 0:
    its branches could neither contribute to the kernel nor be trained. Traced values are not looked at."""
    check_finite(scales)
    dead = []
    for path, entry in scales.entries.items():
        scaled = [b.name for b in entry.branches.branches if b.has_scale]
        vectors = [entry.vectors[name] for name in scaled if name in entry.vectors]
        shape = entry.branches.vector_shape
        if vectors and all(is_concrete(v) and np.shape(v) == shape for v in vectors):
            alive = np.any([np.any(np.asarray(v), axis=-1) for v in vectors], axis=0)
            dead += [f"{path}{at.tolist() or ''}" for at in np.argwhere(~alive)]
    if dead:
        raise ValueError(
            f"all scales are 0 at {', '.join(dead)}, so these kernels would not be trained: leave the layers "
            "out of the scales, or search them again"
        )


def widened(vectors: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """Returns vectors that were trained in any precision as scales are kept, in float32 or wider."""
    return {name: v.astype(jnp.promote_types(v.dtype, jnp.float32)) for name, v in vectors.items()}


def is_concrete(x: Any) -> bool:
    """Whether x has values: it is neither a tracer nor a `jax.ShapeDtypeStruct`."""
    return not isinstance(x, (Tracer, jax.ShapeDtypeStruct))


def _check_vectors(scales: Scales, where: str) -> None:
    """Raises ValueError if vectors are missing or misshapen, which would otherwise be broadcast silently."""
    check_scales(scales)
    expected, found = {}, {}
    for path, entry in scales.entries.items():
        expected |= {f"{path}/{name}": entry.branches.vector_shape for name in entry.branches.names}
        found |= {f"{path}/{name}": tuple(jnp.shape(v)) for name, v in entry.vectors.items()}
    if difference := paths.describe_difference(expected, found, noun="vectors"):
        raise ValueError(f"the scales{where} do not fit their own branches: {difference}")


def _renamed(names: Iterable[str], rules: Mapping[str, str | None]) -> dict[str, str | None]:
    """Returns each name's new one by the first rule that fully matches it, or the same if none does."""
    compiled = {rule: paths.compiled(rule, "rules") for rule in rules}
    renamed: dict[str, str | None] = {}
    deciding, matching = set(), set()
    for name in names:
        matches = {rule: match for rule, pattern in compiled.items() if (match := pattern.fullmatch(name))}
        matching |= matches.keys()
        rule = next(iter(matches), None)
        if rule is None:
            renamed[name] = name
            continue
        deciding.add(rule)
        replacement = rules[rule]
        renamed[name] = None if replacement is None else paths.expanded(matches[rule], replacement, "rules")
    if unused := [
        f"{rule!r} (earlier rules take what it matches)" if rule in matching else repr(rule)
        for rule in rules
        if rule not in deciding
    ]:
        raise ValueError(f"`rules` that match none of the {len(renamed)} paths: {', '.join(unused)}")
    return renamed


_FILE_KIND = "repopt_jax scales, format 1"
_MOST_SCALES = 2**26  # 256 MB of numbers


def _described_scales(stored: Any, location: Any) -> tuple[dict[str, BranchSet], ScalesMetadata]:
    """Returns the branch sets and the metadata that a file of scales holds beside its arrays.

    Raises:
      ValueError: it is none of ours, or its description was changed; the message names the file.
    """
    text = stored.get("repopt_scales") if isinstance(stored, dict) else None
    where = f"the description in {location}"
    description = jsontext.parse(text, where) if isinstance(text, str) else {}
    if not isinstance(description, dict) or description.get("kind") != _FILE_KIND:
        raise ValueError(f"{location} is an Orbax checkpoint, but not one of scales")
    sets, fields = description.get("branch_sets"), description.get("metadata")
    kinds = {field.name: type(field.default) for field in dataclasses.fields(ScalesMetadata)}
    if not isinstance(sets, dict) or not all(isinstance(bs, str) for bs in sets.values()):
        raise ValueError(f"{where} is damaged: it has no texts of branch sets")
    if not isinstance(fields, dict) or {name: type(v) for name, v in fields.items()} != kinds:
        expected = ", ".join(f"{name} ({kind.__name__})" for name, kind in kinds.items())
        raise ValueError(f"{where} is damaged: its metadata must be {expected}")
    branch_sets = {}
    for path, bs in sets.items():
        try:
            if "" in path.split("/"):
                raise ValueError("its path has an empty part")
            branch_sets[path] = BranchSet.from_json(bs)
        except ValueError as error:
            raise ValueError(f"{where} is damaged at {path!r}: {error}") from error
    return branch_sets, ScalesMetadata(**fields)


def readable(read: Callable[[], T], complaint: str) -> T:
    """Returns read(), with one sentence in place of Orbax's long errors for foreign and damaged files, and of
    what it logs of them.

    Raises:
      PermissionError: as read().
      ValueError: read() has failed; `complaint` is the beginning of the message.
    """
    log = logging.getLogger("absl")
    log.addFilter(_is_no_message)
    try:
        return read()
    except PermissionError:
        raise
    except Exception as error:
        raise ValueError(f"{complaint}: Orbax cannot read it ({type(error).__name__})") from error
    finally:
        log.removeFilter(_is_no_message)


def _is_no_message(record: logging.LogRecord) -> bool:
    return False


def _described(branches: BranchSet) -> tuple[str | int, ...]:
    """Returns what two sets for kernels of one shape must have in common, for messages."""
    stack = (f"stack {branches.stack}",) if branches.stacked else ()
    return ("+".join(branches.names), branches.groups, *stack)


def _check_branch_sets(branch_sets: Any) -> None:
    if not isinstance(branch_sets, Mapping) or not all(
        isinstance(v, BranchSet) for v in branch_sets.values()
    ):
        raise TypeError(
            f"`branch_sets` is of type {type(branch_sets).__name__}: it must be a mapping of the kernels' "
            "paths to `BranchSet`, such as `find_branches(model)`"
        )


def _counts(
    branch_sets: Mapping[str, BranchSet], depths: Depths, *, noun: str = "depths"
) -> dict[str, np.ndarray]:
    """Returns `depths` as arrays, by the paths of `branch_sets`.

    Raises:
      ValueError: other paths, or an l that is none, all listed.
    """
    _check_branch_sets(branch_sets)
    if difference := paths.describe_difference(
        dict.fromkeys(branch_sets, ""), dict.fromkeys(depths, ""), noun=f"paths in `{noun}`"
    ):
        raise ValueError(f"`branch_sets` and `{noun}` must have the same paths: {difference}")
    counts = {path: np.asarray(depths[path]) for path in branch_sets}
    if bad := [
        f"{path} (stack {bs.stack}): {depths[path]!r}"
        for path, bs in branch_sets.items()
        if counts[path].shape not in ((), bs.stack) or not _are_counts(counts[path])
    ]:
        raise ValueError(
            f"`{noun}` must hold integers >= 0, one for each path or, where layers are stacked, an array "
            f"of the stack's shape, not {'; '.join(bad)}"
        )
    return counts


def _are_counts(depth: np.ndarray) -> bool:
    return np.issubdtype(depth.dtype, np.integer) and bool((depth >= 0).all())


def _depth_scale(depth: np.ndarray) -> np.ndarray:
    return np.where(depth > 0, np.sqrt(2 / np.maximum(depth, 1)), 1.0)


def _constant(branches: BranchSet, s: np.ndarray, u: float = 1.0) -> LayerScales:
    """Returns s, one number or one for each layer of the stack, as scales of a layer, and u."""
    vectors = {}
    for b in branches.branches:
        values = np.asarray(s if b.has_scale else u, np.float32)[..., None]
        vectors[b.name] = jnp.broadcast_to(values, branches.vector_shape)
    return LayerScales(branches, vectors)


def _nested(scales: Scales) -> dict[str, Any]:
    """Returns the vectors as nested dicts, because Orbax stores keys as file names."""
    return paths.nested(scales.vectors)
