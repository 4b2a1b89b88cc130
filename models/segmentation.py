"""p(I | S) p(S): a scan explained by labels, and labels by an anatomical prior.

.. math::
    \\varphi \\sim p(\\varphi), \\quad c \\sim p(c), \\quad (w, \\mu, \\Sigma) \\sim p(w) p(\\Sigma) p(\\mu \\mid \\Sigma)

    S_x \\sim Cat(\\pi_x(\\varphi, w)), \\quad \\beta_x(c) I_x \\mid S_x = k \\sim \\sum_{g \\in k} m_g N(\\mu_g, \\Sigma_g)

The labels are summed out (``LabelMixture``) and drawn afterwards from their exact conditional.

References: Ashburner & Friston, Unified segmentation, NeuroImage 2005; Puonti, Iglesias, Van Leemput, NeuroImage 2016.
"""

from __future__ import annotations

import pyro
import torch
from pyro import poutine
from pyro.nn import PyroModule
from torch import Tensor

from probmed.appearances import BiasField, GaussianMixture
from probmed.distributions import LabelMixture
from probmed.grids import Grid, MaskedGrid
from probmed.priors import LabelPrior


class Segmentation(PyroModule):
    """A scan in one or several channels from a label prior, an appearance and a bias field.

    Sites: those of the label prior (``affine``, ``velocity``), of the bias field (``bias``), of the appearance (``weights``, ``covariances``,
    ``means``), and ``image``, ``(C, *shape)``, observed where given.

    Arguments:
        labels: any label prior.
        appearance: how labels look.
        bias: the scanner's field; None for none.
        tempering: one factor on the image's log density, for voxels that are not independent given their labels (SPM's inverse ff, "virtual
            decimation"): with n neighbours sharing noise it is about 1/n. The prior is not scaled.
    """

    def __init__(self, labels: LabelPrior, appearance: GaussianMixture, bias: BiasField | None = None, tempering: float = 1.0) -> None:
        super().__init__()
        if not 0 < tempering <= 1:
            raise ValueError(f"expected 0 < tempering <= 1, got {tempering}")
        self.labels, self.appearance, self.bias, self.tempering = labels, appearance, bias, tempering

    def forward(self, image: Tensor | None = None, grid: Grid | MaskedGrid | None = None) -> Tensor:
        if grid is None:
            raise ValueError("a segmentation model needs the grid of the image")
        log_prior = self.labels(grid)
        log_bias = None if self.bias is None else self.bias(grid)
        mixture = self.appearance(log_prior, log_bias, self.labels.coupling)
        with poutine.scale(scale=self.tempering):
            return pyro.sample("image", mixture, obs=image)

    # The closed-form steps of this model; the sites that they do not touch are left to gradients.

    closed_form_sites = ("weights", "covariances", "means", "bias")

    def mixture(self, state: dict[str, Tensor], grid: Grid | MaskedGrid, log_atlas: Tensor | None = None) -> LabelMixture:
        """p(image | latents), at given values of every latent, on any grid in the scan's world."""
        log_atlas = self.log_atlas(state, grid) if log_atlas is None else log_atlas
        log_bias = None if self.bias is None else self.bias.evaluate(state["bias"], grid)
        latents = state["weights"], state["means"], state["covariances"]
        return self.appearance.mixture(log_atlas, *latents, log_bias, self.labels.coupling)

    def log_atlas(self, state: dict[str, Tensor], grid: Grid | MaskedGrid) -> Tensor:
        """log T_k before reweighting, ``(K, *shape)``."""
        log_atlas: Tensor = poutine.condition(self.labels, data=state)(grid)
        return log_atlas

    @torch.no_grad()
    def start(self, image: Tensor, grid: Grid | MaskedGrid) -> dict[str, Tensor]:
        """Every latent's starting value: the prior's mode for anatomy and bias, the atlas's own statistics for the appearance."""
        trace = poutine.trace(poutine.block(self.labels, expose=["affine", "velocity"])).get_trace(grid)
        state = {name: torch.zeros_like(trace.nodes[name]["value"]) for name in trace.stochastic_nodes}
        if self.bias is not None:
            state["bias"] = torch.zeros(self.bias.channels, self.bias.prior_sd(grid).numel()).to(image)
        return state | self.appearance.start(self.log_atlas(state, grid), image)

    @torch.no_grad()
    def em_step(self, state: dict[str, Tensor], image: Tensor, grid: Grid | MaskedGrid, inner: int = 5) -> dict[str, Tensor]:
        """``inner`` rounds of EM on the appearance and a Gauss–Newton step on the bias; none lowers the log joint."""
        state, log_atlas = dict(state), self.log_atlas(state, grid)
        for _ in range(inner):
            mixture = self.mixture(state, grid, log_atlas)
            state |= self.appearance.em_update(log_atlas, mixture, image, state["weights"], self.tempering)
        if self.bias is not None and state["bias"].numel():
            mixture = self.mixture(state, grid, log_atlas)
            gradient, curvature = (self.tempering * x for x in self.appearance.bias_derivatives(mixture, image))
            before, step = self._bias_objective(state, image, grid, log_atlas), 1.0
            for _ in range(6):
                moved = state | {"bias": self.bias.newton_step(state["bias"], grid, gradient, curvature, step)}
                if self._bias_objective(moved, image, grid, log_atlas) >= before:
                    return moved
                step /= 2
        return state

    def _bias_objective(self, state: dict[str, Tensor], image: Tensor, grid: Grid | MaskedGrid, log_atlas: Tensor) -> Tensor:
        if self.bias is None:
            raise ValueError("this model has no bias field")
        prior = -0.5 * ((state["bias"] / self.bias.prior_sd(grid).to(image)) ** 2).sum()
        return self.tempering * self.mixture(state, grid, log_atlas).log_prob(image) + prior
