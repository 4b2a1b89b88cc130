"""Probabilistic programs of medical images: the vocabulary that models are written in.

>>> import probmed
>>> probmed.Grid((4, 4, 4), probmed.Grid.from_spacing((4, 4, 4), 2.0).affine).spacing
(2.0, 2.0, 2.0)
"""

from probmed.appearances import BiasField, GaussianMixture
from probmed.atlases import LabelAtlas, default_atlas
from probmed.atlases.folders import read_atlas, write_atlas
from probmed.distributions import Coupling, InverseWishart, LabelMixture
from probmed.fields import GaussianField
from probmed.grids import Grid, MaskedGrid, resample, sample
from probmed.priors import AffinePrior, DeformableAtlas, FixedAtlas, LabelPrior, MarkovField, SmoothVelocity
from probmed.transforms import Affine, Composition, Displacement, Transform, Velocity, warp
from probmed.volumes import UnusableInput, Volume, read_labels, read_scan, write_labels, write_scan

__version__ = "0.1.0"

__all__ = [
    "Affine",
    "AffinePrior",
    "BiasField",
    "Composition",
    "Coupling",
    "DeformableAtlas",
    "Displacement",
    "FixedAtlas",
    "GaussianField",
    "GaussianMixture",
    "Grid",
    "InverseWishart",
    "LabelAtlas",
    "LabelMixture",
    "LabelPrior",
    "MarkovField",
    "MaskedGrid",
    "SmoothVelocity",
    "Transform",
    "UnusableInput",
    "Velocity",
    "Volume",
    "default_atlas",
    "read_atlas",
    "read_labels",
    "read_scan",
    "resample",
    "sample",
    "warp",
    "write_atlas",
    "write_labels",
    "write_scan",
]
