"""Evidence: claims with their criteria, verdicts from intervals, figures and pages.

Nothing here knows what batch normalization is or how a number came about; it needs NumPy, SciPy
and Matplotlib, and no JAX.
"""
