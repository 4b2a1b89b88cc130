"""p(u) p(z | u; G, C, y, t) p(x | z): images whose codes follow genes, clinic, phenotype and time.

.. math::
    u_l \\sim N(0, I), \\quad
    z_{pl} \\sim N\\left(m_{pl} + \\Phi_p \\, \\mathrm{diag}(v_l)^{1/2} u_l, \\; B_{pl}\\right), \\quad
    x_{pt} \\sim p(x \\mid f(z_{pt}))

z_pl are the values of code l at all visits of person p. Integrated over u, each code is a Gaussian process over all visits of all people, with
covariance Φ diag(v_l) Φᵀ + blockdiag(B_pl): components that people share through features Φ, and components of a person's own. The shares that
components have of a code's variance are learned and sum to one, since a decoder can undo any other scale.

Other choices of parts are other models: no component but noise is the variational autoencoder; fixed effects and a random intercept, the mixed-model
one; covariates that decoder and encoder also read, the conditional one.

References: Casale et al., NeurIPS 2018; Jazbec et al., AISTATS 2021; Ramchandran et al., AISTATS 2021; Kingma & Welling, ICLR 2014; Simchoni &
Rosset, NeurIPS 2021.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import pyro
import torch
from gpytorch.kernels import Kernel
from linear_operator import to_dense
from pyro.distributions import Bernoulli, MultivariateNormal, Normal, TorchDistribution
from pyro.nn import PyroModule
from torch import Tensor, nn
from torch.distributions import constraints

from probmed.grids import Grid
from probmed.kernels import stacked_features
from probmed.priors import SmoothVelocity
from probmed.similarities import IncompleteImage
from probmed.transforms import Velocity, warp

_JITTER = 1e-10  # of the covariance of inducing points, relative, in double precision


def pad_visits(subjects: Tensor, values: Tensor, fill: float = math.nan) -> Tensor:
    """Rows of a table by person and visit.

    Arguments:
        subjects: of each row, ``(N,)``.
        values: ``(N, *size)``.

    Returns:
        ``(P, T, *size)``: people as sorted distinct subjects, visits as they come, T the most that anyone has; the rest is ``fill``.

    Raises:
        ValueError: where the numbers of rows differ.

    >>> pad_visits(torch.tensor([3, 1, 3]), torch.tensor([5.0, 6.0, 7.0]))
    tensor([[6., nan],
            [5., 7.]])
    """
    if subjects.ndim != 1 or len(subjects) != len(values) or not len(subjects):
        raise ValueError(f"expected the subject of each of {len(values)} rows, got {tuple(subjects.shape)}")
    _, person, counts = subjects.unique(return_inverse=True, return_counts=True)
    order = person.argsort(stable=True)
    starts = counts.cumsum(0) - counts
    padded = values.new_full((len(counts), int(counts.max()), *values.shape[1:]), fill)
    padded[person[order], torch.arange(len(order), device=order.device) - starts[person[order]]] = values[order]
    return padded


@dataclass(frozen=True)
class Cohort:
    """Visits of people, and what is known of each.

    Arguments:
        present: which of T visits there are, ``(P, T)`` bool.
        inputs: of the prior's components, and covariates, by name, ``(P, T, D)`` each.
    """

    present: Tensor
    inputs: Mapping[str, Tensor]

    def __post_init__(self) -> None:
        wrong = {name: tuple(x.shape) for name, x in self.inputs.items() if x.ndim != 3 or x.shape[:2] != self.present.shape}
        if self.present.ndim != 2 or self.present.dtype != torch.bool or wrong:
            expected = f"visits (P, T) of bool and inputs {(*self.present.shape, 'D')}"
            raise ValueError(f"expected {expected}, got {tuple(self.present.shape)} of {self.present.dtype} and {wrong}")

    @classmethod
    def of(cls, subjects: Tensor, inputs: Mapping[str, Tensor]) -> Cohort:
        """From the subject of each row of a table, ``(N,)``, and its columns, ``(N, D)`` each; order as in ``pad_visits``."""
        present = pad_visits(subjects, torch.ones_like(subjects), 0) != 0
        return cls(present, {name: pad_visits(subjects, x, 0.0) for name, x in inputs.items()})

    def __len__(self) -> int:
        return len(self.present)

    def people(self, index: Tensor) -> Cohort:
        """Some of the people."""
        return Cohort(self.present[index], {name: x[index] for name, x in self.inputs.items()})

    def only(self, visits: Tensor) -> Cohort:
        """Some of the visits, of ``(P, T)`` bool."""
        return Cohort(self.present & visits, self.inputs)

    def rows(self, names: Sequence[str]) -> list[Tensor]:
        """Some of the inputs at the visits there are, ``(N, D)`` each."""
        return [self.inputs[name][self.present] for name in names]

    def padded(self, rows: Tensor) -> Tensor:
        """``(N, *size)`` of the visits there are as ``(P, T, *size)``, zero elsewhere."""
        padded = rows.new_zeros(*self.present.shape, *rows.shape[1:])
        padded[self.present] = rows
        return padded


class Part(NamedTuple):
    """What a component adds to the covariance between visits: φ(x) φ(x')ᵀ, and a person's own.

    Arguments:
        features: φ, ``(P, T, H)``. own: ``(P, T, T)``.
        left_out: what is in neither, ``(P, T, T)``, and is charged to the divergence.
    """

    features: Tensor
    own: Tensor
    left_out: Tensor | None = None


class Linear(nn.Module):
    """φ(x) = x/√D: effects of D columns, such as standardised genotypes or covariates, on every code.

    A column that is missing, NaN, is a standard normal of the person's own: its feature is the mean, zero, and its variance 1/D that of the person.
    """

    def forward(self, x: Tensor) -> Part:
        missing = x.isnan().to(x.dtype) / math.sqrt(x.shape[-1])
        return Part(x.nan_to_num(0.0) / math.sqrt(x.shape[-1]), missing @ missing.mT)


class Features(nn.Module):
    """The features of a kernel that has finitely many, by ``stacked_features``."""

    def __init__(self, kernel: Kernel) -> None:
        super().__init__()
        self.kernel = kernel

    def forward(self, x: Tensor) -> Part:
        features, variances = stacked_features(self.kernel, x.flatten(0, 1))
        return Part((features * variances.sqrt()).unflatten(0, x.shape[:2]), x.new_zeros(*x.shape[:2], x.shape[1]))


class Inducing(nn.Module):
    """The features of any kernel at M points, φ(x) = k(x, Z) k(Z, Z)^(−½).

    What they leave of the covariance of a person's own visits is kept in the block, which makes another Gaussian process, with the kernel's variances
    but not all of its covariances; or it is charged to the divergence, which makes that a bound of the full kernel's. With every row among the points
    both are the kernel.

    Arguments:
        kernel: with k(x, x) = 1 or so, since shares of variance are the prior's.
        points: Z, ``(M, D)``; they are learned.
        bound: the second.

    References: Snelson & Ghahramani, AISTATS 2007 (partially independent conditionals); Titsias, AISTATS 2009 (the bound).
    """

    def __init__(self, kernel: Kernel, points: Tensor, bound: bool = False) -> None:
        super().__init__()
        if points.ndim != 2 or len(points.unique(dim=0)) < len(points):
            raise ValueError(f"expected distinct points (M, D), got {tuple(points.shape)}, {len(points.unique(dim=0))} of them distinct")
        self.kernel, self.points, self.bound = kernel, nn.Parameter(points.detach().clone()), bound

    def forward(self, x: Tensor) -> Part:
        eye = torch.eye(len(self.points), dtype=x.dtype, device=x.device)
        jitter = _JITTER * torch.finfo(x.dtype).eps / torch.finfo(torch.float64).eps
        root = torch.linalg.cholesky(to_dense(self.kernel(self.points)) + jitter * eye)
        cross = to_dense(self.kernel(x.flatten(0, 1), self.points))
        features = torch.linalg.solve_triangular(root, cross.mT, upper=False).mT.unflatten(0, x.shape[:2])
        rest = to_dense(self.kernel(x)) - features @ features.mT
        return Part(features, torch.zeros_like(rest), rest) if self.bound else Part(features, rest)


class Within(nn.Module):
    """A kernel between visits of one person, of time for instance, independent of other people's."""

    def __init__(self, kernel: Kernel) -> None:
        super().__init__()
        self.kernel = kernel

    def forward(self, x: Tensor) -> Part:
        return Part(_no_features(x), to_dense(self.kernel(x)))


class Intercept(nn.Module):
    """A level of each person's own."""

    def forward(self, x: Tensor) -> Part:
        return Part(_no_features(x), x.new_ones(*x.shape[:2], x.shape[1]))


class Slope(nn.Module):
    """Slopes of each person's own on D columns, such as time: give them mean square one."""

    def forward(self, x: Tensor) -> Part:
        return Part(_no_features(x), x @ x.mT / x.shape[-1])


def _no_features(x: Tensor) -> Tensor:
    return x.new_zeros(*x.shape[:2], 0)


@dataclass(frozen=True)
class CodeCovariance:
    """The prior of the L codes of P people at T visits: mean m, and covariance Φ diag(v_l) Φᵀ + blockdiag(B_pl).

    Arguments:
        mean: ``(P, T, L)``, zero at visits that are not there.
        features: Φ, ``(P, T, H)``, zero there.
        variances: v, ``(L, H)``.
        blocks: B, ``(L, P, T, T)``, those of the identity there.
        left_out: covariance that is in neither and is charged to the divergence, ``(L, P, T, T)``, zero there; None where there is none.
    """

    mean: Tensor
    features: Tensor
    variances: Tensor
    blocks: Tensor
    left_out: Tensor | None = None

    def given(self, weights: Tensor) -> Tensor:
        """The mean given u, ``(L, H)``."""
        return self.mean + self.features @ (self.variances.sqrt() * weights).mT


class CodePrior(nn.Module):
    """Gaussian processes of L codes, as sums of components and noise.

    Parameters: ``logits``, ``(L, K + 1)``, whose softmax are the shares of K components, in their order, and of noise.

    Arguments:
        codes: L.
        components: by the name of their input, modules such as ``Linear`` from x ``(P, T, D)`` to a ``Part``, of unit variance on average. An
            ``Intercept`` needs no input.
        mean: by the name of their input, modules from ``(P, T, D)`` to ``(P, T, L)``: fixed effects, which add up.
    """

    def __init__(self, codes: int, components: Mapping[str, nn.Module] | None = None, mean: Mapping[str, nn.Module] | None = None) -> None:
        super().__init__()
        if codes < 1:
            raise ValueError(f"expected at least one code, got {codes}")
        self.codes = codes
        self.components, self.mean = nn.ModuleDict(dict(components or {})), nn.ModuleDict(dict(mean or {}))
        self.logits = nn.Parameter(torch.zeros(codes, len(self.components) + 1))

    @property
    def shares(self) -> Tensor:
        """Of a code's variance, ``(L, K + 1)``, those of noise last."""
        return self.logits.softmax(-1)

    def forward(self, cohort: Cohort) -> CodeCovariance:
        """
        Raises:
            ValueError: where an input is lacking, or missing entries have no place in its component.
        """
        present, shares = cohort.present, self.shares
        eye = torch.eye(present.shape[1], dtype=shares.dtype, device=shares.device)
        both, there = present[:, :, None] & present[:, None], present[..., None]
        parts = [self._part(name, component, cohort) for name, component in self.components.items()]
        features = [shares.new_zeros(*present.shape, 0), *(part.features for part in parts)]
        widths = torch.tensor([part.features.shape[-1] for part in parts] + [0], device=shares.device)
        own = [share[:, None, None, None] * part.own for share, part in zip(shares.mT, parts, strict=False)]
        left_out = [share[:, None, None, None] * part.left_out for share, part in zip(shares.mT, parts, strict=False) if part.left_out is not None]
        mean = [module(cohort.inputs[name]) for name, module in self.mean.items()]
        return CodeCovariance(
            sum(mean, shares.new_zeros(*present.shape, self.codes)).masked_fill(~there, 0.0),
            torch.cat(features, -1).masked_fill(~there, 0.0),
            shares.repeat_interleave(widths, -1),
            torch.where(both, sum(own, shares[:, -1, None, None, None] * eye), eye),
            torch.stack(left_out).sum(0).masked_fill(~both, 0.0) if left_out else None,
        )

    def _part(self, name: str, component: nn.Module, cohort: Cohort) -> Part:
        if name not in cohort.inputs and not isinstance(component, Intercept):
            raise ValueError(f"expected an input {name!r}, got {sorted(cohort.inputs)}")
        part: Part = component(cohort.inputs.get(name, cohort.present[..., None].to(self.logits.dtype)))
        if not bool(part.features.isfinite().all() and part.own.isfinite().all()):
            raise ValueError(f"expected inputs {name!r} whose covariance is finite, got some that are not")
        return part


class VisitNormal(TorchDistribution):
    """The codes of a person at all visits, jointly: batch ``(P,)``, event ``(T, L)``, zero at visits that are not there.

    Arguments:
        loc: ``(P, T, L)``, zero there.
        blocks: ``(L, P, T, T)``, those of the identity there.
        present: ``(P, T)`` bool.
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {}
    support = constraints.independent(constraints.real, 2)
    has_rsample = True

    def __init__(self, loc: Tensor, blocks: Tensor, present: Tensor, validate_args: bool | None = None) -> None:
        self.loc, self.present = loc, present
        self.root = torch.linalg.cholesky(blocks.movedim(0, 1))
        super().__init__(loc.shape[:1], loc.shape[1:], validate_args=validate_args)

    def log_prob(self, value: Tensor) -> Tensor:
        rest = (value - self.loc).mT
        white = torch.linalg.solve_triangular(self.root, rest[..., None], upper=False)
        constants = 0.5 * math.log(2 * math.pi) * rest.shape[-2] * self.present.sum(-1)
        return -0.5 * white.square().sum((-3, -2, -1)) - self.root.diagonal(dim1=-2, dim2=-1).log().sum((-2, -1)) - constants

    def rsample(self, sample_shape: torch.Size | Sequence[int] = ()) -> Tensor:
        white = torch.randn(*sample_shape, *self.root.shape[:-1], dtype=self.loc.dtype, device=self.loc.device)
        return self.loc + ((self.root @ white[..., None])[..., 0].mT).masked_fill(~self.present[..., None], 0.0)

    def expand(self, batch_shape: Sequence[int], _instance: VisitNormal | None = None) -> VisitNormal:
        if tuple(batch_shape) != tuple(self.batch_shape):
            raise ValueError(f"expected a batch of {tuple(self.batch_shape)} people, got {tuple(batch_shape)}")
        return self


class PixelNormal(nn.Module):
    """Independent values about what the decoder gives, with a standard deviation σ that is learned from a start.

    Arguments:
        sd: in the images' unit.
        size: of an image, where each value has a σ of its own; one for all by default.
    """

    def __init__(self, sd: float = 0.1, size: Sequence[int] = ()) -> None:
        super().__init__()
        if not sd > 0:
            raise ValueError(f"expected a positive standard deviation, got {sd}")
        self.log_sd = nn.Parameter(torch.full(tuple(size), math.log(sd)))

    def forward(self, decoded: Tensor) -> TorchDistribution:
        return Normal(decoded, self.log_sd.exp())


class PixelBernoulli(nn.Module):
    """Independent zeros and ones, whose logits the decoder gives."""

    def forward(self, decoded: Tensor) -> TorchDistribution:
        return Bernoulli(logits=decoded, validate_args=False)


class DeformationDecoder(nn.Module):
    """f(z) = T ∘ exp(v(z)), v(z) = Λ^(−½) w(z): codes of shape, by which a learned template is deformed.

    Arguments:
        template: where T starts, ``(C, *shape)``. grid: of it and of the images.
        deformation: the lattice of v, and Λ, which makes it smooth whatever the network says.
        network: from codes ``(N, L)``, and covariates, to w, ``(N, d * lattice)``.
    """

    def __init__(self, template: Tensor, grid: Grid, deformation: SmoothVelocity, network: nn.Module) -> None:
        super().__init__()
        if tuple(template.shape[1:]) != grid.shape:
            raise ValueError(f"expected a template {('C', *grid.shape)}, got {tuple(template.shape)}")
        self.template = nn.Parameter(template.detach().clone())
        self.grid, self.deformation, self.network = grid, deformation, network

    def forward(self, codes: Tensor, *covariates: Tensor) -> Tensor:
        return self.carried(self.template, codes, *covariates)

    def transform(self, codes: Tensor, *covariates: Tensor) -> Velocity:
        """From each image's world to the template's, N of them."""
        lattice = self.deformation.grid
        white = self.network(codes, *covariates).unflatten(-1, (lattice.ndim, *lattice.shape))
        return self.deformation.evaluate(self.deformation.prior().unwhiten(white))

    def carried(self, image: Tensor, codes: Tensor, *covariates: Tensor) -> Tensor:
        """The template's labels, or any image ``(C, *shape)`` on its grid, as ``(N, C, *shape)``."""
        return warp(image.expand(len(codes), *image.shape), self.grid, self.transform(codes, *covariates), self.grid, fill="edge")


class GPPriorVAE(PyroModule):
    """Images of people at their visits.

    Sites: ``weights``, u, ``(L, H)``, where components have features; in a plate of people ``codes``, ``(P, T, L)``, and ``images``,
    ``(P, T, *shape)``, observed where given; NaN is not observed.

    Arguments:
        prior: of the codes.
        decoder: from codes ``(N, L)``, and covariates ``(N, D)`` each, to the likelihood's parameters, ``(N, *shape)``.
        likelihood: from these to independent distributions of values, such as ``PixelNormal``.
        covariates: names of inputs which the decoder reads.
    """

    def __init__(self, prior: CodePrior, decoder: nn.Module, likelihood: nn.Module, covariates: Sequence[str] = ()) -> None:
        super().__init__()
        self.prior, self.decoder, self.likelihood, self.covariates = prior, decoder, likelihood, tuple(covariates)

    def forward(self, cohort: Cohort, images: Tensor | None = None, people: Tensor | None = None) -> Tensor:
        """
        Arguments:
            people: a minibatch of them, indices; the plate scales its log density to all.
        """
        part, seen = (cohort, images) if people is None else (cohort.people(people), None if images is None else images[people])
        prior = self.prior(part)
        weights = torch.zeros_like(prior.variances)
        if weights.numel():
            weights = pyro.sample("weights", Normal(weights, 1.0).to_event(2))
        with pyro.plate("subject", len(cohort), subsample=people):
            codes = pyro.sample("codes", VisitNormal(prior.given(weights), prior.blocks, part.present))
            return pyro.sample("images", self.image(codes, part), obs=seen)

    def image(self, codes: Tensor, cohort: Cohort) -> IncompleteImage:
        """p(x | z), batch ``(P,)``, event ``(T, *shape)``."""
        decoded = cohort.padded(self.decoder(codes[cohort.present], *cohort.rows(self.covariates)))
        missing = ~cohort.present.reshape(*cohort.present.shape, *[1] * (decoded.ndim - 2))
        return IncompleteImage(self.likelihood(decoded), missing.expand(decoded.shape), 1)


class GPPriorGuide(PyroModule):
    """q(z | x) q(u | z): codes independent and normal given their own image; the weights as they are given the codes.

    .. math:: q(z_{ptl} \\mid x_{pt}) = N(\\mu_l(x_{pt}), s_l^2(x_{pt})), \\quad
              q(u_l \\mid z) = p(u_l \\mid z) = N\\left(S_l \\textstyle\\sum_p A_{pl}^T B_{pl}^{-1} (z_{pl} - m_{pl}), S_l\\right)

    with A = Φ diag(v)^½ and S = (I + Σ AᵀB⁻¹A)⁻¹. ``inference.gp_prior`` has the same bound with the divergence in closed form, and in minibatches.

    Arguments:
        model: whose prior, and whose covariates the encoder reads too.
        encoder: from images ``(N, *shape)``, zero where missing, and covariates, to means and logs of relative standard deviations side by side,
            ``(N, 2L)``.
        sd: standard deviation where the relative one is one; a start at the prior's own, 1, hides the images behind noise for many steps.
    """

    def __init__(self, model: GPPriorVAE, encoder: nn.Module, sd: float = 0.1) -> None:
        super().__init__()
        if not sd > 0:
            raise ValueError(f"expected a positive standard deviation, got {sd}")
        self.prior, self.encoder, self.covariates, self.sd = model.prior, encoder, model.covariates, float(sd)

    def encode(self, cohort: Cohort, images: Tensor) -> tuple[Tensor, Tensor]:
        """Means and standard deviations of q(z | x), ``(P, T, L)`` each: zero and one at visits that are not there."""
        if images.shape[:2] != cohort.present.shape:
            raise ValueError(f"expected images {(*cohort.present.shape, '...')}, got {tuple(images.shape)}")
        encoded = self.encoder(images[cohort.present].nan_to_num(0.0), *cohort.rows(self.covariates))
        if encoded.shape[-1] != 2 * self.prior.codes:
            raise ValueError(f"expected an encoder to {2 * self.prior.codes} numbers for {self.prior.codes} codes, got {encoded.shape[-1]}")
        mean, log_sd = encoded.chunk(2, -1)
        return cohort.padded(mean), cohort.padded(self.sd * log_sd.exp()).masked_fill(~cohort.present[..., None], 1.0)

    def forward(self, cohort: Cohort, images: Tensor) -> dict[str, Tensor]:
        mean, sd = self.encode(cohort, images)
        with pyro.plate("subject", len(cohort)):
            codes = pyro.sample("codes", VisitNormal(mean, torch.diag_embed(sd.movedim(-1, 0) ** 2), cohort.present))
        prior = self.prior(cohort)
        if not prior.variances.numel():
            return {"codes": codes}
        return {"codes": codes, "weights": pyro.sample("weights", weights_given_codes(prior, codes))}


def weights_given_codes(prior: CodeCovariance, codes: Tensor) -> TorchDistribution:
    """p(u | z) of all visits of all people, event ``(L, H)``."""
    root = prior.features * prior.variances.sqrt()[:, None, None]
    solved = torch.cholesky_solve(root, torch.linalg.cholesky(prior.blocks))
    eye = torch.eye(root.shape[-1], dtype=root.dtype, device=root.device)
    precision = eye + torch.einsum("lpth,lptk->lhk", root, solved)
    told = torch.einsum("lpth,ptl->lh", solved, codes - prior.mean)
    mean = torch.cholesky_solve(told[..., None], torch.linalg.cholesky(precision))[..., 0]
    return MultivariateNormal(mean, precision_matrix=precision).to_event(1)
