"""p(y | β, τ, σ; G, C, y_B) p(β) p(τ) p(σ): change since baseline explained by genes, clinic and phenotype.

.. math::
    y_{pt} = y_{pB} + \\Delta x_{pt} \\left(x_p^T \\beta + \\textstyle\\sum_k h_k(p)\\right) + \\varepsilon_{pt} - \\varepsilon_{pB}, \\quad
    h_k \\sim N(0, \\tau_k K_k)

The same model under three names: a kernel machine, whose h_k = K_k α_k minimises squared error with a penalty; a Gaussian process, of which that is
the posterior mean; a linear mixed model, whose random effects have K_k as relationship. The rates h are integrated out.

References: Dalca et al., MICCAI 2015; Liu, Lin & Ghosh, Biometrics 2007 (kernel machines as mixed models).
"""

from __future__ import annotations

import pyro
import torch
from pyro.distributions import HalfCauchy, HalfNormal, Normal
from pyro.nn import PyroModule
from torch import Tensor

from probmed.slopes import FollowUps, Relationship, SubjectChange

BASELINES = ("same", "none", "free")


class Longitudinal(PyroModule):
    """Rates of change of people.

    Sites: ``coefficients``, β, ``(q,)``; ``components``, √τ, ``(K,)``; ``noise``, σ; ``baseline_noise``, σ_B, where it is free; ``change``, ``(N,)``,
    observed where given.

    Arguments:
        scale: prior scale of √τ, a rate, in the phenotype's unit per unit of x: their half Cauchy's.
        noise_scale: prior standard deviation of σ (half normal), in the phenotype's unit.
        coefficient_sd: prior standard deviation of β.
        baseline: "same", σ_B = σ, for the baseline was measured as the others were; "none", σ_B = 0; or "free".

    References: Gelman, Bayesian Analysis 2006 (half Cauchy priors of standard deviations).
    """

    def __init__(self, scale: float = 1.0, noise_scale: float = 1.0, coefficient_sd: float = 10.0, baseline: str = "same") -> None:
        super().__init__()
        if baseline not in BASELINES:
            raise ValueError(f"expected a baseline of {BASELINES}, got {baseline!r}")
        if not min(scale, noise_scale, coefficient_sd) > 0:
            raise ValueError(f"expected positive scales, got {scale}, {noise_scale}, {coefficient_sd}")
        self.scale, self.noise_scale, self.coefficient_sd, self.baseline = scale, noise_scale, coefficient_sd, baseline

    def forward(self, design: Tensor, relationship: Relationship, visits: FollowUps, change: Tensor | None = None) -> Tensor:
        """
        Arguments:
            design: x, ``(P, q)``, a column of ones first.
        """
        one = design.new_ones(())
        coefficients = pyro.sample("coefficients", Normal(design.new_zeros(design.shape[1]), self.coefficient_sd * one).to_event(1))
        distribution = SubjectChange(design @ coefficients, relationship, *self.draw_variances(relationship, visits, one))
        return pyro.sample("change", distribution, obs=change)

    def draw_variances(self, relationship: Relationship, visits: FollowUps, one: Tensor) -> tuple[Tensor, FollowUps, Tensor, Tensor]:
        """τ, the visits, σ² and σ_B², as ``SubjectChange`` takes them.

        Arguments:
            one: of the type that is wanted.
        """
        components = pyro.sample("components", HalfCauchy(self.scale * one.expand(relationship.components)).to_event(1))
        noise = pyro.sample("noise", HalfNormal(self.noise_scale * one))
        first = noise if self.baseline == "same" else torch.zeros_like(noise)
        if self.baseline == "free":
            first = pyro.sample("baseline_noise", HalfNormal(self.noise_scale * one))
        return components**2, visits, noise**2, first**2
