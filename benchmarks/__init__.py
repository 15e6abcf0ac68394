"""Comparisons with peers. Run them in the root of the repository: `python -m benchmarks.NAME`."""
