"""The ways to train one network: plain, as a search, with scales in the optimizer, or with RepVGG's
branches."""

import dataclasses
import difflib
import enum
from typing import Any, assert_never

from flax import nnx

from repopt_jax.core.scales import Scales
from repopt_jax.surgery.layers import Branches, Select, find_branches
from repopt_jax.surgery.search import reinitialize, to_repvgg, to_search


class Mode(enum.StrEnum):
    """How a network is trained.

    PLAIN: as it is. SEARCH: the hyper-search, every selected layer a CSLA layer with trainable scales.
      REPOPT:
    RepOptimizer, the plain network re-initialised, scales in the optimizer. REPVGG: every selected layer as
    branches with batch norms.
    """

    PLAIN = "plain"
    SEARCH = "search"
    REPOPT = "repopt"
    REPVGG = "repvgg"

    @classmethod
    def parse(cls, text: str) -> "Mode":
        """The mode of this name.

        Raises:
          ValueError: there is none, with the nearest name.
        """
        try:
            return cls(text)
        except ValueError:
            near = difflib.get_close_matches(str(text).lower(), list(cls), n=1)
            meant = f" (did you mean '{near[0]}'?)" if near else ""
            raise ValueError(
                f"there is no mode {text!r}{meant}: it must be one of {', '.join(cls)}"
            ) from None


@dataclasses.dataclass(frozen=True)
class Prepared:
    """What is trained.

    Attributes:
      model: the network.
      scales: what the optimizer needs (`repopt_mask(scales)`); None where it is an ordinary one.
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
    allow_trained: bool = False,
    rngs: nnx.Rngs,
) -> Prepared:
    """A plain network made ready for a way of training; the given one is untouched.

        prepared = prepare(model, "repopt", scales=load_scales("scales"), rngs=nnx.Rngs(0))

    Args:
      model: the plain network, freshly made.
      mode: a `Mode` or its name.
      scales: repopt: those of a search, needed. search: where the scales start, by default the depth rule.
        plain and repvgg have none.
      select: which layers, as in `find_layers`. With mode repopt the scales say it; given all the same, they
        must be of exactly these.
      branches: of which branches they are made, as in `find_branches`. Mode plain looks at neither.
      allow_trained: mode repopt: discard the kernels of a trained model.
      rngs: source of the draws (stream `params`).

    Raises:
      ValueError: an unknown mode; scales that the mode has no use for, or that it lacks; and what
        `to_search`, `reinitialize` and `to_repvgg` raise.
    """
    mode = Mode.parse(mode)
    match mode:
        case Mode.PLAIN:
            _refuse(scales, mode)
            return Prepared(nnx.clone(model))
        case Mode.SEARCH:
            start = "depth" if scales is None else scales
            return Prepared(to_search(model, select, branches, scales=start, rngs=rngs))
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
                allow_trained=allow_trained,
            )
            return Prepared(fresh, scales)
        case Mode.REPVGG:
            _refuse(scales, mode)
            return Prepared(to_repvgg(model, select, branches, rngs=rngs))
    assert_never(mode)


def _refuse(scales: Scales | None, mode: Mode) -> None:
    if scales is not None:
        raise ValueError(
            f"mode {mode} has no use for `scales`: leave them out, or train with them in mode {Mode.REPOPT}"
        )
