"""Codes of how bodies change, and forecasts from them; ``shape_code_training`` finds them.

Register the atlas to each baseline scan, and each baseline to its follow-ups → carry the logarithms of the latter to the atlas → their
coefficients in a basis of fields → a variational autoencoder of these, whose codes have a Gaussian process over people and time as prior: nothing at
the baseline, and a rate that follows genes, clinic and the person → for anyone with a baseline scan and any time draws of codes, hence of the scan
to come.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import pandas as pd
import torch
from torch import Tensor, nn

from probmed.inference.gp_prior_smoothed import smoothed_forecast
from probmed.inference.parameters import seeded
from probmed.models.gp_prior_vae import CodePrior, Cohort, GPPriorGuide, GPPriorVAE, Linear, PixelNormal, Slope, pad_visits
from probmed.models.longitudinal_field import FieldBasis
from probmed.tables import Genotypes, Joined, Visits
from probmed.workflows.growth import (
    Forecast,
    GrowthSettings,
    LabelledScan,
    Registrations,
    forecast_from,
    transported_changes,
)
from probmed.workflows.growth_outputs import body_of, measurable, tell_of_atlas, wanted_forecasts
from probmed.workflows.longitudinal import cohort_of, design_of, kernels_of, reference_people
from probmed.workflows.longitudinal_outputs import check_in_genotypes, seen_in, together, with_times_of

EQUATION = "z_l ~ GP(Δx xᵀβ_l, Δx Δx' Σ_k τ_lk K_k + noise), c_j ~ N(f_j(z) − f_j(0), σ_j²), scan_t = scan_B ∘ exp(−Σ_j c_j b_j)"


@dataclass(frozen=True)
class CodeSettings:
    """The autoencoder, and what its codes follow.

    Arguments:
        growth: columns, lattice, basis and registrations.
        codes: L. hidden: width of the two hidden layers of encoder and decoder.
        steps, learning_rate: of the training on all visits at once.
    """

    growth: GrowthSettings
    codes: int = 2
    hidden: int = 32
    steps: int = 1500
    learning_rate: float = 5e-3

    def __post_init__(self) -> None:
        if min(self.codes, self.hidden, self.steps) < 1 or not self.learning_rate > 0:
            raise ValueError(f"expected positive numbers, got {self.codes}, {self.hidden}, {self.steps} and {self.learning_rate}")


class Perceptron(nn.Module):
    """A linear map and a network of two hidden layers beside it, which begins at zero.

    Arguments:
        centred: whether zeros give zeros.
    """

    def __init__(self, inputs: int, hidden: int, outputs: int, centred: bool = False) -> None:
        super().__init__()
        self.centred = centred
        self.linear = nn.Linear(inputs, outputs)
        last = nn.Linear(hidden, outputs)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.bent = nn.Sequential(nn.Linear(inputs, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU(), last)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.linear(x) + self.bent(x)
        if not self.centred:
            return y
        none = torch.zeros_like(x[:1])
        return y - self.linear(none) - self.bent(none)  # type: ignore[no-any-return]


@dataclass(frozen=True)
class ShapeCodes:
    """A trained autoencoder.

    Arguments:
        basis: b. visits: those that it was trained on.
        coefficients: c of each visit, ``(N, J)`` in units of ``scale`` mm, NaN at baselines and without a scan.
        names: of the kernels. time_scale: years that are one in its time.
        joined: the people, and who was left out; None of a run that was read again.
    """

    settings: CodeSettings
    atlas: LabelledScan
    basis: FieldBasis
    model: GPPriorVAE
    guide: GPPriorGuide
    visits: Visits
    coefficients: Tensor
    scale: float
    names: tuple[str, ...]
    time_scale: float
    log: list[dict[str, float]] = field(default_factory=list)
    joined: Joined | None = None

    @property
    def scanned(self) -> Visits:
        """Those of the visits with a scan: all baselines, and where there are coefficients."""
        seen = ~self.visits.table["subject"].duplicated() | ~self.coefficients.isnan().all(1).numpy()
        return replace(self.visits, table=self.visits.table[seen].reset_index(drop=True))

    @property
    def noise(self) -> Tensor:
        """Standard deviations of coefficients given the codes, ``(J,)`` in units of ``scale``."""
        likelihood = self.model.likelihood
        if not isinstance(likelihood, PixelNormal):
            raise TypeError(f"expected a PixelNormal, got {type(likelihood).__name__}")
        return likelihood.log_sd.detach().exp()

    def shares(self) -> pd.DataFrame:
        """A row a code: how its variance divides among the components, at ``time_scale`` years, and noise."""
        prior = self.model.prior
        shares = pd.DataFrame(prior.shares.tolist(), columns=[*self.names, "own", "noise"])
        return shares.set_axis(shares.index + 1).rename_axis("code").reset_index()


def build(settings: CodeSettings, fixed: int, names: Sequence[str], columns: int, seed: int = 0) -> tuple[GPPriorVAE, GPPriorGuide]:
    """Model and guide before training.

    Arguments:
        fixed: number of fixed effects. names: of the kernels. columns: J.
    """
    with seeded(seed):
        components: dict[str, nn.Module] = {_input(k): Linear() for k in range(len(names))} | {"own": Slope()}
        prior = CodePrior(settings.codes, components, {"fixed": nn.Linear(fixed, settings.codes, bias=False)})
        model = GPPriorVAE(prior, Perceptron(settings.codes, settings.hidden, columns, centred=True), PixelNormal(0.2, (columns,)))
        guide = GPPriorGuide(model, Perceptron(columns, settings.hidden, 2 * settings.codes))
    return model.double(), guide.double()


def described(joined: Joined, settings: CodeSettings, reference: Sequence[str], time_scale: float) -> tuple[Cohort, tuple[str, ...]]:
    """What is known of every visit: time, covariates and roots of the kernels between people, all times time. And the names of the kernels.

    Arguments:
        reference: people by whom columns are standardised and alleles counted.
    """
    visits, person = joined.visits, joined.visits.person
    rates = replace(settings.growth.rates, own=False)  # people's own slopes are a component that needs no kernel
    design, _ = design_of(visits, rates, reference)
    time = (visits.years_since_baseline / time_scale)[:, None]
    chosen = torch.tensor([joined.subjects.index(name) for name in reference])
    spread = design[chosen].std(0, correction=0)
    scale = torch.where(spread > 0, spread, 1.0)
    inputs = {"fixed": time * (design / scale)[person], "own": time}
    kernels = kernels_of(joined, rates, reference)
    inputs |= {_input(k): time * _root(matrix)[person] for k, (_, matrix) in enumerate(kernels)}
    return Cohort.of(person, inputs), tuple(name for name, _ in kernels)


def _input(kernel: int) -> str:
    """Of the cohort; modules cannot have a kernel's name, in which there may be dots."""
    return f"kernel {kernel + 1}"


def _root(matrix: Tensor) -> Tensor:
    """R √D with R Rᵀ = K, which ``Linear`` divides by √D again."""
    values, vectors = torch.linalg.eigh(matrix)
    kept = values > 1e-9 * values[-1]
    return vectors[:, kept] * values[kept].sqrt() * int(kept.sum()) ** 0.5


@torch.no_grad()
def predict_scans(
    codes: ShapeCodes,
    asked: Visits,
    registrations: Registrations,
    genotypes: Genotypes | None = None,
    *,
    labels: str | None = None,
    draws: int = 200,
    samples: int = 0,
    seed: int = 0,
    tell: Callable[[float], None] = lambda share: None,
) -> Iterator[tuple[str, Forecast]]:
    """Subject and forecast for each visit without a scan that is not a person's first.

    Arguments:
        asked: of people of the run or of others; later scans are used too. Who has no scan at the first visit is predicted on the atlas.
        labels: column with label maps of the baseline scans; the atlas's are carried where there is none.

    Raises:
        UnusableInput: as ``wanted_forecasts``, and for someone without genotypes where the run has them.
    """
    growth = codes.settings.growth
    scans = growth.rates.scalar
    asked = with_times_of(codes.visits, asked)
    wanted = wanted_forecasts(asked, codes.visits, codes.scanned, scans, codes.atlas)
    check_in_genotypes(asked.path, [subject for subject, _ in wanted], codes.visits, genotypes)
    tell_of_atlas(asked, scans)
    joined = cohort_of(together(codes.visits, asked), growth.rates, genotypes, codes.visits.subjects)
    cohort, _ = described(joined, codes.settings, reference_people(joined, codes.visits.subjects), codes.time_scale)
    drawn = draw_codes(codes, cohort, pad_visits(joined.visits.person, _coefficients(codes, joined.visits, asked, registrations)), draws, seed)
    since = zip(joined.visits.table["subject"], joined.visits.years_since_baseline.tolist(), strict=True)
    place = dict(zip(since, _places(joined.visits.person), strict=True))
    for number, (subject, years) in enumerate(wanted):
        body = body_of(asked, subject, growth, codes.atlas, registrations, labels)
        # What the decoder expects, without the coefficients' own noise: that is of registrations, and the intervals are of the body.
        person, visit = place[subject, years]
        changes = codes.scale * codes.model.decoder(drawn[:, person, visit])
        yield subject, forecast_from(body, codes.basis, changes.mean(0) / years, changes / years, years, samples)
        tell((number + 1) / len(wanted))


def _coefficients(codes: ShapeCodes, merged: Visits, asked: Visits, registrations: Registrations) -> Tensor:
    """Of all visits of the run's people and others, ``(N, J)``, NaN at baselines and where there is no scan."""
    own = dict(zip(_keys(codes.visits), codes.coefficients, strict=True))
    new = measurable(asked, codes.settings.growth.rates.scalar) & ~seen_in(codes.scanned, asked)
    if new.any():
        rows = torch.tensor(new).nonzero()[:, 0]
        fields = transported_changes(asked, rows, codes.settings.growth, codes.atlas, registrations)
        keys = _keys(asked)
        own |= dict(zip((keys[row] for row in rows.tolist()), codes.basis.coefficients(fields) / codes.scale, strict=True))
    none = torch.full((codes.basis.columns,), torch.nan, dtype=torch.float64)
    return torch.stack([own.get(key, none) for key in _keys(merged)])


def _keys(visits: Visits) -> list[tuple[str, float]]:
    return list(zip(visits.table["subject"], visits.table["years"], strict=True))


def _places(person: Tensor) -> list[tuple[int, int]]:
    """Of each visit its person and its number among theirs."""
    counts: dict[int, int] = {}
    found = []
    for each in person.tolist():
        found.append((each, counts.get(each, 0)))
        counts[each] = found[-1][1] + 1
    return found


@torch.no_grad()
def draw_codes(codes: ShapeCodes, cohort: Cohort, coefficients: Tensor, draws: int, seed: int = 0) -> Tensor:
    """Codes at all visits given the coefficients that are known, ``(draws, P, T, L)``.

    Arguments:
        coefficients: ``(P, T, J)``, NaN at visits that nobody has seen.
    """
    known = cohort.present & ~coefficients.isnan().all(-1)
    mean, sd = codes.guide.encode(cohort.only(known), coefficients)
    with seeded(seed):
        return smoothed_forecast(codes.model.prior(cohort), known, mean, sd).draws(draws)
