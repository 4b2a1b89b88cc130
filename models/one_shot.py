"""p(I, S | φ, ψ) p(φ) p(ψ): other people's scans and their labels, from the one scan that is labelled.

.. math::
    \\varphi \\sim p(\\varphi), \\quad \\psi \\sim p(\\psi), \\quad
    I \\sim N\\left((I_1 + \\psi) \\circ \\varphi^{-1}, \\sigma^2\\right), \\quad S = S_1 \\circ \\varphi^{-1}

The distributions of both are learned from scans without labels (``workflows.one_shot``); what the model draws is a training set.

References: Zhao et al., CVPR 2019 (draws of estimated transforms, and not of distributions over them).
"""

from __future__ import annotations

import pyro
import torch
from pyro.distributions import Normal
from pyro.nn import PyroModule
from torch import Tensor

from probmed.field_priors import FieldPrior, FlowPrior
from probmed.grids import Grid
from probmed.similarities import IncompleteImage
from probmed.transforms import warp


class TransformedScan(PyroModule):
    """One labelled scan, changed in shape and in appearance.

    Sites: those of the two priors; ``image``, ``(1, *grid.shape)``, observed where given; and ``labels``, probabilities on its voxels,
    ``(K, *grid.shape)``, which follow from the others.

    Arguments:
        scan: I_1, scaled, ``(1, *grid.shape)``, NaN where nothing is known. labels: S_1 as probabilities, ``(K, *grid.shape)``.
        spatial: φ, from the scan's world to that of others. appearance: ψ, ``(1, *grid.shape)``; None for none.
        noise: σ.
    """

    scan: Tensor
    labels: Tensor

    def __init__(
        self, scan: Tensor, labels: Tensor, grid: Grid, spatial: FlowPrior, appearance: FieldPrior | None = None, noise: float = 0.02
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
        moved = warp(torch.cat([look.nan_to_num(0.0), self.labels]), self.grid, back, self.grid, fill="edge")
        pyro.deterministic("labels", moved[1:])
        drawn: Tensor = pyro.sample("image", IncompleteImage(Normal(moved[:1], self.noise), moved[:1].isnan()), obs=image)
        return drawn
