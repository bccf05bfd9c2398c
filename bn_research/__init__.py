"""bn_research: a laboratory for batch normalization in JAX and Flax."""

__version__ = "0.1.0"
