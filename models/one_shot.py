"""p(I, S | φ, ψ) p(φ) p(ψ): other people's scans and their labels, from the one scan that is labelled.

.. math::
    \\varphi \\sim p(\\varphi), \\quad \\psi \\sim p(\\psi), \\quad
    I \\sim N\\left((I_1 + \\psi) \\circ \\varphi^{-1}, \\sigma^2\\right), \\quad S = S_1 \\circ \\varphi^{-1}

The distributions of both are learned from scans without labels (``workflows.one_shot``); what the model draws is a training set. Where the labelled
scan says nothing, neither does what is drawn from it: beyond its field of view, and at its voxels that are unknown, images are NaN.

References: Zhao et al., CVPR 2019 (draws of estimated transforms, and not of distributions over them).
"""

from __future__ import annotations

import math

import pyro
import torch
from pyro.distributions import Normal
from pyro.nn import PyroModule
from torch import Tensor

from probmed.field_priors import FieldPrior
from probmed.grids import Grid
from probmed.priors import DeformationPrior
from probmed.similarities import IncompleteImage
from probmed.transforms import warp


class TransformedScan(PyroModule):
    """One labelled scan, changed in shape and in appearance.

    Sites: those of the two priors; ``image``, ``(1, *grid.shape)``, observed where given, NaN where unknown; and ``labels``, probabilities on its
    voxels, ``(K, *grid.shape)``, which follow from the others, NaN beyond the labelled scan's field of view.

    Arguments:
        scan: I_1, scaled, ``(1, *grid.shape)``, NaN where nothing is known. labels: S_1 as probabilities, ``(K, *grid.shape)``.
        spatial: φ, from the scan's world to that of others, its grid the same in both. appearance: ψ, ``(1, *grid.shape)``; None for none.
        noise: σ.
    """

    scan: Tensor
    labels: Tensor

    def __init__(
        self, scan: Tensor, labels: Tensor, grid: Grid, spatial: DeformationPrior, appearance: FieldPrior | None = None, noise: float = 0.02
    ) -> None:
        super().__init__()
        if scan.shape != (1, *grid.shape) or labels.shape[1:] != grid.shape:
            raise ValueError(f"expected a scan (1, *{grid.shape}) and labels (K, *{grid.shape}), got {tuple(scan.shape)} and {tuple(labels.shape)}")
        if not noise > 0:
            raise ValueError(f"expected noise > 0, got {noise}")
        self.grid, self.spatial, self.appearance, self.noise = grid, spatial, appearance, noise
        self.register_buffer("scan", scan)
        self.register_buffer("labels", labels)

    def forward(self, image: Tensor | None = None) -> Tensor:
        back = self.spatial().inverse()
        look = self.scan if self.appearance is None else self.scan + self.appearance()
        known = (~look.isnan()).to(look)
        moved = warp(torch.cat([look.nan_to_num(0.0), known, self.labels]), self.grid, back, self.grid, fill=math.nan)
        # A voxel is known where most of its weight lies on known ones, and is their mean. Beyond the field of view the share is NaN, and no more.
        value, share = moved[:1], moved[1:2]
        missing = ~(share > 0.5)
        mean = value.masked_fill(missing, 0.0) / share.masked_fill(missing, 1.0)
        pyro.deterministic("labels", moved[2:])
        drawn: Tensor = pyro.sample("image", IncompleteImage(Normal(mean, self.noise), missing), obs=image)
        return drawn
