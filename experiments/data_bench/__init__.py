"""Benchmarks of data preparation and reading, and a dry run of the ImageNet pipeline."""
