"""Measurements and sweeps; results/ holds their logs and tables."""

from alexnet_jax import machine

machine.keep_freed()  # as main.py does, and before JAX comes
