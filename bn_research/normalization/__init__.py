"""The batch-normalizing transform as pure functions; JAX only, no Flax."""

from bn_research.normalization.batch_norm import batch_norm, normalize
from bn_research.normalization.batch_stats import (
    BatchStats,
    cumulative_momentum,
    population_stats,
    update_batch_stats,
)
from bn_research.normalization.moments import (
    Moments,
    batch_moments,
    merge_moments,
    sync_moments,
    variance,
)

__all__ = [
    "BatchStats",
    "Moments",
    "batch_moments",
    "batch_norm",
    "cumulative_momentum",
    "merge_moments",
    "normalize",
    "population_stats",
    "sync_moments",
    "update_batch_stats",
    "variance",
]
