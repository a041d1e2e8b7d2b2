"""The networks of classification that a config can name: `model.variant` -> how it is built, its kinds."""

from collections import ChainMap
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from repopt_jax.models import (
    GHOST_KINDS,
    GHOST_VARIANTS,
    KINDS,
    MOBILEONE_VARIANTS,
    VGG_VARIANTS,
    GhostRow,
    GhostVariant,
    MobileOne,
    MobileOneVariant,
    RepGhostNet,
    RepOptVGG,
)


class Family(NamedTuple):
    """Networks that share a table of variants.

    Attributes:
      prefix: of a variant's name in a config; what follows is its key in `variants`.
      variants: key -> row.
      kinds: that its networks come in.
      make: `make(row, num_classes=, in_channels=, dtype=, rngs=, ...)`.
      options: fields of `ModelConfig` that `make` takes besides.
      architecture: before the key, what files of scales call the network.
    """

    prefix: str
    variants: Mapping[str, Any]
    kinds: tuple[str, ...]
    make: Callable[..., Any]
    options: tuple[str, ...]
    architecture: str = ""


# Nobody publishes them: for the embedded digits every family has a network that compiles in seconds.
_GHOST_OF_DIGITS = GhostVariant(
    "digits",
    0.5,
    ((GhostRow(3, 8, 16, False, 1),), (GhostRow(3, 24, 24, True, 2),)),
    features=64,
)
_MOBILEONE_OF_DIGITS = MobileOneVariant("digits", (8, 8, 8, 16, 16), copies=2, pairs=(1, 1, 1, 1))

# The first one whose variants have the name is meant. A MobileOne has one kind, its training form.
FAMILIES = (
    Family("", VGG_VARIANTS, KINDS, RepOptVGG, ("kind", "form", "post_se")),
    Family(
        "ghost-",
        ChainMap({"digits": _GHOST_OF_DIGITS}, GHOST_VARIANTS),
        GHOST_KINDS,
        RepGhostNet,
        ("kind", "form"),
        "GhostNet-",
    ),
    Family(
        "mobileone-",
        ChainMap({"digits": _MOBILEONE_OF_DIGITS}, MOBILEONE_VARIANTS),
        ("mobileone",),
        MobileOne,
        (),
        "MobileOne-",
    ),
)

# Kinds that scales are for; the others have branches with batch norms of their own.
SCALED_KINDS = ("target", "search", "csla")


def find_network(name: str) -> tuple[Family, str]:
    """The family and the key of a variant's name, such as "B1", "ghost-0.5" or "mobileone-s0".

    Raises:
      KeyError: there is none.
    """
    for family in FAMILIES:
        key = name.removeprefix(family.prefix)
        if name.startswith(family.prefix) and key in family.variants:
            return family, key
    raise KeyError(f"no variant {name!r}; there are {', '.join(network_names())}")


def network_names() -> tuple[str, ...]:
    """Every name that `find_network` knows."""
    return tuple(family.prefix + key for family in FAMILIES for key in family.variants)


def network_kinds() -> tuple[str, ...]:
    """Every kind that some network has."""
    return tuple(dict.fromkeys(kind for family in FAMILIES for kind in family.kinds))
