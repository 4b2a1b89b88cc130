"""p(I | S) p(S): a scan explained by labels, and labels by an anatomical prior.

.. math::
    \\varphi \\sim p(\\varphi), \\quad c \\sim p(c), \\quad (w, \\mu, \\Sigma) \\sim p(w) p(\\Sigma) p(\\mu \\mid \\Sigma)

    S_x \\sim Cat(\\pi_x(\\varphi, w)), \\quad \\beta_x(c) I_x \\mid S_x = k \\sim \\sum_{g \\in k} m_g N(\\mu_g, \\Sigma_g)

The labels are summed out (``LabelMixture``) and drawn afterwards from their exact conditional.

References: Ashburner & Friston, Unified segmentation, NeuroImage 2005; Puonti, Iglesias, Van Leemput, NeuroImage 2016.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.nn import PyroModule
from torch import Tensor

from probmed.appearances import BiasField, GaussianMixture
from probmed.distributions import LabelMixture
from probmed.grids import Grid, MaskedGrid
from probmed.priors import LabelPrior
from probmed.scores import Scores


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
        trace = poutine.trace(self.labels).get_trace(grid)
        values = {name: trace.nodes[name]["value"] for name in trace.stochastic_nodes}
        state = {name: torch.zeros_like(value) for name, value in values.items() if isinstance(value, Tensor)}
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

    def remaining(self, state: dict[str, Tensor], image: Tensor, grid: Grid | MaskedGrid) -> Callable[[], Any]:
        """A program of the sites without closed form, given the others: the joint density up to a constant, the appearance evaluated once."""
        if self.labels.coupling is not None:
            whole: Any = self
            return partial(whole, image, grid)
        with torch.no_grad():
            evidence = self.mixture(state, grid).label_log_likelihood(image)
            shares = self.appearance.label_weights(state["weights"]).log()
        shares = shares.reshape(-1, *[1] * (evidence.ndim - 1))

        def program() -> None:
            log_prior = (self.labels(grid) + shares).log_softmax(0)
            pyro.factor("image", self.tempering * torch.logsumexp(log_prior + evidence, 0).sum())

        return program

    def scores(self, state: dict[str, Tensor], image: Tensor, grid: Grid | MaskedGrid) -> Scores:
        """Each voxel's gradient of log p in every latent at ``state``: what the Laplace posterior is made of.

        The dense block holds the appearance's coordinates (``GaussianMixture.scores``), the bias coefficients and the affine parameters,
        in this order.
        """
        log_atlas = self.log_atlas(state, grid)
        mixture = self.mixture(state, grid, log_atlas)
        block, precision = self.appearance.scores(mixture, image)
        blocks, precisions = [block], [precision]
        if self.bias is not None and state["bias"].numel():
            slope, _ = self.appearance.bias_derivatives(mixture, image)
            functions = self.bias.functions(grid, image)
            blocks += [s[:, None] * functions for s in slope.flatten(1)]
            precisions.append((self.bias.prior_sd(grid).to(image) ** -2).repeat(len(slope)))
        motion = self.labels.motion(state, grid)
        nodes = slopes = field = None
        if motion is not None:
            evidence = mixture.label_log_likelihood(image).flatten(1)
            shares = self.appearance.label_weights(state["weights"]).log()[:, None]
            positions = motion.positions.detach().requires_grad_()
            with torch.enable_grad():
                log_prior = (motion.log_labels(positions) + shares).log_softmax(0)
                (slopes,) = torch.autograd.grad(torch.logsumexp(log_prior + evidence, 0).sum(), positions)
            if motion.affine is not None and motion.affine_sd is not None:
                blocks.append(torch.einsum("nd,ndp->np", slopes, motion.affine))
                precisions.append(motion.affine_sd**-2)
            nodes, field = motion.nodes, motion.field
        return Scores(torch.cat(blocks, 1), torch.cat(precisions), nodes, None if field is None else slopes, field)

    def moved(self, state: dict[str, Tensor], dense: Tensor, field: Tensor | None) -> dict[str, Tensor]:
        """Every latent at departures from ``state`` in the coordinates of ``scores``, with a leading axis of draws."""
        sizes = [self.appearance.dimension]
        sizes += [state[name].numel() for name in ("bias", "affine") if name in state]
        parts = iter(dense.split(sizes, -1))
        samples = self.appearance.moved(state, next(parts))
        for name in ("bias", "affine"):
            if name in state:
                samples[name] = state[name] + next(parts).unflatten(-1, state[name].shape)
        if field is not None:
            samples["velocity"] = state["velocity"] + field.to(state["velocity"])
        return samples

    def label_posterior(self, state: dict[str, Tensor], image: Tensor, grid: Grid | MaskedGrid) -> Tensor:
        """p(S_v = k | image, latents), ``(K, *shape)``."""
        return self.mixture(state, grid).posterior(image)

    @torch.no_grad()
    def volume_draws(self, samples: dict[str, Tensor], image: Tensor, grid: Grid | MaskedGrid) -> Tensor:
        """Volumes of the labels in ml, ``(draws, K)``: for each draw of the latents, the labels drawn given them, their sums being normal by their
        size. Voxels whose noise is shared count as many times less as the tempering says."""
        rows = []
        for i in range(len(samples["means"])):
            p = self.label_posterior({name: value[i] for name, value in samples.items()}, image, grid).flatten(1).double()
            covariance = torch.diag(p.sum(1)) - p @ p.T
            spectrum, axes = torch.linalg.eigh(covariance / self.tempering)
            rows.append(p.sum(1) + axes @ (spectrum.clamp_min(0).sqrt() * torch.randn_like(spectrum)))
        return torch.stack(rows).clamp_min(0) * grid.voxel_volume / 1000

    def _bias_objective(self, state: dict[str, Tensor], image: Tensor, grid: Grid | MaskedGrid, log_atlas: Tensor) -> Tensor:
        if self.bias is None:
            raise ValueError("this model has no bias field")
        prior = -0.5 * ((state["bias"] / self.bias.prior_sd(grid).to(image)) ** 2).sum()
        return self.tempering * self.mixture(state, grid, log_atlas).log_prob(image) + prior
