"""Kernels from genotypes on disk, sets of SNPs, clinical tables of their own, and what runs record of their columns."""

from __future__ import annotations

import importlib
import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from bed_reader import to_bed
from test_rates import SETTINGS, read, write_cohort
from typer.testing import CliRunner

import probmed.tables.genotypes as genotypes_module
from probmed.cli import app
from probmed.kernels import GeneticRelationship, GenotypeGaussian, IdentityByState
from probmed.tables import Genotypes, SnpSet, read_snp_sets, read_with_clinical
from probmed.volumes import UnusableInput
from probmed.workflows.genetic_kernels import genetic_kernels, relationship
from probmed.workflows.longitudinal import RateSettings, fit_rates
from probmed.workflows.longitudinal_outputs import RateRun

longitudinal_module: Any = importlib.import_module("probmed.workflows.longitudinal")
KERNELS: dict[str, Any] = {"grm": GeneticRelationship, "ibs": IdentityByState, "gaussian": GenotypeGaussian}


def genotypes_of(folder: Path, people: int = 12, snps: int = 30, seed: int = 0) -> Genotypes:
    """With some missing; SNPs 1 to 20 on chromosome 1, the rest on 2, 100 base pairs apart."""
    rng = np.random.default_rng(seed)
    counts = rng.binomial(2, rng.uniform(0.2, 0.8, snps), (people, snps)).astype(float)
    counts[rng.random(counts.shape) < 0.05] = np.nan
    counts[:3, 0] = [0.0, 1.0, 2.0]
    names = [f"p{n:03d}" for n in range(people)]
    properties = {
        "iid": names,
        "fid": names,
        "sid": [f"rs{n}" for n in range(1, snps + 1)],
        "chromosome": ["1"] * 20 + ["2"] * (snps - 20),
        "bp_position": [100 * n for n in range(1, snps + 1)],
    }
    to_bed(folder / "some.bed", counts, properties=properties)
    return Genotypes.open(folder / "some.bed", count_A1=True)


@pytest.mark.parametrize("kind", list(KERNELS))
@pytest.mark.parametrize("entries", [12 * 7, 1 << 22])
def test_kernels_a_few_snps_at_a_time_are_those_of_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, entries: int) -> None:
    monkeypatch.setattr(genotypes_module, "_CHUNK_ENTRIES", entries)
    genotypes = genotypes_of(tmp_path)
    coding = genotypes.of_people([f"p{n:03d}" for n in range(8)]).coding()
    kernel = KERNELS[kind](coding.frequencies).double()
    if kind == "gaussian":
        kernel.lengthscale = 1.0
    with torch.no_grad():
        expected = kernel(genotypes.counts(torch.float64)).to_dense()
    found = relationship(genotypes, coding, kind)
    torch.testing.assert_close(found, expected)
    assert float(torch.linalg.eigvalsh(found).min()) > -1e-9
    with pytest.raises(ValueError, match="kind"):
        relationship(genotypes, coding, "other")


def test_sets_are_read_by_name_or_place_and_have_a_kernel_each(tmp_path: Path) -> None:
    genotypes = genotypes_of(tmp_path)
    pd.DataFrame({"region": ["A.1", "A.1", "B"], "snp": ["rs3", "rs21", "rs3"]}).to_csv(tmp_path / "names.tsv", sep="\t", index=False)
    assert read_snp_sets(tmp_path / "names.tsv") == (SnpSet("A.1", ("rs3", "rs21")), SnpSet("B", ("rs3",)))
    stretches = {"region": ["near", "far", "near"], "chromosome": ["1", "chr2", "2"], "start": [100, 2500, 2900], "end": [300, 2700, 2900]}
    pd.DataFrame(stretches).to_csv(tmp_path / "places.csv", index=False)
    near, far = read_snp_sets(tmp_path / "places.csv")
    assert list(genotypes.snps["name"][near.members(genotypes)]) == ["rs1", "rs2", "rs3", "rs29"]
    assert list(genotypes.snps["name"][far.members(genotypes)]) == ["rs25", "rs26", "rs27"]
    people = list(genotypes.identifiers())
    (first, a), (second, b) = genetic_kernels(genotypes, people, "grm", (near, far))
    assert (first, second) == ("genetics near", "genetics far")
    for matrix, names in ((a, ["rs1", "rs2", "rs3", "rs29"]), (b, ["rs25", "rs26", "rs27"])):
        torch.testing.assert_close(matrix, genotypes.of_snps(names).grm(missing="mean"))

    def refused(table: dict[str, Sequence[object]]) -> str:
        pd.DataFrame(table).to_csv(tmp_path / "bad.tsv", sep="\t", index=False)
        with pytest.raises(UnusableInput) as raised:
            read_snp_sets(tmp_path / "bad.tsv")
        return str(raised.value)

    assert "has no column 'region'" in refused({"snp": ["rs1"]})
    assert "has no snp in row 2" in refused({"region": ["a", "b"], "snp": ["rs1", ""]})
    assert "no stretch from start to end in row 1" in refused({"region": ["a"], "chromosome": ["1"], "start": [5], "end": [4]})
    assert "has no number in column end" in refused({"region": ["a"], "chromosome": ["1"], "start": [5], "end": ["x"]})
    with pytest.raises(UnusableInput, match="no SNP left of the set none"):
        genetic_kernels(genotypes, people, "grm", (SnpSet("none", ("rs99",)),))


def run(*arguments: str, code: int = 0) -> str:
    result = CliRunner().invoke(app, list(arguments))
    assert result.exit_code == code, result.output
    return " ".join(result.output.split())


def test_options_of_genotypes_and_a_clinical_table_on_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table, bed = write_cohort(tmp_path, 24)
    rows = pd.read_csv(table, sep="\t")
    snps = list(Genotypes.open(bed, count_A1=True).snps["name"])
    sets = pd.DataFrame({"region": ["gene.1"] * 40 + ["rest"] * 40, "snp": snps[:80]})
    sets.to_csv(tmp_path / "sets.tsv", sep="\t", index=False)
    clinical = rows.drop_duplicates("subject")[["subject", "age", "sex"]]
    clinical[clinical["subject"] != "p005"].to_csv(tmp_path / "clinic.csv", index=False)
    bare = rows.drop(columns=["age", "sex"])
    bare[bare["subject"] < "p022"].to_csv(tmp_path / "visits.tsv", sep="\t", index=False)
    clinic = ["--clinical-table", str(tmp_path / "clinic.csv")]
    columns = ["--scalar", "volume", "--mean", "age", "--clinical", "age,sex", "--categorical", "sex", *clinic]
    genetic = ["--genotypes", str(bed), "--genetic", "ibs", "--regions", str(tmp_path / "sets.tsv"), "--max-missing", "0.03"]
    computed: list[str] = []
    whole = longitudinal_module.genetic_kernels

    def counted(*arguments: object) -> object:
        computed.append("once")
        return whole(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(longitudinal_module, "genetic_kernels", counted)
    said = run("train", "longitudinal", "--data", str(tmp_path / "visits.tsv"), *columns, *genetic, "-o", str(tmp_path / "run"))
    assert "21 people in all tables" in said and "1 subjects (not in the clinical table)" in said and computed == ["once"]
    record = json.loads((tmp_path / "run" / "longitudinal.json").read_text())
    assert record["Components"] == ["genetics gene.1", "genetics rest", "clinical", "own"]
    assert record["Settings"]["genetic"] == "ibs" and len(record["Settings"]["sets"]) == 2
    reasons = {each["Reason"]: each["Count"] for each in record["GenotypesUsed"]["LeftOut"]}
    assert reasons["not in the list"] == 40 and reasons["missing in more than 0.03 of people"] > 0
    assert record["Covariates"]["clinical"]["levels"]["sex"].keys() == {"F", "M"}
    assert {"What": "subjects", "Reason": "not in the clinical table", "Count": 1, "Names": ["p005"]} in record["People"]["LeftOut"]
    # Everything comes back from the folder, for people of whom the table of visits says nothing else.
    loaded = RateRun.load(tmp_path / "run")
    assert loaded.settings.sets == read_snp_sets(tmp_path / "sets.tsv") and loaded.settings.max_missing == 0.03
    asked = bare[bare["subject"] >= "p022"].copy()
    asked.loc[asked["subject"].duplicated(), "volume"] = np.nan
    asked.to_csv(tmp_path / "new.tsv", sep="\t", index=False, na_rep="n/a")
    predict = ["predict", str(tmp_path / "run"), "--data", str(tmp_path / "new.tsv"), "-o", str(tmp_path / "out")]
    assert "has no column 'age'" in run(*predict, code=2)
    run(*predict, *clinic)
    found = pd.read_csv(tmp_path / "out" / "predictions.tsv", sep="\t")
    assert set(found["subject"]) == {"p022", "p023"}
    with_all = rows.copy()
    with_all.loc[(rows["subject"] >= "p022") & rows["subject"].duplicated(), "volume"] = np.nan
    with_all[rows["subject"] >= "p022"].to_csv(tmp_path / "new.tsv", sep="\t", index=False, na_rep="n/a")
    run(*predict)
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "out" / "predictions.tsv", sep="\t"), found)
    assert "which" in run(*predict, *clinic, code=2) and "a run of a scalar" in run(*predict, "--samples", "1", code=2)
    # Who is not in the clinical table is predicted without what it would say, and that is told.
    asked.to_csv(tmp_path / "new.tsv", sep="\t", index=False, na_rep="n/a")
    clinical[clinical["subject"] != "p023"].to_csv(tmp_path / "clinic.csv", index=False)
    assert "has p023, who are not in" in run(*predict, *clinic)
    lost = pd.read_csv(tmp_path / "out" / "predictions.tsv", sep="\t")
    assert lost["sd"].iloc[-1] > found["sd"].iloc[-1]
    # What cannot be met.
    train = ["train", "longitudinal", "--data", str(tmp_path / "visits.tsv"), "-o", str(tmp_path / "other")]
    assert "of no use without genotypes" in run(*train, *columns, "--regions", str(tmp_path / "sets.tsv"), code=2)
    sets.assign(snp="rs0").to_csv(tmp_path / "sets.tsv", sep="\t", index=False)
    assert "has no SNP left of the set gene.1" in run(*train, *columns, *genetic, code=2)
    clinical.assign(subject="x" + clinical["subject"]).to_csv(tmp_path / "clinic.csv", index=False)
    assert "shares no subject with" in run(*train, *columns, code=2)


def test_sets_of_snps_divide_what_all_explain(tmp_path: Path) -> None:
    """Effects in the first half alone: its kernel explains them."""
    rng = np.random.default_rng(3)
    people, snps = 150, 100
    counts = rng.binomial(2, 0.4, (people, snps)).astype(float)
    names = [f"p{n:03d}" for n in range(people)]
    sid = [f"rs{n}" for n in range(snps)]
    to_bed(tmp_path / "all.bed", counts, properties={"iid": names, "fid": names, "sid": sid, "chromosome": ["1"] * snps})
    rate = 0.05 * (counts[:, :50] - 0.8) / math.sqrt(0.48) @ rng.normal(size=50) / math.sqrt(50)
    rows = [
        {"subject": name, "time": t, "volume": 3 + rate[n] * t + rng.normal(0, 0.02), "age": 60 + n % 7, "sex": "FM"[n % 2]}
        for n, name in enumerate(names)
        for t in (0.0, 2.0, 5.0 + n % 2)
    ]
    pd.DataFrame(rows).to_csv(tmp_path / "visits.tsv", sep="\t", index=False)
    sets = (SnpSet("first", tuple(sid[:50])), SnpSet("second", tuple(sid[50:])))
    result = fit_rates(read(tmp_path / "visits.tsv"), RateSettings("volume", sets=sets), Genotypes.open(tmp_path / "all.bed", count_A1=True))
    table = result.component_table().set_index("component")
    assert table["share"]["genetics first"] > 0.6 and table["p"]["genetics first"] < 1e-4
    assert table["share"]["genetics second"] < 0.25
    with pytest.raises(UnusableInput, match="sets of SNPs, without genotypes"):
        fit_rates(read(tmp_path / "visits.tsv"), RateSettings("volume", sets=sets))


def test_columns_that_do_not_vary_are_left_out_and_told(tmp_path: Path) -> None:
    table, _ = write_cohort(tmp_path, 20)
    rows = pd.read_csv(table, sep="\t").assign(sex="F")
    rows.loc[rows["subject"] == "p004", "age"] = np.nan
    rows.to_csv(table, sep="\t", index=False, na_rep="n/a")
    with pytest.warns(UserWarning) as told:
        result = fit_rates(read(table), SETTINGS)
    lines = [str(each.message) for each in told]
    assert any("has one value of sex for all its people; it is left out" in line for line in lines)
    assert any("has no age of 1 people at baseline; in the linear effects: its mean" in line for line in lines)
    assert any("has no age of 1 people at baseline; in the clinical kernel: integrated out" in line for line in lines)
    assert result.coefficients == ("rate", "age", "age missing")
    assert result.codings["mean"].constant == ("sex",) and result.codings["clinical"].missing == "keep"
    arguments = ["train", "longitudinal", "--data", str(table), "--scalar", "volume", "--categorical", "sex", "-o", str(tmp_path / "run")]
    assert "nothing else for the clinical kernel" in run(*arguments, "--clinical", "sex", code=2)
    said = run(*arguments, "--mean", "age,sex", "--clinical", "age,sex")
    assert "has one value of sex for all its people" in said
    record = json.loads((tmp_path / "run" / "longitudinal.json").read_text())
    assert record["Covariates"]["mean"]["constant"] == ["sex"] and record["Covariates"]["mean"]["missing"] == "impute"
    assert record["Covariates"]["clinical"]["missing"] == "keep" and record["Converged"] is True
    monomorphic = np.ones((20, 4))
    names = [f"p{n:03d}" for n in range(20)]
    to_bed(tmp_path / "one.bed", monomorphic * 2, properties={"iid": names, "fid": names})
    assert "has no SNPs left" in run(*arguments[:-1], str(tmp_path / "other"), "--genotypes", str(tmp_path / "one.bed"), code=2)


def test_a_fit_that_had_not_converged_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table, _ = write_cohort(tmp_path, 15)
    whole = longitudinal_module.fit_components
    monkeypatch.setattr(longitudinal_module, "fit_components", lambda data: replace(whole(data, iterations=1), converged=False))
    with pytest.warns(UserWarning, match="variance components had not converged after 1 steps"):
        assert not fit_rates(read(table), RateSettings("volume")).fit.converged


def test_clinical_tables_say_who_is_not_in_them(tmp_path: Path) -> None:
    table, _ = write_cohort(tmp_path, 5)
    rows = pd.read_csv(table, sep="\t")
    clinical = rows.drop_duplicates("subject")[["subject", "age"]].iloc[1:]
    clinical.to_csv(tmp_path / "clinic.csv", index=False)
    rows.drop(columns="age").to_csv(table, sep="\t", index=False)
    visits = read_with_clinical(table, tmp_path / "clinic.csv", time_unit="years", covariates=["age"], categorical=["sex"])
    assert visits.covariates == ("age",) and visits.categorical == ("sex",) and len(visits.subjects) == 4
    assert visits.omissions[0].names == ("p000",)
    assert visits.baseline["age"].tolist() == pytest.approx(clinical["age"].tolist())
    pd.concat([clinical, clinical]).to_csv(tmp_path / "clinic.csv", index=False)
    with pytest.raises(UnusableInput, match="several rows of subject"):
        read_with_clinical(table, tmp_path / "clinic.csv", time_unit="years", covariates=["age"])
