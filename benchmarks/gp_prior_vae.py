"""Rotated digits: images at an angle that was not seen, by autoencoders with different priors of their codes. Then follow-up scans, by `follow_ups`.

Threes of scikit-learn's 8 × 8 digits, each at six angles. Some lack an angle; others are seen at 0° alone and not in training.
"""

from __future__ import annotations

import importlib
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from gpytorch.kernels import PeriodicKernel
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn import functional

from benchmarks import follow_ups
from benchmarks.figures import forest
from benchmarks.tables import Log, Row, Table, mean_sd
from probmed.inference.gp_prior import CodeForecast, GlobalWeights, exact_loss, forecast_codes
from probmed.inference.gp_prior_baselines import gppvae_loss, svgpvae_forecast, svgpvae_loss
from probmed.inference.gp_prior_smoothed import smoothed_forecast, smoothed_loss
from probmed.inference.parameters import seeded
from probmed.inference.training import TrainingSettings, train
from probmed.metrics import interval_coverage, paired_bootstrap
from probmed.models.gp_prior_vae import CodePrior, Cohort, GPPriorGuide, GPPriorVAE, Intercept, Linear, PixelNormal, Within
from probmed.report.panels import blank_figure

DIGIT, ANGLES, SPLITS = 3, 6, 8
TEST, VALIDATION, COMPLETE, UNSEEN = 40, 20, 40, 40  # digits: the first two lack an angle in training, the last are not in it
CODES, HIDDEN, STEPS, BATCH, DRAWS = 6, 128, 1000, 25, 200
RATES = (3e-3, 1e-2)  # of learning, tried by every method
SCORES = 6  # principal components of the image at 0°, by which digits are compared
TASKS = ("an angle not seen", "a digit seen at 0° alone")


@dataclass(frozen=True)
class Digits:
    """One split.

    Arguments:
        images: ``(P, ANGLES, 8, 8)`` in [0, 1], NaN outside the circle that rotations keep.
        inputs: of the models, ``(P, ANGLES, D)``.
        validation, test, unseen: of whom, ``(P,)`` bool; the first two lack ``angle`` in training, the last are not there.
    """

    images: Tensor
    inputs: dict[str, Tensor]
    validation: Tensor
    test: Tensor
    unseen: Tensor
    angle: int

    @property
    def fitted(self) -> Tensor:
        """What training sees, ``(P, ANGLES)`` bool."""
        seen = ~self.unseen[:, None].expand(-1, ANGLES).clone()
        seen[self.validation | self.test, self.angle] = False
        return seen

    def cohort(self, visits: Tensor) -> Cohort:
        return Cohort(visits, self.inputs)


def rotated_digits(seed: int) -> Digits:
    """Threes, turned about their centre, linearly interpolated, and a random split of them."""
    datasets: Any = importlib.import_module("sklearn.datasets")
    bundle = datasets.load_digits()
    upright = torch.tensor(bundle.images[bundle.target == DIGIT][: TEST + VALIDATION + COMPLETE + UNSEEN] / 16)[:, None]
    angles = 2 * math.pi * torch.arange(ANGLES, dtype=torch.float64) / ANGLES
    turns = torch.stack([torch.stack([a.cos(), -a.sin(), a.new_zeros(())]) for a in angles])
    turns = torch.stack([turns, torch.stack([torch.stack([a.sin(), a.cos(), a.new_zeros(())]) for a in angles])], 1)
    grids = functional.affine_grid(turns, [ANGLES, 1, 8, 8], align_corners=False)
    people = len(upright)
    images = torch.stack([functional.grid_sample(upright, g.expand(people, -1, -1, -1), align_corners=False)[:, 0] for g in grids], 1)
    place = torch.arange(8) - 3.5
    outside = place[:, None] ** 2 + place**2 > 16
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(people, generator=generator)
    test, validation, unseen = (torch.zeros(people, dtype=torch.bool) for _ in range(3))
    test[order[:TEST]], validation[order[TEST : TEST + VALIDATION]], unseen[order[-UNSEEN:]] = True, True, True
    angle = 1 + int(torch.randint(ANGLES - 1, (), generator=generator))
    inputs = _inputs(images[:, 0][:, ~outside], ~unseen, angles)
    return Digits(images.masked_fill(outside, math.nan), inputs, validation, test, unseen, angle)


def _inputs(upright: Tensor, known: Tensor, angles: Tensor) -> dict[str, Tensor]:
    """Which angle, the image at 0° by its principal components, and products of the two: columns of mean square one."""
    centre = upright[known].mean(0)
    _, spread, axes = torch.linalg.svd(upright[known] - centre, full_matrices=False)
    scores = (upright - centre) @ axes[:SCORES].mT / spread[:SCORES] * math.sqrt(len(upright[known]))
    people = len(upright)
    which = (math.sqrt(len(angles)) * torch.eye(len(angles), dtype=torch.float64)).expand(people, -1, -1)
    own = scores[:, None].expand(-1, len(angles), -1)
    both = (which[..., None] * own[..., None, :]).flatten(-2)
    return {"angle": which, "digit": own, "digit_angle": both, "turn": angles[:, None].expand(people, -1, -1)}


class Body(nn.Module):
    """Two layers; covariates stand beside the input."""

    def __init__(self, inputs: int, outputs: int, covariates: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(inputs + covariates, HIDDEN), nn.ELU(), nn.Linear(HIDDEN, outputs))


class Encoder(Body):
    """From images to means and log standard deviations."""

    def __init__(self, covariates: int = 0) -> None:
        super().__init__(64, 2 * CODES, covariates)

    def forward(self, images: Tensor, *covariates: Tensor) -> Tensor:
        encoded: Tensor = self.layers(torch.cat([images.flatten(1), *covariates], -1))
        return encoded


class Decoder(Body):
    """From codes to images."""

    def __init__(self, covariates: int = 0) -> None:
        super().__init__(CODES, 64, covariates)

    def forward(self, codes: Tensor, *covariates: Tensor) -> Tensor:
        decoded: Tensor = self.layers(torch.cat([codes, *covariates], -1)).unflatten(-1, (8, 8))
        return decoded


Loss = Callable[[GPPriorVAE, GPPriorGuide, Cohort, Tensor, Tensor], Tensor]
Codes = Callable[[Any, Tensor, Tensor, Tensor], CodeForecast]


@dataclass(frozen=True)
class Method:
    """A prior, an objective, and how codes of other angles follow.

    Arguments:
        prior: of the codes.
        loss: of a minibatch of people, or of all whatever the minibatch; None for the global q(u) of a fit's own.
        codes: at all visits given the known ones.
        covariates: what both networks read too.
    """

    prior: Callable[[], CodePrior]
    loss: Loss | None
    codes: Codes
    covariates: tuple[str, ...] = ()


def _everyone(model: GPPriorVAE, guide: GPPriorGuide, cohort: Cohort, images: Tensor, people: Tensor) -> Tensor:
    return exact_loss(model, guide, cohort, images)


def _smoothed(model: GPPriorVAE, guide: GPPriorGuide, cohort: Cohort, images: Tensor, people: Tensor) -> Tensor:
    return smoothed_loss(model, guide, cohort, images)


def _gppvae(model: GPPriorVAE, guide: GPPriorGuide, cohort: Cohort, images: Tensor, people: Tensor) -> Tensor:
    return gppvae_loss(model, guide, cohort, images)


def _mean_alone(prior: Any, known: Tensor, mean: Tensor, sd: Tensor) -> CodeForecast:
    """As published: prediction by the posterior mean."""
    found = forecast_codes(prior, known, mean, sd)
    return CodeForecast(found.mean, torch.zeros_like(found.covariance))


def _own(prior: Any, known: Tensor, mean: Tensor, sd: Tensor) -> CodeForecast:
    """Of a model that relates no visits: mean and variance of the codes of the same digit at its other angles."""
    count = known.sum(1)[:, None]
    centre = mean.masked_fill(~known[..., None], 0.0).sum(1) / count
    square = (mean**2 + sd**2).masked_fill(~known[..., None], 0.0).sum(1) / count
    variance = (square - centre**2)[:, None].expand_as(mean)
    return CodeForecast(centre[:, None].expand_as(mean), torch.diag_embed(variance.movedim(-1, 0)))


def _process(*features: str, own: bool) -> CodePrior:
    """Features by name, and with ``own`` a level and a periodic process of each digit."""
    components: dict[str, nn.Module] = {name: Linear() for name in features}
    if own:
        turning = PeriodicKernel()
        turning.period_length = 2 * math.pi
        turning.raw_period_length.requires_grad_(False)
        components |= {"level": Intercept(), "turn": Within(turning)}
    return CodePrior(CODES, components)


def _mixed() -> CodePrior:
    return CodePrior(CODES, {"level": Intercept()}, mean={"angle": nn.Linear(ANGLES, CODES)})


FEATURES = ("angle", "digit", "digit_angle")

METHODS: dict[str, Method] = {
    "GP prior, smoothed q(z)": Method(partial(_process, *FEATURES, own=True), _smoothed, smoothed_forecast),
    "GP prior, exact": Method(partial(_process, *FEATURES, own=True), _everyone, forecast_codes),
    "GP prior, global q(u)": Method(partial(_process, *FEATURES, own=True), None, forecast_codes),
    "gppvae": Method(partial(_process, *FEATURES, own=False), _gppvae, _mean_alone),
    "svgpvae": Method(partial(_process, *FEATURES, own=False), svgpvae_loss, svgpvae_forecast),
    "GP prior, smoothed q(z), angle alone": Method(partial(_process, "angle", own=True), _smoothed, smoothed_forecast),
    "GP prior, exact, angle alone": Method(partial(_process, "angle", own=True), _everyone, forecast_codes),
    "mixed-model VAE, angle alone": Method(_mixed, _everyone, forecast_codes),
    "conditional VAE, angle alone": Method(partial(CodePrior, CODES), _everyone, _own, ("angle",)),
    "VAE": Method(partial(CodePrior, CODES), _everyone, _own),
}


def table(log: Log, limit: int | None, only: Sequence[str], threads: int, seed: int) -> Table:
    """Fit every method on every split; without a limit, also forecast scans."""
    torch.set_num_threads(threads)
    rows = _digits(log, limit, only, seed)
    settings = {"splits": SPLITS, "steps": STEPS, "batch": BATCH, "codes": CODES, "hidden": HIDDEN, "learning_rates": RATES, "threads": threads}
    lines = summarise(rows)
    notes = differences(rows)
    if limit is None:
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary) if log.path is None else log.path.with_suffix(".follow-ups")
            folder.mkdir(exist_ok=True)
            scans = follow_ups.rows(log, folder, only, seed)
        notes += "\n\n" + Table("", [], follow_ups.summarise(scans), follow_ups.differences(scans)).markdown()
        rows += scans
    return Table("gp_prior_vae", rows, lines, notes, settings, seed, figure(rows) if rows else None)


def _digits(log: Log, limit: int | None, only: Sequence[str], seed: int) -> list[Row]:
    rows = []
    torch.set_default_dtype(torch.float64)
    try:
        for split in range(SPLITS)[:limit]:
            for name, method in METHODS.items():
                if only and not any(word in name for word in only):
                    continue
                rows.append(log.row(f"{split}/{name}", partial(_fitted, name, method, seed + split)))
                print(f"split {split} {name:32s} {_told(rows[-1])}", flush=True)
    finally:
        torch.set_default_dtype(torch.float32)
    return rows


def _told(row: Row) -> str:
    return ", ".join(f"{task}: MSE {row[task]['mse']:.4f}, {row[task]['nats']:.1f} nats" for task in TASKS)


def _fitted(name: str, method: Method, seed: int) -> Row:
    """The learning rate that is best on the validation digits, and what it gives on the others."""
    digits = rotated_digits(seed)
    found: list[Row] = []
    for rate in RATES:
        start = time.perf_counter()
        with seeded(seed):
            model, guide = _trained(method, digits, rate, seed)
        seconds = time.perf_counter() - start
        with seeded(seed):
            scores = _scores(method, model, guide, digits)
        found.append({"method": name, "split": seed, "learning_rate": rate, "seconds": round(seconds, 2), **scores})
    return max(found, key=lambda row: row["validation"]["nats"])


def _trained(method: Method, digits: Digits, rate: float, seed: int) -> tuple[GPPriorVAE, GPPriorGuide]:
    width = sum(digits.inputs[name].shape[-1] for name in method.covariates)
    model = GPPriorVAE(method.prior(), Decoder(width), PixelNormal(), method.covariates)
    guide = GPPriorGuide(model, Encoder(width))
    chosen = (~digits.unseen).nonzero()[:, 0]
    cohort, images = digits.cohort(digits.fitted).people(chosen), digits.images[chosen]
    weights = GlobalWeights(CODES, model.prior(cohort).features.shape[-1])
    loss = method.loss or weights.loss

    def batches(generator: torch.Generator) -> Tensor:
        return torch.randperm(len(chosen), generator=generator)[:BATCH]

    settings = TrainingSettings(steps=STEPS, learning_rate=rate, seed=seed, every=STEPS)
    train(lambda people: loss(model, guide, cohort, images, people), {"model": model, "guide": guide, "weights": weights}, batches, settings)
    return model, guide


@torch.no_grad()
def _scores(method: Method, model: GPPriorVAE, guide: GPPriorGuide, digits: Digits) -> Row:
    """Of the validation digits' and the test digits' angle, and of the digits that were seen at 0° alone."""
    known = digits.fitted
    known[digits.unseen, 0] = True
    everything = digits.cohort(torch.ones_like(known))
    mean, sd = guide.encode(digits.cohort(known), digits.images)
    codes = method.codes(model.prior(everything), known, mean, sd).draws(DRAWS)
    asked = {"validation": digits.validation, TASKS[0]: digits.test, TASKS[1]: digits.unseen}
    return {name: _score(model, everything, codes, digits.images, people[:, None] & ~known) for name, people in asked.items()}


def _score(model: GPPriorVAE, cohort: Cohort, codes: Tensor, images: Tensor, asked: Tensor) -> Row:
    """Mean squared error of the predictive mean and coverage of 90 % intervals, a pixel; log predictive density, nats an image."""
    given = [model.image(z, cohort.only(asked)).values for z in codes]
    truth = images[asked]
    inside = ~truth.isnan()
    densities = torch.stack([d.log_prob(images.nan_to_num(0.0))[asked].masked_fill(~inside, 0.0).sum((1, 2)) for d in given])
    drawn = torch.stack([d.sample()[asked][inside] for d in given])
    lower, upper = drawn.quantile(torch.tensor([0.05, 0.95]), 0)
    centre = torch.stack([d.mean[asked][inside] for d in given]).mean(0)
    return {
        "mse": float((centre - truth[inside]).square().mean()),
        "nats": float((densities.logsumexp(0) - math.log(len(codes))).mean()),
        "coverage": interval_coverage(lower, upper, truth[inside]),
    }


def summarise(rows: Sequence[Row]) -> list[dict[str, str]]:
    """A line per method, means and standard deviations over splits."""
    lines = []
    for name in METHODS:
        chosen = [row for row in rows if row["method"] == name]
        if not chosen:
            continue
        line = {"method": name}
        for task in TASKS:
            each = {kind: [row[task][kind] for row in chosen] for kind in ("mse", "nats", "coverage")}
            line[f"{task}: MSE"] = mean_sd(each["mse"], 4)
            line["nats an image" + " " * TASKS.index(task)] = mean_sd(each["nats"], 1)
            line["in 90 % intervals" + " " * TASKS.index(task)] = f"{100 * statistics.fmean(each['coverage']):.0f} %"
        line["seconds a fit"] = f"{statistics.median(row['seconds'] for row in chosen):.0f}"
        lines.append(line)
    return lines


def differences(rows: Sequence[Row]) -> str:
    """What the first method gains on the others, by split."""
    first, *others = METHODS
    of = {name: {row["split"]: row for row in rows if row["method"] == name} for name in METHODS}
    parts = []
    for name in others:
        splits = sorted(set(of[first]) & set(of[name]))
        if len(splits) > 1:
            gains = []
            for task in TASKS:
                ours, theirs = (torch.tensor([of[each][split][task]["nats"] for split in splits]) for each in (first, name))
                gain = paired_bootstrap(ours, theirs)
                gains.append(f"{gain.mean:+.1f} [{gain.lower:+.1f}, {gain.upper:+.1f}]")
            parts.append(f"{name} {' and '.join(gains)}")
    return f"Nats an image of {first} less those of each method, mean over splits with a 95 % paired bootstrap interval: {'; '.join(parts)}."


def figure(rows: Sequence[Row]) -> Figure:
    """Squared error of each method over splits of the digits, and of each over people whose volumes are forecast."""
    drawn = blank_figure(9.6, 5.0)
    digits = {name: [row for row in rows if row["method"] == name] for name in METHODS}
    for place, task in enumerate(TASKS):
        of = {name: torch.tensor([row[task]["mse"] for row in own]) for name, own in digits.items() if own}
        if of:
            axis = drawn.add_axes((0.29 + 0.36 * place, 0.5, 0.33, 0.47))
            axis.set_xscale("log")
            forest(axis, of, next(iter(METHODS)), f"squared error, {task}", named=place == 0)
    for place, kind in enumerate(follow_ups.COHORTS):
        people = {name: [row for row in rows if (row.get("people"), row["method"]) == (kind, name)] for name in follow_ups.METHODS}
        of = {name: torch.tensor([row["error"] for row in own]) for name, own in people.items() if own}
        if of:
            axis = drawn.add_axes((0.29 + 0.36 * place, 0.1, 0.33, 0.25))
            forest(axis, of, follow_ups.CODES, f"error of follow-up volumes, %, {kind}", named=place == 0)
    return drawn
