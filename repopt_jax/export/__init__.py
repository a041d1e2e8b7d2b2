"""Networks as files that run elsewhere, and running them here."""

from repopt_jax.export.metadata import Metadata
from repopt_jax.export.stablehlo import read_stablehlo, to_stablehlo

__all__ = ["Metadata", "read_stablehlo", "to_stablehlo"]
