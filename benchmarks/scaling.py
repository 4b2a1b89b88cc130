"""Longitudinal models from a hundred to a hundred thousand people: seconds and memory of one likelihood with its gradient, of relationships between
people from their genotypes, of estimating variance components, and of an epoch of an autoencoder whose codes have a process prior.

Each row is measured in a process of its own: ``python -m benchmarks.scaling ORDER``.
"""

from __future__ import annotations

import functools
import importlib
import json
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import bed_reader
import numpy as np
import torch
from gpytorch.kernels import RBFKernel
from matplotlib.figure import Figure
from torch import Tensor

from benchmarks.gp_prior_vae import CODES, Decoder, Encoder
from benchmarks.registration_sizes import peak_gib
from benchmarks.runs import child_rows
from benchmarks.tables import Log, Row, Table
from benchmarks.tissue import data_folder
from probmed.inference.gp_prior import GlobalWeights, accumulated_loss, exact_loss
from probmed.inference.reml import ChangeData, fit_components, log_likelihood
from probmed.kernels import StackedCovariance, VisitSums
from probmed.kernels import Visits as Rows
from probmed.models.gp_prior_vae import CodePrior, Cohort, GPPriorGuide, GPPriorVAE, Inducing, Linear, PixelNormal, Slope
from probmed.report.palette import FAINT, distinct
from probmed.report.panels import bare_axes, blank_figure
from probmed.slopes import DenseKernels, FeatureKernels, FollowUps
from probmed.tables import Genotypes

VISITS = 3
PEOPLE_SECONDS = 1e-4  # a person, of the line in proportion in the figure
FEATURES = 512
PEOPLE = (100, 1000, 10_000, 100_000)
EXACT = (100, 1000, 5000)  # people, of whom each has one number left
SNPS = (1000, 10_000, 100_000)
GENOTYPED = 1000  # people of those rows
REPETITIONS = 5  # of which the median counts; 1 where one takes over ten seconds
REAL_FREQUENCY = 0.01
MARKERS, POINTS = 64, 32  # linear features and inducing points of the autoencoder's prior
BATCHES = 10  # of people in an epoch
DENSE, LOW_RANK, STACKED, SUMS = "rates, dense kernel", "rates, features", "all visits, features", "all visits, sums of visits"
WHOLE, IN_PARTS, IN_BATCHES = "autoencoder, everyone at once", "autoencoder, accumulated", f"autoencoder, {BATCHES} batches of people"
RELATED, REAL = "relationship from a PLINK file", "components of 957 people, 14,079 SNPs"
OURS, PEER = "probmed", "glimix-core"


def table(log: Log, limit: int | None, only: Sequence[str], threads: int, seed: int) -> Table:
    """Measure every objective at every size."""
    sizes = {DENSE: EXACT, LOW_RANK: PEOPLE, STACKED: PEOPLE, SUMS: PEOPLE, RELATED: SNPS}
    sizes |= {WHOLE: PEOPLE[:-1], IN_PARTS: PEOPLE, IN_BATCHES: PEOPLE}
    cases = [(what, size, OURS) for what, several in sizes.items() for size in several[:limit]]
    if (data_folder() / "hapmap3").exists():
        cases += [(REAL, 957, OURS), (REAL, 957, PEER)]
    else:
        print(f"no genotypes in {data_folder()}: set PROBMED_DATA")
    rows: list[Row] = []
    for what, size, method in cases:
        key = f"{what}/{size}/{method}"
        if not only or any(word in key for word in only):
            said = {"what": what, "size": size, "method": method, "seed": seed}
            rows += child_rows(log, "benchmarks.scaling", said, {key: None}, {"what": what, "size": size, "method": method}, threads)
    settings = {"threads": threads, "visits": VISITS, "features": FEATURES}
    return Table("scaling", rows, summarise(rows), NOTES + ratio(rows), settings, seed, figure(rows) if rows else None)


NOTES = (
    f"A likelihood with its gradient in all variance components, {VISITS} visits a person, {FEATURES} features where there are features; of "
    f"autoencoders an epoch, with {CODES} codes, {MARKERS} features and {POINTS} inducing points. Once: what is made before it, such as sums and the "
    "decomposition of a kernel. Growth: of seconds, for ten times the size. Peak: largest resident memory of the process, imports and data included."
)

Measured = tuple[Callable[[], object], dict[str, float]]
"""What is repeated, and what was done once, in seconds."""


def visits(people: int, generator: torch.Generator) -> tuple[FollowUps, Tensor]:
    """Follow-ups of people at irregular times, and the person of every visit with the baseline."""
    again = torch.arange(people).repeat_interleave(VISITS - 1)
    delta = torch.rand(len(again), generator=generator, dtype=torch.float64) * 4 + 0.5
    return FollowUps(delta, again, people), torch.arange(people).repeat_interleave(VISITS)


def rates(size: int, generator: torch.Generator, dense: bool) -> Measured:
    """The restricted likelihood of rates with one kernel and people's own rates."""
    seen, _ = visits(size, generator)
    features = torch.randn(size, FEATURES, generator=generator, dtype=torch.float64) / FEATURES**0.5
    matrices = torch.stack([features @ features.mT, torch.eye(size, dtype=torch.float64)]) if dense else features[:0, :, None]
    relationship = DenseKernels(matrices) if dense else FeatureKernels((features,))
    change = torch.randn(len(seen), generator=generator, dtype=torch.float64)
    data = ChangeData(change, seen, torch.ones(size, 1, dtype=torch.float64), relationship)
    return repeated(lambda components: log_likelihood(data, components), data.count), {}


def all_visits(size: int, generator: torch.Generator) -> Measured:
    """The likelihood of every visit: features that change with time, an intercept and a slope of each person's own."""
    seen, person = visits(size, generator)
    rows = Rows.of(person)
    years = torch.cat([torch.zeros(size, 1, dtype=torch.float64), seen.delta.reshape(size, VISITS - 1)], 1).flatten()
    features = torch.randn(len(person), FEATURES, generator=generator, dtype=torch.float64) / FEATURES**0.5
    y = torch.randn(len(person), generator=generator, dtype=torch.float64)
    batches = rows.batches(rows.sorted(years))

    def likelihood(components: Tensor) -> Tensor:
        eye = torch.eye(VISITS, dtype=torch.float64)
        blocks = [components[1] + components[2] * t.unsqueeze(-1) * t.unsqueeze(-2) + components[3] * eye for t in batches]
        return StackedCovariance(features, components[0].expand(FEATURES), rows, blocks).log_prob(y)

    return repeated(likelihood, 4), {}


def sums_of_visits(size: int, generator: torch.Generator) -> Measured:
    """The same where features are of people and the own part is an intercept: from sums that are made once."""
    _, person = visits(size, generator)
    features = torch.randn(size, FEATURES, generator=generator, dtype=torch.float64) / FEATURES**0.5
    y = torch.randn(len(person), generator=generator, dtype=torch.float64)
    start = time.perf_counter()
    sums = VisitSums.of(features, y, Rows.of(person))
    once = {"once_seconds": time.perf_counter() - start}
    return repeated(lambda components: sums.log_prob(components[0].expand(FEATURES), components[1], components[2]).sum(), 3), once


def repeated(likelihood: Callable[[Tensor], Tensor], count: int) -> Callable[[], object]:
    """One likelihood with its gradient."""
    components = torch.full((count,), 0.5, dtype=torch.float64, requires_grad=True)
    return lambda: torch.autograd.grad(likelihood(components), components)


def autoencoder(size: int, generator: torch.Generator, loss: str) -> Measured:
    """−ELBO of 8 × 8 images with its gradient: features of people, a kernel at inducing points, and a slope of each person's own."""
    seen, _ = visits(size, generator)
    years = torch.cat([torch.zeros(size, 1), seen.delta.reshape(size, VISITS - 1).float()], 1)[..., None]
    clinic = torch.randn(size, VISITS, 2, generator=generator)
    markers = torch.randn(size, 1, MARKERS, generator=generator).expand(-1, VISITS, -1)
    cohort = Cohort(torch.ones(size, VISITS, dtype=torch.bool), {"genes": markers, "clinic": clinic, "years": years / years.square().mean().sqrt()})
    points = torch.randn(POINTS, 2, generator=generator)
    prior = CodePrior(CODES, {"genes": Linear(), "clinic": Inducing(RBFKernel(), points), "years": Slope()})
    model = GPPriorVAE(prior, Decoder(), PixelNormal())
    guide = GPPriorGuide(model, Encoder())
    images = torch.randn(size, VISITS, 8, 8, generator=generator)
    weights = GlobalWeights(CODES, MARKERS + POINTS)
    parameters = [*model.parameters(), *guide.encoder.parameters()]

    def epoch() -> None:
        if loss == WHOLE:
            torch.autograd.grad(exact_loss(model, guide, cohort, images), parameters)
        elif loss == IN_PARTS:
            torch.autograd.grad(accumulated_loss(model, guide, cohort, images, max(1, size // BATCHES)), parameters)
        else:
            for people in torch.arange(size).chunk(BATCHES):
                torch.autograd.grad(weights.loss(model, guide, cohort, images, people), parameters)

    return epoch, {}


def relationship(snps: int, generator: torch.Generator, folder: Path) -> Measured:
    """The genetic relationship of people in a file that is read in chunks."""
    seed = int(torch.randint(2**31, (), generator=generator))
    random = np.random.default_rng(seed)
    path = folder / "people.bed"
    bed_reader.to_bed(path, random.binomial(2, random.uniform(0.05, 0.5, snps), (GENOTYPED, snps)).astype(np.int8))
    genotypes = Genotypes.open(path, count_A1=True)
    return genotypes.grm, {}


@functools.cache
def real_people() -> tuple[Tensor, Tensor]:
    """The relationship of people in `hapmap3`, and a trait of half its variance."""
    path = data_folder() / "hapmap3" / "HM3_thinned_autosomal_overlap.bed"
    kernel = Genotypes.open(path, count_A1=True).filtered(min_frequency=REAL_FREQUENCY).grm()
    generator = torch.Generator().manual_seed(0)
    values, vectors = torch.linalg.eigh(kernel)
    explained = vectors @ (values.clamp_min(0).sqrt() * torch.randn(len(kernel), generator=generator, dtype=torch.float64))
    return kernel, explained / explained.std() + torch.randn(len(kernel), generator=generator, dtype=torch.float64)


def components_of_real_people() -> Measured:
    """Restricted maximum likelihood after the decomposition, which stays with the kernel."""
    kernel, trait = real_people()
    people = len(kernel)
    relationship = DenseKernels(kernel[None])
    seen = FollowUps(torch.ones(people), torch.arange(people), people)
    data = ChangeData(trait, seen, torch.ones(people, 1, dtype=torch.float64), relationship, "none")
    start = time.perf_counter()
    log_likelihood(data, torch.ones(2, dtype=torch.float64))
    return lambda: fit_components(data), {"once_seconds": time.perf_counter() - start}


def components_by_glimix() -> Measured:
    """The same by glimix-core."""
    package: Any = importlib.import_module("glimix_core.lmm")
    sugar: Any = importlib.import_module("numpy_sugar.linalg")
    kernel, trait = real_people()
    start = time.perf_counter()
    decomposed = sugar.economic_qs(kernel.numpy())
    once = {"once_seconds": time.perf_counter() - start}
    ones = np.ones((len(kernel), 1))
    return lambda: package.LMM(trait.numpy(), ones, decomposed, restricted=True).fit(verbose=False), once


def measure(what: str, size: int, method: str, seed: int, folder: Path) -> Row:
    """Median seconds of repetitions, seconds of what is done once, and the peak."""
    if method == PEER and importlib.util.find_spec("glimix_core") is None:
        return {"skipped": "is not installed"}
    generator = torch.Generator().manual_seed(seed)
    prepare: dict[str, Callable[[], Measured]] = {
        DENSE: lambda: rates(size, generator, dense=True),
        LOW_RANK: lambda: rates(size, generator, dense=False),
        STACKED: lambda: all_visits(size, generator),
        SUMS: lambda: sums_of_visits(size, generator),
        **{what: functools.partial(autoencoder, size, generator, what) for what in (WHOLE, IN_PARTS, IN_BATCHES)},
        RELATED: lambda: relationship(size, generator, folder),
        REAL: components_by_glimix if method == PEER else components_of_real_people,
    }
    work, once = prepare[what]()
    seconds: list[float] = []
    while len(seconds) < REPETITIONS and not (seconds and seconds[0] > 10):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    spread = {"fastest": round(min(seconds), 5), "slowest": round(max(seconds), 5)}
    once = {name: round(value, 4) for name, value in once.items()}
    return {"seconds": round(statistics.median(seconds), 5), **spread, "repetitions": len(seconds), **once, "peak_gib": round(peak_gib(), 2)}


def summarise(rows: Sequence[Row]) -> list[dict[str, str]]:
    """A line per objective and size."""
    lines = []
    before: dict[tuple[str, str], Row] = {}
    for row in rows:
        line = {"what": row["what"], "size": f"{row['size']:,} {'SNPs' if row['what'] == RELATED else 'people'}", "method": row["method"]}
        values = dict.fromkeys(("seconds", "slowest / fastest", "once", "growth", "peak GiB"), "–")
        if "skipped" in row:
            lines.append({**line, **values, "seconds": row["skipped"]})
            continue
        smaller = before.get((row["what"], row["method"]))
        before[row["what"], row["method"]] = row
        values |= {"seconds": f"{row['seconds']:.3g}", "peak GiB": f"{row['peak_gib']:.1f}"}
        values["slowest / fastest"] = f"{row['slowest'] / row['fastest']:.2f}"
        if "once_seconds" in row:
            values["once"] = f"{row['once_seconds']:.3g}"
        if smaller is not None:
            values["growth"] = f"×{(row['seconds'] / smaller['seconds']) ** (1 / math.log10(row['size'] / smaller['size'])):.2g}"
        lines.append({**line, **values})
    return lines


def ratio(rows: Sequence[Row]) -> str:
    """Our seconds over the peer's for the components of real people."""
    found = {row["method"]: row for row in rows if row["what"] == REAL and "seconds" in row}
    if len(found) < 2:
        return ""
    ours, theirs = found[OURS], found[PEER]
    whole = (ours["seconds"] + ours["once_seconds"]) / (theirs["seconds"] + theirs["once_seconds"])
    return f"\n\n{REAL}: {ours['seconds'] / theirs['seconds']:.2f} of {PEER}'s time after the decomposition, {whole:.2f} with it."


def figure(rows: Sequence[Row]) -> Figure:
    """Seconds and memory against the number of people, and how they would grow in proportion."""
    drawn = blank_figure(9.6, 3.6)
    axes = [drawn.add_axes((left, 0.15, 0.28, 0.78)) for left in (0.07, 0.44)]
    objectives = [what for what in dict.fromkeys(row["what"] for row in rows) if what not in (RELATED, REAL)]
    for what, colour in zip(objectives, distinct(len(objectives)), strict=True):
        own = [row for row in rows if row["what"] == what and "seconds" in row]
        for axis, key in zip(axes, ("seconds", "peak_gib"), strict=True):
            axis.plot([row["size"] for row in own], [row[key] for row in own], "o-", color=colour, ms=4, lw=1.5, label=what)
    axes[0].plot(PEOPLE, [PEOPLE_SECONDS * n for n in PEOPLE], ":", color=FAINT, label="in proportion")
    for axis, unit in zip(axes, ("seconds", "peak GiB of the process"), strict=True):
        axis.set_xscale("log")
        axis.set_xlabel("people, three visits each")
        axis.set_ylabel(unit)
        bare_axes(axis)
    axes[0].set_yscale("log")
    axes[1].set_ylim(bottom=0)
    axes[1].legend(loc="upper left", bbox_to_anchor=(1.02, 1.0), frameon=False, fontsize=7.5)
    axes[0].legend(handles=axes[0].lines[-1:], loc="upper left", frameon=False, fontsize=7.5)
    return drawn


def _child(order: Path) -> None:
    said = json.loads(order.read_text())
    with tempfile.TemporaryDirectory() as folder:
        row = measure(said["what"], said["size"], said["method"], said["seed"], Path(folder))
    for key in said["wanted"]:
        print("ROW " + json.dumps({**row, "key": key}), flush=True)


if __name__ == "__main__":
    _child(Path(sys.argv[1]))
