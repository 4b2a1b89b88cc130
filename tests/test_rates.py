"""Rates of change from tables and genotypes, from Python and from the command line."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from bed_reader import to_bed
from typer.testing import CliRunner

from probmed.cli import app
from probmed.tables import Genotypes, Visits
from probmed.volumes import UnusableInput
from probmed.workflows.longitudinal import RateSettings, fit_rates
from probmed.workflows.longitudinal_outputs import RateRun, together, with_times_of

PEOPLE, SNPS = 60, 120


def write_cohort(folder: Path, people: int = PEOPLE, seed: int = 0) -> tuple[Path, Path]:
    """Visits of a cohort whose rates depend on age and on genotypes, and the genotypes."""
    rng = np.random.default_rng(seed)
    counts = rng.binomial(2, 0.3, (people, SNPS)).astype(float)
    standardised = (counts - 0.6) / math.sqrt(0.42)
    age = rng.normal(70, 6, people)
    rate = -0.05 - 0.004 * (age - 70) + 0.05 * standardised @ rng.normal(size=SNPS) / math.sqrt(SNPS)
    counts[rng.random(counts.shape) < 0.01] = np.nan
    names = [f"p{n:03d}" for n in range(people)]
    to_bed(folder / "cohort.bed", counts, properties={"iid": names, "fid": names, "chromosome": ["1"] * SNPS})
    rows = []
    for n, name in enumerate(names):
        start = rng.uniform(0, 5)
        for t in [0.0, *np.sort(rng.uniform(0.5, 6, rng.integers(1, 4)))]:
            y = 3.0 + rate[n] * t + rng.normal(0, 0.02)
            rows.append({"subject": name, "time": start + t, "volume": y, "age": age[n], "sex": "FM"[n % 2]})
    table = folder / "visits.tsv"
    pd.DataFrame(rows).to_csv(table, sep="\t", index=False)
    return table, folder / "cohort.bed"


def read(path: Path) -> Visits:
    return Visits.read(path, time_unit="years", scalars=["volume"], covariates=["age"], categorical=["sex"])


SETTINGS = RateSettings("volume", mean=("age", "sex"), clinical=("age", "sex"))


def test_components_coefficients_and_effects_are_those_of_the_cohort(tmp_path: Path) -> None:
    table, bed = write_cohort(tmp_path, 200)
    result = fit_rates(read(table), SETTINGS, Genotypes.open(bed, count_A1=True))
    assert result.fit.converged
    assert result.components == ("genetics", "clinical", "own")
    coefficients = result.coefficient_table().set_index("coefficient")
    assert list(coefficients.index) == ["rate", "age", "sex=M"]
    for name, truth in (("rate", -0.05), ("age", -0.004), ("sex=M", 0.0)):
        assert abs(coefficients["estimate"][name] - truth) < 4 * coefficients["standard_error"][name] + (0.02 if name == "rate" else 0.0)
    components = result.component_table().set_index("component")
    assert components["share"]["genetics"] > 0.5
    assert components["p"]["genetics"] < 0.001
    assert float(components["variance"]["noise"]) == pytest.approx(0.02**2, rel=0.4)
    assert (components["share_low"].iloc[:3] <= components["share"].iloc[:3] + 1e-3).all()
    rates = result.rate_table()
    assert list(rates.columns) == ["subject", "mean", "genetics", "clinical", "own"]


def test_predictions_of_a_run_s_own_people_and_of_others(tmp_path: Path) -> None:
    table, bed = write_cohort(tmp_path)
    rows = pd.read_csv(table, sep="\t")
    new = rows["subject"] >= "p050"
    rows[~new].to_csv(tmp_path / "train.tsv", sep="\t", index=False)
    result = CliRunner().invoke(app, ["train", "longitudinal", *_options(tmp_path / "train.tsv", bed, tmp_path / "run")])
    assert result.exit_code == 0, result.output
    assert "50 people in all tables" in " ".join(result.output.split())
    assert "Predictions of visits that were held out" in (tmp_path / "run" / "report.html").read_text()
    record = json.loads((tmp_path / "run" / "longitudinal.json").read_text())
    assert record["Components"] == ["genetics", "clinical", "own"]
    assert record["GenotypesUsed"]["People"] == 50
    asked = rows[new].copy()
    later = asked["subject"].duplicated()
    truth = asked["volume"][later].to_numpy()
    asked.loc[later, "volume"] = np.nan
    known = rows[rows["subject"] == "p003"].iloc[[-1]].assign(time=20.0, volume=np.nan)
    pd.concat([asked, known]).to_csv(tmp_path / "new.tsv", sep="\t", index=False)
    result = CliRunner().invoke(app, ["predict", str(tmp_path / "run"), "--data", str(tmp_path / "new.tsv"), "-o", str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    found = pd.read_csv(tmp_path / "out" / "predictions.tsv", sep="\t")
    assert len(found) == len(truth) + 1
    others = found[found["subject"] != "p003"]
    first = asked[~later].set_index("subject")["volume"]
    before = np.abs(truth - first.loc[others["subject"]].to_numpy())
    assert np.abs(others["mean"].to_numpy() - truth).mean() < 0.8 * before.mean()
    held = (others["low"] <= truth) & (truth <= others["high"])
    assert held.mean() > 0.7
    assert (found["sd"] > 0.02).all()
    # The same person from Python, from the run's own tables.
    run = RateRun.load(tmp_path / "run")
    whole = fit_rates(run.visits, run.settings, Genotypes.open(bed, count_A1=True).filtered(min_frequency=0.01), variances=run.variances)
    baseline = rows[rows["subject"] == "p003"]["time"].min()
    alone = whole.predict(["p003"], [20.0 - baseline])
    mine = found[found["subject"] == "p003"].iloc[0]
    # New people's genotypes move the relationships' frequencies not at all, and their baselines say nothing of rates.
    assert float(alone.mean[0]) == pytest.approx(mine["mean"], abs=1e-6)
    assert float(alone.sd[0]) == pytest.approx(mine["sd"], rel=1e-4)


def test_snps_are_those_that_vary_among_the_people_of_the_run(tmp_path: Path) -> None:
    table, _ = write_cohort(tmp_path, 30)
    counts = np.random.default_rng(1).binomial(2, 0.4, (30, 20)).astype(float)
    counts[:24, 0] = 0.0
    names = [f"p{n:03d}" for n in range(30)]
    to_bed(tmp_path / "few.bed", counts, properties={"iid": names, "fid": names, "chromosome": ["1"] * 20})
    visits, genotypes = read(table), Genotypes.open(tmp_path / "few.bed", count_A1=True)
    alone = fit_rates(visits.of_subjects(names[:24]), SETTINGS, genotypes).joined.genotypes
    later = fit_rates(visits, SETTINGS, genotypes, known=names[:24]).joined.genotypes
    assert alone is not None and later is not None
    # What does not vary among the run's people, or is rare there, is left out, whoever else is asked about.
    assert list(alone.snps["name"]) == list(later.snps["name"])
    assert len(alone.snps) == 19 and len(later) == 30
    rare = fit_rates(visits, replace(SETTINGS, min_frequency=0.4), genotypes).joined.genotypes
    assert rare is not None and 0 < len(rare.snps) < 19


def test_rates_that_noise_hides_are_warned_of(tmp_path: Path) -> None:
    table, _ = write_cohort(tmp_path, 20)
    rows = pd.read_csv(table, sep="\t").groupby("subject").head(2)
    rows["time"] = [0.0, 2.0] * 20
    rows.to_csv(table, sep="\t", index=False)
    with pytest.warns(UserWarning, match="cannot be told from noise"):
        fit_rates(read(table), SETTINGS)
    fit_rates(read(table), replace(SETTINGS, own=False))


def _options(table: Path, bed: Path | None, out: Path) -> list[str]:
    genotypes = [] if bed is None else ["--genotypes", str(bed)]
    columns = ["--mean", "age,sex", "--clinical", "age,sex", "--categorical", "sex"]
    return ["--data", str(table), "--scalar", "volume", *columns, *genotypes, "-o", str(out)]


def test_requests_that_cannot_be_met_get_one_line(tmp_path: Path) -> None:
    table, bed = write_cohort(tmp_path, 12)
    rows = pd.read_csv(table, sep="\t")

    def refused(*arguments: str) -> str:
        result = CliRunner().invoke(app, list(arguments))
        assert result.exit_code == 2, result.output
        return " ".join(result.output.split())

    out = tmp_path / "run"
    assert "has no column" in refused("train", "longitudinal", *_options(table, None, out)[:2], "--scalar", "weight", "-o", str(out))
    once = tmp_path / "once.tsv"
    rows.drop_duplicates("subject").to_csv(once, sep="\t", index=False)
    assert "cannot tell rates of volume apart" in refused("train", "longitudinal", *_options(once, None, out))
    nothing = ["--data", str(table), "--scalar", "volume", "--no-own", "-o", str(out)]
    assert "nothing that could explain rates" in refused("train", "longitudinal", *nothing)
    assert not out.exists()
    assert CliRunner().invoke(app, ["train", "longitudinal", *_options(table, bed, out)]).exit_code == 0
    assert "holds a run already" in refused("train", "longitudinal", *_options(table, bed, out))
    assert "asks for no prediction" in refused("predict", str(out), "--data", str(table), "-o", str(tmp_path / "p"))
    assert "holds no run" in refused("predict", str(tmp_path), "--data", str(table), "-o", str(tmp_path / "p"))
    stranger = rows.iloc[:2].assign(subject="other", volume=[np.nan, np.nan], time=[0.0, 1.0])
    pd.concat([rows, stranger]).to_csv(tmp_path / "bare.tsv", sep="\t", index=False)
    asked = refused("predict", str(out), "--data", str(tmp_path / "bare.tsv"), "-o", str(tmp_path / "p"))
    assert "asks for other, who is not in the genotypes" in asked
    with pytest.raises(ValueError, match="people of the tables"):
        fit_rates(read(table), SETTINGS).predict(["nobody"], [1.0])
    with pytest.raises(ValueError, match="baseline"):
        RateSettings("volume", baseline="other")
    with pytest.raises(UnusableInput, match="nothing that could explain"):
        fit_rates(read(table), RateSettings("volume", own=False))


def test_predictions_that_cannot_be_made_get_one_line(tmp_path: Path) -> None:
    table, bed = write_cohort(tmp_path, 14)
    rows = pd.read_csv(table, sep="\t")
    rows[rows["subject"] < "p012"].to_csv(tmp_path / "train.tsv", sep="\t", index=False)
    run = tmp_path / "run"
    assert CliRunner().invoke(app, ["train", "longitudinal", *_options(tmp_path / "train.tsv", bed, run)]).exit_code == 0
    new = rows[rows["subject"] == "p012"].copy()
    new["volume"] = new["volume"].where(~new["subject"].duplicated())

    def predicted(asked: pd.DataFrame, *more: str, code: int = 2) -> str:
        asked.to_csv(tmp_path / "new.tsv", sep="\t", index=False, na_rep="n/a")
        result = CliRunner().invoke(app, ["predict", str(run), "--data", str(tmp_path / "new.tsv"), "-o", str(tmp_path / "out"), *more])
        assert result.exit_code == code, result.output
        return " ".join(result.output.split())

    earlier = rows[rows["subject"] == "p003"].iloc[[0, 0]].copy()
    earlier["time"] += [-1.0, 30.0]
    earlier["volume"] = [3.0, np.nan]
    assert "has a visit of p003 at" in predicted(earlier) and "before the run's baseline" in predicted(earlier)
    assert "asks for nobody, who is not in the genotypes" in predicted(new.assign(subject="nobody"))
    assert "has no volume at the baseline of p012" in predicted(new.assign(volume=np.nan))
    assert "has no column 'age'" in predicted(new.drop(columns="age"))
    assert "no number in column time" in predicted(new.assign(time="soon"))
    assert "two visits of subject p012 at one time" in predicted(pd.concat([new, new]))
    assert "has level 'X' in column sex" in predicted(new.assign(sex="X"))
    assert "asks for no prediction" in predicted(new.iloc[:1])
    counts = np.ones((2, 3))
    to_bed(tmp_path / "others.bed", counts, properties={"iid": ["p012", "p013"], "fid": ["p012", "p013"]})
    assert "has no genotypes of p000, with whom the run was fitted (12 such)" in predicted(new, "--genotypes", str(tmp_path / "others.bed"))
    # A column may be empty: what is missing is integrated out, and people of the run need no row but those that are asked for.
    assert "predictions of volume" in predicted(new.assign(age=np.nan), code=0)
    later = rows[rows["subject"] == "p003"].iloc[[0]].assign(time=30.0, volume=np.nan)
    assert "1 predictions of volume" in predicted(later, code=0)
    bare = tmp_path / "bare"
    assert CliRunner().invoke(app, ["train", "longitudinal", *_options(tmp_path / "train.tsv", None, bare)]).exit_code == 0
    run = bare
    assert "is of no use to a run without genotypes" in predicted(new, "--genotypes", str(bed))


def test_a_visit_in_days_is_the_run_s_own_and_one_that_it_lacks_is_predicted(tmp_path: Path) -> None:
    table, _ = write_cohort(tmp_path, 12)
    rows = pd.read_csv(table, sep="\t")
    rows["time"] = (rows["time"] * 365.25 + 700_000).round(3)
    gap = rows[rows["subject"] == "p002"].iloc[[-1]].copy()
    gap["time"] += 1000.001
    gap["volume"] = np.nan
    with_gap = pd.concat([rows, gap])
    with_gap.to_csv(table, sep="\t", index=False, na_rep="n/a")
    arguments = ["train", "longitudinal", *_options(table, None, tmp_path / "run"), "--time-unit", "days"]
    assert CliRunner().invoke(app, arguments).exit_code == 0
    asked = CliRunner().invoke(app, ["predict", str(tmp_path / "run"), "--data", str(table), "-o", str(tmp_path / "out")])
    # Every other visit is the run's, so that the table of the training asks for the one visit that it lacks.
    assert asked.exit_code == 0 and "1 predictions of volume" in asked.output, asked.output
    found = pd.read_csv(tmp_path / "out" / "predictions.tsv", sep="\t")
    assert found["subject"].tolist() == ["p002"]
    run = RateRun.load(tmp_path / "run")
    merged = together(run.visits, with_times_of(run.visits, run.read(table)))
    assert len(merged) == len(run.visits) == len(with_gap)
    # What the run lacks at a visit, another table may tell.
    filled = with_gap.assign(volume=with_gap["volume"].fillna(2.5))
    filled.to_csv(table, sep="\t", index=False)
    known = together(run.visits, with_times_of(run.visits, run.read(table)))
    assert known.table["volume"].tolist() == pytest.approx(filled.sort_values(["subject", "time"])["volume"].tolist(), rel=1e-9)
