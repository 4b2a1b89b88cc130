"""Training of codes of how bodies change: what `probmed train gp-prior-vae` does, as one function."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from probmed.inference.gp_prior_smoothed import smoothed_loss
from probmed.inference.training import TrainingSettings, train
from probmed.models.gp_prior_vae import GPPriorGuide, GPPriorVAE, pad_visits
from probmed.slopes import FollowUps
from probmed.tables import Genotypes, Visits
from probmed.workflows.growth import LabelledScan, Registrations, check_scans, choose_basis, follow_up_rows, transported_changes
from probmed.workflows.longitudinal import codings_of, cohort_of, tell_of_codings
from probmed.workflows.shape_codes import CodeSettings, Perceptron, ShapeCodes, build, described


def fit_codes(
    visits: Visits,
    settings: CodeSettings,
    atlas: LabelledScan,
    registrations: Registrations,
    genotypes: Genotypes | None = None,
    *,
    seed: int = 0,
    folder: Path | None = None,
    progress: Callable[[str, float], None] = lambda stage, share: None,
) -> ShapeCodes:
    """Register a cohort, and train.

    Arguments:
        visits: with ``settings.growth.rates.scalar`` among its columns of scans.
        folder: where the training keeps its checkpoint.
        progress: called with a stage's name and the share of the work done.

    Raises:
        UnusableInput: as ``fit_growth``.
    """
    growth = settings.growth
    joined = cohort_of(visits, growth.rates, genotypes)
    tell_of_codings(joined.visits, codings_of(joined.visits, growth.rates, joined.subjects))
    check_scans(joined.visits, growth.rates.scalar, atlas)
    rows = follow_up_rows(joined.visits, growth.rates.scalar)
    years = joined.visits.years_since_baseline
    time_scale = float(years[rows].square().mean().sqrt())
    cohort, names = described(joined, settings, joined.subjects, time_scale)
    fields = transported_changes(joined.visits, rows, growth, atlas, registrations, lambda share: progress("registering", 0.6 * share))
    follow_ups = FollowUps(years[rows], joined.visits.person[rows], len(joined.subjects))
    basis = choose_basis(fields, follow_ups, growth, atlas.lattice(growth.spacing_mm), visits.path)
    found = basis.coefficients(fields)
    scale = float(found.square().sum(1).mean().sqrt())
    coefficients = torch.full((len(joined.visits), basis.columns), torch.nan, dtype=torch.float64)
    coefficients[rows] = found / scale
    model, guide = build(settings, cohort.inputs["fixed"].shape[-1], names, basis.columns, seed)
    start_at_leading(model, guide, found / scale)
    images = pad_visits(joined.visits.person, coefficients)
    known = cohort.only(~images.isnan().all(-1))
    log = train(
        lambda _: smoothed_loss(model, guide, known, images) / len(rows),
        {"model": model, "guide": guide},
        lambda generator: None,
        TrainingSettings(settings.steps, settings.learning_rate, clip_norm=None, seed=seed, every=max(1, settings.steps // 20)),
        folder=folder,
        tell=lambda row, share: progress("training", 0.6 + 0.4 * share),
    )
    return ShapeCodes(settings, atlas, basis, model, guide, joined.visits, coefficients, scale, names, time_scale, log, joined)


def start_at_leading(model: GPPriorVAE, guide: GPPriorGuide, coefficients: Tensor) -> None:
    """Codes that are the first coefficients, in units of their root mean square; what training starts from.

    Arguments:
        coefficients: ``(N, J)``, those that vary most first.
    """
    decoder, encoder = model.decoder, guide.encoder
    if not isinstance(decoder, Perceptron) or not isinstance(encoder, Perceptron):
        raise TypeError(f"expected Perceptrons, got {type(decoder).__name__} and {type(encoder).__name__}")
    codes = range(min(model.prior.codes, coefficients.shape[1]))
    size = coefficients.square().mean(0).sqrt()
    with torch.no_grad():
        for layer in (decoder.linear, encoder.linear):
            layer.weight.zero_()
            layer.bias.zero_()
        for k in codes:
            decoder.linear.weight[k, k], encoder.linear.weight[k, k] = size[k], 1 / size[k]
