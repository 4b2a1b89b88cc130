"""Follow-up scans of people who were seen once: bodies that shrink at rates which are made up, hippocampi of real people or wholly simulated.

Each person's scan of `msd_hippocampus`, or a draw of a deformed body, is the baseline. A flow towards the middle of the labels shrinks them by one
per cent of volume in a unit of time; at later visits the scan and its labels are carried by it for the person's rate times the years, and noise is
added. Rates depend on genotypes (simulated, half of their variance), age and education (a fifth, not linearly) and the person. Some people have two
follow-ups and are trained on, the others the baseline alone.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from benchmarks.pairs import beside, scans
from benchmarks.tables import Log, Row, mean_sd
from probmed.fields import GaussianField
from probmed.grids import Grid
from probmed.metrics import dice, normal_crps, paired_bootstrap
from probmed.priors import SmoothVelocity
from probmed.simulation import simulate_people
from probmed.simulation.contrasts import stream
from probmed.tables import Genotypes, Visits
from probmed.transforms import Affine, Displacement, Velocity, physical_gradient, warp
from probmed.volumes import Volume, read_labels, read_scan, scaled, write_labels, write_scan
from probmed.workflows.follow_up_checks import held_out_codes
from probmed.workflows.growth import Body, Forecast, GrowthSettings, LabelledScan, Registrations, fit_growth, forecast
from probmed.workflows.longitudinal import RateSettings, fit_rates
from probmed.workflows.shape_code_training import fit_codes
from probmed.workflows.shape_codes import CodeSettings, ShapeCodes, predict_scans

TRAINED, ASKED = 60, 30
YEARS = (1.5, 3.0)
ASKED_YEARS = 3.0
MEAN_RATE, RATE_SD = -0.04, 0.02  # of the logarithm of volume, per year
NOISE = 0.02  # of a scaled scan
SMOOTHING_MM = 3.0  # of the labels whose slope is the flow
VOLUME_NOISE = 0.02  # of the volumes that scalars are, relative: what a segmentation would add
LABELS = (1, 2)
SNPS = 300
GROWTH, CODES = "S16, deformations", "S17, codes with a Gaussian process"
COPY, MEAN, SCALAR = "baseline as it is", "mean change", "S15, each structure's volume"
METHODS = (COPY, MEAN, SCALAR, GROWTH, CODES)
LEVEL = 0.9
FINER = 3
SIMULATED_SHAPE, SEMI_AXES_MM = (32, 44, 30), (7.0, 14.0, 6.0)
CODE_COUNTS = (1, 2, 4)


@dataclass(frozen=True)
class Person:
    """A baseline with what shrinks it.

    Arguments:
        labels: zeros and ones, background first, ``(3, *shape)``. flow: of one per cent of volume.
    """

    scan: Volume
    labels: Tensor
    flow: Velocity

    @classmethod
    def of(cls, scan: Volume, labels: Volume) -> Person:
        shares = torch.stack([(labels.data == k).float() for k in (0, *LABELS)])
        return cls(scan, shares, shrinking(1 - shares[0], scan.grid))

    def at(self, log_change: float) -> Displacement:
        """Where the changed body's points come from, for a change of the log of volume."""
        return Velocity(self.flow.grid, self.flow.field * (100 * log_change)).exp(both=False)

    def labels_at(self, change: Displacement | None = None) -> Tensor:
        """On voxels of a third of the size: on its own, a border that moves by less than half a voxel stays where it is."""
        fine = self.scan.grid.at_spacing([h / FINER for h in self.scan.spacing])
        return warp(self.labels, self.scan.grid, change or Affine.identity(3), fine, fill="edge").argmax(0)

    def volumes(self, log_change: float) -> Tensor:
        """Of the labels, ``(2,)``, ml."""
        moved = warp(self.labels[1:], self.scan.grid, self.at(log_change), self.scan.grid)
        return moved.flatten(1).sum(1).double() * self.scan.grid.voxel_volume / 1000


def shrinking(inside: Tensor, grid: Grid) -> Velocity:
    """Backwards, as images are carried: a velocity away from the labels' middle whose integral over them is 1 % of their volume."""
    field = GaussianField.from_sd(grid.shape, grid.spacing, 1.0, SMOOTHING_MM, 2.0)
    smooth = field.covariance_matvec(inside[None])[0]
    velocity = -physical_gradient(smooth[..., None], grid)[..., 0, :].movedim(-1, 0)
    divergence = physical_gradient(velocity.movedim(0, -1), grid).diagonal(dim1=-2, dim2=-1).sum(-1)
    return Velocity(grid, velocity * (-0.01 * inside.sum() / (divergence * inside).sum()))


def real_bodies(count: int, seed: int) -> list[tuple[Volume, Volume]]:
    """Scans with labels of `msd_hippocampus`, of training alone."""
    train, _ = scans()
    chosen = [train[int(index)] for index in np.random.default_rng(seed).permutation(len(train))[:count]]
    return [(read_scan(path), read_labels(beside(path))) for path in chosen]


def simulated_bodies(count: int, seed: int) -> list[tuple[Volume, Volume]]:
    """An ellipsoid of two parts in a smooth surrounding, all deformed by a draw of the smooth prior for each body; noise."""
    grid = Grid.from_spacing(SIMULATED_SHAPE, 1.0)
    points = grid.coordinates()
    inside = (points / torch.tensor(SEMI_AXES_MM)).square().sum(-1) < 1
    labels = torch.where(inside, torch.where(points[..., 1] > 0, 1, 2), 0)
    surrounding = GaussianField.from_sd(grid.shape, grid.spacing, 0.15, 5.0, 2.0).unwhiten(draw((1, *grid.shape), seed, "surrounding"))[0]
    image = torch.where(labels == 0, 0.5 + surrounding, torch.where(labels == 1, 1.0, 0.85))
    prior = SmoothVelocity(grid.at_spacing(2.0), 2.5, 12.0, 3.0).prior()
    found = []
    for number in range(count):
        transform = Velocity(grid.at_spacing(2.0), prior.unwhiten(draw(tuple(prior.event_shape), seed, "shape", number))).exp(both=False)
        scan = warp(image[None], grid, transform, grid, fill="edge")[0] + NOISE * draw(grid.shape, seed, "noise", number)
        found.append((Volume.from_grid(scan, grid), Volume.from_grid(warp(labels[None], grid, transform, grid, "nearest")[0], grid)))
    return found


def draw(shape: Sequence[int], seed: int, *names: str | int) -> Tensor:
    return torch.randn(*shape, generator=stream(seed, *names))


Bodies = Callable[[int, int], list[tuple[Volume, Volume]]]
COHORTS: Mapping[str, Bodies] = {"hippocampi": real_bodies, "simulated": simulated_bodies}


@dataclass(frozen=True)
class MadeUp:
    """A cohort in files.

    Arguments:
        people: by subject. rates: per year. atlas: another person.
        seen: the table of those who are trained on; asked: that of the others, whose later visit is empty.
    """

    people: Mapping[str, Person]
    rates: Mapping[str, float]
    atlas: LabelledScan
    seen: Path
    asked: Path
    genotypes: Path

    @classmethod
    def of(cls, folder: Path, seed: int, bodies: Bodies) -> MadeUp:
        (first, labels), *others = bodies(1 + TRAINED + ASKED, seed)
        known = simulate_people(TRAINED + ASKED, seed, mean_rate=MEAN_RATE, rate_sd=RATE_SD, snps=SNPS)
        names = [str(name) for name in known.table["subject"]]
        people = {name: Person.of(*body) for name, body in zip(names, others, strict=True)}
        rates = dict(zip(names, known.rates.tolist(), strict=True))
        genotypes = folder / "cohort.bed"
        known.genotypes.write(genotypes, names)
        generator = torch.Generator().manual_seed(seed)
        tables: dict[bool, list[Row]] = {True: [], False: []}
        for number, row in enumerate(known.table.to_dict("records")):
            name, trained = str(row["subject"]), number < TRAINED
            for years in (0.0, *YEARS) if trained else (0.0, ASKED_YEARS):
                facts = {"subject": name, "time": years, "age": row["age"], "education": row["education"]}
                visit = write_visit(folder, name, people[name], rates[name], years, generator) if trained or not years else {}
                tables[trained].append({**facts, **visit})
        paths = {True: folder / "seen.tsv", False: folder / "asked.tsv"}
        for which, path in paths.items():
            pd.DataFrame(tables[which]).to_csv(path, sep="\t", index=False, na_rep="n/a")
        atlas = LabelledScan(first, labels, {1: "anterior", 2: "posterior"})
        return cls(people, rates, atlas, paths[True], paths[False], genotypes)

    def read(self, path: Path, scalars: Sequence[str] = ()) -> Visits:
        return Visits.read(path, time_unit="years", scalars=scalars, covariates=["age", "education"], scans=["scan", "labels"])

    def together(self, scalars: Sequence[str] = ()) -> Visits:
        """All visits that there are."""
        seen, asked = self.read(self.seen, scalars), self.read(self.asked, scalars)
        first = asked.table[~asked.table["subject"].duplicated()]
        return replace(seen, table=pd.concat([seen.table, first], ignore_index=True))

    @property
    def people_asked(self) -> list[str]:
        return list(self.read(self.asked).subjects)


def write_visit(folder: Path, name: str, person: Person, rate: float, years: float, generator: torch.Generator) -> Row:
    """A scan with labels as files, and the volumes as they would be measured."""
    grid = person.scan.grid
    change = person.at(rate * years)
    image = warp(scaled(person.scan.data)[None], grid, change, grid, fill="edge")[0]
    codes = warp(person.labels, grid, change, grid, fill="edge").argmax(0)
    paths = [f"{name}_{years:g}{end}.nii.gz" for end in ("", "_dseg")]
    write_scan(folder / paths[0], image + NOISE * torch.randn(grid.shape, generator=generator), person.scan)
    write_labels(folder / paths[1], codes, person.scan)
    measured = person.volumes(rate * years) * (1 + VOLUME_NOISE * torch.randn(2, generator=generator))
    return {"scan": paths[0], "labels": paths[1], **{f"volume_{k}": v for k, v in zip(LABELS, measured.tolist(), strict=True)}}


@dataclass(frozen=True)
class Answer:
    """What a method says of a person: volumes ``(2,)`` ml with ends of 90 % intervals ``(2, 2)``, NaN where it has none, and labels, of a third of
    the voxels' size."""

    volumes: Tensor
    interval: Tensor
    labels: Tensor


Method = Callable[[MadeUp, Path], dict[str, Answer]]


def copied(cohort: MadeUp, folder: Path) -> dict[str, Answer]:
    none = torch.full((2, 2), torch.nan, dtype=torch.float64)
    return {name: Answer(cohort.people[name].volumes(0.0), none, cohort.people[name].labels_at()) for name in cohort.people_asked}


def mean_change(cohort: MadeUp, folder: Path) -> dict[str, Answer]:
    """Volumes by the mean of yearly relative changes, with a normal interval."""
    columns = [f"volume_{k}" for k in LABELS]
    changes = cohort.read(cohort.seen, columns).changes(columns)
    logs = torch.log1p(changes.differences / changes.baseline[changes.person])
    yearly = logs / changes.years[:, None]
    mean, sd = yearly.mean(0), yearly.std(0)
    found = {}
    for name, same in copied(cohort, folder).items():
        ends = torch.stack([mean - 1.645 * sd, mean + 1.645 * sd], -1)
        found[name] = Answer(same.volumes * (ASKED_YEARS * mean).exp(), same.volumes[:, None] * (ASKED_YEARS * ends).exp(), same.labels)
    return found


def of_volumes(cohort: MadeUp, folder: Path) -> dict[str, Answer]:
    """Each volume's rate by genes and clinic."""
    same = copied(cohort, folder)
    parts = []
    for label in LABELS:
        column = f"volume_{label}"
        settings = RateSettings(column, clinical=("age", "education"))
        result = fit_rates(cohort.together([column]), settings, Genotypes.open(cohort.genotypes, count_A1=True))
        found = result.predict(list(same), [ASKED_YEARS] * len(same))
        parts.append((found.mean, found.interval(LEVEL)))
    means, ends = (torch.stack(each, 1) for each in zip(*parts, strict=True))
    return {name: Answer(means[n], ends[n], answer.labels) for n, (name, answer) in enumerate(same.items())}


def deformations(cohort: MadeUp, folder: Path) -> dict[str, Answer]:
    """S16: rates of deformation."""
    kept = Registrations(folder / "registrations", device="cpu")
    growth = fit_growth(cohort.together(), fields(), cohort.atlas, kept, Genotypes.open(cohort.genotypes, count_A1=True))
    found = {}
    for name, row in cohort.read(cohort.asked).baseline.iterrows():
        scan = read_scan(row["scan"])
        body = Body.of(scan, kept.to_atlas(scan, cohort.atlas, growth.settings.to_atlas), cohort.atlas, read_labels(row["labels"]))
        told = forecast(body, growth.basis, growth.rate(str(name)), ASKED_YEARS)
        found[str(name)] = answer(cohort.people[str(name)], told)
    return found


def codes(cohort: MadeUp, folder: Path) -> dict[str, Answer]:
    """S17, with as many codes as predict the last visits of those who are trained on best."""
    kept, genotypes = Registrations(folder / "registrations", device="cpu"), Genotypes.open(cohort.genotypes, count_A1=True)
    visits = cohort.read(cohort.seen)
    fits = [fit_codes(visits, CodeSettings(fields(), count), cohort.atlas, kept, genotypes) for count in CODE_COUNTS]
    trained = min(fits, key=lambda fit: last_visits_crps(fit, kept, genotypes))
    asked = cohort.read(cohort.asked)
    return {name: answer(cohort.people[name], told) for name, told in predict_scans(trained, asked, kept, genotypes, labels="labels")}


def last_visits_crps(fit: ShapeCodes, kept: Registrations, genotypes: Genotypes) -> float:
    found = held_out_codes(fit, kept, genotypes)
    if found is None:
        raise AssertionError
    mean, sd, observed = (torch.tensor(found[0][name].to_numpy(copy=True)) for name in ("mean", "sd", "observed"))
    return float(normal_crps(mean, sd, observed).mean())


def fields() -> GrowthSettings:
    return GrowthSettings(RateSettings("scan", clinical=("age", "education")))


def answer(person: Person, told: Forecast) -> Answer:
    ordered = told.volumes.set_index("index").loc[list(LABELS)]
    volumes, interval = (torch.tensor(ordered[names].to_numpy(copy=True)) for names in ("mean", ["low", "high"]))
    return Answer(volumes, interval, person.labels_at(told.transform))


RUN: Mapping[str, Method] = {COPY: copied, MEAN: mean_change, SCALAR: of_volumes, GROWTH: deformations, CODES: codes}


def rows(log: Log, folder: Path, only: Sequence[str], seed: int) -> list[Row]:
    """A row for each cohort, method and person who was seen once."""
    found: list[Row] = []
    for kind, bodies in COHORTS.items():
        place = folder / kind
        place.mkdir(exist_ok=True)
        cohort = cache(partial(MadeUp.of, place, seed, bodies))
        for method, run in RUN.items():
            name = f"follow-ups/{kind}/{method}"
            if only and not any(word in name for word in only):
                continue
            keys = [key for key in log.rows if key.startswith(f"{name}/")]
            if len(keys) < ASKED:
                for person, said in run(cohort(), place).items():
                    log.row(f"{name}/{person}", partial(score, kind, cohort(), method, person, said))
                keys = [key for key in log.rows if key.startswith(f"{name}/")]
            own = [log.rows[key] for key in keys]
            found += own
            print(f"{name}: {statistics.fmean(row['error'] for row in own):.3f}", flush=True)
    return found


def score(kind: str, cohort: MadeUp, method: str, name: str, said: Answer) -> Row:
    """Mean over the two labels of the absolute relative error, per cent, how many intervals hold, and Dice."""
    person, change = cohort.people[name], cohort.rates[name] * ASKED_YEARS
    truth = person.volumes(change)
    labels = person.labels_at(person.at(change))
    inside = ((said.interval[:, 0] <= truth) & (truth <= said.interval[:, 1])).double()
    return {
        "part": "follow-ups",
        "people": kind,
        "method": method,
        "subject": name,
        "error": float(100 * (said.volumes / truth - 1).abs().mean()),
        "inside": None if bool(said.interval.isnan().any()) else float(inside.mean()),
        "width": None if bool(said.interval.isnan().any()) else float(100 * ((said.interval[:, 1] - said.interval[:, 0]) / truth).mean()),
        "dice": statistics.fmean(dice(said.labels == k, labels == k) for k in LABELS),
    }


def summarise(rows: Sequence[Row]) -> list[dict[str, str]]:
    """A line per cohort and method."""
    lines = []
    for kind, method in itertools.product(COHORTS, METHODS):
        own = [row for row in rows if (row["people"], row["method"]) == (kind, method)]
        if own:
            held = [row["inside"] for row in own if row["inside"] is not None]
            lines.append(
                {
                    "people": kind,
                    "method": method,
                    "volume error, %": mean_sd([row["error"] for row in own], 2),
                    "in 90 % intervals": f"{100 * statistics.fmean(held):.0f} %" if held else "–",
                    "width, %": f"{statistics.fmean(row['width'] for row in own):.1f}" if held else "–",
                    "Dice": mean_sd([row["dice"] for row in own]),
                }
            )
    return lines


def differences(rows: Sequence[Row]) -> str:
    """Volume error of S17 less that of each other method."""
    texts = []
    for kind in COHORTS:
        by = {m: {row["subject"]: row["error"] for row in rows if (row["people"], row["method"]) == (kind, m)} for m in METHODS}
        parts = []
        for method in METHODS:
            shared = sorted(set(by[method]) & set(by[CODES]))
            if method != CODES and shared:
                ours, theirs = (torch.tensor([by[each][name] for name in shared]) for each in (CODES, method))
                difference = paired_bootstrap(ours, theirs)
                parts.append(f"{method} {difference.mean:+.2f} [{difference.lower:+.2f}, {difference.upper:+.2f}]")
        if parts:
            texts.append(f"{kind}: {'; '.join(parts)}")
    return f"Volume error of S17 less that of each method, per cent, mean over people with a 95 % paired bootstrap interval. {'. '.join(texts)}."
