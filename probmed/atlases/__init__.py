"""Label atlases: where each tissue class is likely to be, in a common space.

An atlas is a map of class probabilities, π_k(x) with Σ_k π_k(x) = 1 at every voxel of a grid. `default_atlas`
completes the MNI152 grey- and white-matter maps that come with nilearn to six classes that cover a whole
head; `docs/atlas.md` gives the recipe.

References:
    V. Fonov et al., Unbiased average age-appropriate atlases for pediatric studies, NeuroImage 54, 2011 (the
    MNI152 2009a maps).
    J. Ashburner and K. Friston, Unified segmentation, NeuroImage 26, 2005 (six-class tissue priors, floored
    before their logarithm).
"""

from probmed.atlases.folders import read_atlas, write_atlas
from probmed.atlases.labels import BACKGROUNDS, LabelAtlas
from probmed.atlases.mni152 import AtlasRecipe, cache_folder, default_atlas

__all__ = [
    "BACKGROUNDS",
    "AtlasRecipe",
    "LabelAtlas",
    "cache_folder",
    "default_atlas",
    "read_atlas",
    "write_atlas",
]
