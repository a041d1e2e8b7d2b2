"""Gradient and structural re-parameterization for JAX."""

from repopt_jax._version import __version__ as __version__
