"""alexnet_jax: the AlexNet of 2012 in JAX, as the paper says and as its program ran."""

__version__ = '0.1.0'
