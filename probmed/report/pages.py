"""The HTML pages of a segmented scan, of a registered pair, of a template, and of how people change."""

from __future__ import annotations

import html
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jinja2
import pandas as pd
from markupsafe import Markup
from matplotlib.figure import Figure

from probmed import __version__
from probmed.report import comparison_figures, figures, growth_figures, pair_figures, rate_figures, template_figures
from probmed.report.palette import label_colours
from probmed.report.panels import data_uri
from probmed.tables import Genotypes
from probmed.workflows import rate_checks
from probmed.workflows.comparison import Comparison
from probmed.workflows.follow_up_checks import Foretold, code_ablation, foretold_growth, held_out_codes, leading
from probmed.workflows.growth import EQUATION as GROWTH_EQUATION
from probmed.workflows.growth import Growth, Registrations
from probmed.workflows.longitudinal import EQUATION as RATE_EQUATION
from probmed.workflows.longitudinal import RateResult
from probmed.workflows.propagation import Propagation
from probmed.workflows.provenance import Provenance
from probmed.workflows.registration import RegistrationResult
from probmed.workflows.registration_outputs import total_sd
from probmed.workflows.segmentation import SegmentationResult
from probmed.workflows.shape_code_outputs import code_table
from probmed.workflows.shape_codes import EQUATION as CODE_EQUATION
from probmed.workflows.shape_codes import ShapeCodes
from probmed.workflows.supervision_outputs import Labelled
from probmed.workflows.template_outputs import scan_table
from probmed.workflows.templates import TemplateResult

_TEMPLATES = jinja2.Environment(
    loader=jinja2.PackageLoader("probmed.report", "."),
    autoescape=True,
    trim_blocks=True,
    lstrip_blocks=True,
    undefined=jinja2.StrictUndefined,
)
_COMPARED = {
    "label": "label",
    "segmentation": "segmentation",
    "volume_ml": "volume, ml",
    "expected_ml": "expected, ml",
    "q025": "95 %, ml",
    "dice": "Dice",
    "hd95_mm": "HD95, mm",
    "volume_error": "volume error, %",
}
"""Columns of ``Comparison.volumes`` that a page shows, and their heads."""
_SCORE_WORDS = ((0.6, "good"), (0.3, "fair"), (0.0, "poor"))
_SYMBOLS = (
    ("I", "the scan"),
    ("S", "the labels"),
    ("φ", "the map from the scan to the atlas, affine and smooth velocity"),
    ("β(c)", "the bias field, a cosine series with coefficients c"),
    ("θ", "means and covariances of the labels' Gaussians"),
    ("T", "the atlas's probabilities, weighted by w"),
)


_PAIR_SYMBOLS = (
    ("f", "the fixed image"),
    ("m", "the moving image"),
    ("A", "the affine map"),
    ("v", "the velocity, a smooth Gaussian field, whose flow exp(v) is the deformation"),
    ("θ", "the similarity's own unknowns"),
)
TEMPLATE_EQUATION = "p(f, v, t, u) = p(t) p(u) ∏_n p(v_n | c_n, u) p(f_n | (t_0 + Σ_j c_nj t_j) ∘ exp(v_n))"
_TEMPLATE_SYMBOLS = (
    ("f_n", "scan n, after its affine map"),
    ("t", "the template, and how its intensities change with each covariate"),
    ("v_n", "the velocity of scan n, a smooth Gaussian field about Σ c_nj u_j"),
    ("u_j", "how the shape changes with covariate j"),
    ("c_n", "covariates of scan n, standardised"),
)
_RATE_SYMBOLS = (
    ("y_t", "the scalar at a visit, y_B at the first"),
    ("Δx", "years since the first visit"),
    ("β", "linear effects of covariates x on the rate"),
    ("h_G, h_C, h_y", "rates that genes, clinic and phenotype explain, each N(0, τ K)"),
    ("h_own", "a person's own rate, which nothing explains"),
    ("ε", "measurement error"),
)
_GROWTH_SYMBOLS = (
    ("scan_t", "a scan at a visit, scan_B at the first"),
    ("Δx", "years since the first visit"),
    ("φ", "the map from the atlas to the first scan"),
    ("b_j", "fields of which rates of deformation w consist, on the atlas"),
    *_RATE_SYMBOLS[2:5],
)
_CODE_SYMBOLS = (
    ("z_l", "codes of a visit"),
    ("K_k", "covariances between people by genes, clinic and phenotype"),
    ("c", "coefficients of the deformation since the first visit, in fields b_j on the atlas"),
    ("f", "the decoder"),
    ("Δx", "years since the first visit, in units of the root of their mean square"),
)
_PEOPLE_SHOWN = 8
_PARTS_SHOWN = 12
_SIMILARITIES = {
    "correlation": "local correlation",
    "gaussian": "Gaussian noise",
    "student": "Student's t noise",
    "mixture": "conditional mixture, for images of different contrast",
}


def segmentation_page(
    result: SegmentationResult,
    provenance: Provenance,
    title: str,
    truth: Sequence[dict[str, Any]] | None = None,
) -> str:
    """The report as HTML, with its images inside.

    Arguments:
        result: what was found.
        provenance: how it was made.
        title: the scan's name.
        truth: where it is known, a row for each label with ``name``, ``dice`` and ``volume_ml``.
    """
    view = figures.View.of(result)
    known = None if truth is None else {row["name"]: row["volume_ml"] for row in truth}
    shown = [name for name in result.volumes["name"] if name in result.brain] or list(result.volumes["name"])
    channels = []
    for number, volume in enumerate(result.channels):
        name = volume.path.name if volume.path is not None else f"channel {number + 1}"
        channels.append(
            {
                "name": name,
                "bias": _image(figures.bias(view, number), f"bias field of {name}"),
                "histogram": _image(figures.histogram(view, result, number), f"histogram of {name}"),
            }
        )
    score = float(result.quality["score"])
    return _TEMPLATES.get_template("segmentation.html").render(
        title=title,
        version=__version__,
        summary=_summary(result),
        **_labels(view),
        channels=channels,
        volumes=_image(figures.volumes(result.volumes, label_colours(result.names, result.colours, shown), known), "volumes with intervals"),
        table=_volume_rows(result.volumes, truth),
        truth=truth is not None,
        convergence=_image(figures.convergence(result), "gain of each round"),
        rounds=len(result.rounds),
        converged=result.converged,
        quality={
            "score": f"{score:.2f}",
            "word": next(word for limit, word in _SCORE_WORDS if score >= limit or limit == 0.0),
            "evidence": f"{result.quality['log_evidence_per_voxel']:.3f}",
            "residual": [
                (name, f"{r['mean']:+.2f}", f"{r['sd']:.2f}")
                for name, r in result.quality["residual"].items()
                if name in result.brain
            ],
            "remarks": [*result.quality["remarks"]],
        },
        tempering=f"{result.tempering:.3f}",
        drawn=f"{len(result.volume_draws)} joint draws of appearance, bias field, deformation and labels",
        equation=[_marked_up(line) for line in re.split(r",\s{2,}", result.equation)],
        symbols=[(_marked_up(symbol), meaning) for symbol, meaning in _SYMBOLS],
        provenance=provenance,
    )


def network_page(result: Labelled, provenance: Provenance, title: str) -> str:
    """The report of a scan that networks have labelled, as HTML, with its images inside.

    Arguments:
        title: the scan's name.
    """
    view, count = figures.View.of_labels(result), len(result.answers)
    shape = " × ".join(str(n) for n in result.scan.shape)
    spacing = " × ".join(f"{s:.3g}" for s in result.scan.spacing)
    return _TEMPLATES.get_template("network.html").render(
        title=title,
        version=__version__,
        summary=[("voxels", f"{shape}, {spacing} mm"), ("answers", str(count))],
        **_labels(view),
        volumes=_image(figures.volumes(result.volumes, view.colours), "volumes with intervals") if count > 1 or result.errors else None,
        table=_volume_rows(result.volumes, None),
        truth=False,
        drawn="the errors of volumes on validation scans" if result.errors else f"{count} passes, draws or networks, and what each leaves open",
        provenance=provenance,
    )


def _labels(view: figures.View) -> dict[str, Any]:
    """What ``label_images.html`` and ``label_probabilities.html`` show."""
    several = figures.slices(view)
    return {
        "legend": list(view.colours.items()),
        "segmentation": _image(figures.segmentation(view), "scan and labels in three planes"),
        "slices": None if several is None else _image(several, "labels over axial slices"),
        "posterior": _image(figures.posterior(view), "posterior probabilities and entropy"),
    }


def registration_page(result: RegistrationResult, provenance: Provenance, title: str, propagation: Propagation | None = None) -> str:
    """The report of a pair as HTML, with its images inside.

    Arguments:
        result: what was found.
        provenance: how it was made.
        title: the pair's name.
        propagation: labels that were carried.
    """
    view = pair_figures.PairView.of(result)
    grid, spread, ascent = pair_figures.warped_grid(view), pair_figures.spread(view), pair_figures.ascent(result)
    jacobian = pair_figures.jacobian(view)
    carried, colours = (None, {}) if propagation is None else pair_figures.carried_labels(view, propagation)
    return _TEMPLATES.get_template("registration.html").render(
        title=title,
        version=__version__,
        summary=_pair_summary(result),
        stages=view.stages,
        match=[
            {"name": "correlation", "values": [_signed(value) for value in result.correlation[: len(view.stages)]]},
            {"name": "mutual information, nats", "values": [_signed(value) for value in result.information[: len(view.stages)]]},
        ],
        blend=_image(pair_figures.blend(view), "fixed and moving image in two colours"),
        checkerboard=_image(pair_figures.checkerboard(view), "tiles of the fixed and the moving image"),
        grid=None if grid is None else _image(grid, "warped grid over the fixed image"),
        jacobian=None if jacobian is None else _image(jacobian, "logarithm of the Jacobian determinant"),
        numbers=_pair_numbers(result),
        spread=None if spread is None else _image(spread, "standard deviation of the displacement"),
        draws=len(result.draws),
        carried=None if carried is None else _image(carried, "carried labels over the fixed image"),
        # A legend of a hundred regions would be longer than the page.
        legend=list(colours.items()) if len(colours) <= 12 else [],
        table=None if propagation is None else _volume_rows(propagation.volumes, None),
        ascent=None if ascent is None else _image(ascent, "gain of each iteration"),
        converged=result.converged,
        network=_network_words(result),
        equation=[_marked_up(result.equation)],
        symbols=[(_marked_up(symbol), meaning) for symbol, meaning in _PAIR_SYMBOLS],
        provenance=provenance,
    )


def template_page(result: TemplateResult, provenance: Provenance, title: str) -> str:
    """The report of a template and its cohort as HTML, with its images inside.

    Arguments:
        result: what was found.
        provenance: how it was made.
        title: the cohort's name.
    """
    view = template_figures.TemplateView(result)
    covariates = [
        {
            "name": name,
            "sd": f"{float(result.sds[index]):.3g}",
            "changes": _image(template_figures.changes(view, index), f"template at three values of {name}"),
            "growth": _image(template_figures.growth(view, index), f"local growth with {name}"),
        }
        for index, name in enumerate(result.names)
    ]
    scans = scan_table(result)
    levels = []
    for spacing in dict.fromkeys(where for where, _ in result.history):
        values = [value for where, value in result.history if where == spacing]
        gain = f"{values[-1] - values[-2]:.1f}" if len(values) > 1 else "–"
        levels.append((f"{spacing:.3g}", len(values), f"{values[-1]:.1f}", gain))
    shape = " × ".join(str(n) for n in result.grid.shape)
    spacing_mm = " × ".join(f"{h:.3g}" for h in result.grid.spacing)
    return _TEMPLATES.get_template("template.html").render(
        title=title,
        version=__version__,
        summary=[
            ("scans", str(len(result.scans))),
            ("template", f"{shape} voxels, {spacing_mm} mm"),
            ("similarity", _SIMILARITIES[result.settings.similarity]),
        ],
        template=_image(template_figures.template(view), "mean of the scans, and the template"),
        covariates=covariates,
        columns=list(scans.columns),
        rows=[[value if isinstance(value, str) else f"{value:.3g}" for value in row] for row in scans.itertuples(index=False)],
        levels=levels,
        equation=[_marked_up(TEMPLATE_EQUATION)],
        symbols=[(_marked_up(symbol), meaning) for symbol, meaning in _TEMPLATE_SYMBOLS],
        provenance=provenance,
    )


def rates_page(
    result: RateResult, components: pd.DataFrame, provenance: Provenance, title: str, tell: Callable[[float], None] = lambda share: None
) -> str:
    """The report of rates of change as HTML, with its images inside.

    Arguments:
        result: what was found.
        components: ``result.component_table()``, which takes long.
        provenance: how it was made.
        title: the table's name.
    """
    found = rate_checks.held_out(result)
    courses = rate_checks.courses(result, _PEOPLE_SHOWN)
    kernels = components.dropna(subset=["share"])
    return _TEMPLATES.get_template("rates.html").render(
        title=title,
        version=__version__,
        summary=[
            ("scalar", result.settings.scalar),
            ("people", str(len(result.joined.subjects))),
            ("follow-ups", str(len(result.fit.data.visits))),
            ("years", f"{float(result.fit.data.visits.delta.median()):.3g} (median)"),
        ],
        unit=result.settings.scalar,
        shares=_image(rate_figures.shares(kernels), "shares of the variance of rates"),
        components=[_component_row(row) for row in components.to_dict("records")],
        coefficients=[
            (row["coefficient"], _figures(row["estimate"]), _figures(row["standard_error"]), _between(row, "low", "high"), _figures(row["p"], 2))
            for row in result.coefficient_table().to_dict("records")
        ],
        predictions=_predictions(found),
        checks=_checks(result, tell),
        people=_image(rate_figures.single_people(courses, result.settings.scalar), "courses of single people") if courses else None,
        equation=[_marked_up(RATE_EQUATION)],
        symbols=[(_marked_up(symbol), meaning) for symbol, meaning in _RATE_SYMBOLS],
        provenance=provenance,
    )


def growth_page(
    growth: Growth,
    components: pd.DataFrame,
    regions: pd.DataFrame,
    registrations: Registrations,
    provenance: Provenance,
    title: str,
    tell: Callable[[float], None] = lambda share: None,
) -> str:
    """The report of rates of deformation as HTML, with its images inside.

    Arguments:
        growth: what was found.
        components: ``growth.rates.component_table()``, which takes long. regions: of ``regions_of_growth``.
        registrations: those of the run.
        provenance: how it was made.
        title: the table's name.
    """
    first = leading(growth)
    separate = len(growth.fits) > 1
    return _TEMPLATES.get_template("growth.html").render(
        title=title,
        version=__version__,
        summary=[
            ("people", str(len(growth.rates.joined.subjects))),
            ("follow-up scans", str(len(growth.rates.fit.data.visits))),
            ("years", f"{float(growth.rates.fit.data.visits.delta.median()):.3g} (median)"),
            ("coefficients", f"{growth.basis.columns} on {growth.basis.grid.spacing[0]:.3g} mm"),
        ],
        shares=_image(rate_figures.shares(components.dropna(subset=["share"])), "shares of the variance of rates"),
        components=[_component_row(row) for row in components.to_dict("records")],
        parts=_image(rate_figures.parts(growth.share_table().head(_PARTS_SHOWN), "coefficient"), "shares by coefficient") if separate else None,
        effects=[
            (name, _image(growth_figures.effect(growth.atlas, *maps), f"yearly growth with {name}")) for name, maps in growth.effect_maps().items()
        ],
        predictions=_predictions(rate_checks.held_out(first)),
        checks=_checks(first, tell),
        regions=[_region_row(row) for row in regions.to_dict("records")],
        source="as registered",
        **_follow_up(foretold_growth(growth, registrations)),
        equation=[_marked_up(GROWTH_EQUATION)],
        symbols=[(_marked_up(symbol), meaning) for symbol, meaning in _GROWTH_SYMBOLS],
        provenance=provenance,
    )


def codes_page(
    codes: ShapeCodes,
    regions: pd.DataFrame,
    registrations: Registrations,
    provenance: Provenance,
    title: str,
    genotypes: Genotypes | None = None,
    seed: int = 0,
) -> str:
    """The report of an autoencoder of changes as HTML, with its images inside.

    Arguments:
        regions: of ``regions_of_codes``.
        registrations: those of the run. genotypes: those that it was trained with.
        provenance: how it was made.
        title: the table's name.
    """
    found = held_out_codes(codes, registrations, genotypes, seed)
    shown = code_table(codes)
    known = shown[["subject"]].merge(codes.visits.baseline.reset_index(), on="subject", how="left")
    colours = {"years": shown["years"]} | {name: known[name] for name in (*codes.visits.covariates, *codes.visits.categorical)}
    return _TEMPLATES.get_template("codes.html").render(
        title=title,
        version=__version__,
        summary=[
            ("people", str(len(codes.visits.subjects))),
            ("follow-up scans", str(len(shown))),
            ("codes", str(codes.settings.codes)),
            ("coefficients", f"{codes.basis.columns} on {codes.basis.grid.spacing[0]:.3g} mm"),
        ],
        shares=_image(rate_figures.parts(codes.shares(), "code"), "shares of the variance of codes"),
        time_scale=f"{codes.time_scale:.3g}",
        latents=[_image(rate_figures.latent(shown, colour, name), f"codes by {name}") for name, colour in colours.items()],
        predictions=None if found is None else _predictions(found[0]),
        checks=_check_rows(code_ablation(codes, genotypes, seed)),
        regions=[_region_row(row) for row in regions.to_dict("records")],
        source="as decoded from each scan's codes",
        **_follow_up(None if found is None else found[1]),
        equation=[_marked_up(CODE_EQUATION)],
        symbols=[(_marked_up(symbol), meaning) for symbol, meaning in _CODE_SYMBOLS],
        provenance=provenance,
    )


def _region_row(row: Mapping[Any, Any]) -> list[str]:
    shares = [_figures(row["share"], 2), _between(row, "share_low", "share_high", 2)]
    return [row["name"], row["component"], *shares, _figures(row["statistic"]), _figures(row["p"], 2)]


def comparison_page(comparison: Comparison, volumes: pd.DataFrame, provenance: Provenance, title: str) -> str:
    """The report of several segmentations as HTML, with its images inside.

    Arguments:
        volumes: ``comparison.volumes()``. title: the scan's name.
    """
    agreement, shown = comparison.agreement(), [name for name in _COMPARED if name in volumes]
    shape = " × ".join(str(n) for n in comparison.scan.shape)
    return _TEMPLATES.get_template("comparison.html").render(
        title=title,
        version=__version__,
        summary=[("scan", f"{shape} voxels"), ("segmentations", str(len(comparison.maps) - (comparison.truth is not None)))],
        colours=comparison_figures.colours_of(comparison),
        images=_image(comparison_figures.side_by_side(comparison), "the scan and its segmentations"),
        truth=comparison.truth is not None,
        volumes=_image(comparison_figures.volumes(comparison), "volumes of each segmentation"),
        intervals=bool(comparison.expected),
        columns=[_COMPARED[name] for name in shown],
        rows=[[_compared(name, row) for name in shown] for row in volumes.sort_values("index", kind="stable").to_dict("records")],
        names=list(agreement.columns),
        agreement=[(name, [f"{value:.3f}" for value in row]) for name, row in zip(agreement.index, agreement.to_numpy(), strict=True)],
        provenance=provenance,
    )


def _compared(name: str, row: Mapping[Any, Any]) -> str:
    value = row[name]
    return _between(row, "q025", "q975") if name == "q025" else value if isinstance(value, str) else _figures(value, 4)


def _predictions(found: pd.DataFrame) -> Markup | None:
    """Predicted against observed change, and histograms of predictive probabilities; None where nothing could be held out."""
    description = "predicted against observed change, and histograms of predictive probabilities"
    return _image(rate_figures.predictions(found), description) if len(found) else None


def _checks(result: RateResult, tell: Callable[[float], None]) -> dict[str, Any]:
    """The table of predictions with all kernels and without each."""
    return _check_rows(rate_checks.ablation(result, tell))


def _check_rows(checks: pd.DataFrame) -> dict[str, Any]:
    coverage = [name for name in checks.columns if name.startswith("coverage_")]
    shown = checks[["kernels", "task", "visits", "rmse", "log_density", "crps", *coverage]]
    return {
        "columns": [re.sub(r"coverage_(\d+)", r"\1 % holds", name).replace("_", " ") for name in shown.columns],
        "rows": [[_cell(name, value) for name, value in row.items()] for row in shown.to_dict("records")],
    }


def _follow_up(found: Foretold | None) -> dict[str, Any]:
    """What ``follow_up.html`` shows."""
    if found is None:
        return {"follow_up": None, "person": "", "volumes": []}
    told = found.forecast
    return {
        "follow_up": _image(growth_figures.follow_up(found), "baseline, follow-up and its prediction"),
        "person": f"{found.subject}, {told.years:.3g} years after the first visit",
        "volumes": [
            (row["name"], _figures(row["baseline_ml"], 4), _figures(row["mean"], 4), _between(row, "low", "high", 4))
            for row in told.volumes.to_dict("records")
        ],
    }


def _cell(name: Any, value: Any) -> str:
    return f"{100 * value:.0f} %" if str(name).startswith("coverage_") else value if isinstance(value, str) else _figures(value, 4)


def _component_row(row: Mapping[Any, Any]) -> list[str]:
    known = [_figures(row["variance"]), _figures(row["standard_error"], 2), _figures(row["share"], 2)]
    return [row["component"], *known, _between(row, "share_low", "share_high", 2), _figures(row["statistic"]), _figures(row["p"], 2)]


def _between(row: Mapping[Any, Any], low: str, high: str, digits: int = 3) -> str:
    return "" if row[low] != row[low] else f"{row[low]:.{digits}g} – {row[high]:.{digits}g}"


def _figures(value: float, digits: int = 3) -> str:
    return "" if value != value else f"{value:.{digits}g}"


def _network_words(result: RegistrationResult) -> str | None:
    """What a network has to do with it; None where none has."""
    if "network" not in result.seconds:
        return None
    words, refined = "A trained network gave the posterior.", result.refinement
    if result.elbo_network is not None:
        words += f" Its evidence lower bound is {result.elbo_network:.1f} nats."
    if refined is not None:
        words += f" Refined on this pair, the bound rose by {refined.gap:.1f} ± {refined.error:.1f} nats to {refined.refined:.1f}."
    return words


def _pair_summary(result: RegistrationResult) -> list[tuple[str, str]]:
    facts = []
    for name, volume in (("moving", result.moving), ("fixed", result.fixed)):
        shape = " × ".join(str(n) for n in volume.shape)
        spacing = " × ".join(f"{s:.3g}" for s in volume.spacing)
        facts.append((name, f"{volume.path.name if volume.path else volume.name}, {shape} voxels, {spacing} mm"))
    return [*facts, ("similarity", _SIMILARITIES[result.settings.similarity])]


def _pair_numbers(result: RegistrationResult) -> list[tuple[str, str]]:
    numbers = [
        ("voxels where the map folds", f"{100 * result.folding:.3g} %"),
        ("det Dφ", f"{float(result.determinant.min()):.3g} – {float(result.determinant.max()):.3g}"),
    ]
    if result.sd is not None:
        numbers.append(("sd of the displacement, root mean square", f"{float(total_sd(result.sd).square().mean().sqrt()):.3g} mm"))
    if result.log_joint is not None:
        numbers.append(("log p(f, v, θ) at the mode, tempered", f"{result.log_joint:.1f} nats"))
    if result.log_evidence is not None:
        found = result.log_evidence
        numbers.append(("log p(f, θ), the velocity integrated out, tempered", f"{found.value:.1f} ± {found.error:.1f} nats"))
    return numbers


def _signed(value: float) -> str:
    return "n/a" if value != value else f"{value:.3f}"


def _image(figure: Figure, description: str) -> Markup:
    width = round(figure.get_figwidth() * 100)
    return Markup('<img src="{}" alt="{}" width="{}">').format(data_uri(figure), description, width)


def _summary(result: SegmentationResult) -> list[tuple[str, str]]:
    first = result.channels[0]
    shape = " × ".join(str(n) for n in first.shape)
    spacing = " × ".join(f"{s:.3g}" for s in first.spacing)
    kind = "a brain without its skull" if result.stripped else "a whole head"
    return [
        ("taken for", kind),
        ("voxels", f"{shape}, {spacing} mm"),
        ("channels", str(len(result.channels))),
    ]


def _volume_rows(volumes: pd.DataFrame, truth: Sequence[dict[str, Any]] | None) -> list[dict[str, str]]:
    known = {row["name"]: row for row in truth or ()}
    rows = []
    for row in volumes.to_dict("records"):
        entry = {
            "name": str(row["name"]),
            "volume": _number(row["volume_ml"]),
            "sd": _number(row["sd_ml"]),
            "half": _interval(row["q250"], row["q750"]),
            "most": _interval(row["q100"], row["q900"]),
            "nearly": _interval(row["q025"], row["q975"]),
        }
        if truth is not None:
            there = known.get(row["name"])
            entry["truth"] = "" if there is None else f"{there['volume_ml']:.1f}"
            entry["dice"] = "" if there is None else f"{there['dice']:.3f}"
        rows.append(entry)
    return rows


def _interval(low: float, high: float) -> str:
    return f"{_number(low)} – {_number(high)}"


def _number(value: float) -> str:
    """One digit behind the point, three figures where that would say little."""
    return "n/a" if value != value else f"{value:.1f}" if abs(value) >= 10 else f"{value:.3g}"


def _marked_up(equation: str) -> Markup:
    """An equation in Unicode with ``_k`` or ``_own`` lowered."""
    text = html.escape(equation.strip()).replace("ₓ", "_x")
    return Markup(re.sub(r"_([A-Za-z]+|\w)", r"<sub>\1</sub>", text))
