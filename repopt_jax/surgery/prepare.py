"""The ways of training a network, and the preparation of a plain network for one of them."""

import dataclasses
import enum
from typing import TYPE_CHECKING, Any

from flax import nnx

from repopt_jax.arguments import check_kind
from repopt_jax.core.published import STRUCTURES
from repopt_jax.core.scales import Scales
from repopt_jax.hints import did_you_mean
from repopt_jax.nn.rngs import check_rngs
from repopt_jax.surgery.choose import Options
from repopt_jax.surgery.flow import Example
from repopt_jax.surgery.layers import Branches, Select, find_branches
from repopt_jax.surgery.reinitialize import reinitialize, with_kernels
from repopt_jax.surgery.search import to_search
from repopt_jax.surgery.structures import to_repvgg, to_structure
from repopt_jax.surgery.trained import Keep, check_keep


class Mode(enum.StrEnum):
    """How a network is trained.

    PLAIN: the network as it is. SEARCH: the hyper-search, in which every selected layer is a sum of branches
    with trainable scales. REPOPT: RepOptimizer, the plain network re-initialised, with scales in the
    optimizer. ONLINE: the network of the search, trained on the target itself and fused, without a search
    before. Each of the other modes: every selected layer is the structure of this name in `STRUCTURES`.
    """

    PLAIN = "plain"
    SEARCH = "search"
    REPOPT = "repopt"
    ONLINE = "online"

    if not TYPE_CHECKING:  # one member for each structure, as the documentation of `enum` does it
        _ignore_ = ("members", "structure")
        members = vars()
        for structure in STRUCTURES:
            members[structure.upper()] = structure

    @classmethod
    def parse(cls, text: str) -> "Mode":
        """The mode of this name.

        Raises:
          ValueError: there is none, with the nearest name.
        """
        try:
            return cls(text)
        except ValueError:
            raise ValueError(
                f"there is no mode {text!r}{did_you_mean(text, cls)}: it must be one of {', '.join(cls)}"
            ) from None

    @property
    def has_scales(self) -> bool:
        """Whether the mode takes scales: to multiply gradients, or as initial values."""
        return self in (Mode.SEARCH, Mode.REPOPT, Mode.ONLINE)

    @property
    def is_structure(self) -> bool:
        """Whether the network is trained as a structure of `STRUCTURES`."""
        return self.value in STRUCTURES


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A network that is ready for training.

    Attributes:
      model: the network.
      scales: the scales for the optimizer (`repopt_mask(scales)`); None for an ordinary optimizer.
    """

    model: Any
    scales: Scales | None = None


def prepare(
    model: nnx.Module,
    mode: Mode | str,
    *,
    scales: Scales | None = None,
    select: Select = None,
    branches: Branches = None,
    options: Options = None,
    example: Example = None,
    trained: bool | None = None,
    allow_trained: bool = False,
    keep: Keep = None,
    rngs: nnx.Rngs,
) -> Prepared:
    """Prepares a copy of a plain network for a way of training; the given one is unchanged.

        prepared = prepare(model, "repopt", scales=load_scales("scales"), rngs=nnx.Rngs(0))

    Args:
      model: the plain network, untrained.
      mode: a `Mode` or its name.
      scales: required in mode repopt, those of a search; in modes search and online the initial scales, by
        default the depth rule. The other modes have none.
      select: which layers, as in `find_layers`. In mode repopt the scales define the layers; if `select` is
        given as well, they must be for exactly these layers.
      branches: the layers' branches, as in `find_branches`, in modes search, repopt, online and repvgg.
      options: arguments of the structure, such as {"gamma": 1 / 3} in mode acnet, as in `find_structures`.
      example: of the inputs, in the modes of structures, as in `to_structure`: by it the batch norms are
        found that those of the branches replace.
      trained, allow_trained, keep: what becomes of the kernels of a trained model, as in `reinitialize`,
        `to_search` and `to_structure`. Mode plain keeps them.
      rngs: `nnx.Rngs` with the stream `params`.

    Raises:
      ValueError: an unknown mode; scales, layers, branches, options or an example that the mode does not use,
        or missing scales; or as `to_search`, `reinitialize` and `to_structure`.
    """
    check_rngs(rngs)
    check_keep(keep, allow_trained)
    check_kind("mode", mode, str, "the name of a mode")
    mode = Mode.parse(mode)
    if scales is not None and not mode.has_scales:
        raise ValueError(
            f"mode {mode} has no use for `scales`: leave them out, or train with them in mode {Mode.REPOPT}"
        )
    given = [name for name, value in (("`select`", select), ("`branches`", branches)) if value is not None]
    if given and mode is Mode.PLAIN:
        raise ValueError(
            f"mode {mode} leaves every layer as it is, without a use for {' and '.join(given)}: leave out "
            "what chooses layers and branches"
        )
    if branches is not None and mode.is_structure and mode != "repvgg":
        raise ValueError(f"mode {mode} defines the branches of its layers: leave `branches` out")
    if options and (not mode.is_structure or branches is not None):
        what = f"mode {mode}" if branches is None else "a network of given `branches`"
        raise ValueError(f"{what} has no structure that takes `options` {dict(options)}: leave them out")
    if example is not None and (not mode.is_structure or branches is not None):
        what = f"mode {mode}" if branches is None else "a network of given `branches`"
        raise ValueError(f"{what} has no use for an `example`: leave it out")
    kernels: dict[str, Any] = {"trained": trained, "allow_trained": allow_trained, "keep": keep}
    match mode:
        case Mode.PLAIN:
            return Prepared(with_kernels(model, {}))  # whose arrays can be donated
        case Mode.SEARCH | Mode.ONLINE:
            start = "depth" if scales is None else scales
            return Prepared(to_search(model, select, branches, scales=start, rngs=rngs, **kernels))
        case Mode.REPOPT:
            if scales is None:
                raise ValueError(
                    "mode repopt needs `scales`: give those of a search, or `depth_scales(model)` for none"
                )
            chosen = select is not None or branches is not None
            fresh = reinitialize(
                model,
                scales,
                rngs=rngs,
                branch_sets=find_branches(model, select, branches) if chosen else None,
                **kernels,
            )
            return Prepared(fresh, scales)
    if branches is not None:
        return Prepared(to_repvgg(model, select, branches, rngs=rngs, **kernels))
    found: dict[str, Any] = {"options": options, "example": example}
    return Prepared(to_structure(model, mode.value, select, **found, rngs=rngs, **kernels))
