"""`python -m repopt_jax` is `repopt`."""

import sys

from repopt_jax.cli.main import main

sys.exit(main())
