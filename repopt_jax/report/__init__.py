"""Reports of runs: figures, an HTML page, drawings of detections, and the quickstart."""

from repopt_jax import extras

extras.require("flax", "rich", by=__name__)

__all__: list[str] = []  # the parts are imported one by one: figures need Matplotlib
