"""Continuous batching of many requests at the level of the ODE step; knows nothing of HTTP or Ray."""
