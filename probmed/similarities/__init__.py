"""Similarities: how a fixed image looks given the moved one, p(f | m∘φ), the likelihoods of registration.

A voxel that is NaN in either image (outside a field of view or a mask, or gone with a resection) contributes nothing. What remains is the log
density of the observed voxels, in nats, with all constants. For voxels that are not independent there is one number, ``tempering``, by which whoever
observes the image multiplies the log density.
"""

from probmed.similarities.correlation import LocalCorrelation, WindowRegressions, window_sums
from probmed.similarities.labels import LabelAgreement, OneHotLabels
from probmed.similarities.landmarks import Landmarks
from probmed.similarities.likelihood import IncompleteImage, Similarity
from probmed.similarities.mixture import ConditionalMixture
from probmed.similarities.noise import GaussianNoise, StudentNoise

__all__ = [
    "ConditionalMixture",
    "GaussianNoise",
    "IncompleteImage",
    "LabelAgreement",
    "Landmarks",
    "LocalCorrelation",
    "OneHotLabels",
    "Similarity",
    "StudentNoise",
    "WindowRegressions",
    "window_sums",
]
