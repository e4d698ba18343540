"""Measurements and sweeps; results/ holds their logs and tables."""

from alexnet_jax import memory

memory.keep_freed()  # as main.py does, and before JAX comes
