"""How bodies deform between visits, from scans: what `probmed train longitudinal --scans` does, as one function, and forecasts from it.

Register the atlas to each baseline scan, and each baseline to its follow-ups → carry the logarithms of the latter to the atlas → their coefficients
in a basis of fields → variance components and effects, as of a scalar → for a baseline scan and a time, the deformation to come with its posterior.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from hashlib import sha256
from pathlib import Path

import pandas as pd
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional

from probmed.atlases import LabelAtlas
from probmed.fields import along_axes
from probmed.grids import Grid, average_onto, interpolation_matrices, sample
from probmed.inference.checkpoints import fingerprint
from probmed.inference.reml import ChangeFit, Prediction, fit_components
from probmed.models.longitudinal_field import CosineFields, FieldBasis, PrincipalFields, Transport
from probmed.slopes import FollowUps, collapse
from probmed.tables import Genotypes, Joined, Visits
from probmed.transforms import Affine, Displacement, Transform, Velocity, physical_gradient
from probmed.volumes import UnusableInput, Volume, atomic_write, read_scan
from probmed.workflows.longitudinal import RateResult, RateSettings, cohort_of, explained, fit_rates, kernels_of
from probmed.workflows.propagation import called, label_shares
from probmed.workflows.registration import RegistrationSettings, check_pair, places, register

EQUATION = "scan_t = scan_B ∘ exp(−Δx w), (Dφ)⁻¹ w∘φ = Σ_j b_j (xᵀβ_j + h_Gj + h_Cj + h_yj + h_own,j)"
BASES = ("principal", "cosine")
LEVEL = 0.9  # of intervals
_SPACING_MM, _NODES = 3.0, 24  # of the lattice of rates, and along the shortest side at least
_TELLABLE = 1e-6  # share of the mean square, beyond float32's errors
_FOLDED = 1e-6  # of a determinant, below which there is no logarithm
_MARGIN = 5  # nodes, by which a mask's window is wider on both sides together, and over which it falls
_FORMAT = "probmed registration 1"
_Tell = Callable[[str, float], None]


@dataclass(frozen=True)
class GrowthSettings:
    """How rates of deformation are measured and explained.

    Arguments:
        rates: which columns explain them; its scalar is the column of scans.
        spacing_mm: of the lattice over the atlas on which rates are held; the atlas's own where that is coarser. By default 3, or, of a small atlas,
            what puts 24 nodes along its shortest side.
        basis: "principal", the principal components of the observed rates, or "cosine", smooth waves that no data choose.
        share: of the rates' mean square that the principal components keep; most: of their number.
        finest_mm: half the wavelength of the finest cosine.
        separate: whether each coefficient has variance components of its own, in place of shares that are common to all.
        to_atlas: how a baseline scan is registered to the atlas. within: how follow-ups are to the baseline; their affine map is rigid.
    """

    rates: RateSettings
    spacing_mm: float | None = None
    basis: str = "principal"
    share: float = 0.99
    most: int = 50
    finest_mm: float = 12.0
    separate: bool = True
    to_atlas: RegistrationSettings = field(default_factory=lambda: RegistrationSettings(apart=True))
    within: RegistrationSettings = field(default_factory=lambda: RegistrationSettings(symmetric=True))

    def __post_init__(self) -> None:
        if self.basis not in BASES:
            raise ValueError(f"expected a basis of {BASES}, got {self.basis!r}")
        numbers = [self.most, self.finest_mm, *([] if self.spacing_mm is None else [self.spacing_mm])]
        if not 0 < self.share <= 1 or not min(numbers) > 0:
            raise ValueError(f"expected a share in (0, 1] and positive numbers, got {self.share} and {numbers}")


@dataclass(frozen=True)
class LabelledScan:
    """An atlas: an image with labels on its grid, and their names.

    Arguments:
        mask: the part of it that scans are matched to and whose rates are held, ``(*shape)`` bool; all of it by default.
    """

    scan: Volume
    labels: Volume
    names: dict[int, str]
    mask: Tensor | None = None

    @classmethod
    def of(cls, atlas: LabelAtlas) -> LabelledScan:
        """The brain of a probabilistic atlas, with the likeliest label of each voxel: its template need not have a skull where scans have one.

        Raises:
            ValueError: for one without a template.
        """
        if atlas.template is None:
            raise ValueError("expected an atlas with a template image, got one without")
        labels = torch.tensor(atlas.indices)[atlas.probabilities.argmax(0)] * atlas.brain_mask
        names = {index: name for index, name in zip(atlas.indices, atlas.names, strict=True) if name in atlas.brain}
        return cls(Volume.from_grid(atlas.template, atlas.grid), Volume.from_grid(labels, atlas.grid), names, atlas.brain_mask)

    def lattice(self, spacing_mm: float | None = None) -> Grid:
        """Over its field of view; the default as ``GrowthSettings`` has it."""
        if spacing_mm is None:
            shortest = min(n * h for n, h in zip(self.scan.shape, self.scan.spacing, strict=True))
            spacing_mm = min(_SPACING_MM, shortest / _NODES)
        return coarser(self.scan.grid, spacing_mm)

    def window(self, lattice: Grid) -> Tensor:
        """1 in the mask and near it, falling to 0 beyond, ``(*lattice.shape)``."""
        if self.mask is None:
            return torch.ones(lattice.shape)
        d = lattice.ndim
        widen, smooth = (functional.max_pool2d, functional.avg_pool2d) if d == 2 else (functional.max_pool3d, functional.avg_pool3d)
        near = widen(average_onto(self.mask.float()[None], self.scan.grid, lattice).ceil(), _MARGIN, 1, _MARGIN // 2)
        return smooth(near, _MARGIN, 1, _MARGIN // 2)[0]


def coarser(grid: Grid, spacing_mm: float) -> Grid:
    """Over the same field of view, nowhere finer than the grid itself."""
    return grid.at_spacing([max(h, spacing_mm) for h in grid.spacing])


@dataclass(frozen=True)
class Registered:
    """What is kept of a registration: A and v of A ∘ exp(v), fixed to moving world."""

    affine: Affine
    velocity: Velocity

    @property
    def transform(self) -> Transform:
        return self.affine @ self.velocity.exp().with_exact_inverse()


@dataclass(frozen=True)
class Registrations:
    """Registrations that are kept as files, named for what went into them: a run that was stopped goes on, and ends in the same numbers.

    Arguments:
        folder: where they are kept; made if missing. others: folders where more may be.
    """

    folder: Path
    others: tuple[Path, ...] = ()
    seed: int = 0
    device: str = "auto"

    def __call__(self, moving: Volume, fixed: Volume, settings: RegistrationSettings, mask: Tensor | None = None) -> Registered:
        """
        Arguments:
            mask: the part of the fixed image that is to be matched.

        Raises:
            UnusableInput: as ``register``, and for a file that cannot be read or written.
        """
        inputs = fingerprint([moving.data, moving.grid.affine, fixed.data, fixed.grid.affine, mask])
        name = sha256(f"{_FORMAT} {inputs} {settings} {self.seed}".encode()).hexdigest()[:32] + ".safetensors"
        for place in (self.folder, *self.others):
            if (place / name).exists():
                return _read_registered(place / name)
        result = register(moving, fixed, seed=self.seed, device=self.device, settings=settings, mask=mask)
        velocity = result.velocity or Velocity(fixed.grid, torch.zeros(fixed.grid.ndim, *fixed.shape))
        self.folder.mkdir(parents=True, exist_ok=True)
        tensors = {"matrix": result.affine.matrix, "velocity": velocity.field, "affine": velocity.grid.affine}
        with atomic_write(self.folder / name) as temporary:
            save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, temporary)
        return Registered(result.affine, velocity)

    def also(self, folder: Path) -> Registrations:
        """Looking in another folder too."""
        return replace(self, others=(*self.others, folder))

    def to_atlas(self, scan: Volume, atlas: LabelledScan, settings: RegistrationSettings) -> Transform:
        """φ, the atlas's world to the scan's, mm."""
        return self(scan, atlas.scan, settings, atlas.mask).transform


def _read_registered(path: Path) -> Registered:
    try:
        with safe_open(path, framework="pt") as file:
            matrix, velocity, affine = (file.get_tensor(key) for key in ("matrix", "velocity", "affine"))
    except (SafetensorError, OSError) as error:
        raise UnusableInput(path, f"is no registration that can be read ({error})", "remove it, and it is made again") from error
    return Registered(Affine(matrix), Velocity(Grid(tuple(velocity.shape[1:]), affine), velocity))


@dataclass(frozen=True)
class Growth:
    """Rates of deformation, and what explains them.

    Arguments:
        rates: of the coefficients c, mm per year, whose shares are common to all.
        fits: of groups of coefficients, in order, with components of their own: all of them, or each alone.
        basis: b, on the atlas's lattice.
    """

    rates: RateResult
    fits: tuple[ChangeFit, ...]
    basis: FieldBasis
    atlas: LabelledScan
    settings: GrowthSettings

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the coefficients."""
        return column_names(self.basis.columns)

    def rate(self, subject: str) -> Prediction:
        """Posterior of a person's coefficients, ``(J,)`` each, per year.

        Raises:
            ValueError: for someone who is not in the tables.
        """
        subjects = self.rates.joined.subjects
        if subject not in subjects:
            raise ValueError(f"expected people of the tables, got {subject!r}")
        found = [fit.rates(torch.tensor([subjects.index(subject)])) for fit in self.fits]
        return Prediction(torch.cat([each.mean[0] for each in found]), torch.cat([each.sd[0] for each in found]))

    def share_table(self) -> pd.DataFrame:
        """A row a coefficient with components of its own: its name, and the share of its rates' variance that each kernel explains."""
        kernels = range(len(self.rates.components))
        shares = [[fit.share([k])[0] for k in kernels] for fit in self.fits]
        return pd.DataFrame(shares, columns=list(self.rates.components)).assign(coefficient=self.columns)[["coefficient", *self.rates.components]]

    def effect_maps(self, draws: int = 100, seed: int = 0) -> dict[str, tuple[Tensor, Tensor]]:
        """Yearly relative growth of volume per unit of each covariate, div Σ_j β_j b_j, and its standard deviation; on the atlas's voxels."""
        generator = torch.Generator().manual_seed(seed)
        estimates, errors = (torch.cat([getattr(fit, name) for fit in self.fits], 1) for name in ("coefficients", "coefficient_errors"))
        matrices = interpolation_matrices(self.basis.grid, self.atlas.scan.grid, torch.zeros(()))
        maps = {}
        for name, estimate, error in zip(self.rates.coefficients, estimates, errors, strict=True):
            drawn = estimate + error * torch.randn(draws, len(estimate), generator=generator, dtype=torch.float64)
            growth = torch.stack([_divergence(self.basis.fields(each[None])[0], self.basis.grid) for each in (estimate, *drawn)])
            mean, sd = growth[0], growth[1:].std(0)
            maps[name] = along_axes(mean, matrices), along_axes(sd, matrices)
        return maps


def _divergence(vectors: Tensor, grid: Grid) -> Tensor:
    return physical_gradient(vectors.movedim(0, -1), grid).diagonal(dim1=-2, dim2=-1).sum(-1)


def column_names(count: int) -> tuple[str, ...]:
    """Of coefficients in a table."""
    return tuple(f"coefficient_{number:04d}" for number in range(1, count + 1))


def fit_growth(
    visits: Visits,
    settings: GrowthSettings,
    atlas: LabelledScan,
    registrations: Registrations,
    genotypes: Genotypes | None = None,
    *,
    progress: _Tell | None = None,
) -> Growth:
    """Register a cohort, and explain how its bodies change.

    Arguments:
        visits: with ``settings.rates.scalar`` among its columns of scans, and whatever else the settings name.
        genotypes: of the same people; those without are left out.
        progress: called with a stage's name and the share of the work done, in [0, 1].

    Raises:
        UnusableInput: for scans that are missing at baseline, cannot be read, or are of other dimensions than the atlas; where no one has a follow-up
            scan; and as ``fit_rates`` and ``register``.
    """
    tell = progress or (lambda stage, share: None)
    joined = cohort_of(visits, settings.rates, genotypes)
    scans = settings.rates.scalar
    check_scans(joined.visits, scans, atlas)
    rows = follow_up_rows(joined.visits, scans)
    follow_ups = FollowUps(joined.visits.years_since_baseline[rows], joined.visits.person[rows], len(joined.subjects))
    kernels = dict(kernels_of(joined, settings.rates, joined.subjects))
    _check_explicable(joined, settings.rates, follow_ups, kernels)
    fields = transported_changes(joined.visits, rows, settings, atlas, registrations, lambda share: tell("registering", share))
    tell("components", 1.0)
    basis = choose_basis(fields, follow_ups, settings, atlas.lattice(settings.spacing_mm), visits.path)
    table = with_coefficients(joined.visits, rows, basis.coefficients(fields))
    result = fit_rates(table, settings.rates, joined.genotypes, columns=column_names(basis.columns), kernels=kernels)
    fits = tuple(map(fit_components, result.fit.data.split())) if settings.separate else (result.fit,)
    unsettled = [name for name, fit in zip(column_names(basis.columns), fits, strict=False) if not fit.converged]
    if settings.separate and unsettled:
        names = f"{unsettled[0]} and {len(unsettled) - 1} others" if len(unsettled) > 1 else unsettled[0]
        warnings.warn(f"{visits.path}: variance components of {names} had not converged; --common has them in common", stacklevel=2)
    return Growth(replace(result, joined=replace(result.joined, omissions=joined.omissions)), fits, basis, atlas, settings)


def check_scans(visits: Visits, scans: str, atlas: LabelledScan, *, from_baseline: bool = True) -> None:
    """Refuse, before any work, scans that cannot be registered.

    Arguments:
        from_baseline: whether everyone needs a scan at baseline.

    Raises:
        UnusableInput: for a baseline without a scan, one that cannot be read, or has other axes than the atlas.
    """
    first = visits.baseline[scans]
    if from_baseline and first.isna().any():
        raise UnusableInput(visits.path, f"has no scan at the baseline of {first.index[first.isna()][0]}", "give it, or leave the subject out")
    for path in visits.table[scans].dropna():
        check_pair(read_scan(path), atlas.scan, RegistrationSettings(apart=True))


def follow_up_rows(visits: Visits, scans: str) -> Tensor:
    """Places of the later visits with a scan, ``(N,)``.

    Raises:
        UnusableInput: where there is none.
    """
    later = visits.table["subject"].duplicated() & visits.table[scans].notna()
    if not later.any():
        raise UnusableInput(visits.path, f"has no follow-up scan of anyone in column {scans}", "give people two visits or more, each with a scan")
    return torch.tensor(later.to_numpy()).nonzero()[:, 0]


def _check_explicable(joined: Joined, settings: RateSettings, follow_ups: FollowUps, kernels: Mapping[str, Tensor]) -> None:
    """Refuse too few people or collinear covariates before the registrations."""
    explained(joined, settings, follow_ups, torch.zeros(len(follow_ups), dtype=torch.float64), kernels=kernels)


def transported_changes(
    visits: Visits,
    rows: Tensor,
    settings: GrowthSettings,
    atlas: LabelledScan,
    registrations: Registrations,
    tell: Callable[[float], None] = lambda share: None,
) -> Tensor:
    """Log velocities from each person's baseline to later visits, seen in the atlas: ``(N, d, *lattice)`` mm.

    Arguments:
        rows: places of the later visits, of which each person's are together.
    """
    scans, lattice = visits.table[settings.rates.scalar], atlas.lattice(settings.spacing_mm)
    window = atlas.window(lattice)
    fields: list[Tensor] = []
    for person in visits.person[rows].unique_consecutive().tolist():
        baseline = read_scan(visits.baseline[settings.rates.scalar].iloc[person])
        transport = Transport(registrations.to_atlas(baseline, atlas, settings.to_atlas), lattice)
        for row in rows[visits.person[rows] == person].tolist():
            change = registrations(read_scan(scans.iloc[row]), baseline, within_person(settings, baseline.grid.ndim)).velocity
            fields.append(window * transport(change).field)
            tell(len(fields) / len(rows))
    return torch.stack(fields)


def within_person(settings: GrowthSettings, ndim: int) -> RegistrationSettings:
    """Scans of one person differ by a rigid map and by what changed."""
    return replace(settings.within, affine=ndim * (ndim + 1) // 2)


def choose_basis(fields: Tensor, visits: FollowUps, settings: GrowthSettings, lattice: Grid, source: Path) -> FieldBasis:
    """
    Arguments:
        fields: ``(N, d, *lattice.shape)`` mm.
        source: what messages name.

    Raises:
        UnusableInput: where nothing changes between visits.
    """
    if not bool((fields != 0).any()):
        raise UnusableInput(source, "names follow-up scans that are no different from their baselines", "check the paths")
    if settings.basis == "cosine":
        return CosineFields.of(lattice, settings.finest_mm)
    return principal_fields(fields, visits, lattice, settings.rates.baseline, settings.share, settings.most)


def principal_fields(
    fields: Tensor, visits: FollowUps, lattice: Grid, baseline: str = "same", share: float = 0.99, most: int = 50
) -> PrincipalFields:
    """Principal components of people's rates, each weighted by the precision with which their visits tell it. Not centred: the mean rate is one too.

    Arguments:
        fields: changes, ``(N, d, *lattice.shape)``.
        baseline: of ``Longitudinal``.
        share: of the mean square that is kept; most: of their number.
    """
    one = torch.ones((), dtype=torch.float64)
    # Rates are linear in the changes: their weights, those of unit changes.
    told = collapse(visits, torch.eye(len(visits), dtype=torch.float64), one, one if baseline == "same" else torch.zeros_like(one))
    weights = told.precision.sqrt()[:, None] * told.slope
    flat = fields.flatten(1)
    values, vectors = torch.linalg.eigh(weights @ (flat @ flat.mT).double() @ weights.mT)
    values, vectors = values.flip(0).clamp_min(0), vectors.flip(1)
    kept = (values > _TELLABLE * values[0]) & (values.cumsum(0) - values < share * values.sum())
    count = min(most, int(kept.sum()))
    mixing = (vectors[:, :count] * (lattice.numel / values[:count]).sqrt()).mT @ weights
    return PrincipalFields(lattice, torch.tensordot(mixing.to(fields), fields, 1))


def with_columns(visits: Visits, rows: Tensor, values: Tensor, names: Sequence[str]) -> Visits:
    """A table with further scalars: 0 at each person's first visit, from which change is counted, those given at ``rows``, else missing.

    Arguments:
        rows: ``(N,)`` places of visits; values: theirs, ``(N, J)``.
    """
    every = torch.full((len(visits), len(names)), torch.nan, dtype=torch.float64)
    every[torch.tensor((~visits.table["subject"].duplicated()).to_numpy())] = 0.0
    every[rows] = values
    table = pd.DataFrame(every.numpy(), columns=list(names), index=visits.table.index)
    return replace(visits, table=pd.concat([visits.table, table], axis=1), scalars=(*visits.scalars, *names))


def with_coefficients(visits: Visits, rows: Tensor, coefficients: Tensor) -> Visits:
    """``with_columns`` of coefficients ``(N, J)``."""
    return with_columns(visits, rows, coefficients, column_names(coefficients.shape[1]))


@dataclass(frozen=True)
class Body:
    """A baseline scan.

    Arguments:
        from_atlas: φ, the atlas's world to the scan's, mm.
        labels: of the scan, or of the atlas where its own are not known. to_labels: from the scan's world to theirs, mm.
        names: of the labels.
    """

    scan: Volume
    from_atlas: Transform
    labels: Volume
    to_labels: Transform
    names: dict[int, str]

    @classmethod
    def of(cls, scan: Volume, from_atlas: Transform, atlas: LabelledScan, labels: Volume | None = None) -> Body:
        """With labels of its own, or else the atlas's carried there."""
        if labels is not None:
            return cls(scan, from_atlas, labels, Affine.identity(scan.grid.ndim), atlas.names)
        return cls(scan, from_atlas, atlas.labels, from_atlas.inverse(), atlas.names)

    @classmethod
    def of_atlas(cls, atlas: LabelledScan) -> Body:
        """The atlas's own, for a person without a baseline scan."""
        same = Affine.identity(atlas.scan.grid.ndim)
        return cls(atlas.scan, same, atlas.labels, same, atlas.names)


@dataclass(frozen=True)
class Forecast:
    """A follow-up that has not been made; images on the baseline scan's voxels.

    Arguments:
        years: since the baseline.
        transform: where the follow-up's points come from in the baseline, mm; inverse: where the baseline's go.
        predicted: the scan, ``(*shape)``. labels: ``(*shape)`` int64.
        volumes: a row a label: index, name, ``baseline_ml``, then mean, sd and the ends of the 90 % interval (low, high) at follow-up, ml.
        growth, growth_sd: log det over the years until then, per year, posterior mean and standard deviation, ``(*shape)``.
        shrinking: posterior probability that det < 1.
        samples: the scan under each of the first draws, ``(S, *shape)``.
    """

    baseline: Volume
    years: float
    transform: Displacement
    inverse: Displacement
    predicted: Tensor
    labels: Tensor
    volumes: pd.DataFrame
    growth: Tensor
    growth_sd: Tensor
    shrinking: Tensor
    samples: Tensor


def forecast(
    body: Body, basis: FieldBasis, rate: Prediction, years: float, *, draws: int = 200, samples: int = 0, seed: int = 0
) -> Forecast:
    """What a scan will look like.

    The intervals are of the body, not of what a scanner and a segmentation would make of it. They have what is not known of the rate: of β, h, and
    what is the person's own; not the errors of the registration to the atlas and of the labels.

    Arguments:
        rate: of the person's coefficients, ``(J,)`` each, per year.
        years: since the baseline.
        draws: from the posterior. samples: how many of them become scans.
    """
    white = torch.randn(draws, len(rate.mean), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return forecast_from(body, basis, rate.mean, rate.mean + rate.sd * white, years, samples)


def forecast_from(body: Body, basis: FieldBasis, mean: Tensor, drawn: Tensor, years: float, samples: int = 0) -> Forecast:
    """``forecast`` from draws of the person's coefficients, per year; on a lattice over the scan as fine as the basis's.

    Arguments:
        mean: of which the deformation is, ``(J,)``; drawn: of which the intervals are, ``(draws, J)``. samples: how many of them become scans.
    """
    if not 0 <= samples <= len(drawn):
        raise ValueError(f"expected 0 to {len(drawn)} samples, got {samples}")
    grid = body.scan.grid
    lattice = coarser(grid, min(basis.grid.spacing))
    transport, weights = Transport(body.from_atlas.inverse(), lattice), RegionWeights.of(body, lattice)

    def velocity(coefficients: Tensor) -> Velocity:
        return transport(Velocity(basis.grid, basis.fields(coefficients[None])[0]))

    def seen_at(points: Tensor) -> Tensor:
        return sample(body.scan.data[None], grid, points, fill="edge")[0]

    volumes, yearly = [], _Moments()
    for coefficients in drawn:
        determinant = Velocity(lattice, years * velocity(coefficients).field).exp(both=False).jacobian_determinant(lattice)
        volumes.append(weights.volumes(determinant))
        yearly.add(determinant.clamp_min(_FOLDED).log() / years)
    def flow_of(coefficients: Tensor) -> Displacement:
        return Velocity(lattice, years * velocity(coefficients).field).exp().with_exact_inverse()

    flow = flow_of(mean)
    back = flow.inverse()
    there = places(back, grid)
    scans = [seen_at(places(flow_of(each).inverse(), grid)) for each in drawn[:samples]]
    fine = interpolation_matrices(lattice, grid, yearly.mean)
    return Forecast(
        baseline=body.scan,
        years=years,
        transform=back,
        inverse=flow,
        predicted=seen_at(there),
        labels=sample(body.labels.data[None], body.labels.grid, body.to_labels(there), "nearest")[0],
        volumes=weights.table(torch.stack(volumes)),
        growth=along_axes(yearly.mean, fine),
        growth_sd=along_axes(yearly.sd, fine),
        shrinking=along_axes(yearly.below_zero, fine),
        samples=torch.stack(scans) if samples else body.scan.data.new_zeros(0, *grid.shape),
    )


class _Moments:
    """Mean, standard deviation and share below zero of maps, as they come."""

    mean: Tensor

    def __init__(self) -> None:
        self._count = 0

    def add(self, values: Tensor) -> None:
        if not self._count:
            self.mean, self._squares, self._below = (torch.zeros_like(values) for _ in range(3))
        self._count += 1
        departure = values - self.mean
        self.mean = self.mean + departure / self._count
        self._squares = self._squares + departure * (values - self.mean)
        self._below = self._below + (values < 0)

    @property
    def sd(self) -> Tensor:
        return (self._squares / max(self._count - 1, 1)).sqrt()

    @property
    def below_zero(self) -> Tensor:
        return self._below / self._count


@dataclass(frozen=True)
class RegionWeights:
    """What each node of a lattice counts in each region's volume, ml, where it is multiplied by the det there: a volume at follow-up is the integral
    of det over the region at baseline.

    Arguments:
        indices, names: of the labels but 0, ``(K,)``. weights: ``(K, nodes)`` float64.
    """

    indices: tuple[int, ...]
    names: tuple[str, ...]
    weights: Tensor

    @classmethod
    def of(cls, body: Body, lattice: Grid) -> RegionWeights:
        labels, grid = body.labels, body.scan.grid
        indices = tuple(int(k) for k in labels.data.unique() if k != 0)
        code = torch.zeros_like(labels.data)
        for number, index in enumerate(indices, 1):
            code[labels.data == index] = number
        voxels, label, share = label_shares(code, labels.grid, body.to_labels, grid)
        matrices = [m.mT for m in interpolation_matrices(lattice, grid, share)]
        weights = []
        for number in range(1, len(indices) + 1):
            mine = label == number
            region = share.new_zeros(grid.numel).index_add(0, voxels[mine], share[mine])
            weights.append(along_axes(region.reshape(grid.shape), matrices).flatten().double())
        voxel_ml = body.scan.as_3d().grid.voxel_volume / 1000
        return cls(indices, called(labels, body.names), voxel_ml * torch.stack(weights))

    def volumes(self, determinant: Tensor) -> Tensor:
        """``(K,)`` ml."""
        return self.weights @ determinant.flatten().double()

    def table(self, draws: Tensor) -> pd.DataFrame:
        """As ``Forecast`` has it, of volumes ``(draws, K)``."""
        ends = torch.tensor([(1 - LEVEL) / 2, (1 + LEVEL) / 2], dtype=draws.dtype)
        low, high = torch.quantile(draws, ends, dim=0)
        columns = {"baseline_ml": self.weights.sum(1), "mean": draws.mean(0), "sd": draws.std(0), "low": low, "high": high}
        return pd.DataFrame({"index": self.indices, "name": self.names} | {name: values.tolist() for name, values in columns.items()})
