"""Prepared data sets and the batches drawn from them. Never imports JAX."""
