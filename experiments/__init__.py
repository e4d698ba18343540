"""Measurements and the commands that print them; results/ holds their logs."""

from alexnet_jax import memory

memory.keep_freed()  # as main.py does, and before JAX comes
