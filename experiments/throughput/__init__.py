"""Benchmarks of the training step, the input pipeline and the start; see __main__.py."""
