"""Reports of runs: figures, an HTML page, drawings of detections, and the quickstart."""
