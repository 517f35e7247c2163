"""Benchmarks: one script per op, run as ``python -m benchmarks.<op>`` from the root of the repository."""
