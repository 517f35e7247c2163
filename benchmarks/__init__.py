"""Benchmarks: one script an op, run as ``python -m benchmarks.<op>`` from the root of the repository."""
