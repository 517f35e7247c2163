"""Benchmarks of ops, blocks and models: ``python -m benchmarks --help``, from the root of the repository."""
