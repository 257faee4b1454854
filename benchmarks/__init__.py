"""Measurements made by hand, each one command: `python -m benchmarks.NAME`. The packages never import them."""
