"""Adapters for `python -m benchmarks peers`: one module an engine."""
