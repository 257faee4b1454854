"""Measurements, each one command: `python -m benchmarks.NAME`. The packages never import them."""
