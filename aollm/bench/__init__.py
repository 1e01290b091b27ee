"""Measurements of a runtime against what its machine can do: `python -m aollm.bench`."""
