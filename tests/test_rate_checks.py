"""Predictions of visits that were held out, and their report."""

from __future__ import annotations

import math
from pathlib import Path

import pandas as pd
import pytest
import torch
from scipy.stats import norm
from test_rates import SETTINGS, read, write_cohort

from probmed.inference.reml import compare_component
from probmed.report import rates_page
from probmed.tables import Genotypes
from probmed.workflows.longitudinal import RateResult, RateSettings, fit_rates
from probmed.workflows.provenance import Provenance
from probmed.workflows.rate_checks import ablation, calibration, courses, held_out


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> RateResult:
    table, bed = write_cohort(tmp_path_factory.mktemp("cohort"), 120)
    return fit_rates(read(table), SETTINGS, Genotypes.open(bed, count_A1=True))


def dense(result: RateResult) -> torch.Tensor:
    """Covariance of all changes, β integrated out under a prior that is all but flat."""
    data, variances = result.fit.data, result.fit.variances
    d, person = data.visits.delta, data.visits.subject
    eye = torch.eye(len(data.design), dtype=torch.float64)
    kernels = [variances[k] * data.relationship.product(k, eye) for k in range(data.relationship.components)]
    rates = torch.stack(kernels).sum(0) + 1e4 * data.design @ data.design.mT
    same = (person[:, None] == person).double()
    return d[:, None] * d * rates[person][:, person] + variances[-1] * (torch.eye(len(d)).double() + same)


def test_held_out_visits_are_conditioned_on_the_others_alone(result: RateResult) -> None:
    found = held_out(result)
    covariance = dense(result)
    data, names = result.fit.data, list(result.joined.subjects)
    place = {(names[int(p)], float(t)): n for n, (p, t) in enumerate(zip(data.visits.subject, data.visits.delta, strict=True))}
    later = found[found["task"] == "a later visit"]
    chosen = torch.tensor([place[key] for key in zip(later["subject"], later["years"], strict=True)])
    others = torch.tensor([n for n in range(len(data.change)) if n not in set(chosen.tolist())])
    weights = torch.linalg.solve(covariance[others][:, others], covariance[others][:, chosen]).mT
    mean = later["mean"].to_numpy(copy=True) - later["baseline"].to_numpy(copy=True)
    torch.testing.assert_close(torch.tensor(mean), weights @ data.change[others], rtol=1e-4, atol=1e-6)
    left = (covariance[chosen][:, chosen] - weights @ covariance[others][:, chosen]).diagonal().sqrt()
    torch.testing.assert_close(torch.tensor(later["sd"].to_numpy(copy=True)), left, rtol=1e-3, atol=0)


def test_every_follow_up_is_predicted_once_for_a_new_person(result: RateResult) -> None:
    found = held_out(result)
    new = found[found["task"] == "a new person"]
    assert len(new) == len(result.fit.data.change)
    assert not new.duplicated(["subject", "years"]).any()
    later = found[found["task"] == "a later visit"]
    several = new.groupby("subject").filter(lambda rows: len(rows) > 1).groupby("subject")["years"].max()
    assert dict(zip(later["subject"], later["years"], strict=True)) == pytest.approx(several.to_dict())


def test_calibration_counts_intervals() -> None:
    """Predictions with quantiles at the middles of a thousand parts hold exactly what they say."""
    quantile = (torch.arange(1000).double() + 0.5) / 1000
    observed = torch.tensor(norm.ppf(quantile.numpy()))
    table = pd.DataFrame({"task": "x", "observed": observed, "mean": 0.0, "sd": 1.0, "quantile": quantile})
    row = calibration(table).iloc[0]
    assert [row[f"coverage_{p}"] for p in (50, 80, 90, 95)] == pytest.approx([0.5, 0.8, 0.9, 0.95])
    assert row["rmse"] == pytest.approx(1.0, abs=0.01)
    assert row["log_density"] == pytest.approx(-0.5 * (1 + math.log(2 * math.pi)), abs=0.01)
    assert row["crps"] == pytest.approx(1 / math.sqrt(math.pi), abs=0.002)  # of a calibrated standard normal


def test_without_its_genes_a_cohort_is_predicted_worse(result: RateResult) -> None:
    shares: list[float] = []
    table = ablation(result, shares.append)
    assert shares[-1] == 1.0
    new = table[table["task"] == "a new person"].set_index("kernels")
    all_kernels, without = (new.loc[name] for name in ("all", "without genetics"))
    assert without["rmse"] > 1.3 * all_kernels["rmse"]
    assert without["log_density"] < all_kernels["log_density"] - 0.2
    statistic = 2 * (all_kernels["log_likelihood"] - without["log_likelihood"])
    assert statistic == pytest.approx(compare_component(result.fit, 0).statistic, rel=1e-6)


def test_courses_are_of_those_seen_most_and_end_at_the_visit_left_out(result: RateResult) -> None:
    found = held_out(result)
    later = found[found["task"] == "a later visit"].set_index("subject")
    chosen = courses(result, 5)
    assert len(chosen) == 5
    assert all(len(course.seen) == 3 for course in chosen)  # the baseline and two follow-ups, of three at most
    for course in chosen:
        row = later.loc[course.subject]
        assert course.last == pytest.approx((row["years"], row["observed"]))
        assert (float(course.mean[-1]), float(course.sd[-1])) == pytest.approx((row["mean"], row["sd"]), rel=1e-9)


def test_the_report_says_what_was_found(result: RateResult) -> None:
    components = result.component_table()
    page = rates_page(result, components, Provenance.of("probmed train longitudinal", 0, [], []), "cohort")
    assert page.count("data:image/png") == 3
    for text in ("genetics", "without clinical", "a new person", "sex=M", f"{components['variance'][0]:.3g}", "h<sub>own</sub>"):
        assert text in page
    assert "nan" not in page.replace("data:image", "").split("<img")[0]


def test_people_seen_again_once_have_no_course(tmp_path: Path) -> None:
    table, _ = write_cohort(tmp_path, 40)
    rows = pd.read_csv(table, sep="\t").groupby("subject").head(2)
    rows.to_csv(table, sep="\t", index=False)
    result = fit_rates(read(table), RateSettings("volume", clinical=("age",)))
    assert set(held_out(result)["task"]) == {"a new person"}
    assert courses(result, 4) == []
    page = rates_page(result, result.component_table(), Provenance.of("probmed train longitudinal", 0, [], []), "cohort")
    assert "Single people" not in page


def test_who_alone_tells_an_effect_is_not_held_out(tmp_path: Path) -> None:
    """Everyone of one level is in one tenth: the others say nothing of it."""
    table, _ = write_cohort(tmp_path, 20)
    rows = pd.read_csv(table, sep="\t")
    rows["sex"] = rows["subject"].map(lambda name: "X" if name == "p007" else "F")
    rows.to_csv(table, sep="\t", index=False)
    result = fit_rates(read(table), RateSettings("volume", mean=("age", "sex")))
    new = held_out(result).query("task == 'a new person'")
    assert "p007" not in set(new["subject"]) and new["subject"].nunique() == 19
    # Of three people and two effects nobody can be held out.
    few = fit_rates(read(table).of_subjects(["p000", "p001", "p002"]), RateSettings("volume", mean=("age",)))
    assert "a new person" not in set(held_out(few)["task"])
    assert list(calibration(held_out(few).iloc[:0]).columns)[:2] == ["task", "visits"]
