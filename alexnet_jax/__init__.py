"""alexnet_jax: the AlexNet of 2012 in JAX, as the paper describes it and as its program ran."""

__version__ = '0.1.0'
