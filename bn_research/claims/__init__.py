"""Evidence: claims with their criteria, verdicts from intervals, figures and pages.

Nothing here knows what batch normalization is or how a number came about; it needs NumPy, SciPy
and Matplotlib, and no JAX.
"""

from bn_research.claims.claim import Claim
from bn_research.claims.estimate import estimate, paired_difference
from bn_research.claims.finding import Finding, decide

__all__ = ["Claim", "Finding", "decide", "estimate", "paired_difference"]
