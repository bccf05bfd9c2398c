"""Thin Flax layers over the pure functions."""
