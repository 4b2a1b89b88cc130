"""p(f | φ, t; c) p(φ | c) p(t): the images of a cohort explained by one template, a deformation each, and covariates such as age.

.. math::
    t_0, \\ldots, t_P \\sim p(t), \\quad u_1, \\ldots, u_P \\sim N(0, s^2 \\Lambda^{-1}), \\quad
    v_n \\sim N\\left(\\textstyle\\sum_j c_{nj} u_j, \\Lambda^{-1}\\right), \\quad
    f_n \\sim p\\left(f \\mid (t_0 + \\textstyle\\sum_j c_{nj} t_j) \\circ \\exp(v_n)\\right)

What a covariate changes is shape (a velocity u_j) and intensity (t_j), both linear in it, so that the template of any value of the covariates is
(t_0 + Σ c_j t_j) ∘ exp(Σ c_j u_j). Without covariates it is the plain template. Deformations of mean zero need no penalty of their own: a mean that
all v_n share would cost prior density which the template can have for nothing.

References: Ashburner & Friston, NeuroImage 2009 (templates as a generative model's parameters); Dalca et al., NeurIPS 2019 (conditional templates).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import pyro
import torch
from pyro import poutine
from pyro.nn import PyroModule
from torch import Tensor

from probmed.fields import GaussianField
from probmed.grids import Grid, sample
from probmed.models.registration import carried
from probmed.priors import SmoothVelocity
from probmed.similarities import Similarity
from probmed.transforms import Displacement


class Template(PyroModule):
    """A cohort on one grid.

    Sites: ``template``, ``(1 + P, *shape)``; with covariates ``effects``, ``(P, d, *velocity.shape)`` mm; in a plate of scans the ``velocity``,
    ``(N, d, *velocity.shape)`` mm, those of the similarity, and ``images``, ``(N, 1, *shape)``, observed where given.

    Arguments:
        grid: of template and images, which an affine map has brought there.
        deformation: of one image; its prior is Λ.
        similarity: how an image looks given the deformed template.
        covariates: P. They should have mean 0 and standard deviation 1.
        share: prior standard deviation of what one unit of a covariate changes, relative to that of the velocities and of the template.
        level: mean of t_0, a number or ``(*shape)``. A likelihood that does not see contrast, such as local correlation, leaves it to this prior:
            there give the mean of the scans.
        sd, length_mm: standard deviation and correlation length of the template's intensities.
    """

    level: Tensor
    sd: Tensor

    def __init__(
        self,
        grid: Grid,
        deformation: SmoothVelocity,
        similarity: Similarity,
        covariates: int = 0,
        share: float = 1.0,
        level: Tensor | float = 0.5,
        sd: float = 1.0,
        length_mm: float = 10.0,
    ) -> None:
        super().__init__()
        self.grid, self.deformation, self.similarity = grid, deformation, similarity
        self.covariates, self.share, self.length_mm = covariates, share, length_mm
        self.register_buffer("level", torch.as_tensor(level, dtype=torch.get_default_dtype()).clone())
        self.register_buffer("sd", torch.tensor(float(sd)))

    def prior(self) -> GaussianField:
        """p(t), rough enough for edges (α = 1), event ``(1 + P, *shape)``; of what covariates change once the design is multiplied by ``share``."""
        field = GaussianField.from_sd(self.grid.shape, self.grid.spacing, self.sd, self.length_mm, 1.0, 1 + self.covariates)
        loc = torch.zeros_like(field.loc)
        loc[0] = self.level
        return field.about(loc)

    def design(self, covariates: Tensor) -> Tensor:
        """What the template's coefficients are multiplied by, ``(N, 1 + P)``, of covariates ``(N, P)``."""
        return torch.cat([covariates.new_ones(len(covariates), 1), self.share * covariates], 1)

    def forward(self, covariates: Tensor, images: Tensor | None = None) -> Tensor:
        """
        Arguments:
            covariates: ``(N, P)``, with P = 0 where there are none.
        """
        coefficients = pyro.sample("template", self.prior())
        field = self.deformation.prior()
        mean = field.loc.expand(len(covariates), *field.event_shape)
        if self.covariates:
            effects = pyro.sample("effects", field.expand([self.covariates]).to_event(1))
            mean = self.mean_velocity(covariates, effects)
        with pyro.plate("scan", len(covariates)):
            velocity = pyro.sample("velocity", field.about(mean))
            template = combined(self.design(covariates), coefficients)[:, None]
            moved = carried(template, self.grid, self.deformation.evaluate(velocity), self.grid)
            distribution = self.similarity(moved)
            with poutine.scale(scale=self.similarity.tempering):
                return pyro.sample("images", distribution, obs=images)

    def mean_velocity(self, covariates: Tensor, effects: Tensor) -> Tensor:
        """Σ_j c_nj u_j, ``(N, d, *velocity.shape)`` mm; the site ``effects`` is u / share, which has the prior of a velocity."""
        return combined(self.share * covariates, effects)

    def fitted_effects(self, covariates: Tensor, velocities: Tensor) -> Tensor:
        """The mode of ``effects`` given the velocities: ridge regression, the same at every frequency since both have the prior's spectrum.

        Arguments:
            velocities: ``(N, d, *velocity.shape)`` mm.
        """
        design = self.share * covariates
        gram = design.T @ design + torch.eye(self.covariates).to(design)
        return torch.linalg.solve(gram, design.T @ velocities.flatten(1)).reshape(-1, *velocities.shape[1:])


def combined(weights: Tensor, fields: Tensor) -> Tensor:
    """Σ_j w_nj x_j: ``(N, *size)`` of weights ``(N, P)`` and fields ``(P, *size)``."""
    return torch.tensordot(weights, fields, 1)


@dataclass(frozen=True)
class TemplateLinearisation:
    """The log likelihood of a cohort near a template, the deformations given: images are linear in it, f_n ~ W_n (Σ_j d_nj t_j).

    Arguments:
        log_joint: tempered log likelihood and log prior of the similarity's latents, of all scans, nats.
        gradient: of the former in the template, ``(1 + P, *shape)``, nats.
        latents: of the similarity, scan by scan.
        curvature: minus the expected second derivative in each value of the moved template, ``(N, *shape)``.
        design: d, ``(N, 1 + P)``.
        flows: of the scans, on any grid with the axes of ``grid``.
    """

    log_joint: float
    gradient: Tensor
    latents: list[dict[str, Tensor]]
    curvature: Tensor
    design: Tensor
    flows: Sequence[Displacement]
    grid: Grid

    @property
    def elements(self) -> tuple[int, ...]:
        """Shape of the data, ``(N, *shape)``."""
        return tuple(self.curvature.shape)

    def precision(self, template: Tensor) -> Tensor:
        """The Hessian times templates ``(batch, 1 + P, *shape)``: Σ_n d_n d_nᵀ ⊗ W_nᵀ h_n W_n."""
        total = torch.zeros_like(template)
        for weights, h, flow in zip(self.design, self.curvature, self.flows, strict=True):
            pull, push = lookup(flow, self.grid, template)
            total += torch.tensordot(push(h * pull(torch.tensordot(template, weights, ([1], [0])))), weights, 0).movedim(-1, 1)
        return total

    def precision_root(self, white: Tensor) -> Tensor:
        """Σ_n d_n ⊗ W_nᵀ √h_n applied to ``(batch, N, *shape)``."""
        total = white.new_zeros(len(white), self.design.shape[1], *self.grid.shape)
        for n, (weights, h, flow) in enumerate(zip(self.design, self.curvature, self.flows, strict=True)):
            _, push = lookup(flow, self.grid, white)
            total += torch.tensordot(push(h.sqrt() * white[:, n]), weights, 0).movedim(-1, 1)
        return total

    def blocks(self) -> Tensor:
        """A bound of the Hessian that is diagonal in space, ``(1 + P, 1 + P, *shape)``: the rows of W_n are positive and sum to one."""
        count = self.design.shape[1]
        total = self.curvature.new_zeros(count, count, *self.grid.shape)
        for weights, h, flow in zip(self.design, self.curvature, self.flows, strict=True):
            _, push = lookup(flow, self.grid, h)
            total += torch.tensordot(torch.outer(weights, weights), push(h[None])[0], 0)
        return total


def lookup(flow: Displacement, grid: Grid, like: Tensor) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    """W, which looks images ``(C, *shape)`` up where a flow takes the voxels, linearly and zero outside, and its transpose."""
    points = flow(grid.coordinates(like.dtype, like.device))

    def pull(images: Tensor) -> Tensor:
        return sample(images, grid, points, fill=0.0)

    def push(values: Tensor) -> Tensor:
        leaf = values.new_zeros(len(values), *grid.shape, requires_grad=True)
        with torch.enable_grad():
            return torch.autograd.grad(pull(leaf), leaf, values)[0]

    return pull, push


def linearise_template(
    model: Template,
    template: Tensor,
    flows: Sequence[Displacement],
    images: Tensor,
    covariates: Tensor,
    latents: Sequence[Mapping[str, Tensor]] | None = None,
) -> TemplateLinearisation:
    """The log likelihood near a template, with the similarity's latents maximised.

    Arguments:
        template: ``(1 + P, *shape)``.
        flows: exp(v_n).
        images: ``(N, 1, *shape)``, NaN where nothing is known.
        latents: from which the similarity's are maximised; their start by default.
    """
    similarity, design = model.similarity, model.design(covariates)
    value, gradient, found, curvature = template.new_zeros(()), torch.zeros_like(template), [], []
    for n, (image, flow, weights) in enumerate(zip(images, flows, design, strict=True)):
        moved = carried(torch.tensordot(weights, template, 1)[None], model.grid, flow, model.grid)
        known = similarity.update(moved, image, latents[n] if latents else similarity.start(moved, image))
        value = value + similarity.tempering * similarity.distribution(moved, known).log_prob(image).sum() + similarity.log_prior(moved, known).sum()
        slope, h = (similarity.tempering * x for x in similarity.newton(moved, image, known))
        _, push = lookup(flow, model.grid, template)
        gradient = gradient + torch.tensordot(weights, push(slope)[0], 0)
        found.append(dict(known))
        curvature.append(h[0].clamp_min(0))
    return TemplateLinearisation(float(value), gradient, found, torch.stack(curvature), design, flows, model.grid)
