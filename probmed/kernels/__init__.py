"""Kernels of imaging genetics on GPyTorch, and the covariances that they make of many visits of many people.

Each is a correlation-like kernel without a scale: wrap it in GPyTorch's ``ScaleKernel`` for a variance component, and add and multiply with + and *.
Columns of one table go to kernels by ``active_dims``. Kernels with finitely many features stack into one root (``stacked_features``) for
``StackedCovariance``; inside ``exact_algebra`` GPyTorch's own algebra is by Cholesky at every size.
"""

from probmed.kernels.algebra import exact_algebra
from probmed.kernels.columns import ColumnGaussian, ColumnLinear, LevelCorrelation, PhenotypeGaussian, PhenotypeLinear, SameLevel, mixed_columns
from probmed.kernels.covariances import StackedCovariance, Visits, VisitSums
from probmed.kernels.features import FeatureKernel, stacked_features
from probmed.kernels.genetics import (
    GeneticRelationship,
    GenotypeGaussian,
    GivenRelationship,
    IdentityByState,
    allele_frequencies,
    beta_weights,
    by_region,
    power_weights,
)
from probmed.kernels.times import InterceptSlope, SameSubject

__all__ = [
    "ColumnGaussian",
    "ColumnLinear",
    "FeatureKernel",
    "GeneticRelationship",
    "GenotypeGaussian",
    "GivenRelationship",
    "IdentityByState",
    "InterceptSlope",
    "LevelCorrelation",
    "PhenotypeGaussian",
    "PhenotypeLinear",
    "SameLevel",
    "SameSubject",
    "StackedCovariance",
    "VisitSums",
    "Visits",
    "allele_frequencies",
    "beta_weights",
    "by_region",
    "exact_algebra",
    "mixed_columns",
    "power_weights",
    "stacked_features",
]
