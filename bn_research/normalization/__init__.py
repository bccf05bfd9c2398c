"""The batch-normalizing transform as pure functions; JAX only, no Flax."""

from bn_research.normalization.batch_norm import batch_norm
from bn_research.normalization.batch_stats import (
    BatchStats,
    cumulative_momentum,
    population_stats,
    update_batch_stats,
)
from bn_research.normalization.folding import check_folding, fold_after, fold_before
from bn_research.normalization.moments import (
    Moments,
    batch_moments,
    merge_moments,
    sync_moments,
    variance,
)
from bn_research.normalization.normalize import normalize
from bn_research.normalization.renorm import batch_renorm
from bn_research.normalization.whitening import (
    CovarianceMoments,
    apply_whitening,
    batch_covariance,
    covariance,
    inverse_sqrt,
    merge_covariance,
    whiten,
)

__all__ = [
    "BatchStats",
    "CovarianceMoments",
    "Moments",
    "apply_whitening",
    "batch_covariance",
    "batch_moments",
    "batch_norm",
    "batch_renorm",
    "check_folding",
    "covariance",
    "cumulative_momentum",
    "fold_after",
    "fold_before",
    "inverse_sqrt",
    "merge_covariance",
    "merge_moments",
    "normalize",
    "population_stats",
    "sync_moments",
    "update_batch_stats",
    "variance",
    "whiten",
]
