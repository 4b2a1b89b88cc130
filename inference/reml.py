"""Variance components of rates of change by restricted maximum likelihood, and what follows: effects, heritability, tests, predictions.

With V the covariance of the changes d and P = V⁻¹ − V⁻¹X(XᵀV⁻¹X)⁻¹XᵀV⁻¹, an iteration adds to the components the gradient of the log likelihood
divided by the average information ½ dᵀP V_i P V_j P d, and halves the step until the likelihood rises. Components stop at 0. The log likelihood is of
the changes themselves, log|XᵀV⁻¹X| in it and log|XᵀX| not.

Changes may have several columns, whose covariances are V times a scale λ_j each. The scales are those at which the likelihood is greatest given the
other components, λ_j = d_jᵀP d_j / n, so that what is shared costs one factor whatever their number.

References: Gilmour, Thompson & Cullis, Biometrics 1995 (average information); Bertsekas, SIAM Journal on Control and Optimization 1982 (steps beside
bounds); Self & Liang, JASA 1987 (tests on the boundary).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from scipy.optimize import brentq
from scipy.stats import chi2, norm
from torch import Tensor

from probmed.slopes import Collapsed, Factor, FollowUps, Relationship, among, collapse

_LOG_2PI = math.log(2 * math.pi)
_HALVINGS = 20
_SHRINKING, _NEGLIGIBLE = 0.1, 1e-4  # of a component in one step, until it is that small a part of where it started
_RIDGE = 1e-10  # relative, for components that cannot be told apart
_FLOOR = 1e-6  # of the noise, relative to the changes' variance: below it P loses its digits


@dataclass(frozen=True)
class ChangeData:
    """Changes since baseline with what explains them.

    Arguments:
        change: d, ``(N,)``, or ``(N, J)`` of which each column has a scale of its own; float64. visits: their times and persons.
        design: x, ``(P, q)``. relationship: kernels between the P people.
        baseline: "same", "none" or "free", as ``Longitudinal``.
    """

    change: Tensor
    visits: FollowUps
    design: Tensor
    relationship: Relationship
    baseline: str = "same"

    def __post_init__(self) -> None:
        people = {len(self.design), self.relationship.people, self.visits.people}
        if len(people) > 1 or len(self.change) != len(self.visits):
            raise ValueError(f"expected one number of people and changes for {len(self.visits)} visits, got {people} and {len(self.change)}")
        if not self.change.dtype == self.design.dtype == torch.float64:
            raise ValueError(f"expected float64, got {self.change.dtype} and {self.design.dtype}")
        if not bool(self.change.isfinite().all()) or not bool(self.design.isfinite().all()):
            raise ValueError("expected finite changes and covariates, got some that are not")
        seen = self.seen
        rank = int(torch.linalg.matrix_rank(self.design[seen]))
        if rank < self.design.shape[1]:
            raise ValueError(f"expected covariates that differ between the people seen again, got {self.design.shape[1]} columns of rank {rank}")
        if len(seen) <= rank:
            raise ValueError(f"expected more people seen again than the {rank} covariates, got {len(seen)}")

    @cached_property
    def seen(self) -> Tensor:
        """Persons with a follow-up, ``(S,)`` indices."""
        return self.visits.subject.unique()

    @cached_property
    def among_seen(self) -> Relationship:
        """The kernels between them."""
        return among(self.relationship, self.seen)

    @property
    def noise_hides_rates(self) -> bool:
        """Whether each was seen again once, after equal times, so that noise and a rate of one's own are the same."""
        return len(self.seen) == len(self.visits) and bool((self.visits.delta == self.visits.delta[0]).all())

    @property
    def count(self) -> int:
        """Number of variance components: those of the kernels, σ², and σ_B² where it is free."""
        return self.relationship.components + (2 if self.baseline == "free" else 1)

    @property
    def columns(self) -> Tensor:
        """Changes, ``(N, J)``."""
        return self.change.reshape(len(self.change), -1)

    def split(self) -> list[ChangeData]:
        """Each column alone, with the same relationship; the kernels between those seen are held once for all."""
        parts = [replace(self, change=self.columns[:, j : j + 1]) for j in range(self.columns.shape[1])]
        for part in parts:
            vars(part)["among_seen"] = self.among_seen
        return parts

    def noises(self, variances: Tensor) -> tuple[Tensor, Tensor]:
        """σ² and σ_B²."""
        noise = variances[self.relationship.components]
        if self.baseline == "free":
            return noise, variances[-1]
        return noise, noise if self.baseline == "same" else torch.zeros_like(noise)


@dataclass(frozen=True)
class _Solved:
    """At given components: the collapsed data, M's factor, scales, and generalised least squares."""

    told: Collapsed
    factor: Factor
    gram: Tensor
    coefficients: Tensor
    weighted: Tensor
    weighted_design: Tensor
    scales: Tensor
    log_likelihood: Tensor


def _solve(data: ChangeData, variances: Tensor, restricted: bool, scales: Tensor | None = None) -> _Solved:
    told = collapse(data.visits, data.change, *data.noises(variances))
    design, kernels = data.design[told.seen], data.relationship.components
    people, covariates = design.shape
    factor = data.among_seen.plus(variances[:kernels], 1 / told.precision)
    both = factor.solve(torch.cat([design, told.slope], 1))
    gram = design.mT @ both[:, :covariates]
    coefficients = torch.linalg.solve(gram, design.mT @ both[:, covariates:])
    residual = told.slope - design @ coefficients
    weighted = both[:, covariates:] - both[:, :covariates] @ coefficients
    squares = told.squares + (residual * weighted).sum(0)
    determinants = told.constant - 0.5 * (people * _LOG_2PI + factor.logdet())
    independent = len(data.change)
    if restricted:
        determinants = determinants + 0.5 * (covariates * _LOG_2PI - torch.linalg.slogdet(gram)[1])
        independent -= covariates
    if scales is None:
        scales = torch.ones_like(squares) if data.change.ndim == 1 else squares / independent
    value = len(squares) * determinants - 0.5 * (squares / scales + independent * scales.log()).sum()
    return _Solved(told, factor, gram, coefficients, weighted, both[:, :covariates], scales, value)


def log_likelihood(data: ChangeData, variances: Tensor, restricted: bool = True) -> Tensor:
    """log p(d | τ, σ²) with β at its generalised least squares, or, restricted, integrated out; nats.

    Arguments:
        variances: τ of each kernel, σ², and σ_B² where it is free.
    """
    return _solve(data, variances, restricted).log_likelihood


@torch.no_grad()
def average_information(data: ChangeData, variances: Tensor, solved: _Solved | None = None) -> Tensor:
    """½ dᵀP V_i P V_j P d, ``(components, components)``, which for large samples is the information of the components; a sum over columns.

    Arguments:
        solved: at these components, restricted, where it is known.
    """
    visits, inner, seen = data.visits, data.among_seen, data.seen
    noise, first = data.noises(variances)
    solved = _solve(data, variances, True) if solved is None else solved
    delta = visits.delta.to(data.change)[:, None]
    counts = visits.sums(torch.ones_like(delta[:, 0]))
    rho = (first / (noise + counts * first))[visits.subject][:, None]

    def shared(x: Tensor) -> Tensor:
        """11ᵀ x within each person."""
        return visits.sums(x)[visits.subject]

    def unrelated(x: Tensor) -> Tensor:
        """R⁻¹ x."""
        return (x - rho * shared(x)) / noise

    def project(x: Tensor) -> Tensor:
        """P x: what is collapsed goes through M, the rest through R alone."""
        outer = unrelated(x)
        rate = visits.sums(delta * outer)[seen] / solved.told.precision[:, None]
        weighted = solved.factor.solve(rate)
        weighted = weighted - solved.weighted_design @ torch.linalg.solve(solved.gram, data.design[seen].mT @ weighted)
        change = rate - weighted / solved.told.precision[:, None]
        every = x.new_zeros(visits.people, x.shape[1]).index_copy(0, seen, change)
        return outer - unrelated(delta * every[visits.subject])

    projected = project(data.columns / solved.scales.sqrt())
    rates = visits.sums(delta * projected)[seen]
    columns = []
    for k in range(inner.components):
        every = rates.new_zeros(visits.people, rates.shape[1]).index_copy(0, seen, inner.product(k, rates))
        columns.append(delta * every[visits.subject])
    columns.append(projected + (shared(projected) if data.baseline == "same" else 0.0))
    if data.baseline == "free":
        columns.append(shared(projected))
    stacked = torch.stack(columns, 1)
    return 0.5 * torch.einsum("nij,nkj->ik", stacked, project(stacked.flatten(1)).reshape(stacked.shape))


@dataclass(frozen=True)
class ChangeFit:
    """Estimates of the components and all that they imply.

    Arguments:
        variances: as ``log_likelihood`` has them. information: average, of them.
        coefficients: β, ``(q,)`` or ``(q, J)``; coefficient_covariance: of β where the scale is 1.
        scales: λ, ``(J,)``, of mean 1; where changes have no columns, 1.
        log_likelihood: restricted or not, as asked for. converged: whether the last step gained less than the tolerance.
    """

    data: ChangeData
    variances: Tensor
    information: Tensor
    coefficients: Tensor
    coefficient_covariance: Tensor
    scales: Tensor
    log_likelihood: float
    restricted: bool
    converged: bool
    iterations: int

    @property
    def covariance(self) -> Tensor:
        """Of the components, from their information; 0 for those at 0, and huge for those that cannot be told apart."""
        free = (self.variances > 0).nonzero()[:, 0]
        full = torch.zeros_like(self.information)
        unit, correlation = _in_own_units(self.information[free][:, free])
        full[free[:, None], free] = unit[:, None] * torch.linalg.inv(correlation) * unit
        return full

    @property
    def standard_errors(self) -> Tensor:
        """Of the components."""
        return self.covariance.diagonal().clamp_min(0).sqrt()

    @property
    def coefficient_errors(self) -> Tensor:
        """Standard errors of β, ``(q,)`` or ``(q, J)``."""
        return self._like_changes(torch.outer(self.coefficient_covariance.diagonal(), self.scales).sqrt())

    def _like_changes(self, x: Tensor) -> Tensor:
        """``(..., J)``, or ``(...)`` where changes have no columns."""
        return x.reshape(*x.shape[:-1], *self.data.change.shape[1:])

    def coefficient_intervals(self, level: float = 0.95) -> Tensor:
        """``(q, 2)`` or ``(q, J, 2)``, normal."""
        half = float(norm.ppf((1 + level) / 2)) * self.coefficient_errors
        return torch.stack([self.coefficients - half, self.coefficients + half], -1)

    def share(self, part: Sequence[int], whole: Sequence[int] | None = None) -> tuple[float, float]:
        """A ratio of sums of components, such as heritability, and its standard error by the delta method.

        Arguments:
            part, whole: indices of components. By default the whole is all kernels, of which rates consist, and the noise too where it is a part of
                the person: a trait that was measured once, of which every Δx is 1 and the baseline "none". Kernels count by their mean diagonal.
        """
        top, bottom = self._weights(part), self._weights(self._whole(whole))
        total = bottom @ self.variances
        ratio = (top @ self.variances) / total
        slope = (top - ratio * bottom) / total
        return float(ratio), float((slope @ self.covariance @ slope).clamp_min(0).sqrt())

    def share_interval(self, component: int, whole: Sequence[int] | None = None, level: float = 0.95) -> tuple[float, float]:
        """Of one component's ``share``: where twice the log likelihood, maximised over all else, falls by less than the quantile of χ²₁. Unlike the
        standard error it knows that shares lie between 0 and 1."""
        estimate, _ = self.share([component], whole)
        enough = float(chi2.ppf(level, 1))

        def fall(share: float) -> float:
            return 2 * (self.log_likelihood - self._at_share(component, whole, share)) - enough

        edge = 1e-3
        top = 1 - edge
        if math.isnan(estimate):
            return 0.0, 1.0  # nothing varies: no share is ruled out
        low = 0.0 if estimate <= edge or fall(0.0) <= 0 else float(brentq(fall, 0.0, min(estimate, top), xtol=edge))
        high = 1.0 if estimate >= top or fall(top) <= 0 else float(brentq(fall, estimate, top, xtol=edge))
        return low, high

    def _at_share(self, component: int, whole: Sequence[int] | None, share: float) -> float:
        """The log likelihood where a component has a share of the whole: it is then a multiple of what the others sum to."""
        weights = self._weights(self._whole(whole))
        others = [k for k in range(self.data.count) if k != component]
        mixing = torch.eye(self.data.count).to(self.variances)[:, others]
        mixing[component] = share / (1 - share) * weights[others] / weights[component]
        return fit_components(self.data, self.restricted, self.variances[others], mixing, tolerance=1e-6).log_likelihood

    def _whole(self, whole: Sequence[int] | None) -> Sequence[int]:
        if whole is not None:
            return whole
        visits = self.data.visits
        once = self.data.baseline == "none" and bool((visits.delta == 1).all()) and len(visits.subject.unique()) == len(visits)
        return range(self.data.count if once else self.data.relationship.components)

    def _weights(self, chosen: Sequence[int]) -> Tensor:
        """What a component adds to the variance of a person, on average; 0 for those that are not chosen."""
        relationship = self.data.relationship
        weights = torch.ones_like(self.variances)
        for k in range(relationship.components):
            weights[k] = relationship.diagonal(k).mean()
        return torch.zeros_like(weights).index_fill(0, torch.tensor(list(chosen)), 1.0) * weights

    def dual(self) -> Tensor:
        """α, ``(P, K)`` or ``(P, K, J)``: the rates' kernel machine, h_k = K_k α_k with α_k = τ_k M⁻¹(b − Xβ); 0 for people without a follow-up."""
        return self._like_changes(self._dual())

    def effects(self) -> Tensor:
        """ĥ_k of all people, ``(P, K)`` or ``(P, K, J)``: posterior mean of what each kernel explains of a rate (best linear unbiased prediction)."""
        alpha = self._dual()
        products = [self.data.relationship.product(k, alpha[:, k]) for k in range(alpha.shape[1])]
        return self._like_changes(torch.stack(products, 1))

    def _dual(self) -> Tensor:
        """``(P, K, J)``."""
        solved = self._solved()
        weighted = solved.weighted
        every = weighted.new_zeros(self.data.visits.people, weighted.shape[1]).index_copy(0, solved.told.seen, weighted)
        return every[:, None] * self.variances[: self.data.relationship.components, None]

    def rates(self, people: Tensor) -> Prediction:
        """Posterior of rates of any of the people, ``(M,)`` indices, each once: independent between columns.

        The uncertainty is that of h and of β̂ (kriging with an unknown mean); the components are taken as they were estimated.
        """
        mean, variance = self._rates(people)
        return Prediction(self._like_changes(mean), self._like_changes(torch.outer(variance, self.scales).sqrt()))

    def _rates(self, people: Tensor) -> tuple[Tensor, Tensor]:
        """Mean ``(M, J)``, and variance where the scale is 1, ``(M,)``."""
        data, solved = self.data, self._solved()
        chosen = torch.arange(len(people))
        one_hot = data.design.new_zeros(data.visits.people, len(people)).index_put((people, chosen), data.design.new_ones(()))
        columns = torch.stack([self.variances[k] * data.relationship.product(k, one_hot) for k in range(data.relationship.components)]).sum(0)
        own = columns[people, chosen]
        cross = columns[solved.told.seen]
        solution = solved.factor.solve(cross)
        mean = data.design[people] @ solved.coefficients + cross.mT @ solved.weighted
        lever = data.design[people] - solution.mT @ data.design[solved.told.seen]
        return mean, own - (cross * solution).sum(0) + ((lever @ self.coefficient_covariance) * lever).sum(1)

    def predict(self, visits: FollowUps) -> Prediction:
        """Changes at visits of any of the people, whose own follow-ups count as those of others do; uncertain as ``rates`` are."""
        data = self.data
        people, where = visits.subject.unique(return_inverse=True)
        mean, variance = self._rates(people)
        # The baseline's error, which all changes of a person share, is known in part from those that were seen.
        noise, first = data.noises(self.variances)
        delta = data.visits.delta.to(data.change)
        count, times = data.visits.sums(torch.stack([torch.ones_like(delta), delta], 1))[visits.subject].unbind(1)
        kappa = first / (noise + count * first)
        slope = visits.delta.to(data.change) - kappa * times
        left = first * (1 - count * kappa) + noise
        expected = kappa[:, None] * data.visits.sums(data.columns)[visits.subject] + slope[:, None] * mean[where]
        spread = torch.outer(slope**2 * variance[where] + left, self.scales).sqrt()
        return Prediction(self._like_changes(expected), self._like_changes(spread))

    def _solved(self) -> _Solved:
        return _solve(self.data, self.variances, self.restricted, self.scales)


@dataclass(frozen=True)
class Prediction:
    """Normal distributions, of changes as they would be measured or of rates; mean, sd: ``(N,)`` or ``(N, J)``."""

    mean: Tensor
    sd: Tensor

    def interval(self, level: float = 0.9) -> Tensor:
        """``(N, 2)`` or ``(N, J, 2)``."""
        half = float(norm.ppf((1 + level) / 2)) * self.sd
        return torch.stack([self.mean - half, self.mean + half], -1)


def fit_components(
    data: ChangeData,
    restricted: bool = True,
    start: Tensor | None = None,
    mixing: Tensor | None = None,
    iterations: int = 100,
    tolerance: float = 1e-10,
) -> ChangeFit:
    """Components at the maximum of their likelihood.

    Arguments:
        start: of the components, or of what they are mixed from; equal parts of the changes' variance by default.
        mixing: ``(components, free)``, not negative: the components are this times free numbers ≥ 0, which are estimated. The identity by default.
        tolerance: nats.

    Raises:
        FloatingPointError: where the likelihood is not finite at the start.
    """
    mixing = torch.eye(data.count).to(data.change) if mixing is None else mixing
    lowest = torch.zeros(data.count).to(data.change)
    lowest[data.relationship.components] = _FLOOR * data.change.square().mean()
    lowest = mixing.mT @ lowest
    free = torch.maximum(mixing.mT @ _start(data) / mixing.square().sum(0) if start is None else start, lowest)
    negligible = torch.maximum(_NEGLIGIBLE * (mixing.mT @ _start(data)), lowest)
    value, gradient, solved = _with_gradient(data, free, mixing, restricted)
    if not math.isfinite(value):
        raise FloatingPointError(f"the log likelihood is {value} at the start")
    converged, taken = False, 0
    while taken < iterations and not converged:
        taken += 1
        # A component that leaps to its bound may never come back: there information is great, and steps are small.
        floor = torch.where(free > negligible, _SHRINKING * free, lowest)
        information = mixing.mT @ average_information(data, mixing @ free, solved if restricted else None) @ mixing
        step, held = _step(free, floor, gradient, information)
        size, gain = 1.0, -math.inf
        for _ in range(_HALVINGS):
            candidate = torch.maximum(free + size * step, floor)
            found, slope, there = _with_gradient(data, candidate, mixing, restricted)
            gain = found - value
            if gain >= 0:
                break
            size /= 2
        if not gain >= 0:
            # No step gains: at the maximum, as near as its value can tell.
            converged = float(step @ gradient) < math.sqrt(tolerance)
            break
        free, value, gradient, solved = candidate, found, slope, there
        converged = gain < tolerance and not held
    # Of components and scales only the product is determined.
    variances = mixing @ free
    unit = _solve(data, variances, restricted).scales.mean()
    return at_components(data, unit * variances, restricted, converged, taken)


def at_components(
    data: ChangeData,
    variances: Tensor,
    restricted: bool = True,
    converged: bool = True,
    iterations: int = 0,
    scales: Tensor | None = None,
) -> ChangeFit:
    """Everything that follows from given components, such as those that other people gave.

    Arguments:
        scales: of the columns, ``(J,)``; by default those at which the likelihood is greatest.
    """
    with torch.no_grad():
        solved = _solve(data, variances, restricted, scales)
        return ChangeFit(
            data,
            variances,
            average_information(data, variances),
            solved.coefficients.reshape(-1, *data.change.shape[1:]),
            torch.linalg.inv(solved.gram),
            solved.scales,
            float(solved.log_likelihood),
            restricted,
            converged,
            iterations,
        )


def _step(free: Tensor, floor: Tensor, gradient: Tensor, information: Tensor) -> tuple[Tensor, bool]:
    """The gradient divided by the information, along which the likelihood rises. Components that it would take below their floor go there by
    themselves, or stay where the likelihood falls that way: in a joint step that is cut off there the others would follow what those cannot do.

    Returns:
        The step, and whether a component had to stay, which may move after the others.
    """
    step, held = torch.zeros_like(free), False
    movable = torch.ones_like(free, dtype=torch.bool)
    while bool(movable.any()):
        chosen = movable.nonzero()[:, 0]
        unit, correlation = _in_own_units(information[chosen][:, chosen])
        step[chosen] = unit * torch.linalg.solve(correlation, unit * gradient[chosen])
        below = movable & (free + step < floor)
        if not bool(below.any()):
            break
        # Those that want to fall first: without them the rest may have no such step.
        falling = below & (gradient < 0)
        held = held or not bool(falling.any())
        out = falling if bool(falling.any()) else below
        step = torch.where(out, torch.where(gradient < 0, floor - free, 0.0), step)
        movable &= ~out
    return step, held


def _in_own_units(information: Tensor) -> tuple[Tensor, Tensor]:
    """Units, and an information in them that can be inverted: a small noise has one of another size than a kernel's variance."""
    unit = information.diagonal().clamp_min(torch.finfo(information.dtype).tiny).rsqrt()
    return unit, unit[:, None] * information * unit + _RIDGE * torch.eye(len(information)).to(information)


def _start(data: ChangeData) -> Tensor:
    """The changes' variance in equal parts, in the units of rates for kernels."""
    total = (data.change - data.change.mean(0)).square().mean()
    rate = total / data.visits.delta.to(data.change).square().mean()
    kernels = data.relationship.components
    means = torch.stack([data.relationship.diagonal(k).mean() for k in range(kernels)]) if kernels else total[None][:0]
    return torch.cat([rate / means.clamp_min(1e-300), total.expand(data.count - kernels)]) / data.count


def _with_gradient(data: ChangeData, free: Tensor, mixing: Tensor, restricted: bool) -> tuple[float, Tensor, _Solved | None]:
    """The log likelihood, its gradient, and what the information there needs."""
    leaf = free.clone().requires_grad_()
    try:
        with torch.enable_grad():
            solved = _solve(data, mixing @ leaf, restricted)
            (gradient,) = torch.autograd.grad(solved.log_likelihood, leaf)
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        return -math.inf, torch.zeros_like(free), None
    return float(solved.log_likelihood.detach()), gradient, solved


@dataclass(frozen=True)
class ComponentTest:
    """statistic: twice the log likelihood ratio; p_value: of ½χ²₀ + ½χ²₁, for the component lies on its boundary under the null."""

    statistic: float
    p_value: float


def compare_component(fit: ChangeFit, component: int) -> ComponentTest:
    """The likelihood-ratio test of one component against 0, all others being estimated."""
    kept = [k for k in range(fit.data.count) if k != component]
    null = fit_components(fit.data, fit.restricted, fit.variances[kept], torch.eye(fit.data.count).to(fit.variances)[:, kept])
    statistic = max(0.0, 2 * (fit.log_likelihood - null.log_likelihood))
    return ComponentTest(statistic, float(0.5 * chi2.sf(statistic, 1)) if statistic > 0 else 1.0)
