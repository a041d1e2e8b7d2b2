"""The command line."""

from repopt_jax.cli.main import main

__all__ = [
    "main",
]
